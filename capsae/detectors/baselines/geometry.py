"""Baselines that compare the feature with the head's weights, or with stored features."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..base import Detector, register
from ..observations import Observations
from .maths import both, class_means, largest_products, mean_row

_NEAR_ZERO = 1e-8


@register("she")
@dataclass
class SHE(Detector):
    """Inner product with the mean correctly classified training feature of the predicted class.

    A class without a correctly classified training row takes the mean of all its rows (our choice).
    """

    title, source = "SHE", "zhang2023she"
    formula = r"-\langle z, \bar z_{\hat y}\rangle"
    needs = ("features", "logits", "labels")
    presets = {"openood": {}}

    def fit(self, obs: Observations, validation: Observations | None = None) -> Detector:
        n_classes = obs.logits.shape[1]
        labels = obs.require_labels(n_classes)
        hit = obs.predicted == labels
        missed = np.bincount(labels[hit], minlength=n_classes) == 0
        keep = hit | missed[labels]
        self._patterns = class_means(obs, labels, n_classes, lambda block: block.cls64, keep)
        return self

    def _score(self, obs: Observations) -> np.ndarray:
        return -np.einsum("nd,nd->n", obs.cls64, self._patterns[obs.predicted])


@register("nnguide")
@dataclass
class NNGuide(Detector):
    """Energy guided by neighbours: logsumexp of the logits times the mean of the k largest guided cosines.

    A bank row's guided cosine is its own logsumexp times its cosine with the sample. ``bank`` is the share of the
    training rows kept, drawn with ``seed``. OpenOOD takes k = 100 of 1 % of ImageNet's rows; ours are pytorch-ood's
    k = 10 of all rows, since 1 % of a small training set leaves no neighbours.
    """

    title, source = "NNGuide", "park2023nnguide"
    formula = r"-E(x)\,\tfrac1k\sum_{i\in\text{top }k}E_i\langle\hat z,\hat z_i\rangle,\; E=\log\sum_c e^{l_c}"
    needs = ("features", "logits")
    presets = {"openood": {"k": 100, "bank": 0.01}}
    k: int = 10
    bank: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if not 0 < self.bank <= 1:
            raise ValueError(f"bank is {self.bank}: use a share of the training rows in (0, 1]")

    def fit(self, obs: Observations, validation: Observations | None = None) -> Detector:
        size = int(np.ceil(self.bank * len(obs)))
        if not 1 <= self.k <= size:
            raise ValueError(
                f"k is {self.k}, but the bank holds {size} rows ({100 * self.bank:g} % of {len(obs)}): "
                f"use k in 1..{size}, or a larger bank"
            )
        if size < len(obs):
            obs = obs.take(np.sort(np.random.default_rng(self.seed).permutation(len(obs))[:size]))
        self._guides = np.concatenate(
            [(block.unit * -block.free_energy[:, None]).astype(np.float32) for block in obs.blocks()]
        )
        return self

    def _score(self, obs: Observations) -> np.ndarray:
        values = largest_products(obs.unit.astype(np.float32), self._guides, self.k)[0]
        return obs.free_energy * values.mean(axis=1, dtype=np.float64)


@register("fdbd")
@dataclass
class FDBD(Detector):
    """Distances from the feature to the boundaries of its predicted class, over its distance from the training mean.

    Distances between the head's weight rows come from their Gram matrix, C x C, never C x C x d; two classes with the
    same weights have no boundary, and count 0. ``average`` divides by C - 1, as paper and pytorch-ood do (OpenOOD takes
    the sum); ``centre=False`` divides by the norm of the feature instead, which OpenOOD offers to choose by validation.
    """

    title, source = "fDBD", "liu2024fdbd"
    formula = r"-\frac{1}{C-1}\sum_{c\ne\hat y}\frac{|l_{\hat y}-l_c|}{\lVert w_{\hat y}-w_c\rVert\,\lVert z-\mu\rVert}"
    needs = ("features", "logits", "head")
    presets = {"openood": {"average": False}}
    average: bool = True
    centre: bool = True

    def fit(self, obs: Observations, validation: Observations | None = None) -> Detector:
        weight, _ = obs.require_head()
        weight = weight - weight.mean(axis=0)  # the same differences, less to cancel
        squares = (weight**2).sum(axis=1)
        squared = squares[:, None] + squares - 2 * weight @ weight.T
        apart = squared > 1e-12 * squares.max()
        np.fill_diagonal(apart, False)
        inverse = np.where(apart, 1 / np.sqrt(np.where(apart, squared, 1)), 0)
        self._inverse = both(inverse / max(1, len(weight) - 1) if self.average else inverse)
        self._mean = mean_row(obs, lambda block: block.cls64) if self.centre else 0.0
        return self

    def _score(self, obs: Observations) -> np.ndarray:
        gaps = obs.logits - np.take_along_axis(obs.logits, obs.predicted[:, None], axis=1)
        np.abs(gaps, out=gaps)
        gaps *= self._inverse[gaps.dtype][obs.predicted]
        away = np.linalg.norm(obs.cls64 - self._mean, axis=1) if self.centre else obs.norms
        return -gaps.sum(axis=1, dtype=np.float64) / np.maximum(away, _NEAR_ZERO)


@register("nci")
@dataclass
class NCI(Detector):
    """Projection of the predicted class's weights on the centred feature's direction, and the feature's L1 norm."""

    title, source = "NCI", "liu2025nci"
    formula = r"-\Bigl(\frac{\langle w_{\hat y}, z-\mu\rangle}{\lVert z-\mu\rVert}+\alpha\lVert z\rVert_1\Bigr)"
    needs = ("features", "logits", "head")
    presets = {"openood": {}}
    alpha: float = 1e-4

    def __post_init__(self):
        if self.alpha < 0:
            raise ValueError(f"alpha is {self.alpha}: use 0 (no norm) or more")

    def fit(self, obs: Observations, validation: Observations | None = None) -> Detector:
        self._weight, _ = obs.require_head()
        self._mean = mean_row(obs, lambda block: block.cls64)
        return self

    def _score(self, obs: Observations) -> np.ndarray:
        x = obs.cls64 - self._mean
        along = np.einsum("nd,nd->n", x, self._weight[obs.predicted])
        along /= np.maximum(np.linalg.norm(x, axis=1), _NEAR_ZERO)
        return -(along + self.alpha * np.abs(obs.cls64).sum(axis=1))


@register("gradnorm")
@dataclass
class GradNorm(Detector):
    """L1 norm of the gradient of KL(uniform || softmax) by the head's weights, in closed form.

    The gradient is the outer product of p - 1/C and the feature, so its norm is a product of two. ``average`` takes
    the mean over classes, as KL does; OpenOOD and the authors' code take the sum, C times as much.
    """

    title, source = "GradNorm", "huang2021gradnorm"
    formula = r"-\lVert z\rVert_1\,\lVert p-\tfrac1C\rVert_1"
    needs, fitted_on = ("features", "logits"), "nothing"
    presets = {"openood": {"average": False}}
    average: bool = True

    def _score(self, obs: Observations) -> np.ndarray:
        p = obs.softmax
        uneven = np.abs(p - p.dtype.type(1 / p.shape[1])).sum(axis=1, dtype=np.float64)
        return -np.abs(obs.cls64).sum(axis=1) * uneven * (1 if self.average else p.shape[1])
