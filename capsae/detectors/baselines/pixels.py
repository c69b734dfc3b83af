"""Controls that do not look at what an image shows: statistics of its file and pixels, and the norm of its features.

A benchmark whose OOD images differ from the ID ones in size, compression, blur or colour can be won without any
understanding. Each statistic is a detector of its own: how far does it lie from its ID training median, on either side?
Nothing is fitted to OOD images and no direction is chosen after looking. :func:`pixel_controls_verdict` says of a table
where such a control wins: there the benchmark is broken, whatever the other rows say.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pandas as pd

from ...data.images import PIXEL_STATISTICS
from ...metrics import HIGHER_IS_BETTER
from ..base import Control, register
from ..observations import Observations
from .maths import whitening

_RATIOS = ("file_size", "bytes_per_pixel", "image_size", "aspect", "sharpness")  # twice as much is as far as half


def _statistics(obs: Observations) -> np.ndarray:
    """(N, P) float64, ratios as logarithms."""
    if obs.pixels is None:
        raise ValueError("this control reads the images themselves: give pixels to Observations(...)")
    if obs.pixels.shape[1] != len(PIXEL_STATISTICS):
        raise ValueError(
            f"pixels has {obs.pixels.shape[1]} columns, expected {len(PIXEL_STATISTICS)}: {', '.join(PIXEL_STATISTICS)}"
        )
    values = obs.pixels.astype(np.float64)
    ratios = [PIXEL_STATISTICS.index(name) for name in _RATIOS]
    sharpness = PIXEL_STATISTICS.index("sharpness")
    values[:, sharpness] += 1  # an image of one colour has 0
    if (values[:, ratios] <= 0).any():
        column, row = next((c, int((values[:, c] <= 0).argmax())) for c in ratios if (values[:, c] <= 0).any())
        raise ValueError(f"pixels: {PIXEL_STATISTICS[column]} is not positive in row {row}")
    values[:, ratios] = np.log(values[:, ratios])
    return values


@dataclass
class Deviation(Control):
    """Absolute deviation of ``values(obs)`` (N,) from the ID training median over the median absolute deviation.

    Where the training rows are all alike (a benchmark whose images have one size) the unit is their standard deviation,
    or 1 if that is 0, too: then rows that are like them score 0 and all others more.
    """

    def fit(self, obs: Observations, validation: Observations | None = None) -> Deviation:
        values = self.values(obs)
        self.median_ = float(np.median(values))
        self.scale_ = float(np.median(np.abs(values - self.median_))) or float(values.std()) or 1.0
        return self

    def score(self, obs: Observations) -> np.ndarray:
        return np.abs(self.values(obs) - self.median_) / self.scale_


@dataclass
class _PixelControl(Deviation):
    statistic: ClassVar[str]
    needs = ("pixels",)

    def values(self, obs: Observations) -> np.ndarray:
        return _statistics(obs)[:, PIXEL_STATISTICS.index(self.statistic)]


_OF_ONE_STATISTIC = {  # name: title, value that is compared (TeX), description
    "file_size": ("File size", r"\log b", "Bytes b of the encoded image, on a logarithmic scale."),
    "bytes_per_pixel": (
        "Bytes per pixel",
        r"\log (b / WH)",
        "Bytes b of the encoded image over its pixels, on a logarithmic scale: how hard it was compressed.",
    ),
    "image_size": ("Image size", r"\log WH", "Number of pixels, on a logarithmic scale."),
    "aspect": ("Aspect ratio", r"\log (W / H)", "Width over height, on a logarithmic scale."),
    "sharpness": (
        "Sharpness",
        r"\log (1 + \mathrm{Var} \Delta g)",
        "Variance of the grey image's Laplacian, on a logarithmic scale: enlarged and blurred images have little.",
    ),
    "brightness": ("Brightness", r"\bar g", "Mean of the grey image g."),
    "contrast": ("Contrast", r"\sigma_g", "Standard deviation of the grey image g."),
    "colourfulness": (
        "Colourfulness",
        r"\|(\sigma_{rg}, \sigma_{yb})\| + 0.3 \|(\mu_{rg}, \mu_{yb})\|",
        "Spread and mean of the two opponent colours, after Hasler and Suesstrunk.",
    ),
}
for _name, (_title, _value, _about) in _OF_ONE_STATISTIC.items():
    _own = {"title": _title, "formula": rf"|{_value} - \mathrm{{med}}| / \mathrm{{MAD}}", "statistic": _name}
    register(_name)(type(_title.title().replace(" ", ""), (_PixelControl,), {"__doc__": _about, **_own}))


@register("pixel_statistics")
@dataclass
class PixelStatistics(Control):
    """All pixel statistics together: Mahalanobis distance to their ID training mean, classes left out of account.

    Parameters
    ----------
    ridge : float
        Added to the variance of each standardised statistic. It keeps the distance finite where one follows from
        another, and lets a statistic count in which the training rows are all alike.
    """

    title = "Pixel statistics"
    formula = r"(s - \mu)^\top (\Sigma + r I)^{-1} (s - \mu), \quad s \text{ standardised statistics}"
    needs = ("pixels",)

    ridge: float = 1e-3

    def fit(self, obs: Observations, validation: Observations | None = None) -> PixelStatistics:
        if self.ridge <= 0:
            raise ValueError(f"ridge is {self.ridge}; a number over 0 would do, such as 0.001")
        values = _statistics(obs)
        self.mean_, std = values.mean(axis=0), values.std(axis=0)
        self.scale_ = np.where(std > 1e-9, std, 1.0)  # of equal values, rounding leaves about 1e-15
        unit = (values - self.mean_) / self.scale_
        self.whiten_ = whitening(unit.T @ unit / len(unit) + self.ridge * np.eye(values.shape[1]))
        return self

    def score(self, obs: Observations) -> np.ndarray:
        return np.square((_statistics(obs) - self.mean_) / self.scale_ @ self.whiten_).sum(axis=1)


@register("feature_norm")
@dataclass
class FeatureNorm(Deviation):
    """Length of the feature vector: what is left of the features when their direction is taken away."""

    title = "Feature norm"
    formula = r"|\|z\| - \mathrm{med}| / \mathrm{MAD}"
    needs = ("features",)

    def values(self, obs: Observations) -> np.ndarray:
        return np.linalg.norm(obs.cls.astype(np.float64), axis=1)


PIXEL_CONTROLS = (*PIXEL_STATISTICS, "pixel_statistics")
"""Detectors that know nothing but pixel statistics."""


def pixel_controls_verdict(table: pd.DataFrame, metric: str = "auroc") -> pd.DataFrame:
    """Where does a control that never looks at what an image shows do better than every score? A tie is no win.

    Parameters
    ----------
    table : DataFrame
        Of :func:`capsae.evaluate`: method, set, group, metric, value.
    metric : str
        One of :data:`capsae.metrics.METRICS`.

    Returns
    -------
    DataFrame
        A row a set, and a row for each mean over sets: set, group, control, control_value (the best pixel control),
        method, method_value (the best of all others), broken (True where the control does better). Empty where the
        table holds no pixel control.

    Raises
    ------
    ValueError
        For an unknown metric, or a table without any other method.
    """
    if metric not in HIGHER_IS_BETTER:
        raise ValueError(f"metric is {metric!r}; one of {', '.join(HIGHER_IS_BETTER)} would do")
    sign = 1 if HIGHER_IS_BETTER[metric] else -1
    rows = []
    for (where, group), part in table[table["metric"] == metric].groupby(["set", "group"], sort=False):
        is_control = part["method"].isin(PIXEL_CONTROLS)
        if not is_control.any():
            continue
        if is_control.all():
            raise ValueError(f"{where}: the table holds pixel controls alone, so there is nothing to compare them with")
        best = [each.loc[(sign * each["value"]).idxmax()] for each in (part[is_control], part[~is_control])]
        broken = bool(sign * best[0]["value"] > sign * best[1]["value"])
        rows.append((where, group, *(each[key] for each in best for key in ("method", "value")), broken))
    return pd.DataFrame(rows, columns=["set", "group", "control", "control_value", "method", "method_value", "broken"])
