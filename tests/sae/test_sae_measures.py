"""Every measure against a loop that does what its definition says, dense and slowly."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from scipy.stats import ttest_ind

from capsae import ClassActivationProfiles
from capsae.sae import SAEConfig, SparseCodes, TopKSAE, measures

N, M, K, D, C = 60, 15, 4, 8, 3


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(measures, "ROWS", 7)  # so that every function sees several blocks and a rest


def random_codes(seed: int = 0, n: int = N, m: int = M, k: int = K) -> SparseCodes:
    """Some slots unused (also latent 0's, with index 0), latent m - 1 dead, latent m - 2 fires once."""
    rng = np.random.default_rng(seed)
    indices = np.stack([rng.permutation(m - 2)[:k] for _ in range(n)]).astype(np.int32)
    values = rng.gamma(1.0, size=(n, k)).astype(np.float32)
    empty = rng.random((n, k)) < 0.3
    values[empty], indices[empty] = 0, 0
    indices[5, 0], values[5, 0] = m - 2, 1.5
    return SparseCodes(values, indices, m)


def labels_of(n: int = N, seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).permutation(np.arange(n) % C)


def model(seed: int = 0, **options) -> TopKSAE:
    sae = TopKSAE.untrained(D, SAEConfig(latents=M, k=K, seed=seed, **options))
    with torch.no_grad():
        sae.pre_bias.copy_(torch.linspace(-0.2, 0.3, D))
    return sae


def rows(seed: int = 1, n: int = N) -> np.ndarray:
    return np.random.default_rng(seed).normal(1, 2, size=(n, D)).astype(np.float32)


@pytest.mark.parametrize("given", [True, False])
def test_fvu_is_of_the_whole_set(given):
    sae, x = model(), rows()
    codes = sae.encode(x)
    u, x_hat = sae.normalize(x).astype(np.float64), sae.decode(codes).astype(np.float64)
    expected = ((u - x_hat) ** 2).sum() / ((u - u.mean(0)) ** 2).sum()
    assert measures.fvu(sae, x, codes if given else None) == pytest.approx(expected, rel=1e-12)
    assert measures.fvu(sae, torch.from_numpy(x)) == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match="undefined"):
        measures.fvu(model(normalize="none"), np.ones((9, D), np.float32))
    with pytest.raises(ValueError, match="x has 60 rows, codes 10"):
        measures.fvu(sae, x, codes[:10])


def test_head_accuracy_counts_rows():
    sae, x, rng = model(), rows(), np.random.default_rng(5)
    head = SimpleNamespace(weight=rng.normal(size=(C, D)).astype(np.float32), bias=rng.normal(size=C))
    labels = labels_of()
    now = [int(np.argmax(head.weight.astype(float) @ row + head.bias)) for row in x]
    then = [int(np.argmax(head.weight.astype(float) @ row + head.bias)) for row in sae.reconstruct(x)]
    found = measures.head_accuracy(sae, x, labels, head)
    a, b = np.mean(now == labels), np.mean(then == labels)
    assert found == pytest.approx(
        {"accuracy": a, "reconstructed": b, "kept": b / a, "agreement": np.mean(np.array(now) == then)}
    )
    assert 0 < found["agreement"] < 1  # the test can tell the two apart
    with pytest.raises(ValueError, match=r"0\.\.2"):
        measures.head_accuracy(sae, x, labels + 1, head)


def test_how_often_latents_fire():
    codes = random_codes()
    dense = codes.dense()
    assert measures.l0(codes) == pytest.approx((dense != 0).sum(1).mean())
    np.testing.assert_allclose(measures.density(codes), (dense != 0).mean(0))
    assert (
        measures.dead_fraction(codes) == pytest.approx((dense == 0).all(0).mean()) and measures.dead_fraction(codes) > 0
    )


