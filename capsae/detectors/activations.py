"""Baselines that edit the feature, or compare it with stored activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from scipy.special import logsumexp

from .base import Detector, Observations, register
from .distances import class_means


@register("react")
@dataclass
class ReAct(Detector):
    """Energy of the logits after clipping the feature at a percentile of all training activations."""

    title: ClassVar[str] = "ReAct"
    group: ClassVar[str] = "baseline"
    formula: ClassVar[str] = r"-\log\sum_c \exp(W\min(z,t)+b)_c"
    source: ClassVar[str] = "sun2021react"
    needs: ClassVar[tuple[str, ...]] = ("features", "head")
    percentile: float = 90.0

    def __post_init__(self):
        if not 0 < self.percentile <= 100:
            raise ValueError(f"percentile is {self.percentile}: use a number in (0, 100]")

    def fit(self, obs: Observations) -> Detector:
        obs.require_head()
        self._threshold = np.percentile(obs.cls, self.percentile)
        return self

    def score(self, obs: Observations) -> np.ndarray:
        weight, bias = obs.require_head()
        return -logsumexp(np.minimum(obs.cls, self._threshold).astype(np.float64) @ weight.T + bias, axis=1)


@register("she")
@dataclass
class SHE(Detector):
    """Inner product with the mean correctly classified training feature of the predicted class.

    A class without a correctly classified training row takes the mean of all its rows (our choice).
    """

    title: ClassVar[str] = "SHE"
    group: ClassVar[str] = "baseline"
    formula: ClassVar[str] = r"-\langle z, \bar z_{\hat y}\rangle"
    source: ClassVar[str] = "zhang2023she"
    needs: ClassVar[tuple[str, ...]] = ("features", "logits", "labels")

    def fit(self, obs: Observations) -> Detector:
        n_classes = obs.logits.shape[1]
        labels = obs.require_labels(n_classes)
        hit = obs.predicted == labels
        missed = np.bincount(labels[hit], minlength=n_classes) == 0
        rows = hit | missed[labels]
        self._patterns = class_means(obs.cls[rows].astype(np.float64), labels[rows], n_classes)
        return self

    def score(self, obs: Observations) -> np.ndarray:
        return -(obs.cls * self._patterns[obs.predicted]).sum(axis=1)
