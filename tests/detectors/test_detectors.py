"""Every detector against an independent computation on small arrays, and properties all of them share."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

import capsae
from capsae import detectors
from capsae.data.images import PIXEL_STATISTICS
from capsae.sae import SAEConfig, TopKSAE


@pytest.fixture(scope="module")
def world():
    """Three classes in 12 dimensions, and as OOD a cloud elsewhere."""
    rng = np.random.default_rng(0)
    centres, mix = rng.normal(size=(3, 12)) * 2, rng.normal(size=(12, 12))
    head = SimpleNamespace(weight=rng.normal(size=(3, 12)) * 0.2 + centres / 12, bias=rng.normal(size=3))
    sae = TopKSAE.untrained(12, SAEConfig(latents=60, k=6))

    def observations(n, centres=centres):
        labels = np.arange(n) % 3
        cls = (centres[labels] + rng.normal(size=(n, 12)) @ mix * 0.5).astype(np.float32)
        pixels = np.exp(rng.normal(size=(n, len(PIXEL_STATISTICS))))
        return capsae.Observations(cls, labels=labels, head=head, sae=sae, pixels=pixels)

    return observations(300), observations(90), observations(60, rng.normal(size=(3, 12)) * 3)


def softmax(x):
    e = np.exp(x - x.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def by_hand(name, test):
    match name:
        case "code_l1":
            return test.codes.values.sum(1)
        case "code_flatness":
            values = test.codes.values.astype(np.float64)
            return values.sum(1) / np.linalg.norm(values, axis=1)
        case "code_energy":
            return -np.linalg.norm(test.codes.values.astype(np.float64), axis=1)
        case "sae_error":
            gap = (
                test.sae.normalize(test.cls) - test.codes.dense().astype(np.float64) @ test.sae.decoder.detach().numpy()
            )
            return (gap**2).sum(1)
        case "code_entropy":
            q = test.codes.values.astype(np.float64)
            q /= q.sum(1, keepdims=True)
            return -np.where(q > 0, q * np.log(np.maximum(q, 1e-300)), 0).sum(1)


CODE_CONTROLS = ["code_l1", "code_flatness", "code_energy", "code_entropy", "sae_error"]


@pytest.mark.parametrize("name", CODE_CONTROLS)
def test_controls_against_a_closed_form(world, name):
    train, test, _ = world
    scores, expected = detectors.create(name).fit(train).score(test), by_hand(name, test)
    assert np.abs(scores - expected).max() < 1e-5 * expected.std()


def profiles_by_hand(train, test, fraction=0.15):
    h, x = train.codes.dense().astype(np.float64), test.codes.dense().astype(np.float64)
    for row, c in zip(x, test.predicted, strict=True):
        mean = h[train.labels == c].mean(0)
        core = np.argsort(-mean, kind="stable")[: round(fraction * len(mean))]
        yield row[core] / max(row[core].sum(), 1e-300), mean[core] / mean[core].sum()


DIVERGENCES = {
    "cosine": lambda p, q: 1 - p @ q / np.linalg.norm(p) / np.linalg.norm(q),
    "euclidean": lambda p, q: np.linalg.norm(p - q),
    "hellinger": lambda p, q: np.linalg.norm(np.sqrt(p) - np.sqrt(q)) / np.sqrt(2),
    "spearman": lambda p, q: 1 - spearmanr(p, q).statistic,
    "reverse_kl": lambda p, q: (q * np.log(q / (0.99 * p + 0.01 / len(q)))).sum(),
    "symmetric_kl": lambda p, q: (
        (q * np.log(q / (0.99 * p + 0.01 / len(q)))).sum()
        + sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)
    ),
}


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("fraction", [0.15, 0.4])
def test_divergences_against_dense_profiles(world, name, fraction):
    train, test, _ = world
    scores = detectors.create(name, core_fraction=fraction).fit(train).score(test)
    compared = 0
    for score, (p, q) in zip(scores, profiles_by_hand(train, test, fraction), strict=True):
        if p.sum() > 0:
            assert score == pytest.approx(DIVERGENCES[name](p, q), rel=1e-5, abs=1e-7)
            compared += 1
    assert compared > 80


@pytest.mark.parametrize("name", detectors.available())
def test_metadata_finite_and_independent_of_batch_and_order(world, name):
    train, test, ood = world
    described = detectors.info(name)
    assert all(described[key] for key in ("title", "group", "formula", "source", "needs", "description", "fitted_on"))
    detector = detectors.create(name).fit(train)
    assert detector.options == described["defaults"]
    for obs in (test, ood):
        scores = detector.score(obs)
        assert scores.shape == (len(obs),) and scores.dtype == np.float64 and np.isfinite(scores).all()
    order = np.random.default_rng(0).permutation(len(test))
    whole = detector.score(test)
    np.testing.assert_allclose(detector.score(test.take(order)), whole[order], rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(detector.score(test.take(np.arange(7))), whole[:7], rtol=1e-6, atol=1e-9)


OTHER = {
    "core_fraction": 0.4, "correct_only": True, "smoothing": 0.2, "seed": 1, "temperature": 3.0, "gamma": 0.5,
    "top": 1, "k": 5, "dim": 3, "percentile": 50.0, "epsilon": 0.3, "average": False, "max_logit": False, "alpha": 0.1,
    "centre": False, "bank": 0.1, "ridge": 0.1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "option"), [(n, o) for n in detectors.available() for o in detectors.info(n)["defaults"] if o in OTHER]
)
def test_each_option_moves_the_score(world, name, option):
    train, test, _ = world
    given = {"bank": 0.5} if (name, option) == ("nnguide", "seed") else {}  # which rows, if not all
    a = detectors.create(name, **given).fit(train).score(test)
    b = detectors.create(name, **given, **{option: OTHER[option]}).fit(train).score(test)
    assert np.abs(a - b).max() > 1e-9


def test_every_option_is_exercised():
    options = {o for n in detectors.available() for o in detectors.info(n)["defaults"]}
    assert options - {"backend"} <= set(OTHER)  # the backend must not move the score


def test_the_untrained_control_is_the_sae_before_its_first_step(world):
    """Same weights, pre-bias and normalisation as training starts from, for each normalisation."""
    from capsae.sae.rows import start

    train, test, _ = world
    for normalize in ("sample", "dataset"):
        config = SAEConfig(latents=60, k=6, normalize=normalize, seed=3)
        obs = capsae.Observations(train.cls, train.logits, train.labels, sae=TopKSAE.untrained(12, config))
        control = detectors.create("epd_untrained").fit(obs)
        begin = start(torch.as_tensor(train.cls), config, torch.device("cpu"))[0]
        assert begin.pre_bias.abs().sum() > 0
        codes = begin.encode(test.cls)
        assert (control._codes(test).indices == codes.indices).all()
        np.testing.assert_array_equal(control._codes(test).values, codes.values)


def test_flatness_controls_point_the_right_way():
    """A flat code is more OOD than a peaked one of the same energy, a weak one more than a strong one."""
    values = np.array([[1, 1, 1, 1], [1.9, 0.6, 0.15, 0.05]], np.float32)
    values[1] *= 2 / np.linalg.norm(values[1])
    indices = np.tile(np.arange(4, dtype=np.int32), (2, 1))
    obs = capsae.Observations(np.zeros((2, 3)), codes=capsae.SparseCodes(values, indices, 9))
    for name in ("code_l1", "code_flatness", "code_entropy"):
        flat, peaked = detectors.create(name).score(obs)
        assert flat > peaked
    weak = capsae.Observations(np.zeros((2, 3)), codes=capsae.SparseCodes(values * [[0.5], [1]], indices, 9))
    scores = detectors.create("code_energy").score(weak)
    assert scores[0] > scores[1]


def rpd_by_hand(train, test, temperature=2.0, epsilon=0.03):
    h, x = train.codes.dense().astype(np.float64), test.codes.dense().astype(np.float64)
    background = h.sum(0) / h.sum()
    scores = []
    for row, logit in zip(x, test.logits.astype(np.float64), strict=True):
        p, pi, score = row / row.sum(), softmax(logit[None] / temperature)[0], 0.0
        for c in range(3):
            q = h[train.labels == c].mean(0)
            mixed = (1 - epsilon) * q / q.sum() + epsilon * background
            on = p > 0
            unseen = on & (background == 0)
            on &= background > 0
            kl = (p[on] * np.log(p[on] / mixed[on])).sum() - (p[on] * np.log(p[on] / background[on])).sum()
            score += pi[c] * (kl - p[unseen].sum() * np.log(epsilon))
        scores.append(score)
    return np.array(scores)


def test_rpd_is_its_formula_is_bounded_and_its_shares_sum_to_it(world):
    train, test, ood = world
    detector = detectors.create("rpd").fit(train)
    for obs in (test, ood):
        scores = detector.score(obs)
        np.testing.assert_allclose(scores, rpd_by_hand(train, obs), rtol=1e-5, atol=1e-8)
        np.testing.assert_allclose(detector.contributions(obs).sum(1), scores, rtol=1e-9)
        assert scores.max() <= -np.log(0.03)


def soft_rmdspp_by_hand(train, test, temperature=2.0):
    unit = [obs.cls / np.linalg.norm(obs.cls, axis=1, keepdims=True) for obs in (train, test)]
    means = np.stack([unit[0][train.labels == c].mean(0) for c in range(3)])
    within, overall = unit[0] - means[train.labels], unit[0] - unit[0].mean(0)
    tied, background = (np.linalg.inv(x.T @ x / len(x)) for x in (within, overall))
    pi = softmax(test.logits.astype(np.float64) / temperature)
    squares = np.stack([np.einsum("nd,de,ne->n", x := unit[1] - mean, tied, x) for mean in means], axis=1)
    x = unit[1] - unit[0].mean(0)
    return (pi * squares).sum(1) - np.einsum("nd,de,ne->n", x, background, x) / 2


def test_rpd_plus_is_the_sum_of_two_standardised_scores_and_its_shares_sum_to_it(world):
    train, test, ood = world
    for known in (test, None):  # validation samples; without them the training samples
        detector = detectors.create("rpd+").fit(train, known)
        for obs in (test, ood):
            expected = 0.0
            for by_hand in (rpd_by_hand, soft_rmdspp_by_hand):
                at = by_hand(train, train if known is None else known)
                expected = expected + (by_hand(train, obs) - at.mean()) / at.std()
            scores = detector.score(obs)
            np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-4)
            shares = detector.contributions(obs), detector.class_contributions(obs)
            assert shares[0].shape == obs.codes.values.shape and shares[1].shape == obs.logits.shape
            np.testing.assert_allclose(shares[0].sum(1) + shares[1].sum(1), scores, rtol=1e-8, atol=1e-10)


def test_rpd_scores_a_code_on_unseen_latents_or_without_energy_highest(world):
    train, test, _ = world
    some = capsae.SparseCodes(train.codes.values, np.where(train.codes.indices > 40, 0, train.codes.indices), 60)
    detector = detectors.create("rpd").fit(capsae.Observations(train.cls, train.logits, train.labels, codes=some))
    unseen = capsae.SparseCodes(np.ones((1, 6), np.float32), np.arange(50, 56, dtype=np.int32)[None], 60)
    silent = capsae.SparseCodes(np.zeros((1, 6), np.float32), np.arange(6, dtype=np.int32)[None], 60)
    for codes in (unseen, silent):
        assert detector.score(capsae.Observations(test.cls[:1], test.logits[:1], codes=codes))[0] == pytest.approx(
            -np.log(0.03)
        )


def test_refusals(world):
    train, test, _ = world
    with pytest.raises(ValueError, match="no detector is named 'mps'"):
        detectors.create("mps")
    with pytest.raises(TypeError, match="no option 'kk'"):
        detectors.create("knn", kk=3)
    with pytest.raises(ValueError, match="no detector is named 'ash-b'; did you mean 'ash_b'?"):
        detectors.create("ash-b")
    with pytest.raises(AttributeError, match="MDS has no '_centre': call fit before score"):
        detectors.create("mds").score(test)
    with pytest.raises(ValueError, match="k is 301"):
        detectors.create("knn", k=301).fit(train)
    with pytest.raises(ValueError, match="dim is 12"):
        detectors.create("vim", dim=12).fit(train)
    with pytest.raises(ValueError, match="dim is 12"):
        detectors.create("neco", dim=12).fit(train)
    with pytest.raises(ValueError, match=r"k is 10, but the bank holds 3 rows \(1 % of 300\): use k in 1..3"):
        detectors.create("nnguide", bank=0.01).fit(train)
    for name in ("ash_b", "ash_p", "ash_s", "scale", "dice"):
        with pytest.raises(ValueError, match="percentile is 100"):
            detectors.create(name, percentile=100)
    for name, options in {
        "react": {"percentile": 0}, "gen": {"top": 0}, "energy": {"temperature": 0}, "nnguide": {"bank": 0},
        "tempscale": {"temperature": -1}, "nci": {"alpha": -1}, "knn": {"backend": "cuda"}, "epd": {"core_fraction": 2},
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(options))):
            detectors.create(name, **options)
    with pytest.raises(ValueError, match=r"percentile is 99: that leaves none of 12 activations"):
        detectors.create("scale", percentile=99).score(test)
    with pytest.raises(ValueError, match="head"):
        detectors.create("vim").fit(capsae.Observations(train.cls, logits=train.logits))
    with pytest.raises(ValueError, match="labels"):
        detectors.create("mds").fit(capsae.Observations(train.cls))
    broken = train.cls.copy()
    broken[17, 3] = np.nan
    with pytest.raises(ValueError, match="row 17"):
        capsae.Observations(broken)
    with pytest.raises(ValueError, match="logits has 5 rows, cls 300"):
        capsae.Observations(train.cls, logits=train.logits[:5])


def test_take_does_not_compute_again(world):
    train, test, _ = world
    full = capsae.Observations(test.cls, head=test.head, sae=test.sae, labels=test.labels)
    codes = full.codes
    part = full.take(np.arange(3))
    part.sae = None
    assert (part.codes.values == codes.values[:3]).all() and len(part) == 3
