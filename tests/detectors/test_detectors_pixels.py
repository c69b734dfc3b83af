"""The controls that never look at what an image shows, and the verdict on a table in which they win."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

import capsae
from capsae import detectors
from capsae.data.images import PIXEL_STATISTICS
from capsae.detectors.baselines.pixels import PIXEL_CONTROLS, pixel_controls_verdict


def observations(n, seed=0, **columns):
    """Pixel statistics of n photographs of one size; ``columns`` are factors on some of them."""
    rng = np.random.default_rng(seed)
    pixels = np.exp(rng.normal(size=(n, len(PIXEL_STATISTICS))) * 0.3) * 100
    pixels[:, PIXEL_STATISTICS.index("image_size")] = 50176
    pixels[:, PIXEL_STATISTICS.index("aspect")] = 1
    for name, factor in columns.items():
        pixels[:, PIXEL_STATISTICS.index(name)] *= factor
    return capsae.Observations(rng.normal(size=(n, 6)), pixels=pixels.astype(np.float32))


@pytest.mark.parametrize("name", PIXEL_STATISTICS)
@pytest.mark.parametrize("factor", [1 / 8, 8])
def test_each_control_sees_its_own_statistic_on_either_side_and_no_other(name, factor):
    train, test, changed = observations(400), observations(200, 1), observations(200, 2, **{name: factor})
    found = {each: detectors.create(each).fit(train) for each in PIXEL_CONTROLS}
    auroc = {n: capsae.metrics.auroc(d.score(test), d.score(changed)) for n, d in found.items()}
    assert auroc[name] > 0.95 and auroc["pixel_statistics"] > 0.85
    assert all(0.35 < value < 0.65 for n, value in auroc.items() if n not in (name, "pixel_statistics"))


def test_deviation_is_in_units_of_the_mad():
    train, test = observations(101), observations(50, 1)
    at = PIXEL_STATISTICS.index("brightness")
    values, own = train.pixels[:, at].astype(float), test.pixels[:, at].astype(float)
    mad = np.median(np.abs(values - np.median(values)))
    score = detectors.create("brightness").fit(train).score(test)
    np.testing.assert_allclose(score, np.abs(own - np.median(values)) / mad, rtol=1e-12)
    size = PIXEL_STATISTICS.index("file_size")
    values, own = np.log(train.pixels[:, size].astype(float)), np.log(test.pixels[:, size].astype(float))
    mad = np.median(np.abs(values - np.median(values)))
    np.testing.assert_allclose(
        detectors.create("file_size").fit(train).score(test), np.abs(own - np.median(values)) / mad, rtol=1e-12
    )


def test_equal_sizes_score_zero_and_stay_finite():
    train, test = observations(50), observations(20, 1)
    assert (detectors.create("image_size").fit(train).score(test) == 0).all()
    assert np.isfinite(detectors.create("pixel_statistics").fit(train).score(test)).all()


def test_combined_control_is_the_mahalanobis_distance():
    train, test = observations(300), observations(40, 1)

    def logs(obs):
        x = obs.pixels.astype(float)
        x[:, 4] += 1
        x[:, :5] = np.log(x[:, :5])
        return x

    x, z = logs(train), logs(test)
    scale = np.where(x.std(0) > 1e-9, x.std(0), 1)
    x, z = (x - x.mean(0)) / scale, (z - x.mean(0)) / scale
    inverse = np.linalg.inv(x.T @ x / len(x) + 0.01 * np.eye(8))
    expected = np.einsum("nd,de,ne->n", z, inverse, z)
    found = detectors.create("pixel_statistics", ridge=0.01).fit(train).score(test)
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    with pytest.raises(ValueError, match="ridge is 0"):
        detectors.create("pixel_statistics", ridge=0).fit(train)


def test_feature_norm_is_two_sided():
    train = capsae.Observations(np.random.default_rng(0).normal(size=(200, 30)))
    detector = detectors.create("feature_norm").fit(train)
    score = detector.score(capsae.Observations(np.stack([train.cls[0] * 0.01, train.cls[0] * 9])))
    assert score.min() > detector.score(train).max()


def test_what_is_missing_is_said():
    bare = capsae.Observations(np.zeros((3, 2)))
    with pytest.raises(ValueError, match="give pixels to Observations"):
        detectors.create("sharpness").fit(bare)
    with pytest.raises(ValueError, match="pixels has 2 columns, expected 8: file_size"):
        detectors.create("sharpness").fit(capsae.Observations(np.zeros((3, 2)), pixels=np.ones((3, 2))))
    with pytest.raises(ValueError, match="pixels: file_size is not positive in row 1"):
        broken = np.ones((3, 8))
        broken[1, 0] = 0
        detectors.create("sharpness").fit(capsae.Observations(np.zeros((3, 2)), pixels=broken))
    with pytest.raises(ValueError, match="pixels has 4 rows, cls 3"):
        capsae.Observations(np.zeros((3, 2)), pixels=np.ones((4, 8)))
    with pytest.raises(ValueError, match="pixels holds NaN or infinity in 1 rows, the first is row 2"):
        capsae.Observations(np.zeros((3, 2)), pixels=np.array([[1.0], [2.0], [np.nan]]))


def test_rows_of_pixels_follow_take():
    obs = observations(9)
    assert (obs.take([5, 2]).pixels == obs.pixels[[5, 2]]).all()


# --- the verdict


def table(**values):
    rows = [
        (name, where, "far", metric, value if metric == "auroc" else 1 - value)
        for name, pair in values.items()
        for where, value in zip(("far/a", "far/b"), pair, strict=True)
        for metric in ("auroc", "fpr95_id_pos")
    ]
    return pd.DataFrame(rows, columns=["method", "set", "group", "metric", "value"])


@pytest.mark.parametrize("metric", ["auroc", "fpr95_id_pos"])
def test_a_table_in_which_a_pixel_control_wins_is_broken(metric):
    found = pixel_controls_verdict(
        table(msp=(0.9, 0.8), mds=(0.7, 0.95), sharpness=(0.6, 0.97), aspect=(0.5, 0.5)), metric
    )
    assert found["broken"].tolist() == [False, True]
    assert found["control"].tolist() == ["sharpness"] * 2 and found["method"].tolist() == ["msp", "mds"]


def test_verdict_of_tables_without_controls_or_methods():
    assert pixel_controls_verdict(table(msp=(0.9, 0.8))).empty
    with pytest.raises(ValueError, match="far/a: the table holds pixel controls alone"):
        pixel_controls_verdict(table(aspect=(0.9, 0.8)))
    with pytest.raises(ValueError, match="metric is 'fpr95'"):
        pixel_controls_verdict(table(aspect=(0.9, 0.8)), "fpr95")
    tied = pixel_controls_verdict(table(msp=(0.9, 0.8), contrast=(0.9, 0.1)))
    assert tied["broken"].tolist() == [False, False], "where both are perfect, nothing is decided"
