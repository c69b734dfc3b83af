"""Intervals and tests against counting, closed forms and the bootstrap."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from capsae import metrics, stats
from capsae.metrics import Thresholds
from capsae.stats import bootstrap

few = st.lists(st.integers(-4, 4).map(float), min_size=2, max_size=30).map(np.array)


@pytest.fixture
def tied():
    rng = np.random.default_rng(0)
    return rng.integers(0, 6, 50).astype(float), rng.integers(2, 9, 30).astype(float), rng.random(50) < 0.7


@pytest.mark.parametrize("compiled", [True, False])
def test_bootstrap_replicate_is_the_metric_of_the_resampled_scores(tied, compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(stats, "_kernels", lambda: None)
    id_scores, ood_scores, correct = tied
    draws = bootstrap({"m": Thresholds.of(id_scores, ood_scores, correct)}, 40, seed=3, stream=1)["m"]
    ids = np.random.default_rng([3, 0]).integers(0, 50, size=(40, 50))
    oods = np.random.default_rng([3, 2]).integers(0, 30, size=(40, 30))
    assert set(draws) == {*metrics.METRICS, *metrics.WITH_CORRECT}
    for metric in draws:
        flags = {"correct": correct} if metric in metrics.WITH_CORRECT else {}
        by_hand = [
            getattr(metrics, metric)(id_scores[i], ood_scores[o], **{name: flag[i] for name, flag in flags.items()})
            for i, o in zip(ids, oods, strict=True)
        ]
        np.testing.assert_allclose(draws[metric], by_hand, atol=1e-12, err_msg=metric)
    errors = stats.bootstrap_errors(id_scores, ~correct, 40, seed=3)
    for metric in metrics.OF_ERRORS:
        by_hand = [getattr(metrics, metric)(id_scores[i], ~correct[i]) for i in ids]
        np.testing.assert_allclose(errors[metric], by_hand, atol=1e-12, err_msg=metric)


@settings(max_examples=60, deadline=None)
@given(few, few)
def test_the_compiled_loops_are_the_readable_ones(id_scores, ood_scores):
    one = Thresholds.of(id_scores, ood_scores, np.arange(len(id_scores)) % 3 > 0)
    weights = np.ones((len(one.order), 65), np.int32)  # one more than stand side by side
    found = stats._replicates(one, weights, one.metrics)
    exact = metrics.all_metrics(one, np.ones(one.n_id), np.ones(len(ood_scores)))
    for metric in one.metrics:
        assert found[metric] == pytest.approx(np.full(65, float(exact[metric])), abs=1e-12, nan_ok=True), metric


def test_only_the_metrics_asked_for(tied):
    found = bootstrap({"m": Thresholds.of(*tied[:2])}, 5, metrics=["fpr95_id_pos"])["m"]
    assert list(found) == ["fpr95_id_pos"]


def test_bootstrap_interval_covers():
    """A 95 % interval of the AUROC of two normal samples should hold the true value in about 95 % of the trials."""
    rng, boot, delong, truth = np.random.default_rng(1), 0, 0, norm.cdf(1 / np.sqrt(2))
    for trial in range(200):
        a, b = rng.normal(size=150), rng.normal(1, 1, size=150)
        lo, hi = stats.interval(bootstrap({"m": Thresholds.of(a, b)}, 200, seed=trial)["m"]["auroc"])
        boot += lo <= truth <= hi
        value, error = stats.delong([stats.placements(a, b)])
        delong += abs(value - truth) <= 1.96 * error
    assert 178 <= boot <= 199 and 178 <= delong <= 199


@settings(max_examples=100, deadline=None)
@given(few, few)
def test_delong_against_all_pairs(id_scores, ood_scores):
    """The kernel of Mann and Whitney over all pairs, and DeLong's variance from its row and column means."""
    kernel = (ood_scores[None] > id_scores[:, None]) + 0.5 * (ood_scores[None] == id_scores[:, None])
    value, error = stats.delong([stats.placements(id_scores, ood_scores)])
    assert value == pytest.approx(metrics.auroc(id_scores, ood_scores), abs=1e-12)
    variance = kernel.mean(1).var(ddof=1) / len(id_scores) + kernel.mean(0).var(ddof=1) / len(ood_scores)
    assert error**2 == pytest.approx(variance, abs=1e-12)


