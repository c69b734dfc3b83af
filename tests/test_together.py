"""Latents that fire together: planted pairs are found, those that classes explain are told apart, chance gives none."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import hypergeom

from capsae.analyses import together
from capsae.sae import SparseCodes


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
    assert together.found(alone)["found"] >= 10 and together.found(within)["found"] == 1
    null = together.pairs(together.shuffled(codes, labels, 3, seed=1), labels, 3)
    assert together.found(null)["found"] == 0


def test_a_shuffle_keeps_how_often_each_latent_fires_in_each_class(planted):
    codes, labels = planted
    other = together.shuffled(codes, labels, 3, seed=2)
    dense, again = codes.dense(), other.dense()
    assert not np.array_equal(dense, again)
    for c in range(3):
        assert ((dense[labels == c] > 0).sum(0) == (again[labels == c] > 0).sum(0)).all()


def test_p_is_never_below_the_exact_tail():
    n, a, b = 60, 20, 9
    k = np.arange(10)
    exact = hypergeom.sf(k - 1, n, a, b)
    p = together._upper_tail(k.astype(float), np.full(10, a * b / n))
    assert (p >= exact - 1e-12).all() and p[9] < 0.01
    rng, hits = np.random.default_rng(3), []
    for _ in range(40):
        table = together.pairs(_codes(rng.random((200, 25)) < 0.15))
        hits.append(together.found(table)["found"] > 0)
    assert np.mean(hits) <= 0.15


def test_groups_are_the_planted_classes(planted):
    codes, labels = planted
    groups = together.communities(together.pairs(codes), 4)
    of = groups.set_index("latent")["community"]
    assert of[0] == of[1] == of[2] and of[3] == of[4] == of[5] and of[6] == of[7] == of[8] and of[9] == of[10]
    assert len({of[0], of[3], of[6], of[9]}) == 4
    shares = np.vstack([np.eye(3)[[0, 0, 0, 1, 1, 1, 2, 2, 2]], np.full((3, 3), 1 / 3)])
    inner = groups[groups["latent"] < 9]
    followed = together.follow_classes(inner, shares, n_boot=20)
    assert followed["ari"] == 1 and followed["lo"] > 0.9 and followed["purity"] == 1
    dealt = inner.assign(community=np.random.default_rng(0).permutation(inner["community"]))
    assert together.follow_classes(dealt, shares, n_boot=20)["ari"] < 0.6
    counted = together.group_classes(inner, shares, ["a", "b", "c"])
    assert counted["latents"].sum() == 9 and (counted["latents"] == 3).sum() == 3
    with pytest.raises(ValueError, match="too few for 50 groups"):
        together.communities(together.pairs(codes), 50)


def test_no_pairs_no_groups():
    rng = np.random.default_rng(4)
    table = together.pairs(_codes(rng.random((50, 6)) < 0.02))
    assert len(table) == 0 and together.found(table)["found"] == 0