@pytest.mark.parametrize("seed", range(5))
def test_monosemanticity_equals_the_pair_loop(seed):
    codes, e = random_codes(seed), np.random.default_rng(seed).normal(0.3, 1, size=(N, 6))
    dense, unit = codes.dense().astype(np.float64), e / np.linalg.norm(e, axis=1, keepdims=True)
    found = measures.monosemanticity(codes, e)
    for latent in range(M):
        a = dense[:, latent]
        if (a > 0).sum() < 2:
            assert np.isnan(found[latent])
            continue
        a = a / a.max()
        over = under = 0.0
        for i, j in itertools.combinations(range(N), 2):
            over, under = over + a[i] * a[j] * (unit[i] @ unit[j]), under + a[i] * a[j]
        assert abs(found[latent] - over / under) < 1e-12


def test_monosemanticity_knows_one_meaning_from_two():
    e = np.repeat(np.eye(2), 10, axis=0)  # ten images of each of two kinds
    one, both = np.zeros((20, 1), np.float32), np.ones((20, 1), np.float32)
    one[:10] = 1
    values = np.hstack([one, both])
    found = measures.monosemanticity(SparseCodes(values, np.tile(np.arange(2, dtype=np.int32), (20, 1)), 2), e)
    np.testing.assert_allclose(found, [1.0, 90 / 190], atol=1e-14)
    with pytest.raises(ValueError, match="row 19 has no direction"):
        e[19] = 0
        measures.monosemanticity(SparseCodes(values, np.tile(np.arange(2, dtype=np.int32), (20, 1)), 2), e)
    stand_in = measures.stand_in_embeddings(rows())
    np.testing.assert_allclose(np.linalg.norm(stand_in, axis=1), 1)
    centred = rows() - rows().mean(0)
    assert (stand_in * centred).sum(1) == pytest.approx(np.linalg.norm(centred, axis=1), rel=1e-5)


def test_separability_equals_scipy_over_all_pairs():
    codes, labels = random_codes(), labels_of()
    found, dense = measures.concept_separability(codes, labels, C, bins=4), codes.dense()
    for latent in range(M):
        a = dense[:, latent].astype(np.float64)
        if not a.any():
            assert np.isnan(found[latent])
            continue
        edges = np.linspace(0, a.max(), 5)
        which = np.where(a > 0, 1 + np.minimum(np.searchsorted(edges, a, side="right") - 1, 3), 0)
        p = [[np.mean(which[labels == c] == b) for b in range(5)] for c in range(C)]
        distances = [jensenshannon(p[i], p[j], base=2) for i, j in itertools.combinations(range(C), 2)]
        assert found[latent] == pytest.approx(np.mean(distances), abs=1e-7)


def test_separability_is_one_where_classes_share_nothing_and_pairs_can_be_drawn():
    labels = labels_of()
    values = np.stack([labels == 0, np.ones(N)], 1).astype(np.float32)
    codes = SparseCodes(values, np.tile(np.arange(2, dtype=np.int32), (N, 1)), 2)
    two = np.minimum(labels, 1)
    np.testing.assert_allclose(measures.concept_separability(codes, two, 2), [1, 0], atol=1e-12)
    some = measures.concept_separability(random_codes(), labels, C, max_pairs=1, seed=1)
    assert not np.allclose(some, measures.concept_separability(random_codes(), labels, C), equal_nan=True)
    np.testing.assert_array_equal(some, measures.concept_separability(random_codes(), labels, C, max_pairs=1, seed=1))
    with pytest.raises(ValueError, match="needs two"):
        measures.concept_separability(codes, labels * 0, 2)


def test_t_equals_scipy():
    codes, labels = random_codes(), labels_of()
    dense, found = codes.dense().astype(np.float64), measures.class_t(codes, labels, C)
    for c, latent in itertools.product(range(C), range(M - 2)):
        a, b = dense[labels == c, latent], dense[labels != c, latent]
        spread = np.sqrt(a.var() / len(a) + b.var() / len(b))  # scipy divides by n - 1, the measure by n
        assert found[c, latent] == pytest.approx((a.mean() - b.mean()) / spread, rel=1e-9)
        assert np.sign(found[c, latent]) == np.sign(ttest_ind(a, b, equal_var=False).statistic)
    assert (found[:, M - 1] == 0).all()


