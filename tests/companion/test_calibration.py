from __future__ import annotations

import numpy as np
import pytest

from companion.chapters.shift import calibration


def _drawn(n=40_000, classes=5, scale=2.0, seed=0):
    """Logits and labels that are drawn from their softmax: a calibrated classifier."""
    rng = np.random.default_rng(seed)
    logits = scale * rng.normal(size=(n, classes))
    p = np.exp(calibration.log_softmax(logits))
    return logits, (p.cumsum(1) < rng.random((n, 1))).sum(1).clip(0, classes - 1)


def test_temperature_finds_the_factor_and_changes_no_prediction():
    logits, labels = _drawn()
    assert calibration.temperature(logits, labels) == pytest.approx(1, abs=0.03)
    assert calibration.temperature(3 * logits, labels) == pytest.approx(3, rel=0.03)
    worse, better = calibration.per_sample(3 * logits, labels), calibration.per_sample(logits, labels)
    assert (worse["accuracy"] == better["accuracy"]).all()
    for metric in ("nll", "brier"):
        assert worse[metric].mean() > better[metric].mean()


def test_a_calibrated_classifier_has_no_calibration_error_and_an_overconfident_one_has():
    logits, labels = _drawn()
    good, bad = (calibration.measure(calibration.per_sample(t * logits, labels)) for t in (1, 4))
    for metric in calibration.ERRORS:
        assert good[metric] < 0.01 and bad[metric] > 0.1
        confidence = calibration.per_sample(4 * logits, labels)["confidence"].mean()
        assert bad[metric] == pytest.approx(confidence - bad["accuracy"], abs=0.02), "overconfident in every bin"


def test_values_by_hand():
    logits = np.log([[0.8, 0.2], [0.6, 0.4], [0.3, 0.7]])
    of = calibration.per_sample(logits, [0, 1, 1])
    assert of["accuracy"].tolist() == [1, 0, 1]
    np.testing.assert_allclose(of["nll"], -np.log([0.8, 0.4, 0.7]))
    np.testing.assert_allclose(of["brier"], [0.08, 0.72, 0.18])
    np.testing.assert_allclose(of["confidence"], [0.8, 0.6, 0.7])
    found = calibration.measure(of, bins=2)  # all three lie in the upper bin: mean confidence .7, accuracy 2/3
    assert found["ece"] == pytest.approx(0.7 - 2 / 3, abs=1e-6)
    assert calibration.measure(of, bins=15)["ece"] == pytest.approx((0.2 + 0.6 + 0.3) / 3, abs=1e-6)
    assert calibration.measure(of, bins=3)["ece_adaptive"] == pytest.approx((0.2 + 0.6 + 0.3) / 3, abs=1e-6)


def test_bins_are_of_equal_width_or_of_equal_size():
    confidence = np.array([0.01, 0.5, 0.5001, 1.0, 0.0])
    assert calibration.bins_of(confidence, bins=2).tolist() == [0, 0, 1, 1, 0]
    sizes = np.bincount(calibration.bins_of(np.random.default_rng(0).random(100) ** 5, adaptive=True, bins=10))
    assert sizes.tolist() == [10] * 10


def test_weights_are_repeated_samples():
    logits, labels = _drawn(300)
    of = calibration.per_sample(logits, labels)
    weights = np.random.default_rng(1).multinomial(300, np.full(300, 1 / 300), size=3)
    found = calibration.measure(of, weights)
    for b in range(3):
        rows = np.repeat(np.arange(300), weights[b])
        again = calibration.measure({key: value[rows] for key, value in of.items()})
        for metric in ("accuracy", "nll", "brier", "ece"):  # the adaptive bins are those of the whole sample
            assert found[metric][b] == pytest.approx(again[metric], abs=1e-5)


def test_replicates_of_a_small_binned_error_are_centred_on_it():
    logits, labels = _drawn(300)
    of = calibration.per_sample(logits, labels)
    weights = np.random.default_rng(1).multinomial(300, np.full(300, 1 / 300), size=400)
    value, draws = calibration.measure(of)["ece"], calibration.measure(of, weights)["ece"]
    assert draws.mean() > value + 0.005, "resamples have noisier bins"
    moved = calibration.centred(draws, value)
    assert moved.mean() == pytest.approx(value, abs=1e-3) and (moved >= 0).all()
    assert calibration.centred(np.array([0.1, 0.5]), 0.1).tolist() == pytest.approx([0, 0.3])


def test_errors_are_named():
    with pytest.raises(ValueError, match=r"logits have shape \(2, 3\) and labels \(3,\)"):
        calibration.per_sample(np.zeros((2, 3)), [0, 1, 2])
    with pytest.raises(ValueError, match=r"labels lie in \[0, 5\], the logits have 3 classes"):
        calibration.temperature(np.zeros((2, 3)), [0, 5])
    with pytest.raises(ValueError, match="weights have 3 columns, the samples are 2"):
        calibration.measure(calibration.per_sample(np.zeros((2, 3)), [0, 1]), np.ones((1, 3)))