def _two_methods(seed=0, shift=0.3):
    """Two correlated scores of the same samples on two OOD sets."""
    rng = np.random.default_rng(seed)

    def pair(n, mean):
        common = rng.normal(size=n)
        return common + rng.normal(mean, 0.7, n), common + rng.normal(mean * (1 + shift), 0.7, n)

    return pair(300, 0), [pair(150, 0.8), pair(80, 1.2)]


def test_delong_of_a_mean_over_sets_agrees_with_the_bootstrap():
    ids, sets = _two_methods()
    draws = []
    for method in (0, 1):
        of = [bootstrap({"m": Thresholds.of(ids[method], s[method])}, 4000, stream=i)["m"] for i, s in enumerate(sets)]
        draws.append(np.mean([each["auroc"] for each in of], axis=0))
    placed = [[stats.placements(ids[m], s[m]) for s in sets] for m in (0, 1)]
    for m in (0, 1):
        assert stats.delong(placed[m])[1] == pytest.approx(draws[m].std(), rel=0.06)
    found = stats.delong_difference(*placed)
    difference = draws[0] - draws[1]
    expected = np.mean([metrics.auroc(ids[0], s[0]) - metrics.auroc(ids[1], s[1]) for s in sets])
    assert found["value"] == pytest.approx(expected)
    assert (found["hi"] - found["lo"]) / (2 * 1.96) == pytest.approx(difference.std(), rel=0.06)
    assert found["p"] == pytest.approx(2 * norm.sf(abs(found["value"]) / difference.std()), rel=0.5)


def test_delong_p_is_uniform_where_methods_are_alike():
    found = []
    for seed in range(300):
        ids, sets = _two_methods(seed, shift=0)
        placed = [[stats.placements(ids[m], s[m]) for s in sets] for m in (0, 1)]
        found.append(stats.delong_difference(*placed)["p"])
    assert 0.02 <= np.mean(np.array(found) < 0.05) <= 0.09 and 0.4 < np.mean(found) < 0.6


def test_a_method_does_not_differ_from_itself():
    placed = [stats.placements([1.0, 2, 3], [2.0, 4])]
    assert stats.delong_difference(placed, placed)["p"] == 1
    assert stats.bootstrap_p(np.zeros(99)) == 1 and stats.bootstrap_p(np.full(99, 0.1)) == 0.02


def test_holm_by_hand():
    np.testing.assert_allclose(stats.holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.9, 0.8]).tolist() == [1, 1]


def test_win_tie_loss_counts_sets_and_leaves_means_out():
    rows = [("a", "epd", where, "auroc", verdict) for where, verdict in
            [("near/x", "better"), ("far/y", "undecided"), ("far/z", "better"), ("mean", "worse")]]  # fmt: skip
    counted = stats.win_tie_loss(pd.DataFrame(rows, columns=["method", "other", "set", "metric", "verdict"]))
    assert counted[["win", "tie", "loss"]].to_numpy().tolist() == [[2, 1, 0]]


def test_critical_difference_against_the_tables_of_demsar():
    """Demsar 2006, table 5: q at 0.05 is 2.343 for 3 and 3.031 for 8 classifiers."""
    rng = np.random.default_rng(0)
    values = pd.DataFrame(rng.random((14, 3)) + [0, 0.4, 0.8], columns=["low", "middle", "high"])
    found = stats.critical_difference(values, higher_is_better=True)
    assert found["cd"] == pytest.approx(2.343 * np.sqrt(3 * 4 / (6 * 14)), abs=2e-3) and found["note"] == ""
    assert list(found["ranks"].index) == ["high", "middle", "low"] and found["p"] < 0.01
    few = stats.critical_difference(pd.DataFrame(rng.random((7, 8))), higher_is_better=False)
    assert few["cd"] == pytest.approx(3.031 * np.sqrt(8 * 9 / (6 * 7)), abs=2e-3) and "only 7 OOD sets" in few["note"]
    one = stats.critical_difference(pd.DataFrame(rng.random((1, 8))), higher_is_better=False)
    assert "mean nothing" in one["note"] and np.isnan(one["p"])


