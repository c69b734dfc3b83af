"""Class Activation Profiles (CAPs) of sparse codes, and the score the paper makes of them.

A CAP is the mean sparse code of a class. Everything here works on k-sparse codes, ``values (N, k)`` and
``indices (N, k)``, in one pass that can be merged; nothing of size N x M is built.

Source: "Sparsity as a Key", arXiv 2604.26409. The paper's text was read through public notes; what they leave open
is marked "our choice".
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .data.asarray import as_numpy
from .features.featureset import read_tensors, write_tensors

SCHEMA = 1
_ROWS = 65_536  # codes handled at a time: bounds the memory of a pass whatever N is


def _check_codes(codes) -> tuple[np.ndarray, np.ndarray, int]:
    values, indices = as_numpy(codes.values), as_numpy(codes.indices)
    if values.ndim != 2 or values.shape != indices.shape:
        raise ValueError(f"codes need values and indices of one shape (N, k), found {values.shape} and {indices.shape}")
    if values.dtype.kind not in "fiu" or indices.dtype.kind not in "iu":
        raise ValueError(f"codes hold {values.dtype} at {indices.dtype}, expected real values at whole indices")
    if not np.isfinite(values).all():
        raise ValueError(f"codes hold NaN or infinity in row {int(np.argwhere(~np.isfinite(values))[0, 0])}")
    if indices.size and (indices.min() < 0 or indices.max() >= codes.n_latents):
        found = f"codes fire latents {indices.min()}..{indices.max()}"
        raise ValueError(f"{found}, but n_latents is {codes.n_latents}: 0..{codes.n_latents - 1} would do")
    return values, indices, int(codes.n_latents)


def check_labels(labels, n_rows: int, n_classes: int, what: str = "labels") -> np.ndarray:
    """Return ``labels`` as int64 ``(N,)``; raise if their number or their range does not fit."""
    labels = as_numpy(labels)
    if labels.ndim != 1 or len(labels) != n_rows:
        raise ValueError(f"{what} has {labels.shape[0] if labels.ndim else 0} rows, codes {n_rows}")
    if len(labels) and labels.dtype.kind not in "iu":
        raise TypeError(f"{what} must hold integers, found {labels.dtype}")
    if len(labels) and (labels.min() < 0 or labels.max() >= n_classes):
        raise ValueError(
            f"{what} holds {labels.min()}..{labels.max()}, but n_classes is {n_classes}: use 0..{n_classes - 1}"
        )
    return labels.astype(np.int64)


@dataclass
class ClassActivationProfiles:
    """Streaming per-class sums of sparse codes.

    Parameters
    ----------
    sums : (C, M) float64
        Sum of the codes of each class.
    active : (C, M) int64
        In how many samples of the class the latent fired.
    counts : (C,) int64
        Samples seen per class.

    Notes
    -----
    ``hbar_c`` of the paper is row ``c`` of :attr:`mean`. Sums, not means, are kept, so that :meth:`merge` of two
    shards is the CAP of the whole, up to the rounding of a float64 sum.
    """

    sums: np.ndarray
    active: np.ndarray
    counts: np.ndarray

    def __post_init__(self):
        self.sums, self.active, self.counts = map(as_numpy, (self.sums, self.active, self.counts))

    @classmethod
    def empty(cls, n_classes: int, n_latents: int) -> ClassActivationProfiles:
        """Profiles that have seen no sample."""
        if n_classes < 1 or n_latents < 1:
            raise ValueError(f"n_classes and n_latents must be at least 1, found {n_classes} and {n_latents}")
        shape = (n_classes, n_latents)
        return cls(np.zeros(shape), np.zeros(shape, np.int64), np.zeros(n_classes, np.int64))

    @classmethod
    def fit(cls, codes, labels, n_classes: int) -> ClassActivationProfiles:
        """Profiles of ``codes`` (SparseCodes of N rows) under ``labels`` (N,) in 0..n_classes-1.

        Raises
        ------
        ValueError
            If the number of labels differs from the number of codes, a label is out of range, or a class has no sample.
        """
        caps = cls.empty(n_classes, int(codes.n_latents)).update(codes, labels)
        missing = np.flatnonzero(caps.counts == 0)
        if len(missing):
            raise ValueError(
                f"{len(missing)} of {n_classes} classes have no sample, the first is class {missing[0]}: "
                "give every class at least one, or lower n_classes"
            )
        return caps

    def update(self, codes, labels) -> ClassActivationProfiles:
        """Add a batch of codes; returns self. Raises ValueError as :meth:`fit` does, but allows missing classes."""
        values, indices, n_latents = _check_codes(codes)
        if n_latents != self.n_latents:
            raise ValueError(f"codes have {n_latents} latents, the profiles {self.n_latents}")
        labels = check_labels(labels, len(values), self.n_classes)
        size = self.sums.size
        for start in range(0, len(values), _ROWS):
            rows = slice(start, start + _ROWS)
            cell = (labels[rows, None] * n_latents + indices[rows]).ravel()
            value = values[rows].ravel().astype(np.float64)
            self.sums += np.bincount(cell, value, minlength=size).reshape(self.sums.shape)
            self.active += np.bincount(cell[value != 0], minlength=size).reshape(self.sums.shape)
        self.counts += np.bincount(labels, minlength=self.n_classes)
        return self

    def merge(self, other: ClassActivationProfiles) -> ClassActivationProfiles:
        """Profiles of both sets of samples together (a new object)."""
        if self.sums.shape != other.sums.shape:
            raise ValueError(f"profiles of shape {self.sums.shape} and {other.sums.shape} cannot be merged")
        return type(self)(self.sums + other.sums, self.active + other.active, self.counts + other.counts)

    def all_reduce(self) -> ClassActivationProfiles:
        """Profiles of the samples of all ranks together, on every rank (a new object); without torchrun, the same.

        Each rank has seen samples of its own. The result is :meth:`merge` of them all.
        """
        from . import distributed

        if distributed.world_size() == 1:
            return self
        import torch

        device = distributed.meeting_place()
        parts = (torch.tensor(part, device=device) for part in (self.sums, self.active, self.counts))
        return type(self)(*(distributed.all_reduce(part).cpu().numpy() for part in parts))

    @property
    def n_classes(self) -> int:
        return self.sums.shape[0]

    @property
    def n_latents(self) -> int:
        return self.sums.shape[1]

    @property
    def mean(self) -> np.ndarray:
        """``hbar`` (C, M) float64: the mean code of each class; zero for a class without samples."""
        return self.sums / np.maximum(self.counts, 1)[:, None]

    def core_size(self, fraction: float) -> int:
        """L = fraction * M, rounded, at least 1."""
        if not 0 < fraction <= 1:
            raise ValueError(f"core_fraction is {fraction}: use a share of the latents in (0, 1], the paper's is 0.15")
        return max(1, round(fraction * self.n_latents))

    def core(self, fraction: float = 0.15) -> np.ndarray:
        """Indices (C, L) int32 of the L largest entries of each profile, largest first; ties go to the lower index."""
        return np.argsort(-self.mean, axis=1, kind="stable")[:, : self.core_size(fraction)].astype(np.int32)

    def core_mask(self, fraction: float = 0.15) -> np.ndarray:
        """The same as a mask (C, M) bool."""
        mask = np.zeros(self.sums.shape, bool)
        np.put_along_axis(mask, self.core(fraction).astype(np.int64), True, axis=1)
        return mask

    def active_fraction(self, at_least: float = 0.0) -> np.ndarray:
        """Share (C,) of the latents that fire in more than the share ``at_least`` of a class's samples."""
        return (self.active > at_least * self.counts[:, None]).mean(axis=1)

    def jaccard(self, fraction: float = 0.05) -> np.ndarray:
        """Jaccard index (C, C) of the classes' core sets (the paper's figure 2 takes the top 5 %)."""
        mask = self.core_mask(fraction).astype(np.float64)
        both = mask @ mask.T
        return both / (2 * self.core_size(fraction) - both)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file."""
        arrays = {"sums": self.sums, "active": self.active, "counts": self.counts}
        write_tensors(path, arrays, {"kind": "caps", "schema": SCHEMA})

    @classmethod
    def load(cls, path: str | Path) -> ClassActivationProfiles:
        """Read what :meth:`save` wrote; ValueError for another kind of file or schema."""
        arrays, info = read_tensors(path)
        if info != {"kind": "caps", "schema": SCHEMA}:
            raise ValueError(f"{path} holds {info or 'no capsae header'}, expected caps of schema {SCHEMA}")
        return cls(*(arrays[name] for name in ("sums", "active", "counts")))


def stability(codes, labels, n_classes: int, seed: int = 0) -> np.ndarray:
    """Cosine (C,) between the CAPs of two random halves of each class's samples: the paper's invariance, measured.

    A class with fewer than two samples gets NaN.
    """
    codes = codes.numpy()
    n_latents = codes.n_latents
    labels = check_labels(labels, len(codes), n_classes)
    half = np.zeros(len(labels), np.int64)
    rng = np.random.default_rng(seed)
    for c in range(n_classes):
        rows = rng.permutation(np.flatnonzero(labels == c))
        half[rows[len(rows) // 2 :]] = 1
    a, b = (
        ClassActivationProfiles.empty(n_classes, n_latents).update(codes[half == h], labels[half == h]) for h in (0, 1)
    )
    norms = np.linalg.norm(a.mean, axis=1) * np.linalg.norm(b.mean, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(norms > 0, (a.mean * b.mean).sum(1) / norms, np.nan)


def core_activations(codes, predicted, caps: ClassActivationProfiles, core_fraction: float) -> np.ndarray:
    """The codes with every entry outside the predicted class's core set to zero, values (N, k) float64."""
    values, indices, n_latents = _check_codes(codes)
    if n_latents != caps.n_latents:
        raise ValueError(f"codes have {n_latents} latents, the profiles {caps.n_latents}")
    predicted = check_labels(predicted, len(values), caps.n_classes, "predicted")
    inside = caps.core_mask(core_fraction)[predicted[:, None], indices]
    return np.where(inside, values, 0.0).astype(np.float64)


