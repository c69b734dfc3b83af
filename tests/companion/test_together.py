"""Latents that fire together: planted pairs are found, those that classes explain are not, chance gives none."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.stats import hypergeom

from capsae.sae import SparseCodes
from companion.chapters.meaning import together


def _codes(fires):
    fires = np.asarray(fires, np.float32)
    indices = np.tile(np.arange(fires.shape[1], dtype=np.int32), (len(fires), 1))
    return SparseCodes(fires, indices, fires.shape[1])


@pytest.fixture(scope="module")
def planted():
    """900 rows, 3 classes, 12 latents: 0-2, 3-5, 6-8 of a class each, 9 and 10 meet by themselves, 11 is alone."""
    rng, labels = np.random.default_rng(0), np.repeat([0, 1, 2], 300)
    share = np.full((900, 12), 0.03)
    for c in range(3):
        share[labels == c, 3 * c : 3 * c + 3] = 0.4
    share[:, 9:] = 0.1
    fires = rng.random((900, 12)) < share
    fires[:, 10] = np.where(rng.random(900) < 0.8, fires[:, 9], fires[:, 10])
    return _codes(fires), labels


def test_pairs_are_counted_as_a_dense_product_counts_them(planted):
    codes, labels = planted
    dense = codes.values.astype(float)
    table = together.pairs(codes)
    counts = dense.T @ dense
    assert table["together"].tolist() == [counts[i, j] for i, j in zip(table["i"], table["j"], strict=True)]
    f = dense.mean(0)
    assert table["expected"].to_numpy() == pytest.approx(900 * f[table["i"]] * f[table["j"]])
    phi = np.corrcoef(dense.T)
    assert table["phi"].to_numpy() == pytest.approx([phi[i, j] for i, j in zip(table["i"], table["j"], strict=True)])
    assert table.attrs["pairs"] == 66 and (table["q"] >= table["p"]).all()
    within = together.pairs(codes, labels, 3).iloc[0]
    parts = [dense[labels == c] for c in range(3)]
    assert within["expected"] == pytest.approx(sum(p[:, 0].sum() * p[:, 1].sum() / 300 for p in parts))


def test_classes_explain_pairs_of_their_own_and_not_the_planted_one(planted):
    codes, labels = planted
    alone, within = together.pairs(codes), together.pairs(codes, labels, 3)
    pairs = {(i, j) for i, j in alone.loc[alone["q"] <= 0.05, ["i", "j"]].to_numpy().tolist()}
    assert {(0, 1), (3, 5), (7, 8), (9, 10)} <= pairs and (0, 3) not in pairs
    assert within.loc[within["q"] <= 0.05, ["i", "j"]].to_numpy().tolist() == [[9, 10]]
    assert together.found(alone) >= 10 and together.found(within) == 1
    null = together.pairs(together.shuffled(codes, labels, 3, seed=1), labels, 3)
    assert together.found(null) == 0


def test_a_shuffle_keeps_how_often_each_latent_fires_in_each_class(planted):
    codes, labels = planted
    other = together.shuffled(codes, labels, 3, seed=2)
    dense, again = codes.dense(), other.dense()
    assert not np.array_equal(dense, again)
    for c in range(3):
        assert ((dense[labels == c] > 0).sum(0) == (again[labels == c] > 0).sum(0)).all()


def _exact(n, f_i, f_j):
    """P(K >= k), k = 0, 1, ..., of a sum of hypergeometric counts over strata."""
    pmf = np.ones(1)
    for n_s, a, b in zip(n, f_i, f_j, strict=True):
        pmf = np.convolve(pmf, hypergeom.pmf(np.arange(min(a, b) + 1), n_s, a, b))
    return pmf[::-1].cumsum()[::-1]


def _ours(n, f_i, f_j):
    exact = _exact(n, f_i, f_j)
    moments = (m[0, 1] for m in together._moments(np.array([f_i, f_j]).T, np.array(n)))
    mean, variance, third = (np.full(len(exact), m) for m in moments)
    return exact, together._upper_tail(np.arange(len(exact), dtype=float), mean, variance, third), (mean, variance)


@pytest.mark.parametrize(
    ("n", "f_i", "f_j"),
    [
        ([60], [20], [9]),  # variance 2: Poisson
        ([400, 400, 400], [8, 300, 200], [10, 280, 220]),
        ([900] * 4, [60, 80, 50, 30], [90, 40, 70, 80]),  # rare: skewed
        ([100, 100], [95, 90], [60, 80]),
        ([500, 500], [450, 440], [450, 430]),  # frequent
    ],
)
def test_p_is_the_exact_tail_or_a_little_more(n, f_i, f_j):
    exact, p, (mean, variance) = _ours(n, f_i, f_j)
    clear = (np.arange(len(exact)) > mean) & (exact > 1e-8)
    assert (p[clear] >= 0.97 * exact[clear]).all()
    if variance[0] >= 5:
        close = clear & (exact > 1e-4)
        assert (p[close] <= 2 * exact[close]).all()


def test_moments_are_those_of_the_exact_counts():
    n, f_i, f_j = [50, 80], [20, 9], [31, 40]
    exact = _exact(n, f_i, f_j)
    pmf, k = exact - np.append(exact[1:], 0), np.arange(len(exact))
    mean = (pmf * k).sum()
    wanted = [mean, (pmf * (k - mean) ** 2).sum(), (pmf * (k - mean) ** 3).sum()]
    found = [m[0, 1] for m in together._moments(np.array([f_i, f_j]).T, np.array(n))]
    assert found == pytest.approx(wanted)


def test_independent_latents_give_no_more_than_the_rate():
    rng, hits = np.random.default_rng(3), []
    for share in (0.15, 0.6):
        for _ in range(30):
            table = together.pairs(_codes(rng.random((200, 25)) < share))
            hits.append(together.found(table) > 0)
    assert np.mean(hits) <= 0.15


def test_a_pair_within_a_class_is_found_where_both_fire_often():
    """What a Poisson tail misses: 40 latents that fire in most rows of their class, two of them together."""
    rng, labels = np.random.default_rng(5), np.repeat([0, 1], 300)
    share = np.where(labels == 0, 0.7, 0.05)[:, None]
    fires = rng.random((600, 40)) < share
    fires[:, 1] = np.where(rng.random(600) < 0.5, fires[:, 0], fires[:, 1])
    codes = _codes(fires)
    within = together.pairs(codes, labels, 2)
    assert within.loc[within["q"] <= 0.05, ["i", "j"]].to_numpy().tolist() == [[0, 1]]
    row = within.iloc[0]
    assert row["z"] == pytest.approx((row["together"] - row["expected"]) / row["sd"])
    poisson = together._upper_tail(*(np.array([x]) for x in (row["together"], row["expected"], 0.0, 0.0)))
    assert poisson[0] * within.attrs["pairs"] > 0.05 > row["p"] * within.attrs["pairs"]
    null = [together.pairs(together.shuffled(codes, labels, 2, seed=s), labels, 2) for s in range(20)]
    assert sum(together.found(table) > 0 for table in null) <= 3
    names = pd.DataFrame({"name": "", "classes": [f"c{i}" for i in range(40)]})
    assert together.strongest(within, names)[["i", "j"]].to_numpy().tolist() == [[0, 1]]
    # Classes account for how often latents meet, for less of it in the planted pair.
    alone = together.pairs(codes)
    assert together.excess(alone, within) == pytest.approx(1, abs=0.03)
    pair = alone[(alone["i"] == 0) & (alone["j"] == 1)]
    assert together.excess(pair, within[(within["i"] == 0) & (within["j"] == 1)]) < 0.8
    assert np.isnan(together.excess(alone.assign(q=1.0), within))


def test_groups_are_the_planted_classes(planted):
    codes, labels = planted
    groups = together.communities(together.pairs(codes), 4)
    of = groups.set_index("latent")["community"]
    assert of[0] == of[1] == of[2] and of[3] == of[4] == of[5] and of[6] == of[7] == of[8] and of[9] == of[10]
    assert len({of[0], of[3], of[6], of[9]}) == 4
    shares = np.vstack([np.eye(3)[[0, 0, 0, 1, 1, 1, 2, 2, 2]], np.full((3, 3), 1 / 3)])
    inner = groups[groups["latent"] < 9]
    followed = together.follow_classes(inner, shares, n_boot=20)
    assert followed["value"] == 1 and followed["lo"] > 0.9
    permuted = inner.assign(community=np.random.default_rng(0).permutation(inner["community"]))
    assert together.follow_classes(permuted, shares, n_boot=20)["value"] < 0.6
    counted = together.group_classes(inner, shares, ["a", "b", "c"])
    assert counted["latents"].sum() == 9 and (counted["latents"] == 3).sum() == 3
    with pytest.raises(ValueError, match="too few for 50 groups"):
        together.communities(together.pairs(codes), 50)


def test_no_pairs_no_groups():
    rng = np.random.default_rng(4)
    table = together.pairs(_codes(rng.random((50, 6)) < 0.02))
    assert len(table) == 0 and together.found(table) == 0