def test_probing_equals_dense_least_squares_and_selects_on_train():
    train, y, test, y_test = random_codes(0), labels_of(), random_codes(1, n=31), labels_of(31, 4)
    found = measures.class_probing(train, y, test, y_test, C, sizes=(1, 3))
    t = measures.class_t(train, y, C)
    for row in found.itertuples():
        outputs = np.zeros((31, C))
        for c in range(C):
            best = sorted(range(M), key=lambda i: (-abs(t[c, i]), i))[: row.size]
            a = np.hstack([np.ones((N, 1)), train.dense()[:, best].astype(np.float64)])
            w = np.sqrt(np.where(y == c, 0.5 / (y == c).sum(), 0.5 / (y != c).sum()))[:, None]
            fit = np.linalg.lstsq(a * w, np.where(y == c, 1.0, -1.0)[:, None] * w, rcond=None)[0][:, 0]
            outputs[:, c] = np.hstack([np.ones((31, 1)), test.dense()[:, best]]) @ fit
        each = []
        for c in range(C):
            chosen, true = outputs[:, c] > 0, y_test == c
            each.append((chosen[true].mean() + (~chosen[~true]).mean()) / 2)
        assert row.balanced == pytest.approx(np.mean(each)) and row.top1 == np.mean(outputs.argmax(1) == y_test)


def test_probing_finds_a_class_latent_and_nothing_in_noise():
    y = labels_of(300)
    perfect = SparseCodes(np.ones((300, 1), np.float32), y[:, None].astype(np.int32), C)
    found = measures.class_probing(perfect[:150], y[:150], perfect[150:], y[150:], C)
    np.testing.assert_allclose(found[["balanced", "top1"]], 1)
    noise = random_codes(0, n=300)
    found = measures.class_probing(noise[:150], y[:150], noise[150:], y[150:], C, sizes=(1,))
    assert abs(found["balanced"][0] - 0.5) < 0.1
    with pytest.raises(ValueError, match="without rows: \\[2\\]"):
        measures.class_probing(noise, np.minimum(y, 1), noise, y, C)


@pytest.mark.parametrize("signed", [True, False])
def test_matching_equals_all_permutations(signed):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(4, 3)), rng.normal(size=(5, 3))
    unit = [one / np.linalg.norm(one, axis=1, keepdims=True) for one in (a, b)]
    cosine = unit[0] @ unit[1].T if signed else abs(unit[0] @ unit[1].T)
    best = max(sum(cosine[i, j] for i, j in enumerate(p)) for p in itertools.permutations(range(5), 4))
    assert measures.matched_cosines(a, b, signed).sum() == pytest.approx(best)
    assert measures.matched_cosines(b, a, signed).sum() == pytest.approx(best)
    np.testing.assert_allclose(measures.max_cosines(a, b, signed), cosine.max(1))
    with pytest.raises(ValueError, match=r"\(4, 3\) and \(5, 2\)"):
        measures.matched_cosines(a, b[:, :2])


def test_matching_sees_through_order_and_sign():
    a = np.random.default_rng(0).normal(size=(6, 9))
    b = 3 * a[[4, 2, 0, 5, 3, 1]] * np.array([[1], [-1], [1], [-1], [1], [1]])
    assert measures.matched_cosines(a, b, signed=False) == pytest.approx(1)
    assert measures.matched_cosines(a, torch.from_numpy(b)).mean() < 0.9


def test_overlaps():
    assert measures.jaccard([1, 2, 3], np.array([2, 3, 4, 5])) == pytest.approx(2 / 5)
    assert measures.jaccard(["a"], ["a"]) == 1 and measures.jaccard([1], []) == 0
    with pytest.raises(ValueError, match="empty"):
        measures.jaccard([], [])
    caps = ClassActivationProfiles.fit(random_codes(), labels_of(), C)
    core = [set(row) for row in caps.core(0.3)]
    expected = np.mean([len(a & b) / len(a | b) for a, b in itertools.combinations(core, 2)])
    assert measures.core_overlap(caps, 0.3) == pytest.approx(expected)