# --- seeds and images


def _drawn(rng, n, seeds, image_sd, seed_sd):
    """Values of S seeds on n images, whose mean over both is 0 in truth, and the images' part of the error."""
    images = rng.normal(0, image_sd, n)
    values = images.mean() + rng.normal(0, seed_sd, seeds)
    return values, images.std(ddof=1) / np.sqrt(n)


@pytest.mark.parametrize(("image_sd", "seed_sd"), [(1.0, 0.05), (0.5, 0.1), (0.1, 0.3)])
def test_an_interval_of_seeds_and_images_covers(image_sd, seed_sd):
    """Both sources drawn anew in each trial; one seed's own interval misses what the seeds add."""
    rng, hit, naive = np.random.default_rng(0), 0, 0
    for _ in range(1500):
        values, error = _drawn(rng, 100, 5, image_sd, seed_sd)
        found = stats.seeds_and_images(values, error)
        hit += found["lo"] <= 0 <= found["hi"]
        naive += abs(values[0]) <= 1.96 * error
    assert 0.935 <= hit / 1500 <= 0.97
    assert naive / 1500 < (0.93 if seed_sd >= 0.1 else 1)


def test_differences_of_two_methods_with_seeds_of_their_own_cover():
    rng, hit, false = np.random.default_rng(1), 0, 0
    for _ in range(1500):
        images = rng.normal(0, 0.4, 80)
        a = 0.2 + images.mean() + rng.normal(0, 0.1, 10)
        b = rng.normal(0, 0.05, 5)
        found = stats.seeds_and_images(a, images.std(ddof=1) / np.sqrt(80), b)
        hit += found["lo"] <= 0.2 <= found["hi"]
        false += stats.seeds_and_images(a - 0.2, images.std(ddof=1) / np.sqrt(80), b)["p"] < 0.05
    assert 0.935 <= hit / 1500 <= 0.965 and 0.035 <= false / 1500 <= 0.065


def test_one_seed_knows_the_images_alone_and_says_so():
    found = stats.seeds_and_images([0.3], 0.1)
    assert found["holds"] == "images" and found["df"] == np.inf and found["seeds"] == 1
    assert found["hi"] - 0.3 == pytest.approx(norm.isf(0.025) * 0.1) and found["p"] == pytest.approx(2 * norm.sf(3))


def test_seeds_that_agree_add_nothing():
    many, one = stats.seeds_and_images([0.3] * 5, 0.1), stats.seeds_and_images([0.3], 0.1)
    assert many["holds"] == "images and seeds"
    assert {key: many[key] for key in ("lo", "hi", "p")} == {key: pytest.approx(one[key]) for key in ("lo", "hi", "p")}
    sure = stats.seeds_and_images([0.0] * 3, 0.0)
    assert sure["p"] == 1 and sure["lo"] == sure["hi"] == 0 and stats.seeds_and_images([0.125] * 4, 0.0)["p"] == 0


def test_degrees_of_freedom_are_those_of_students_t_without_images():
    from scipy.stats import ttest_1samp, ttest_ind

    rng = np.random.default_rng(2)
    a, b = rng.normal(0.5, 1, 7), rng.normal(0, 2, 4)
    assert stats.seeds_and_images(a, 0.0)["p"] == pytest.approx(ttest_1samp(a, 0).pvalue)
    assert stats.seeds_and_images(a, 0.0, b)["p"] == pytest.approx(ttest_ind(a, b, equal_var=False).pvalue)
    with pytest.raises(ValueError, match="for each seed"):
        stats.seeds_and_images([], 0.1)
