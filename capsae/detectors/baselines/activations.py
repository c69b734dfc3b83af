"""Baselines that edit the feature or the head before the energy is taken."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..base import Detector, register
from ..observations import Observations
from .maths import both, free_energy, keep_largest, mean_row

_LARGEST_RATIO = 50.0


@register("react")
@dataclass
class ReAct(Detector):
    """Energy of the logits after clipping the feature at a percentile of all ID activations.

    The percentile is that of the validation rows, as in OpenOOD, or of the training rows where there are none.
    """

    title, source = "ReAct", "sun2021react"
    formula = r"-\log\sum_c \exp(W\min(z,t)+b)_c"
    needs, fitted_on = ("features", "head"), "validation"
    presets = {"openood": {}}
    percentile: float = 90.0

    def __post_init__(self):
        if not 0 < self.percentile <= 100:
            raise ValueError(f"percentile is {self.percentile}: use a number in (0, 100]")

    def fit(self, obs: Observations, validation: Observations | None = None) -> Detector:
        rows = obs if validation is None or not len(validation) else validation
        rows.require_head()
        self._threshold = np.percentile(rows.cls, self.percentile)
        return self

    def _score(self, obs: Observations) -> np.ndarray:
        return free_energy(obs.head_logits(np.minimum(obs.cls, obs.cls.dtype.type(self._threshold))))


@dataclass
class _Shaped(Detector):
    """What ASH and SCALE share: the k = d - round(d percentile / 100) largest entries of a feature.

    s1 / s2 is bounded, which the features of a ReLU network hardly reach, or a sum near zero would give infinity.
    """

    needs, fitted_on = ("features", "head"), "nothing"
    percentile: float = 90.0

    def __post_init__(self):
        if not 0 <= self.percentile < 100:
            raise ValueError(f"percentile is {self.percentile}: use a number in [0, 100), or no activation is left")

    def _kept(self, z: np.ndarray) -> int:
        d = z.shape[1]
        kept = d - int(np.round(d * self.percentile / 100))
        if kept < 1:
            raise ValueError(
                f"percentile is {self.percentile}: that leaves none of {d} activations, "
                f"use at most {100 * (1 - 1 / d):.4g}"
            )
        return kept

    def _ratio(self, z: np.ndarray, largest: np.ndarray) -> np.ndarray:
        """exp(s1 / s2), (N, 1), in the precision of z."""
        s1, s2 = z.sum(axis=1, dtype=np.float64), largest.sum(axis=1, dtype=np.float64)
        ratio = np.divide(s1, s2, out=np.zeros_like(s1), where=s2 != 0)
        return np.exp(np.clip(ratio, -_LARGEST_RATIO, _LARGEST_RATIO))[:, None].astype(z.dtype)


@register("ash_b")
@dataclass
class ASHB(_Shaped):
    """Energy after the smallest activations are set to 0 and the k others to the sum of all over k.

    Of equal activations at the border the first are kept. OpenOOD's "ASH" is this one.
    """

    title, source = "ASH-B", "djurisic2023ash"
    formula = r"-\log\sum_c \exp\bigl(W(\tfrac{\sum z}{k}[z\in\text{top }k])+b\bigr)_c"
    presets = {"openood": {}}

    def _score(self, obs: Observations) -> np.ndarray:
        z, k = obs.cls, self._kept(obs.cls)
        level = (z.sum(axis=1, keepdims=True, dtype=np.float64) / k).astype(z.dtype)
        return free_energy(obs.head_logits(np.where(keep_largest(z, k), level, z.dtype.type(0))))


@register("ash_p")
@dataclass
class ASHP(_Shaped):
    """Energy after the smallest activations are set to 0, the others left as they are."""

    title, source = "ASH-P", "djurisic2023ash"
    formula = r"-\log\sum_c \exp\bigl(W(z[z\in\text{top }k])+b\bigr)_c"

    def _score(self, obs: Observations) -> np.ndarray:
        z = obs.cls
        return free_energy(obs.head_logits(np.where(keep_largest(z, self._kept(z)), z, z.dtype.type(0))))


@register("ash_s")
@dataclass
class ASHS(_Shaped):
    """Energy after the smallest activations are set to 0 and the k others multiplied by exp(s1 / s2).

    s1 is the sum of all activations, s2 that of the k kept; the ratio is held within +-50.
    """

    title, source = "ASH-S", "djurisic2023ash"
    formula = r"-\log\sum_c \exp\bigl(W(e^{s_1/s_2}z[z\in\text{top }k])+b\bigr)_c"
    percentile: float = 65.0

    def _score(self, obs: Observations) -> np.ndarray:
        z = obs.cls
        kept = np.where(keep_largest(z, self._kept(z)), z, z.dtype.type(0))
        return free_energy(obs.head_logits(kept * self._ratio(z, kept)))


@register("scale")
@dataclass
class SCALE(_Shaped):
    """Energy of the feature multiplied by exp(s1 / s2); nothing is pruned.

    s1 is the sum of all activations, s2 that of the k largest; the ratio is held within +-50.
    """

    title, source = "SCALE", "xu2024scale"
    formula = r"-\log\sum_c \exp\bigl(e^{s_1/s_2}Wz+b\bigr)_c"
    presets = {"openood": {}}
    percentile: float = 85.0

    def _score(self, obs: Observations) -> np.ndarray:
        z, k = obs.cls, self._kept(obs.cls)
        largest = np.partition(z, z.shape[1] - k, axis=1)[:, z.shape[1] - k :]
        return free_energy(obs.head_logits(z * self._ratio(z, largest)))


@register("dice")
@dataclass
class DICE(Detector):
    """Energy with the head's weights cut to those that contribute most, W times the mean training feature.

    ``percentile`` of the C d contributions are cut.
    """

    title, source = "DICE", "sun2022dice"
    formula = r"-\log\sum_c \exp\bigl((W\odot[W\odot\bar z>t])z+b\bigr)_c"
    needs = ("features", "head")
    presets = {"openood": {}}
    percentile: float = 90.0

    def __post_init__(self):
        if not 0 <= self.percentile < 100:
            raise ValueError(f"percentile is {self.percentile}: use a number in [0, 100), or no weight is left")

    def fit(self, obs: Observations, validation: Observations | None = None) -> Detector:
        weight, bias = obs.require_head()
        self._bias = both(bias)
        contribution = weight * mean_row(obs, lambda block: block.cls64)
        self._weight = both(np.where(contribution > np.percentile(contribution, self.percentile), weight, 0))
        return self

    def _score(self, obs: Observations) -> np.ndarray:
        kind = obs.cls.dtype
        return free_energy(obs.cls @ self._weight[kind].T + self._bias[kind])
