"""Clusters and retrieval on codes, held against scikit-learn and against codes that know nothing."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score, average_precision_score, normalized_mutual_info_score

from capsae.sae import SparseCodes
from companion.chapters.meaning import neighbours


@pytest.fixture(scope="module")
def sets():
    """Three classes: codes with latents of their own, and features that are noise."""
    rng = np.random.default_rng(0)

    def codes(labels):
        indices = (8 * labels[:, None] + rng.permuted(np.tile(np.arange(8), (len(labels), 1)), axis=1)[:, :4]).astype(
            np.int32
        )
        indices[:, 3] = rng.integers(24, 30, len(labels))
        return SparseCodes(rng.gamma(3, size=indices.shape).astype(np.float32), indices, 30)

    train, test = np.repeat([0, 1, 2], 60), np.repeat([0, 1, 2], 20)
    noise = tuple(rng.normal(size=(len(labels), 10)) for labels in (train, test))
    return {"good": (codes(train), codes(test)), "noise": noise}, train, test


def test_retrieval_is_that_of_the_dense_codes_and_of_scikit_learn(sets):
    pairs, train, test = sets
    found = neighbours.retrieval(*pairs["good"], train, test, k=5)
    unit = [x.dense() / np.linalg.norm(x.dense(), axis=1, keepdims=True) for x in pairs["good"]]
    near = unit[1] @ unit[0].T
    best = [average_precision_score(train == label, row) for row, label in zip(near, test, strict=True)]
    assert found["map"] == pytest.approx(best, abs=1e-5)
    nearest = np.argsort(-near, axis=1)[:, :5]
    assert found["precision"] == pytest.approx((train[nearest] == test[:, None]).mean(1))
    same = neighbours.retrieval(unit[0], unit[1], train, test, k=5)
    assert same["map"] == pytest.approx(found["map"], abs=1e-5)
    with pytest.raises(ValueError, match="k is 0"):
        neighbours.retrieval(*pairs["good"], train, test, k=0)


def test_a_query_of_an_unknown_class_has_no_average_precision(sets):
    pairs, train, test = sets
    found = neighbours.retrieval(*pairs["good"], train, np.full_like(test, 7), k=5)
    assert np.isnan(found["map"]).all() and (found["precision"] == 0).all()


def test_ties_do_not_follow_the_order_of_the_classes():
    train, labels = np.ones((200, 3)), np.repeat([0, 1], 100)
    found = neighbours.retrieval(train, np.ones((2, 3)), labels, np.array([0, 1]), k=50)
    assert found["map"] == pytest.approx([0.5, 0.5]) and (np.abs(found["precision"] - 0.5) < 0.25).all()


def test_what_knows_the_classes_beats_noise_and_not_itself(sets):
    pairs, train, test = sets
    table = neighbours.retrieve(pairs | {"again": pairs["good"]}, train, test, n_boot=200)
    rows = table.set_index(["representation", "measure"])
    assert rows.loc[("good", "precision"), "value"] > 0.85 and np.isnan(rows.loc[("good", "map"), "difference"])
    assert rows.loc[("noise", "map"), "difference_lo"] > 0.2
    assert rows.loc[("again", "map"), ["difference", "difference_lo", "difference_hi"]].tolist() == [0, 0, 0]
    lo, value, hi = rows.loc[("noise", "precision"), ["lo", "value", "hi"]]
    assert lo < value < hi


def test_agreement_is_scikit_learns():
    rng = np.random.default_rng(1)
    labels, found = rng.integers(0, 4, 300), rng.integers(0, 5, 300)
    found = np.where(rng.random(300) < 0.5, labels, found)
    table = np.zeros((1, 4, 5))
    np.add.at(table[0], (labels, found), 1)
    measured = neighbours.agreement(table)
    assert measured["nmi"][0] == pytest.approx(normalized_mutual_info_score(labels, found))
    assert measured["ari"][0] == pytest.approx(adjusted_rand_score(labels, found))
    assert measured["purity"][0] == table[0].max(0).sum() / 300


def test_clusters_are_judged_by_classes_and_with_their_starts(sets):
    pairs, train, test = sets
    clusters = neighbours.cluster(pairs, 3, seeds=(0, 1, 2))
    assert clusters["good"].shape == (3, 60)
    rows = neighbours.judge(clusters, test, n_boot=100).set_index(["representation", "measure"])
    each = [normalized_mutual_info_score(test, start) for start in clusters["good"]]
    assert rows.loc[("good", "nmi"), "value"] == pytest.approx(np.mean(each)) and np.mean(each) > 0.6
    assert rows.loc[("noise", "ari"), "value"] < 0.1 and rows.loc[("noise", "nmi"), "difference_lo"] > 0
    # One start that finds nothing widens the interval.
    perfect = np.tile(test, (3, 1))
    worse = perfect.copy()
    worse[0] = np.random.default_rng(2).integers(0, 3, 60)
    wide = neighbours.judge({"perfect": perfect, "worse": worse}, test, n_boot=100).set_index(
        ["representation", "measure"]
    )
    lo, hi = wide.loc[("perfect", "nmi"), ["lo", "hi"]]
    assert lo == pytest.approx(1) and hi == pytest.approx(1)
    assert wide.loc[("worse", "nmi"), "hi"] - wide.loc[("worse", "nmi"), "lo"] > 0.2
    assert set(neighbours.panels(rows.reset_index())["panel"]) == {"NMI of k-means", "ARI of k-means"}


def test_rows_drawn_twice_do_not_lift_the_intervals():
    """Clusters that know nothing, many of them: replicates agree more than the rows do, basic intervals hold 0."""
    rng = np.random.default_rng(3)
    labels, starts = rng.integers(0, 15, 120), rng.integers(0, 15, (10, 120))
    row = neighbours.judge({"none": starts}, labels, n_boot=300).set_index("measure")
    again = neighbours.judge({"none": starts}, labels, n_boot=1)
    assert again.set_index("measure").loc["ari", "lo"] < row.loc["ari", "value"]  # the one replicate, turned around
    assert row.loc["ari", "lo"] < 0.01 and row.loc["ari", "value"] == pytest.approx(0, abs=0.03)
    assert row.loc["nmi", "lo"] < row.loc["nmi", "value"] and row.loc["nmi", "hi"] < row.loc["nmi", "value"] + 0.02
