"""Baselines that split feature space into the principal subspace of the training features and the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..base import Detector, register
from ..observations import Observations
from .maths import covariance, mean_row

# Singular values of the head under this share of the largest count as 0. The rows of a head that was trained from zeros
# sum to zero, up to the rounding of float32; without the cut that rounding would set the origin.
_RANK = 1e-5


def _check_dim(dim: int, d: int) -> int:
    if not 1 <= dim < d:
        raise ValueError(f"dim is {dim}, features have {d} dimensions: use 1..{d - 1}, or nothing is left over")
    return dim


@register("residual")
@dataclass
class Residual(Detector):
    """Norm of the feature outside the principal subspace of the training features.

    ``dim`` is the dimension of that subspace; None takes 1000 for d >= 2048 and 512 below, as ViM's authors do, and
    d / 2 under d = 768, which is ours. The origin is u = -pinv(W) b, where the head's logits are zero. OpenOOD's code
    finds the subspace on its validation rows, all others on training rows, as here.
    """

    title, source = "Residual", "wang2022vim"
    formula = r"\lVert P_\perp (z-u)\rVert,\; u=-W^+ b"
    needs: ClassVar[tuple[str, ...]] = ("features", "head")
    presets = {"openood": {"dim": 512}}
    dim: int | None = None

    def fit(self, obs: Observations, validation: Observations | None = None) -> Detector:
        weight, bias = obs.require_head()
        d = obs.cls.shape[1]
        own = 1000 if d >= 2048 else 512 if d >= 768 else d // 2
        dim = _check_dim(own if self.dim is None else self.dim, d)
        self._origin = -np.linalg.pinv(weight, rcond=_RANK) @ bias
        spread = covariance(obs, lambda block: block.cls64, self._origin)
        self._null = np.linalg.eigh(spread)[1][:, : d - dim]
        return self

    def _residual(self, obs: Observations) -> np.ndarray:
        return np.linalg.norm((obs.cls64 - self._origin) @ self._null, axis=1)

    def _score(self, obs: Observations) -> np.ndarray:
        return self._residual(obs)


@register("vim")
@dataclass
class ViM(Residual):
    """Virtual-logit matching: the residual, scaled to the logits, against their free energy.

    alpha is the mean largest logit over the mean residual of the training rows. ``dim`` as for Residual; OpenOOD's 256
    does not go with every backbone.
    """

    title, source = "ViM", "wang2022vim"
    formula = r"\alpha\lVert P_\perp (z-u)\rVert - \log\sum_c e^{l_c}"
    needs = ("features", "logits", "head")
    presets = {"openood": {"dim": 256}}

    def fit(self, obs: Observations, validation: Observations | None = None) -> Detector:
        super().fit(obs)
        sums = [(block.logits.max(axis=1).sum(dtype=np.float64), self._residual(block).sum()) for block in obs.blocks()]
        largest, residual = np.sum(sums, axis=0)
        if not residual > 0:
            raise ValueError("no training feature leaves the principal subspace: ViM cannot scale; use a smaller dim")
        self._alpha = largest / residual
        return self

    def _score(self, obs: Observations) -> np.ndarray:
        return self._alpha * self._residual(obs) + obs.free_energy


@register("neco")
@dataclass
class NECO(Detector):
    """Share of the standardised feature's norm that lies in the principal subspace, times the largest logit.

    Standardised: each coordinate less its mean over its standard deviation on the training rows (a constant
    one over 1). The principal components are those of the standardised training features. As in the authors' code for
    ViT; for DeiT and Swin that code divides by the norm of the raw feature instead, and for ResNet it leaves out the
    largest logit (``max_logit=False``). ``dim`` None takes their 100, or d / 2 where d < 200. A feature at the mean of
    the training rows gets a share of 0.
    """

    title, source = "NECO", "benammar2024neco"
    formula = r"-\frac{\lVert V_{1..D}^\top\tilde z\rVert}{\lVert\tilde z\rVert}\max_c l_c"
    needs = ("features", "logits")
    dim: int | None = None
    max_logit: bool = True

    def fit(self, obs: Observations, validation: Observations | None = None) -> Detector:
        d = obs.cls.shape[1]
        dim = _check_dim(self.dim if self.dim is not None else min(100, d // 2), d)
        self._mean = mean_row(obs, lambda block: block.cls64)
        spread = covariance(obs, lambda block: block.cls64, self._mean)
        std = np.sqrt(np.diag(spread))
        # a coordinate that is constant up to rounding is constant
        self._std = np.where(std > 1e-7 * np.maximum(np.abs(self._mean), 1e-30), std, 1.0)
        self._axes = np.linalg.eigh(spread / np.outer(self._std, self._std))[1][:, d - dim :]
        return self

    def _score(self, obs: Observations) -> np.ndarray:
        x = (obs.cls64 - self._mean) / self._std
        whole = np.linalg.norm(x, axis=1)
        share = np.linalg.norm(x @ self._axes, axis=1) / np.where(whole > 0, whole, 1)
        return -share * (obs.logits.max(axis=1) if self.max_logit else 1)
