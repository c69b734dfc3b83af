"""Baselines that measure a distance in feature space: to class means, or to training rows.

Covariances are float64 and divided by N; Mahalanobis distances are Euclidean after whitening by ``eigh`` of
standardised columns, with null directions cut (:data:`capsae.detectors.baselines.maths.RCOND`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from scipy.special import softmax

from ..base import Detector, register
from ..observations import Observations, unit_rows
from .maths import class_means, covariance, largest_products, mean_row, whitening


@dataclass
class _Mahalanobis(Detector):
    needs: ClassVar[tuple[str, ...]] = ("features", "labels")
    normalise, relative = False, False

    def _features(self, obs: Observations) -> np.ndarray:
        return obs.unit if self.normalise else obs.cls64

    def fit(self, obs: Observations, validation: Observations | None = None) -> Detector:
        labels = obs.require_labels(int(np.max(obs.labels)) + 1 if obs.labels is not None and len(obs) else 1)
        means = class_means(obs, labels, labels.max() + 1, self._features)
        self._white = whitening(covariance(obs, self._features, means, labels))
        self._centre = mean_row(obs, self._features)
        self._means = (means - self._centre) @ self._white
        self._white0 = whitening(covariance(obs, self._features, self._centre)) if self.relative else None
        return self

    def _score(self, obs: Observations) -> np.ndarray:
        x = self._features(obs) - self._centre
        white = x @ self._white
        cross = (self._means**2).sum(axis=1) - 2 * white @ self._means.T
        nearest = np.maximum((white**2).sum(axis=1) + cross.min(axis=1), 0)
        return nearest - ((x @ self._white0) ** 2).sum(axis=1) if self.relative else nearest


@register("mds")
class MDS(_Mahalanobis):
    """Squared Mahalanobis distance to the nearest class mean under the tied covariance.

    Without the factor 1/2, and with a covariance divided by N, as in OpenOOD; pytorch-ood's score is this one over 2 N.
    """

    title, source = "MDS", "lee2018simple"
    formula = r"\min_c (z-\mu_c)^\top S^{-1}(z-\mu_c)"
    presets = {"openood": {}}


@register("rmds")
class RMDS(_Mahalanobis):
    """MDS less the squared Mahalanobis distance to the mean of all samples under their covariance."""

    title, source = "RMDS", "ren2021simple"
    formula = r"\min_c (z-\mu_c)^\top S^{-1}(z-\mu_c) - (z-\mu)^\top S_0^{-1}(z-\mu)"
    presets = {"openood": {}}
    relative = True


@register("mds++")
class MDSPlusPlus(_Mahalanobis):
    """MDS on features of unit length."""

    title, source = "MDS++", "mueller2025mahalanobispp"
    formula = r"\text{MDS on } z/\lVert z\rVert"
    normalise = True


@register("rmds++")
class RMDSPlusPlus(_Mahalanobis):
    """RMDS on features of unit length."""

    title, source = "RMDS++", "mueller2025mahalanobispp"
    formula = r"\text{RMDS on } z/\lVert z\rVert"
    normalise, relative = True, True


@register("soft_rmds++")
@dataclass
class SoftRMDSPlusPlus(_Mahalanobis):
    """Squared Mahalanobis distance to the class means on features of unit length, averaged over the head's posterior
    (softmax at a temperature), less half of that to the mean of all samples: no class is chosen."""

    title, source, group = "soft RMDS++", "this work, after RMDS and MDS++", "control"
    formula = r"\sum_c \pi_c\,(\hat z-\mu_c)^\top S^{-1}(\hat z-\mu_c) - \tfrac12(\hat z-\mu)^\top S_0^{-1}(\hat z-\mu)"
    needs = ("features", "labels", "logits")
    normalise, relative = True, True
    temperature: float = 2.0  # RPD's

    def _score(self, obs: Observations) -> np.ndarray:
        return self.contributions(obs).sum(axis=1)

    def contributions(self, obs: Observations) -> np.ndarray:
        """Share (N, C) of each class in the score; they sum to it."""
        x = self._features(obs) - self._centre
        white, background = x @ self._white, ((x @ self._white0) ** 2).sum(axis=1)
        squares = (white**2).sum(axis=1)[:, None] + (self._means**2).sum(axis=1) - 2 * white @ self._means.T
        posterior = softmax(obs.logits.astype(np.float64) / self.temperature, axis=1)
        return posterior * (np.maximum(squares, 0) - background[:, None] / 2)


@register("knn")
@dataclass
class KNN(Detector):
    """Squared Euclidean distance to the k-th nearest training feature, all of unit length.

    The neighbour is found by exact search in float32 about the training mean, where rounding does the least harm, its
    distance is float64. The square is OpenOOD's; pytorch-ood takes the root. ``backend="faiss"`` searches
    with faiss (exactly, too) where that is installed.
    """

    title, source = "KNN", "sun2022knn"
    formula = r"\lVert \hat z - \hat z_{(k)}\rVert^2"
    needs = ("features",)
    presets = {"openood": {}}
    k: int = 50
    backend: str = "blocks"

    def __post_init__(self):
        if self.backend not in ("blocks", "faiss"):
            raise ValueError(f"backend is {self.backend!r}: use 'blocks', or 'faiss' where faiss-cpu is installed")

    def fit(self, obs: Observations, validation: Observations | None = None) -> Detector:
        if not 1 <= self.k <= len(obs):
            raise ValueError(f"k is {self.k}, but there are {len(obs)} training rows: use k in 1..{len(obs)}")
        self._centre = mean_row(obs, lambda block: block.unit)
        self._bank = np.concatenate([self._about_the_centre(block, bank=True) for block in obs.blocks()])
        self._cls = obs.cls  # for the exact distance to the one neighbour that counts
        if self.backend == "faiss":
            import faiss

            self._index = faiss.IndexFlatIP(self._bank.shape[1])
            self._index.add(self._bank)
        return self

    def _about_the_centre(self, obs: Observations, bank: bool = False) -> np.ndarray:
        """Rows (n, d + 1) float32 whose inner product with a bank row is largest where the distance is smallest."""
        x = obs.unit - self._centre
        last = -np.einsum("nd,nd->n", x, x) / 2 if bank else np.ones(len(x))
        return np.concatenate([x, last[:, None]], axis=1).astype(np.float32)

    def _score(self, obs: Observations) -> np.ndarray:
        unit = self._about_the_centre(obs)
        if self.backend == "faiss":
            found = self._index.search(unit, self.k)[1]
        else:
            found = largest_products(unit, self._bank, self.k)[1]
        return ((obs.unit - unit_rows(self._cls[found[:, -1]])) ** 2).sum(axis=1)
