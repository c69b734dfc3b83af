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

from ..images import PIXEL_STATISTICS
from ..metrics import HIGHER_IS_BETTER
from .base import Detector, Observations, register

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
class Deviation(Detector):
    """Absolute deviation from the ID training median in units of the median absolute deviation (two-sided).

    Where the training rows are all alike (a benchmark whose images have one size) the unit is their standard deviation,
    or 1 if that is 0, too: then rows that are like them score 0 and all others more.
    """

    group: ClassVar[str] = "control"
    source: ClassVar[str] = "our control"

    def fit(self, obs: Observations, validation: Observations | None = None) -> Deviation:
        values = self.values(obs)
        self.median_ = float(np.median(values))
        self.scale_ = float(np.median(np.abs(values - self.median_))) or float(values.std()) or 1.0
        return self

    def score(self, obs: Observations) -> np.ndarray:
        return np.abs(self.values(obs) - self.median_) / self.scale_

    def values(self, obs: Observations) -> np.ndarray:
        """(N,) float64: what is compared with its median."""
        raise TypeError(f"{type(self).__name__} defines no values")


@dataclass
class _PixelControl(Deviation):
    statistic: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ("pixels",)

    def values(self, obs: Observations) -> np.ndarray:
        return _statistics(obs)[:, PIXEL_STATISTICS.index(self.statistic)]


@register("file_size")
@dataclass
class FileSize(_PixelControl):
    """Bytes of the encoded image, on a logarithmic scale."""

    title: ClassVar[str] = "File size"
    formula: ClassVar[str] = r"|\log b - \mathrm{med}| / \mathrm{MAD}, \quad b \text{ bytes of the file}"
    statistic: ClassVar[str] = "file_size"


@register("bytes_per_pixel")
@dataclass
class BytesPerPixel(_PixelControl):
    """Bytes of the encoded image over its pixels, on a logarithmic scale: how hard it was compressed."""

    title: ClassVar[str] = "Bytes per pixel"
    formula: ClassVar[str] = r"|\log (b / WH) - \mathrm{med}| / \mathrm{MAD}"
    statistic: ClassVar[str] = "bytes_per_pixel"


@register("image_size")
@dataclass
class ImageSize(_PixelControl):
    """Number of pixels, on a logarithmic scale."""

    title: ClassVar[str] = "Image size"
    formula: ClassVar[str] = r"|\log WH - \mathrm{med}| / \mathrm{MAD}"
    statistic: ClassVar[str] = "image_size"


@register("aspect")
@dataclass
class Aspect(_PixelControl):
    """Width over height, on a logarithmic scale."""

    title: ClassVar[str] = "Aspect ratio"
    formula: ClassVar[str] = r"|\log (W / H) - \mathrm{med}| / \mathrm{MAD}"
    statistic: ClassVar[str] = "aspect"


@register("sharpness")
@dataclass
class Sharpness(_PixelControl):
    """Variance of the Laplacian, on a logarithmic scale: enlarged and blurred images have little."""

    title: ClassVar[str] = "Sharpness"
    formula: ClassVar[str] = r"|\log (1 + \mathrm{Var} \Delta g) - \mathrm{med}| / \mathrm{MAD}, \quad g \text{ grey}"
    statistic: ClassVar[str] = "sharpness"


@register("brightness")
@dataclass
class Brightness(_PixelControl):
    """Mean of the grey image."""

    title: ClassVar[str] = "Brightness"
    formula: ClassVar[str] = r"|\bar g - \mathrm{med}| / \mathrm{MAD}"
    statistic: ClassVar[str] = "brightness"


@register("contrast")
@dataclass
class Contrast(_PixelControl):
    """Standard deviation of the grey image."""

    title: ClassVar[str] = "Contrast"
    formula: ClassVar[str] = r"|\sigma_g - \mathrm{med}| / \mathrm{MAD}"
    statistic: ClassVar[str] = "contrast"


@register("colourfulness")
@dataclass
class Colourfulness(_PixelControl):
    """Spread and mean of the two opponent colours, after Hasler and Suesstrunk."""

    title: ClassVar[str] = "Colourfulness"
    formula: ClassVar[str] = (
        r"|M - \mathrm{med}| / \mathrm{MAD}, \quad M = \|(\sigma_{rg}, \sigma_{yb})\| + 0.3 \|(\mu_{rg}, \mu_{yb})\|"
    )
    statistic: ClassVar[str] = "colourfulness"


@register("pixel_statistics")
@dataclass
class PixelStatistics(Detector):
    """All pixel statistics together: Mahalanobis distance to their ID training mean, classes left out of account.

    Parameters
    ----------
    ridge : float
        Added to the variance of each standardised statistic. It keeps the distance finite where one follows from
        another, and lets a statistic count in which the training rows are all alike.
    """

    title: ClassVar[str] = "Pixel statistics"
    group: ClassVar[str] = "control"
    formula: ClassVar[str] = r"(s - \mu)^\top (\Sigma + r I)^{-1} (s - \mu), \quad s \text{ standardised statistics}"
    source: ClassVar[str] = "our control"
    needs: ClassVar[tuple[str, ...]] = ("pixels",)

    ridge: float = 1e-3

    def fit(self, obs: Observations, validation: Observations | None = None) -> PixelStatistics:
        if self.ridge <= 0:
            raise ValueError(f"ridge is {self.ridge}; a number over 0 would do, such as 0.001")
        values = _statistics(obs)
        self.mean_, std = values.mean(axis=0), values.std(axis=0)
        self.scale_ = np.where(std > 1e-9, std, 1.0)  # of equal values, rounding leaves about 1e-15
        unit = (values - self.mean_) / self.scale_
        variances, axes = np.linalg.eigh(unit.T @ unit / len(unit) + self.ridge * np.eye(values.shape[1]))
        self.whiten_ = axes / np.sqrt(variances)
        return self

    def score(self, obs: Observations) -> np.ndarray:
        return np.square((_statistics(obs) - self.mean_) / self.scale_ @ self.whiten_).sum(axis=1)


@register("feature_norm")
@dataclass
class FeatureNorm(Deviation):
    """Length of the feature vector: what is left of the features when their direction is taken away."""

    title: ClassVar[str] = "Feature norm"
    formula: ClassVar[str] = r"|\|z\| - \mathrm{med}| / \mathrm{MAD}"
    needs: ClassVar[tuple[str, ...]] = ("features",)

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
        method, method_value (the best of all others), broken (True where the control does better), and words,
        a sentence. Empty where the table holds no pixel control.

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
        name = where if where != "mean" else f"mean of {group} sets"
        told = f"{best[0]['method']} {best[0]['value']:.3f}, {best[1]['method']} {best[1]['value']:.3f}"
        words = f"{name}: {'broken, pixel statistics win' if broken else 'no pixel control wins'} ({metric}: {told})"
        rows.append((where, group, *(each[key] for each in best for key in ("method", "value")), broken, words))
    return pd.DataFrame(
        rows, columns=["set", "group", "control", "control_value", "method", "method_value", "broken", "words"]
    )
