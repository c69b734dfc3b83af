"""Baselines that read the logits alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import brentq
from scipy.special import softmax

from ..base import Detector, register
from ..observations import Observations
from .maths import both, class_sums, free_energy

_LOG_ZERO = float(np.log(np.nextafter(0, 1)))  # stands for log 0: the smallest logarithm of a float64
_TEMPERATURES = (0.05, 20.0)


@register("msp")
@dataclass
class MSP(Detector):
    """Maximum softmax probability."""

    title, source = "MSP", "hendrycks2017baseline"
    formula = r"-\max_c p_c"
    needs, fitted_on = ("logits",), "nothing"
    presets = {"openood": {}}

    def _score(self, obs: Observations) -> np.ndarray:
        return -1 / obs.exponentials[2]


@register("tempscale")
@dataclass
class TempScale(Detector):
    """MSP at the temperature that minimises the negative log-likelihood of ID validation rows.

    Without labelled validation rows the training rows are taken, which the head has seen: the temperature is then too
    low. The optimum is found exactly, within 0.05 to 20; OpenOOD and pytorch-ood make 50 steps of L-BFGS towards it.
    ``temperature`` sets it by hand (None: fit).
    """

    title, source = "TempScale", "guo2017calibration"
    formula = r"-\max_c \mathrm{softmax}(l/T)_c,\; T=\arg\min_T \mathrm{NLL}_{\mathrm{val}}(T)"
    needs, fitted_on = ("logits", "labels"), "validation"
    presets = {"openood": {}}
    temperature: float | None = None

    def __post_init__(self):
        if self.temperature is not None and not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}: use a number above 0, or None to fit it")

    def fit(self, obs: Observations, validation: Observations | None = None) -> Detector:
        self._temperature = self.temperature
        if self.temperature is None:
            rows = obs
            if validation is not None and validation.labels is not None:
                rows = validation.take(validation.labels >= 0)  # -1 is none
            rows.require_labels(rows.logits.shape[1])
            low, high = (1 / t for t in reversed(_TEMPERATURES))
            if _slope(rows, low) >= 0:
                self._temperature = 1 / low
            elif _slope(rows, high) <= 0:
                self._temperature = 1 / high
            else:
                self._temperature = 1 / brentq(lambda inverse: _slope(rows, inverse), low, high, xtol=1e-12)
        return self

    def _score(self, obs: Observations) -> np.ndarray:
        largest = obs.logits.max(axis=1, keepdims=True)
        scaled = (obs.logits - largest) / np.asarray(self._temperature, obs.logits.dtype)
        return -1 / np.exp(scaled).sum(axis=1, dtype=np.float64)


def _slope(rows: Observations, inverse: float) -> float:
    """Slope of the mean negative log-likelihood in 1/T, in which it is convex."""
    total = 0.0
    for block in rows.blocks():
        shifted = block.logits - block.logits.max(axis=1, keepdims=True)
        weight = np.exp(shifted * shifted.dtype.type(inverse))
        mean = (weight * shifted).sum(axis=1, dtype=np.float64) / weight.sum(axis=1, dtype=np.float64)
        total += (mean - shifted[np.arange(len(mean)), block.labels]).sum()
    return total / len(rows)


@register("maxlogit")
@dataclass
class MaxLogit(Detector):
    """Largest logit."""

    title, source = "MaxLogit", "hendrycks2022scaling"
    formula = r"-\max_c l_c"
    needs, fitted_on = ("logits",), "nothing"
    presets = {"openood": {}}

    def _score(self, obs: Observations) -> np.ndarray:
        return -obs.logits.max(axis=1).astype(np.float64)


@register("energy")
@dataclass
class Energy(Detector):
    """Free energy of the logits at a temperature."""

    title, source = "Energy", "liu2020energy"
    formula = r"-T\log\sum_c e^{l_c/T}"
    needs, fitted_on = ("logits",), "nothing"
    presets = {"openood": {}}
    temperature: float = 1.0

    def __post_init__(self):
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}: use a number above 0")

    def _score(self, obs: Observations) -> np.ndarray:
        if self.temperature == 1:
            return obs.free_energy
        return self.temperature * free_energy(obs.logits / np.asarray(self.temperature, obs.logits.dtype))


@register("entropy")
@dataclass
class Entropy(Detector):
    """Entropy of the softmax, in nats."""

    title, source = "Entropy", "chan2021entropy"
    formula = r"-\sum_c p_c\log p_c"
    needs, fitted_on = ("logits",), "nothing"

    def _score(self, obs: Observations) -> np.ndarray:
        return softmax_entropy(obs)


def softmax_entropy(obs: Observations) -> np.ndarray:
    """(N,) float64: log of the sum less the mean shifted logit, both of one sign, so that nothing cancels."""
    largest, exp, total = obs.exponentials
    shifted = obs.logits - largest[:, None].astype(exp.dtype)
    shifted *= exp
    return np.log(total) - shifted.sum(axis=1, dtype=np.float64) / total


@register("gen")
@dataclass
class GEN(Detector):
    """Generalised entropy of the largest probabilities; with fewer classes than ``top`` all of them are taken.

    pytorch-ood takes the mean instead of the sum and keeps probabilities off 0 and 1 by 1e-7, which at this power
    counts: its score is another one.
    """

    title, source = "GEN", "liu2023gen"
    formula = r"\sum_{c\in\text{top }m} p_c^\gamma(1-p_c)^\gamma"
    needs, fitted_on = ("logits",), "nothing"
    presets = {"openood": {}}
    gamma: float = 0.1
    top: int = 100

    def __post_init__(self):
        if not self.gamma > 0:
            raise ValueError(f"gamma is {self.gamma}: use a number above 0")
        if self.top < 1:
            raise ValueError(f"top is {self.top}: use at least 1")

    def _score(self, obs: Observations) -> np.ndarray:
        _, exp, total = obs.exponentials
        if self.top < exp.shape[1]:
            exp = np.partition(exp, exp.shape[1] - self.top, axis=1)[:, -self.top :]
        p = exp / total[:, None].astype(exp.dtype)
        # 1 - p of the largest from the sum, or float32 would take a probability of 1 - 1e-12 for 1.
        of_largest = (np.maximum(total - 1, 0) / total)[:, None].astype(exp.dtype)
        powers = (p * np.where(exp == 1, of_largest, 1 - p)) ** exp.dtype.type(self.gamma)
        return powers.sum(axis=1, dtype=np.float64)


@register("klm")
@dataclass
class KLMatching(Detector):
    """KL divergence to the nearest mean softmax of the ID rows predicted as one class.

    The means are made from validation rows, as OpenOOD does, or from the training rows where there are none, as NINCO
    does. A class that the head predicts for none of them has no mean and is left out, as in pytorch-ood. A mean of 0
    counts as the smallest float64, so that the score stays finite.
    """

    title, source = "KL matching", "hendrycks2022scaling"
    formula = r"\min_k \mathrm{KL}(p\Vert d_k),\; d_k=\mathrm{mean}\{p : \arg\max p=k\}"
    needs, fitted_on = ("logits",), "validation"
    presets = {"openood": {}}

    def fit(self, obs: Observations, validation: Observations | None = None) -> Detector:
        rows = obs if validation is None or not len(validation) else validation
        total: Any = 0.0
        counts: Any = 0
        for block in rows.blocks():
            p = softmax(block.logits.astype(np.float64), axis=1)
            predicted = block.logits.argmax(axis=1)
            total = total + class_sums(p, predicted, p.shape[1])
            counts = counts + np.bincount(predicted, minlength=p.shape[1])
        typical = total[counts > 0] / counts[counts > 0, None]
        self._log_typical = both(np.log(typical, out=np.full_like(typical, _LOG_ZERO), where=typical > 0).T)
        return self

    def _score(self, obs: Observations) -> np.ndarray:
        p = obs.softmax
        cross = -(p @ self._log_typical[p.dtype]).max(axis=1).astype(np.float64)
        return np.maximum(cross - softmax_entropy(obs), 0)
