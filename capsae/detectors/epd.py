"""The paper's score, and the controls that tell what in it does the work.

All of them read the same k-sparse codes and the same profiles. ``divergence`` swaps the comparison and nothing else;
the flatness controls use no class and no profile; the dictionary controls use no trained SAE.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from scipy.special import entr

from ..caps import ClassActivationProfiles, core_activations, core_reference, epd_terms
from ..data.asarray import as_numpy
from .base import Control, Detector, register
from .observations import Observations

PAPER = "oh2026sparsity"


def profiles(obs: Observations, codes, correct_only: bool) -> ClassActivationProfiles:
    """The profiles of the true classes, of all samples or of those that the head classifies correctly."""
    n_classes = obs.logits.shape[1]
    labels = obs.require_labels(n_classes)
    if correct_only:
        hit = obs.predicted == labels
        codes, labels = codes[hit], labels[hit]
    return ClassActivationProfiles.fit(codes, labels, n_classes)


@dataclass
class _OnProfiles(Control):
    """Fits the CAPs that a score on profiles needs."""

    needs: ClassVar[tuple[str, ...]] = ("codes", "labels", "logits")
    core_fraction: float = 0.15
    correct_only: bool = False

    def __post_init__(self):
        if not 0 < self.core_fraction <= 1:
            raise ValueError(f"core_fraction is {self.core_fraction}: use a share in (0, 1], the paper's is 0.15")

    def _codes(self, obs: Observations):
        return obs.codes

    def fit(self, obs: Observations, validation: Observations | None = None) -> Detector:
        return self.on(profiles(obs, self._codes(obs), self.correct_only))

    def on(self, caps: ClassActivationProfiles) -> Detector:
        """Fit on profiles that are made already; returns self."""
        self.caps = caps
        return self


@register("epd")
@dataclass
class EPD(_OnProfiles):
    """Energy Profile Divergence: KL of the sample's core profile from its predicted class's."""

    title, source, group = "EPD", PAPER, "paper"
    formula = r"\sum_{i\in M_{\hat y}} P_i\log(P_i/Q_i)"

    def score(self, obs: Observations) -> np.ndarray:
        return epd_terms(self._codes(obs), obs.predicted, self.caps, self.core_fraction)[0]

    def degenerate(self, obs: Observations) -> np.ndarray:
        """Rows (N,) bool for which EPD is undefined or infinite and the largest score was given."""
        return epd_terms(self._codes(obs), obs.predicted, self.caps, self.core_fraction)[2]


class _Divergence(_OnProfiles):
    """Another comparison of the same P and Q on the same core. A silent core (P = 0) gets the largest value."""

    largest: ClassVar[float]  # and a method _compare(p, q, predicted) -> (N,)

    def on(self, caps: ClassActivationProfiles) -> Detector:
        super().on(caps)
        self._reference = core_reference(self.caps, self.core_fraction)[0]
        return self

    def _pq(self, obs: Observations) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """P (N, k), Q at the same latents (N, k), predicted class (N,)."""
        inside = core_activations(obs.codes, obs.predicted, self.caps, self.core_fraction)
        total = inside.sum(axis=1, keepdims=True)
        p = np.divide(inside, total, out=np.zeros_like(inside), where=total > 0)
        return p, self._reference[obs.predicted[:, None], obs.codes.indices], obs.predicted

    def score(self, obs: Observations) -> np.ndarray:
        p, q, predicted = self._pq(obs)
        return np.where(p.sum(axis=1) > 0, self._compare(p, q, predicted), self.largest)


@register("cosine")
class Cosine(_Divergence):
    """One less the cosine of P and Q."""

    title = "CAP cosine"
    formula = r"1-\cos(P,Q)"
    largest = 1.0

    def _compare(self, p, q, predicted):
        norms = np.linalg.norm(p, axis=1) * np.linalg.norm(self._reference, axis=1)[predicted]
        return 1 - np.divide((p * q).sum(1), norms, out=np.zeros(len(p)), where=norms > 0)


@register("euclidean")
class Euclidean(_Divergence):
    """Euclidean distance of P and Q."""

    title = "CAP Euclidean"
    formula = r"\lVert P-Q\rVert_2"
    largest = float(np.sqrt(2))

    def _compare(self, p, q, predicted):
        squared = (p**2).sum(1) - 2 * (p * q).sum(1) + (self._reference**2).sum(1)[predicted]
        return np.sqrt(np.maximum(squared, 0))


@register("hellinger")
class Hellinger(_Divergence):
    """Hellinger distance of P and Q."""

    title = "CAP Hellinger"
    formula = r"\sqrt{1-\sum_i\sqrt{P_iQ_i}}"
    largest = 1.0

    def _compare(self, p, q, predicted):
        return np.sqrt(np.maximum(1 - np.sqrt(p * q).sum(1), 0))


@register("spearman")
class Spearman(_Divergence):
    """One less Spearman's rank correlation of P and Q over the core, ties with average ranks.

    The score of an earlier version of the paper (OpenReview rxiWsoM6Cx).
    """

    title, source = "CAP Spearman", "withdrawn earlier version of the paper"
    formula = r"1-\rho(P,Q)"
    largest = 2.0

    def on(self, caps: ClassActivationProfiles) -> Detector:
        from scipy.stats import rankdata

        super().on(caps)
        core = self.caps.core(self.core_fraction).astype(np.int64)
        ranks = rankdata(np.take_along_axis(self._reference, core, 1), axis=1)
        ranks -= ranks.mean(axis=1, keepdims=True)
        self._ranks = np.zeros_like(self._reference)
        np.put_along_axis(self._ranks, core, ranks, axis=1)
        return self

    def score(self, obs: Observations) -> np.ndarray:
        from scipy.stats import rankdata

        p, _, predicted = self._pq(obs)
        size = self.caps.core_size(self.core_fraction)
        fired = p > 0
        silent = size - fired.sum(axis=1)
        # The L - n latents that do not fire share the mean of the lowest ranks; those that fire follow above them.
        rank = np.where(fired, rankdata(np.where(fired, p, -np.inf), axis=1) - (~fired).sum(1, keepdims=True), 0.0)
        zero_rank = (silent + 1) / 2
        lift = np.where(fired, rank + silent[:, None] - zero_rank[:, None], 0.0)
        centred = self._ranks[predicted[:, None], obs.codes.indices]
        covariance = (lift * centred).sum(axis=1)  # the centred ranks of Q sum to zero, so a shift of P's drops out
        mean = (size + 1) / 2
        spread_p = (np.where(fired, rank + silent[:, None] - mean, 0.0) ** 2).sum(1) + silent * (zero_rank - mean) ** 2
        norms = np.sqrt(spread_p * (self._ranks**2).sum(axis=1)[predicted])
        rho = np.divide(covariance, norms, out=np.zeros(len(p)), where=norms > 0)
        return np.where(fired.any(axis=1), 1 - rho, self.largest)


@register("reverse_kl")
@dataclass
class ReverseKL(_Divergence):
    """KL(Q || P), with P mixed with the uniform profile of the core, or it would be infinite for every sample."""

    title = "CAP reverse KL"
    formula = r"\mathrm{KL}(Q\Vert(1-\epsilon)P+\epsilon U)"
    smoothing: float = 0.01

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.smoothing < 1:
            raise ValueError(f"smoothing is {self.smoothing}: use a number between 0 and 1")

    def score(self, obs: Observations) -> np.ndarray:
        p, q, predicted = self._pq(obs)
        floor = self.smoothing / self.caps.core_size(self.core_fraction)
        entropy = np.where(self._reference > 0, self._reference * np.log(np.maximum(self._reference, 1e-300)), 0).sum(1)
        # Every latent of the core at the floor, corrected where P > 0.
        lifted = np.log((1 - self.smoothing) * p + floor) - np.log(floor)
        return entropy[predicted] - np.log(floor) - (q * lifted).sum(axis=1)


@register("symmetric_kl")
@dataclass
class SymmetricKL(ReverseKL):
    """EPD plus the smoothed reverse divergence."""

    title = "CAP symmetric KL"
    formula = r"\mathrm{KL}(P\Vert Q)+\mathrm{KL}(Q\Vert(1-\epsilon)P+\epsilon U)"

    def score(self, obs: Observations) -> np.ndarray:
        return super().score(obs) + epd_terms(obs.codes, obs.predicted, self.caps, self.core_fraction)[0]


class _OnCodes(Control):
    """Reads the activations of a code and nothing else, by a method ``_of(values (N, k)) -> (N,)``."""

    needs = ("codes",)

    def score(self, obs: Observations) -> np.ndarray:
        return self._of(as_numpy(obs.codes.values).astype(np.float64))


@register("code_l1")
class CodeL1(_OnCodes):
    """The L1 norm of the code, without class or profile; a large one counts as OOD.

    At one L2 norm a larger L1 norm means a flatter code. OOD codes also have less energy, which works the other way, so
    this sum of two effects can fall below chance; `code_flatness` and `code_energy` are the two taken apart. The sign
    was fixed before any result was seen.
    """

    title = "code L1 norm"
    formula = r"\lVert h\rVert_1"

    def _of(self, values):
        return values.sum(axis=1)


@register("code_flatness")
class CodeFlatness(_OnCodes):
    """Flatness alone: the L1 norm of the code over its L2 norm, without class or profile. A silent code is flattest."""

    title = "code L1/L2"
    formula = r"\lVert h\rVert_1/\lVert h\rVert_2"

    def _of(self, values):
        norm = np.linalg.norm(values, axis=1)
        flattest = np.full(len(values), np.sqrt(values.shape[1]))
        return np.divide(values.sum(axis=1), norm, out=flattest, where=norm > 0)


@register("code_energy")
class CodeEnergy(_OnCodes):
    """Energy alone: the L2 norm of the code, without class or profile; a small one counts as OOD."""

    title = "code energy"
    formula = r"-\lVert h\rVert_2"

    def _of(self, values):
        return -np.linalg.norm(values, axis=1)


@register("sae_error")
class SAEError(Control):
    """What the SAE leaves unexplained: squared error of its reconstruction, on the normalised feature, without class
    or profile."""

    title = "SAE error"
    formula = r"\lVert x-\hat x\rVert_2^2"
    needs = ("features", "codes")

    def fit(self, obs: Observations, validation: Observations | None = None) -> Detector:
        if obs.sae is None:
            raise ValueError("sae_error reconstructs the features: give sae to Observations(...)")
        self._sae = obs.sae
        return self

    def score(self, obs: Observations) -> np.ndarray:
        gap = self._sae.normalize(obs.cls) - self._sae.decode(obs.codes)
        return (as_numpy(gap).astype(np.float64) ** 2).sum(axis=1)


@register("code_entropy")
class CodeEntropy(_OnCodes):
    """Flatness alone: the entropy of the normalised code, without class or profile."""

    title = "code entropy"
    formula = r"H(h/\lVert h\rVert_1)"

    def _of(self, values):
        total = values.sum(axis=1, keepdims=True)
        return entr(np.divide(values, total, out=np.zeros_like(values), where=total > 0)).sum(axis=1)


def dense_codes(values: np.ndarray):
    """Every column of non-negative ``values`` (N, M) as a latent: SparseCodes with k = M."""
    from ..sae import SparseCodes

    indices = np.broadcast_to(np.arange(values.shape[1], dtype=np.int32), values.shape)
    return SparseCodes(np.ascontiguousarray(values, np.float32), np.ascontiguousarray(indices), values.shape[1])


def _standardised_rows(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64) - x.mean(axis=1, keepdims=True, dtype=np.float64)
    std = x.std(axis=1, keepdims=True)
    return np.divide(x, std, out=np.zeros_like(x), where=std > 0)


class _OtherCodes(EPD):
    """EPD on codes of its own making."""

    source = "our control"
    group = "control"
    needs: ClassVar[tuple[str, ...]] = ("features", "labels", "logits")


@register("epd_dense")
class EPDDense(_OtherCodes):
    """EPD with the feature itself, each row standardised and rectified, in place of the code: no dictionary at all."""

    title = "EPD on dense ReLU"
    formula = r"\text{EPD with } h=\mathrm{relu}(\mathrm{std}(z))"

    def _codes(self, obs):
        return dense_codes(np.maximum(_standardised_rows(obs.cls), 0))


@register("epd_pca")
class EPDPCA(_OtherCodes):
    """EPD on principal components of the row-standardised, centred features, each split into two latents by sign."""

    title = "EPD on PCA"
    formula = r"\text{EPD with } h=\mathrm{relu}([Vx, -Vx]),\; x=\mathrm{std}(z)-\overline{\mathrm{std}(z)}"

    def fit(self, obs, validation=None):
        x = _standardised_rows(obs.cls)
        self._centre = x.mean(axis=0)
        self._axes = np.linalg.eigh(np.cov(x.T))[1]
        return super().fit(obs)

    def _codes(self, obs):
        scores = (_standardised_rows(obs.cls) - self._centre) @ self._axes
        return dense_codes(np.maximum(np.concatenate([scores, -scores], axis=1), 0))


@register("epd_untrained")
@dataclass
class EPDUntrained(_OtherCodes):
    """EPD on the SAE before its first training step: random unit rows; normalisation and pre-bias are set already."""

    title = "EPD, untrained SAE"
    formula = r"\text{EPD with random } W"
    needs = ("features", "labels", "logits", "codes")
    seed: int | None = None  # None: the seed of the SAE

    def fit(self, obs, validation=None):
        from dataclasses import replace

        import torch

        from ..sae.rows import start

        if obs.sae is None:
            raise ValueError("epd_untrained copies the configuration of the sae: give sae to Observations(...)")
        config = obs.sae.config if self.seed is None else replace(obs.sae.config, seed=self.seed)
        self._sae = start(torch.as_tensor(obs.cls, dtype=torch.float32), config, torch.device("cpu"))[0]
        return super().fit(obs)

    def _codes(self, obs):
        return self._sae.encode(obs.cls).numpy()
