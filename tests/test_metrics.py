"""Metrics against scikit-learn and against counting, with ties."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score

from capsae import metrics

# Few distinct values, so that ties are the rule.
scores = st.lists(st.integers(-4, 4).map(float), min_size=1, max_size=40).map(np.array)


def fpr_by_counting(positive, negative):
    """Smallest share of negatives at or above a threshold that at least 95 % of the positives reach."""
    for threshold in np.unique(np.concatenate([positive, negative]))[::-1]:
        if np.mean(positive >= threshold) >= 0.95:
            return np.mean(negative >= threshold)


@settings(max_examples=200, deadline=None)
@given(scores, scores)
def test_against_scikit_learn_and_counting(id_scores, ood_scores):
    truth = np.r_[np.zeros(len(id_scores)), np.ones(len(ood_scores))]
    both = np.r_[id_scores, ood_scores]
    assert metrics.auroc(id_scores, ood_scores) == pytest.approx(roc_auc_score(truth, both), abs=1e-12)
    assert metrics.aupr_out(id_scores, ood_scores) == pytest.approx(average_precision_score(truth, both), abs=1e-12)
    assert metrics.aupr_in(id_scores, ood_scores) == pytest.approx(average_precision_score(1 - truth, -both), abs=1e-12)
    assert metrics.fpr95_ood_pos(id_scores, ood_scores) == pytest.approx(fpr_by_counting(ood_scores, id_scores))
    assert metrics.fpr95_id_pos(id_scores, ood_scores) == pytest.approx(fpr_by_counting(-id_scores, -ood_scores))


def test_the_two_fpr95_differ_and_no_metric_guesses_a_direction():
    id_scores, ood_scores = np.r_[np.zeros(90), np.full(10, 5.0)], np.r_[np.full(50, 4.0), np.full(50, 6.0)]
    assert metrics.fpr95_ood_pos(id_scores, ood_scores) == pytest.approx(0.10)
    assert metrics.fpr95_id_pos(id_scores, ood_scores) == pytest.approx(0.50)
    assert metrics.auroc(ood_scores, id_scores) == pytest.approx(1 - metrics.auroc(id_scores, ood_scores))
    assert not hasattr(metrics, "fpr95")


flags = st.lists(st.booleans(), min_size=40, max_size=40).map(np.array)


@settings(max_examples=100, deadline=None)
@given(scores, scores)
def test_autc_is_the_area_under_both_threshold_curves(id_scores, ood_scores):
    """Riemann sums over 20,000 thresholds of the two curves, drawn as their definition says."""
    both = np.r_[id_scores, ood_scores]
    if np.ptp(both) == 0:
        assert metrics.autc(id_scores, ood_scores) == 0.5
        return
    scaled_id, scaled_ood = ((s - both.min()) / np.ptp(both) for s in (id_scores, ood_scores))
    at = (np.arange(20_000) + 0.5) / 20_000
    fpr = 1 - np.searchsorted(np.sort(scaled_id), at, "left") / len(id_scores)
    fnr = np.searchsorted(np.sort(scaled_ood), at, "left") / len(ood_scores)
    assert metrics.autc(id_scores, ood_scores) == pytest.approx((fpr.mean() + fnr.mean()) / 2, abs=1e-4)


def test_autc_sees_the_margin_that_auroc_does_not():
    near, far = metrics.autc([0, 0.49], [0.51, 1]), metrics.autc([0, 0.01], [0.99, 1])
    assert metrics.auroc([0, 0.49], [0.51, 1]) == metrics.auroc([0, 0.01], [0.99, 1]) == 1 and near > 0.2 > far
    assert np.isnan(metrics.autc([0.0], [np.inf]))


@settings(max_examples=100, deadline=None)
@given(scores, scores, flags)
def test_oscr_by_walking_its_curve(id_scores, ood_scores, correct):
    correct = correct[: len(id_scores)]
    curve = [(0.0, 0.0)]  # (OOD accepted, ID accepted and correct), the loosest threshold last
    for threshold in np.unique(np.r_[id_scores, ood_scores]):
        curve.append((np.mean(ood_scores <= threshold), np.mean((id_scores <= threshold) & correct)))
    x, y = np.array(curve).T
    assert metrics.oscr(id_scores, ood_scores, correct) == pytest.approx(np.trapezoid(y, x), abs=1e-12)
    if correct.any():
        expected = metrics.auroc(id_scores[correct], ood_scores)
        assert metrics.auroc_correct(id_scores, ood_scores, correct) == pytest.approx(expected, abs=1e-12)
    else:
        assert np.isnan(metrics.auroc_correct(id_scores, ood_scores, correct))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=1, max_size=6))
def test_aurc_is_the_mean_over_all_orders_of_tied_samples(samples):
    areas = []
    for order in itertools.permutations(samples):
        ranked = sorted(order, key=lambda sample: sample[0])  # stable: ties stay in this permutation's order
        failed = np.array([f for _, f in ranked], dtype=float)
        areas.append((np.cumsum(failed) / np.arange(1, len(failed) + 1)).mean())
    values, failed = (np.array(column) for column in zip(*samples, strict=True))
    assert metrics.aurc(values, failed) == pytest.approx(np.mean(areas), abs=1e-12)


def test_risk_coverage_errors_flagged_and_ties():
    scores, failed = np.arange(100.0), np.zeros(100, bool)
    failed[[3, 97, 98]] = True
    coverage, risk = metrics.risk_coverage(scores, failed)
    assert coverage[-1] == 1 and risk[-1] == pytest.approx(0.03) and risk[2] == 0 and risk[3] == 0.25
    assert metrics.errors_flagged(scores, failed) == pytest.approx(2 / 3)
    assert np.isnan(metrics.errors_flagged(scores, np.zeros(100, bool)))
    assert metrics.tie_rate([1, 2, 3], [3, 4]) == pytest.approx(2 / 5) and metrics.tie_rate([1, 2], [3]) == 0
    with pytest.raises(ValueError, match=r"failed has shape \(3,\), the scores \(100,\)"):
        metrics.aurc(scores, np.zeros(3, bool))


@pytest.mark.parametrize("name", ["fpr95", "FPR95", "FPR@95", "FPR 95, %", "fpr_95", "FPR at 95", "mean fpr95"])
def test_an_fpr95_without_convention_is_refused(name):
    with pytest.raises(ValueError, match="which class is positive"):
        metrics.require_convention(["auroc", name])


def test_a_named_fpr95_passes_and_every_metric_has_a_direction():
    metrics.require_convention([*metrics.METRICS, "FPR95, ID positive", "FPR95 OOD-pos., %", "fpr", 3])
    every = {*metrics.METRICS, *metrics.WITH_CORRECT, *metrics.OF_ERRORS, "accuracy"}
    assert set(metrics.HIGHER_IS_BETTER) == every
    metrics.require_convention(every)
    assert all(hasattr(metrics, name) for name in every - {"accuracy"})


@pytest.mark.parametrize("bad", [np.array([]), np.array([1.0, np.nan]), np.zeros((2, 2))])
def test_bad_scores_are_refused(bad):
    with pytest.raises(ValueError, match="ood_scores"):
        metrics.auroc(np.zeros(3), bad)


def test_infinite_scores_rank_last():
    assert metrics.auroc(np.array([0.0, 1.0]), np.array([np.inf])) == 1
