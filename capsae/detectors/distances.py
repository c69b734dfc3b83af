"""Baselines that measure a distance in feature space.

Covariances are float64 and divided by N; Mahalanobis distances are Euclidean after whitening by ``eigh``, with
directions under ``RCOND`` times the largest eigenvalue cut (a pseudo-inverse).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from .base import Detector, Observations, register

RCOND = 1e-10


def unit_rows(x: np.ndarray) -> np.ndarray:
    """Rows of x (N, d) divided by their Euclidean norm, float64; a zero row stays zero."""
    x = x.astype(np.float64)
    norm = np.linalg.norm(x, axis=1, keepdims=True)
    return np.divide(x, norm, out=np.zeros_like(x), where=norm > 0)


def class_means(x: np.ndarray, labels: np.ndarray, n_classes: int) -> np.ndarray:
    """Mean (C, d) of the rows of each class; ValueError where a class has none."""
    counts = np.bincount(labels, minlength=n_classes)
    if (counts == 0).any():
        raise ValueError(f"class {int((counts == 0).argmax())} has no training row: give every class at least one")
    onehot = np.zeros((len(labels), n_classes))
    onehot[np.arange(len(labels)), labels] = 1
    return onehot.T @ x / counts[:, None]


def whitening(centred: np.ndarray) -> np.ndarray:
    """Matrix (d, r) that makes the covariance of ``centred`` (N, d) the identity, on its r non-null directions."""
    values, vectors = np.linalg.eigh(centred.T @ centred / len(centred))
    keep = values > RCOND * values[-1]
    if not keep.any():
        raise ValueError("all training features of a class are equal: a Mahalanobis distance needs some spread")
    return vectors[:, keep] / np.sqrt(values[keep])


@dataclass
class _Mahalanobis(Detector):
    group: ClassVar[str] = "baseline"
    needs: ClassVar[tuple[str, ...]] = ("features", "labels")
    normalise: ClassVar[bool] = False
    relative: ClassVar[bool] = False

    def _features(self, obs: Observations) -> np.ndarray:
        return unit_rows(obs.cls) if self.normalise else obs.cls.astype(np.float64)

    def fit(self, obs: Observations) -> Detector:
        x = self._features(obs)
        labels = obs.require_labels(int(np.max(obs.labels)) + 1 if obs.labels is not None and len(obs) else 1)
        means = class_means(x, labels, labels.max() + 1)
        self._white = whitening(x - means[labels])
        self._means = means @ self._white
        self._mean = x.mean(axis=0)
        self._white0 = whitening(x - self._mean) if self.relative else None
        return self

    def score(self, obs: Observations) -> np.ndarray:
        x = self._features(obs)
        white = x @ self._white
        squared = (white**2).sum(1)[:, None] - 2 * white @ self._means.T + (self._means**2).sum(1)
        nearest = np.maximum(squared.min(axis=1), 0)
        if not self.relative:
            return nearest
        return nearest - (((x - self._mean) @ self._white0) ** 2).sum(axis=1)


@register("mds")
class MDS(_Mahalanobis):
    """Squared Mahalanobis distance to the nearest class mean under the tied covariance."""

    title: ClassVar[str] = "MDS"
    formula: ClassVar[str] = r"\min_c (z-\mu_c)^\top S^{-1}(z-\mu_c)"
    source: ClassVar[str] = "lee2018simple"


@register("rmds")
class RMDS(_Mahalanobis):
    """MDS less the squared Mahalanobis distance to the mean of all samples under their covariance."""

    title: ClassVar[str] = "RMDS"
    formula: ClassVar[str] = r"\min_c (z-\mu_c)^\top S^{-1}(z-\mu_c) - (z-\mu)^\top S_0^{-1}(z-\mu)"
    source: ClassVar[str] = "ren2021simple"
    relative: ClassVar[bool] = True


@register("mds++")
class MDSPlusPlus(MDS):
    """MDS on features of unit length."""

    title: ClassVar[str] = "MDS++"
    formula: ClassVar[str] = r"\text{MDS on } z/\lVert z\rVert"
    source: ClassVar[str] = "mueller2025mahalanobispp"
    normalise: ClassVar[bool] = True


@register("rmds++")
class RMDSPlusPlus(RMDS):
    """RMDS on features of unit length."""

    title: ClassVar[str] = "RMDS++"
    formula: ClassVar[str] = r"\text{RMDS on } z/\lVert z\rVert"
    source: ClassVar[str] = "mueller2025mahalanobispp"
    normalise: ClassVar[bool] = True


@register("knn")
@dataclass
class KNN(Detector):
    """Squared Euclidean distance to the k-th nearest training feature, all of unit length."""

    title: ClassVar[str] = "KNN"
    group: ClassVar[str] = "baseline"
    formula: ClassVar[str] = r"\lVert \hat z - \hat z_{(k)}\rVert^2"
    source: ClassVar[str] = "sun2022knn"
    needs: ClassVar[tuple[str, ...]] = ("features",)
    k: int = 50
    _bank: np.ndarray = field(default=None, init=False, repr=False)

    def fit(self, obs: Observations) -> Detector:
        if not 1 <= self.k <= len(obs):
            raise ValueError(f"k is {self.k}, but there are {len(obs)} training rows: use k in 1..{len(obs)}")
        self._bank = unit_rows(obs.cls)
        return self

    def score(self, obs: Observations) -> np.ndarray:
        rows = max(1, 2**24 // len(self._bank))  # 128 MiB of distances at a time
        parts = [
            np.partition(unit_rows(obs.cls[i : i + rows]) @ self._bank.T, len(self._bank) - self.k, axis=1)
            for i in range(0, len(obs), rows)
        ]
        # The k-th largest inner product of unit vectors is the k-th smallest distance.
        return np.concatenate([2 - 2 * part[:, len(self._bank) - self.k] for part in parts]) if parts else np.zeros(0)


@register("residual")
@dataclass
class Residual(Detector):
    """Norm of the feature outside the principal subspace of the training features.

    ``dim`` is the dimension of that subspace; None takes 512 for d >= 768 and d / 2 below, as ViM's authors do
    for their networks. The origin is u = -pinv(W) b, where the head's logits are zero.
    """

    title: ClassVar[str] = "Residual"
    group: ClassVar[str] = "baseline"
    formula: ClassVar[str] = r"\lVert P_\perp (z-u)\rVert,\; u=-W^+ b"
    source: ClassVar[str] = "wang2022vim"
    needs: ClassVar[tuple[str, ...]] = ("features", "head")
    dim: int | None = None

    def fit(self, obs: Observations) -> Detector:
        weight, bias = obs.require_head()
        d = obs.cls.shape[1]
        dim = self.dim if self.dim is not None else (512 if d >= 768 else d // 2)
        if not 1 <= dim < d:
            raise ValueError(f"dim is {dim}, features have {d} dimensions: use 1..{d - 1}, or nothing is left over")
        self._origin = -np.linalg.pinv(weight) @ bias
        x = obs.cls.astype(np.float64) - self._origin
        self._null = np.linalg.eigh(x.T @ x / len(x))[1][:, : d - dim]
        return self

    def score(self, obs: Observations) -> np.ndarray:
        return np.linalg.norm((obs.cls.astype(np.float64) - self._origin) @ self._null, axis=1)


@register("vim")
@dataclass
class ViM(Residual):
    """Virtual-logit matching: the residual, scaled to the logits, against their free energy."""

    title: ClassVar[str] = "ViM"
    formula: ClassVar[str] = r"\alpha\lVert P_\perp (z-u)\rVert - \log\sum_c e^{l_c}"
    source: ClassVar[str] = "wang2022vim"
    needs: ClassVar[tuple[str, ...]] = ("features", "logits", "head")

    def fit(self, obs: Observations) -> Detector:
        super().fit(obs)
        self._alpha = obs.logits.max(axis=1).astype(np.float64).mean() / super().score(obs).mean()
        return self

    def score(self, obs: Observations) -> np.ndarray:
        from scipy.special import logsumexp

        return self._alpha * super().score(obs) - logsumexp(obs.logits.astype(np.float64), axis=1)
