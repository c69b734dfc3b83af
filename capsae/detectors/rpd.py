"""Our own scores: Relative Profile Divergence (RPD), and RPD+ with a density of the features."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_matrix
from scipy.special import softmax

from ..caps import ClassActivationProfiles
from .base import Detector, create, register
from .epd import profiles
from .observations import Observations

_CELLS = 2**22  # rows x classes held at a time


@register("rpd")
@dataclass
class RPD(Detector):
    r"""Relative Profile Divergence: how much worse the likely classes explain a code than the background does.

    $P$ is the whole code divided by its sum, $Q_c$ the profile of class c over the whole dictionary, $B$ the profile of
    all training samples together, $\pi$ the softmax of the logits at a temperature, and
    $\tilde Q_c = (1-\epsilon)Q_c + \epsilon B$. Three changes to EPD, each for a reason. No core: what fires outside it
    is OOD's most telling part. A background, as RMDS has one: energy on latents that every class uses counts for
    nothing. The head's whole posterior: a sample between classes has no one profile to be measured by. The score is at
    most $-\log\epsilon$, so it needs no rule for silent cores; a latent that no training sample fired counts as that
    much. The form and both constants were chosen on ID training and validation rows (benchmarks/rpd_selection.py);
    results on OOD sets had been seen once before the final choice of the SAE's recipe.
    """

    title, source, group = "RPD (ours)", "this work", "ours"
    formula = (
        r"\sum_c \pi_c\,[\mathrm{KL}(P\Vert\tilde Q_c)-\mathrm{KL}(P\Vert B)]"
        r" = \sum_i P_i \sum_c \pi_c \log(B_i/\tilde Q_{ci})"
    )
    needs = ("codes", "labels", "logits")
    temperature: float = 2.0
    epsilon: float = 0.03
    correct_only: bool = False

    def __post_init__(self):
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}: use a number above 0")
        if not 0 < self.epsilon < 1:
            raise ValueError(f"epsilon is {self.epsilon}: use a number between 0 and 1")

    def fit(self, obs: Observations, validation: Observations | None = None) -> Detector:
        return self.on(profiles(obs, obs.codes, self.correct_only))

    def on(self, caps: ClassActivationProfiles) -> Detector:
        """Fit on profiles that are made already; returns self."""
        self.caps = caps
        profile = self.caps.mean / np.maximum(self.caps.mean.sum(axis=1, keepdims=True), 1e-300)
        background = self.caps.sums.sum(axis=0) / max(self.caps.sums.sum(), 1e-300)
        mixed = (1 - self.epsilon) * profile + self.epsilon * background
        known = background > 0
        # (M, C): what one unit of energy on latent i says against class c.
        self._against = np.full((len(background), caps.n_classes), -np.log(self.epsilon))
        self._against[known] = np.log(background[known, None] / mixed.T[known])
        return self

    def _profile(self, codes) -> np.ndarray:
        """P (N, k); a code without energy gives zeros."""
        values = codes.values.astype(np.float64)
        total = values.sum(axis=1, keepdims=True)
        return np.divide(values, total, out=np.zeros_like(values), where=total > 0)

    def score(self, obs: Observations) -> np.ndarray:
        posterior = self._posterior(obs)
        p, indices = self._profile(obs.codes), obs.codes.indices
        silent = p.sum(axis=1) == 0
        out, rows = np.empty(len(obs)), max(1, _CELLS // posterior.shape[1])
        for start in range(0, len(obs), rows):
            part = slice(start, start + rows)
            k, n = p.shape[1], len(p[part])
            sparse = csr_matrix(
                (p[part].ravel(), indices[part].ravel(), np.arange(0, n * k + 1, k)), shape=(n, len(self._against))
            )
            out[part] = (posterior[part] * (sparse @ self._against)).sum(axis=1)
        return np.where(silent, -np.log(self.epsilon), out)

    def contributions(self, obs: Observations) -> np.ndarray:
        """Share (N, k) of each slot of the code in the score; they sum to it (a silent code has none)."""
        posterior, p = self._posterior(obs), self._profile(obs.codes)
        return np.stack(
            [row * (self._against[i] @ pi) for row, i, pi in zip(p, obs.codes.indices, posterior, strict=True)]
        )

    def _posterior(self, obs: Observations) -> np.ndarray:
        if obs.logits.shape[1] != self.caps.n_classes:
            raise ValueError(f"logits have {obs.logits.shape[1]} classes, the profiles {self.caps.n_classes}")
        return softmax(obs.logits.astype(np.float64) / self.temperature, axis=1)


@register("rpd+")
@dataclass
class RPDPlus(Detector):
    r"""RPD and a class-conditional density of the features, in equal parts.

    RPD reads the code alone; what the dictionary leaves out of a feature, it cannot see. Soft RMDS++ reads the whole
    feature and weighs the classes by the same posterior. Each is standardised, $z(s) = (s - m) / \sigma$, by its mean
    and standard deviation on ID validation samples (on the training samples where there are none, which flatters the
    density); the weights are equal, temperature and epsilon are RPD's, nothing was tuned. That a sum of such a pair
    does well was suggested by results on the OOD sets of this project's own experiments, which therefore cannot
    confirm it.
    """

    title, source, group = "RPD+ (ours)", "this work", "ours"
    formula = r"z(\text{RPD}) + z(\text{soft RMDS++})"
    needs, fitted_on = ("codes", "features", "labels", "logits"), "validation"
    temperature: float = 2.0
    epsilon: float = 0.03

    def __post_init__(self):
        self._rpd = RPD(self.temperature, self.epsilon)
        self._density = create("soft_rmds++", temperature=self.temperature)

    def fit(self, obs: Observations, validation: Observations | None = None) -> Detector:
        self.caps = self._rpd.fit(obs).caps
        self._density.fit(obs)
        known = obs if validation is None else validation
        scores = [detector.score(known) for detector in (self._rpd, self._density)]
        self._scale = [(float(each.mean()), max(float(each.std()), 1e-12)) for each in scores]
        return self

    def score(self, obs: Observations) -> np.ndarray:
        scores = [detector.score(obs) for detector in (self._rpd, self._density)]
        return np.sum([(each - mean) / std for each, (mean, std) in zip(scores, self._scale, strict=True)], axis=0)

    def contributions(self, obs: Observations) -> np.ndarray:
        """Share (N, k) of each slot of the code in the score. With :meth:`class_contributions` they sum to it (but for
        a silent code, which has none)."""
        (mean, std), _ = self._scale
        return (self._rpd.contributions(obs) - mean * self._rpd._profile(obs.codes)) / std

    def class_contributions(self, obs: Observations) -> np.ndarray:
        """Share (N, C) of each class, by the density of the features."""
        _, (mean, std) = self._scale
        posterior = self._rpd._posterior(obs)
        return (self._density.contributions(obs) - mean * posterior) / std
