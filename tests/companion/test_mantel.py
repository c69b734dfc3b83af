"""Mantel's test against its plain definition, and what it must find and not find."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pandas as pd
import pytest
from scipy.spatial.distance import pdist, squareform
from scipy.stats import pearsonr, spearmanr

from capsae import ClassActivationProfiles
from companion.chapters.ontology import mantel
from companion.chapters.ontology.mantel import Pairs


def _distances(n, seed, d=3):
    return squareform(pdist(np.random.default_rng(seed).normal(size=(n, d))))


def _upper(matrix):
    return matrix[np.triu_indices(len(matrix), 1)]


@pytest.mark.parametrize(("method", "of"), [("pearson", pearsonr), ("spearman", spearmanr)])
def test_r_is_scipys_correlation_of_the_pairs(method, of):
    a, b = np.round(_distances(12, 0), 1), _distances(12, 1)  # ties
    found = mantel.mantel(Pairs(a, method), Pairs(b, method), n=9)
    assert found["r"] == pytest.approx(of(_upper(a), _upper(b)).statistic, abs=1e-12)
    assert found["lo"] < found["r"] < found["hi"]


def test_p_tends_to_that_of_all_permutations():
    noise = _distances(5, 3)
    a, b = _distances(5, 2), _distances(5, 2) + 0.6 * noise
    observed = np.corrcoef(_upper(a), _upper(b))[0, 1]
    orders = [np.array(order) for order in permutations(range(5))]
    exact = np.mean([np.corrcoef(_upper(a[np.ix_(o, o)]), _upper(b))[0, 1] >= observed - 1e-12 for o in orders])
    assert mantel.mantel(Pairs(a), Pairs(b), n=4000)["p"] == pytest.approx(exact, abs=0.02)
    assert 0.005 < exact < 0.5


def test_draws_are_permutations_of_classes_and_p_counts_them():
    a, b = Pairs(_distances(9, 4)), Pairs(_distances(9, 5))
    draws = a.permuted(49, seed=7)
    rng = np.random.default_rng(7)
    for draw in draws[:5]:
        order = rng.permutation(9)
        moved = Pairs(a.matrix[np.ix_(order, order)]).whole
        assert draw == pytest.approx(moved, abs=1e-12)
    p = mantel.mantel(a, b, n=49, seed=7)["p"]
    assert p == (1 + sum(draw @ b.whole >= a.whole @ b.whole - 1e-12 for draw in draws)) / 50
    assert p == mantel.mantel(a, b, draws=draws)["p"]
    same = mantel.mantel(a, a, n=49)
    assert same["p"] == 1 / 50 and same["r"] == pytest.approx(1)  # never 0


def test_partial_is_the_correlation_of_what_is_left():
    a, b, c, d = (Pairs(_distances(14, seed)) for seed in range(4))

    def left(x, given):
        design = np.stack([np.ones(len(x.whole)), *(one.whole for one in given)], axis=1)
        return x.whole - design @ np.linalg.lstsq(design, x.whole, rcond=None)[0]

    for given in ([c], [c, d]):
        found = mantel.mantel(a, b, given, n=9)["r"]
        assert found == pytest.approx(np.corrcoef(left(a, given), left(b, given))[0, 1], abs=1e-10)


def test_partial_finds_what_is_added_and_nothing_where_nothing_is():
    rng = np.random.default_rng(0)
    shared, own = rng.normal(size=(30, 3)), rng.normal(size=(30, 3))
    noise = rng.normal(size=(30, 2, 3))
    tree = squareform(pdist(np.hstack([shared, own])))
    raw = squareform(pdist(shared + 0.1 * noise[:, 0]))
    more = squareform(pdist(np.hstack([shared, own]) + 0.1))
    copy = squareform(pdist(shared + 0.1 * noise[:, 1]))
    distances = {("raw", "x"): raw, ("more", "x"): more, ("copy", "x"): copy}
    halves = np.arange(30) < 15
    split = mantel.split_distance(halves)
    assert split[0, 14] == 0 and split[0, 15] == split[15, 0] == 1 and split[20, 29] == 0
    table = mantel.agreement(tree, distances, "raw", split, n=199).set_index(["of", "method"])
    for method in mantel.METHODS:
        assert table.loc[("more", method), "beyond_p"] == 1 / 200 and table.loc[("more", method), "gain_lo"] > 0
        assert table.loc[("copy", method), "p"] == 1 / 200 and table.loc[("copy", method), "beyond"] < 0.25
        assert table.loc[("copy", method), "gain_lo"] < 0 < table.loc[("copy", method), "gain_hi"]
        assert np.isnan(table.loc[("raw", method), "beyond_p"]) and table.loc[("copy", method), "over"] == "x"
    fixed = [Pairs(split), Pairs(raw)]
    assert table.loc[("more", "pearson"), "beyond"] == pytest.approx(
        mantel.mantel(Pairs(tree), Pairs(more), fixed)["r"]
    )
    assert table.loc[("raw", "pearson"), "split_r"] == pytest.approx(mantel.mantel(Pairs(tree), Pairs(split))["r"])
    assert (table["permutations"] == 199).all() and (table["classes"] == 30).all()
    gains = mantel.gains(tree, distances, "more", "copy")
    assert (gains["lo"] > 0).all() and len(gains) == 2
    assert gains["value"].iloc[0] == pytest.approx(
        table.loc[("more", "pearson"), "r"] - table.loc[("copy", "pearson"), "r"]
    )


def test_a_split_carries_a_whole_r_and_nothing_is_left_given_it_or_inside():
    """Two clusters, within which the distances have nothing to do with each other."""
    halves = np.arange(24) < 12
    split = mantel.split_distance(halves)
    tree, other = (10 * split + _distances(24, seed) * (1 - np.eye(24)) for seed in (0, 1))
    table = mantel.agreement(tree, {("it", "x"): other, ("raw", "x"): _distances(24, 2)}, "raw", split, n=199)
    rows = table[table["of"] == "it"]
    assert (rows["r"] > 0.7).all() and (rows["p"] == 1 / 200).all() and (rows["split_r"] > rows["r"] - 0.05).all()
    assert (rows["within"].abs() < 0.2).all() and (rows["within_p"] > 0.05).all()
    inside = mantel.inside(tree, {("it", "x"): other, ("self", "x"): tree}, {"one": halves, "two": ~halves}, "spearman")
    inside = inside.set_index(["of", "family"])
    assert (inside.loc["it", "r"].abs() < 0.35).all() and (inside.loc["it", "p"] > 0.05).all()
    assert (inside.loc["self", "r"] > 0.999).all() and (inside["classes"] == 12).all()
    plain = mantel.mantel(Pairs(tree[:12, :12], "spearman"), Pairs(other[:12, :12], "spearman"))["r"]
    assert inside.loc[("it", "one"), "r"] == pytest.approx(plain)
    assert (inside[["lo", "hi"]].abs() <= 1).all(axis=None)


def test_p_is_even_and_intervals_cover_where_nothing_is_shared():
    found = [mantel.mantel(Pairs(_distances(12, 2 * i)), Pairs(_distances(12, 2 * i + 1)), n=99) for i in range(150)]
    table = pd.DataFrame(found)
    assert (table["p"] < 0.1).mean() == pytest.approx(0.1, abs=0.06)
    assert (table["p"] < 0.5).mean() == pytest.approx(0.5, abs=0.12)
    assert ((table["lo"] < 0) & (table["hi"] > 0)).mean() > 0.85


def test_distances_are_what_they_say():
    rng = np.random.default_rng(0)
    rows = rng.random((5, 7))
    cosine = 1 - (rows[0] @ rows[1]) / np.linalg.norm(rows[0]) / np.linalg.norm(rows[1])
    assert mantel.cosine_distance(rows)[0, 1] == pytest.approx(cosine)
    p, q = rows[0] / rows[0].sum(), rows[1] / rows[1].sum()
    assert mantel.hellinger_distance(rows)[0, 1] == pytest.approx(np.linalg.norm(np.sqrt(p) - np.sqrt(q)) / np.sqrt(2))
    caps = ClassActivationProfiles(rows, np.ones((5, 7), np.int64), np.ones(5, np.int64))
    found = mantel.cap_distances(caps, 3 / 7)
    a, b = (set(np.argsort(-row)[:3]) for row in rows[:2])
    assert found["core Jaccard"][0, 1] == pytest.approx(1 - len(a & b) / len(a | b))
    labels = np.repeat(np.arange(4), 50)
    x = rng.normal(size=(200, 3)) @ np.diag([10, 1, 0.1]) + np.eye(4, 3)[labels] * 5
    of = mantel.mean_distances(x, labels, 4)
    means = np.stack([x[labels == c].mean(0) for c in range(4)])
    inverse = np.linalg.inv(np.cov((x - means[labels]).T) * 199 / 196)
    gap = means[0] - means[1]
    assert of["Mahalanobis"][0, 1] == pytest.approx(np.sqrt(gap @ inverse @ gap))
    assert of["Euclidean"][0, 1] == pytest.approx(np.linalg.norm(gap))
    for matrix in (*found.values(), *of.values()):
        assert (np.diag(matrix) == 0).all() and np.allclose(matrix, matrix.T) and Pairs(matrix).whole.shape


def test_what_is_no_distance_is_refused():
    good = _distances(6, 0)
    for wrong, message in ((good[:, :5], "shape"), (good[:3, :3], "4 classes"), (np.triu(good), "symmetric")):
        with pytest.raises(ValueError, match=message):
            Pairs(wrong)
    with pytest.raises(ValueError, match="kendall"):
        Pairs(good, "kendall")
    with pytest.raises(ValueError, match=r"\[6, 7\]"):
        mantel.mantel(Pairs(good), Pairs(_distances(7, 0)))
    with pytest.raises(ValueError, match="different methods"):
        mantel.mantel(Pairs(good), Pairs(good, "spearman"))
