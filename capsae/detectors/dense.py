"""Relative Profile Divergence without a dictionary: what of it is the score, and what the sparse code."""

from __future__ import annotations

import numpy as np

from .base import Detector, register
from .epd import _standardised_rows, dense_codes
from .observations import Observations
from .rpd import RPD


@register("rpd_dense")
class RPDDense(RPD):
    """RPD with the feature itself, each row standardised and rectified, in place of the code: no dictionary at all."""

    title = "RPD on dense ReLU"
    group = "control"
    formula = r"\text{RPD with } h=\mathrm{relu}(\mathrm{std}(z))"
    source = "our control"
    needs = ("features", "labels", "logits")

    def fit(self, obs: Observations, validation: Observations | None = None) -> Detector:
        return super().fit(_rectified(obs))

    def score(self, obs: Observations) -> np.ndarray:
        return super().score(_rectified(obs))

    def contributions(self, obs: Observations) -> np.ndarray:
        return super().contributions(_rectified(obs))


def _rectified(obs: Observations) -> Observations:
    codes = dense_codes(np.maximum(_standardised_rows(obs.cls), 0))
    return Observations(obs.cls, obs.logits, obs.labels, codes=codes, predicted=obs.predicted)
