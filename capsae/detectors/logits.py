"""Baselines that read the logits alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from scipy.special import logsumexp, softmax

from .base import Detector, Observations, register


@register("msp")
@dataclass
class MSP(Detector):
    """Maximum softmax probability."""

    title: ClassVar[str] = "MSP"
    group: ClassVar[str] = "baseline"
    formula: ClassVar[str] = r"-\max_c p_c"
    source: ClassVar[str] = "hendrycks2017baseline"
    needs: ClassVar[tuple[str, ...]] = ("logits",)

    def score(self, obs: Observations) -> np.ndarray:
        return -softmax(obs.logits.astype(np.float64), axis=1).max(axis=1)


@register("maxlogit")
@dataclass
class MaxLogit(Detector):
    """Largest logit."""

    title: ClassVar[str] = "MaxLogit"
    group: ClassVar[str] = "baseline"
    formula: ClassVar[str] = r"-\max_c l_c"
    source: ClassVar[str] = "hendrycks2022scaling"
    needs: ClassVar[tuple[str, ...]] = ("logits",)

    def score(self, obs: Observations) -> np.ndarray:
        return -obs.logits.astype(np.float64).max(axis=1)


@register("energy")
@dataclass
class Energy(Detector):
    """Free energy of the logits at a temperature."""

    title: ClassVar[str] = "Energy"
    group: ClassVar[str] = "baseline"
    formula: ClassVar[str] = r"-T\log\sum_c e^{l_c/T}"
    source: ClassVar[str] = "liu2020energy"
    needs: ClassVar[tuple[str, ...]] = ("logits",)
    temperature: float = 1.0

    def __post_init__(self):
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}: use a number above 0")

    def score(self, obs: Observations) -> np.ndarray:
        return -self.temperature * logsumexp(obs.logits.astype(np.float64) / self.temperature, axis=1)


@register("gen")
@dataclass
class GEN(Detector):
    """Generalised entropy of the largest probabilities; with fewer classes than ``top`` all of them are taken."""

    title: ClassVar[str] = "GEN"
    group: ClassVar[str] = "baseline"
    formula: ClassVar[str] = r"\sum_{c\in\text{top }m} p_c^\gamma(1-p_c)^\gamma"
    source: ClassVar[str] = "liu2023gen"
    needs: ClassVar[tuple[str, ...]] = ("logits",)
    gamma: float = 0.1
    top: int = 100

    def __post_init__(self):
        if not 0 < self.gamma < 1:
            raise ValueError(f"gamma is {self.gamma}: use a number between 0 and 1")
        if self.top < 1:
            raise ValueError(f"top is {self.top}: use at least 1")

    def score(self, obs: Observations) -> np.ndarray:
        p = np.sort(softmax(obs.logits.astype(np.float64), axis=1), axis=1)[:, ::-1][:, : self.top]
        return (p**self.gamma * (1 - p) ** self.gamma).sum(axis=1)
