"""Metrics against scikit-learn and against counting, with ties."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score

from capsae import metrics
from capsae.metrics import Thresholds
from capsae.stats import bootstrap

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


@pytest.mark.parametrize("bad", [np.array([]), np.array([1.0, np.nan]), np.zeros((2, 2))])
def test_bad_scores_are_refused(bad):
    with pytest.raises(ValueError, match="ood_scores"):
        metrics.auroc(np.zeros(3), bad)


def test_infinite_scores_rank_last():
    assert metrics.auroc(np.array([0.0, 1.0]), np.array([np.inf])) == 1


def test_bootstrap_replicate_is_the_metric_of_the_resampled_scores():
    rng = np.random.default_rng(0)
    id_scores, ood_scores = rng.integers(0, 6, 50).astype(float), rng.integers(2, 9, 30).astype(float)
    draws = bootstrap({"m": Thresholds.of(id_scores, ood_scores)}, 40, seed=3, stream=1)["m"]
    ids = np.random.default_rng([3, 0]).integers(0, 50, size=(40, 50))
    oods = np.random.default_rng([3, 2]).integers(0, 30, size=(40, 30))
    for metric in metrics.METRICS:
        by_hand = [getattr(metrics, metric)(id_scores[i], ood_scores[o]) for i, o in zip(ids, oods, strict=True)]
        np.testing.assert_allclose(draws[metric], by_hand, atol=1e-12)


def test_bootstrap_interval_covers():
    """A 95 % interval of the AUROC of two normal samples should hold the true value in about 95 % of the trials."""
    from scipy.stats import norm

    from capsae.stats import interval

    rng, hits = np.random.default_rng(1), 0
    for trial in range(100):
        lo, hi = interval(
            bootstrap({"m": Thresholds.of(rng.normal(size=150), rng.normal(1, 1, size=150))}, 200, seed=trial)["m"][
                "auroc"
            ]
        )
        hits += lo <= norm.cdf(1 / np.sqrt(2)) <= hi
    assert 86 <= hits <= 100