def core_reference(caps: ClassActivationProfiles, core_fraction: float) -> tuple[np.ndarray, float]:
    """``Q`` (C, M): each profile cut to its core and divided by its sum; and the largest divergence it allows.

    KL(P || Q) is at most ``-log(min Q)`` over the latents with Q > 0. That bound, taken over all classes, is the score
    of samples for which EPD is undefined or infinite, so such a sample ranks above all others (our choice).
    """
    core = np.where(caps.core_mask(core_fraction), caps.mean, 0.0)
    total = core.sum(axis=1, keepdims=True)
    reference = np.divide(core, total, out=np.zeros_like(core), where=total > 0)
    positive = reference[reference > 0]
    return reference, float(-np.log(positive.min())) if len(positive) else 0.0


def energy_profile_divergence(
    codes, predicted, caps: ClassActivationProfiles, core_fraction: float = 0.15
) -> np.ndarray:
    """Energy Profile Divergence, EPD = KL(P || Q) in nats: higher = more out of distribution.

    P is the sample's code on the core of its predicted class and Q that class's profile on the same core, both divided
    by their sums (arXiv 2604.26409).

    Parameters
    ----------
    codes : SparseCodes
        N rows of k values >= 0 with their latent indices.
    predicted : (N,) int
        Class predicted by the backbone's own head (not by the profiles).
    caps : ClassActivationProfiles
        Profiles of the training samples.
    core_fraction : float
        p; the core of a class is the p * M largest entries of its profile.

    Returns
    -------
    (N,) float64
        Where P_i = 0 a latent contributes 0. Where no core latent fires, or P_i > 0 meets Q_i = 0, the score is the
        largest value that a finite EPD under these profiles can take (see :func:`core_reference`; our choice).

    Raises
    ------
    ValueError
        If shapes, the number of latents or the class numbers do not fit, or ``core_fraction`` is not in (0, 1].
    """
    return epd_terms(codes, predicted, caps, core_fraction)[0]


def epd_terms(codes, predicted, caps, core_fraction: float = 0.15) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """EPD with its parts: scores (N,), each slot's term P log(P/Q) (N, k), and the degenerate rows (N,) bool."""
    inside = core_activations(codes, predicted, caps, core_fraction)
    reference, largest = core_reference(caps, core_fraction)
    total = inside.sum(axis=1, keepdims=True)
    p = np.divide(inside, total, out=np.zeros_like(inside), where=total > 0)
    q = reference[as_numpy(predicted).astype(np.int64)[:, None], as_numpy(codes.indices)]
    valid = (p > 0) & (q > 0)
    terms = np.zeros_like(p)
    terms[valid] = p[valid] * np.log(p[valid] / q[valid])
    degenerate = (total[:, 0] <= 0) | ((p > 0) & (q <= 0)).any(axis=1)
    # The bound holds up to rounding; the minimum makes it hold exactly.
    return np.where(degenerate, largest, np.minimum(terms.sum(axis=1), largest)), terms, degenerate
