"""Detection metrics of two arrays of scores, higher = more out of distribution, as shares in [0, 1].

FPR95 has two meanings in print, and on one and the same scores they can differ by 20 points. Both are here, named by
what counts as the positive class; there is no plain ``fpr95``, and :func:`require_convention` refuses a table that has
one. No metric ever decides a direction by itself.

A metric walks the thresholds between distinct scores, so ties are counted exactly, as scikit-learn does. Three kinds:
:data:`METRICS` need ID and OOD scores, :data:`WITH_CORRECT` also which ID samples the head classified correctly,
:data:`OF_ERRORS` look at the head's errors on ID samples alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from .data.asarray import as_numpy, as_real

RECALL = 0.95
METRICS = ("auroc", "fpr95_ood_pos", "fpr95_id_pos", "aupr_in", "aupr_out", "autc")
WITH_CORRECT = ("oscr", "auroc_correct")
OF_ERRORS = ("aurc", "errors_flagged")
_LOWER_IS_BETTER = ("fpr95_ood_pos", "fpr95_id_pos", "autc", "aurc")
HIGHER_IS_BETTER = {m: m not in _LOWER_IS_BETTER for m in (*METRICS, *WITH_CORRECT, *OF_ERRORS, "accuracy")}


def require_convention(names: Iterable[object]) -> None:
    """Raise ValueError for a column or metric called FPR95 without saying which class is positive.

    Accepted are names such as ``fpr95_ood_pos``, ``"FPR95, ID positive"``; refused ``fpr95``, ``FPR@95``, ``"FPR 95"``.
    """
    for name in names:
        plain = str(name).lower()
        bare = re.search(r"fpr[^a-z0-9]*(at[^a-z0-9]*)?\d", plain)
        if bare and not re.search(r"(?<![a-z])(ood|id)[ _.-]*pos", plain):
            raise ValueError(f"{name!r} does not say which class is positive: name it fpr95_ood_pos or fpr95_id_pos")


def _scores(name: str, scores) -> np.ndarray:
    scores = as_real(scores, name)
    if scores.ndim != 1 or not len(scores):
        raise ValueError(f"{name} must be a non-empty vector of scores, found shape {scores.shape}")
    if np.isnan(scores).any():
        raise ValueError(f"{name} holds NaN, the first in row {int(np.isnan(scores).argmax())}")
    return scores


@dataclass(frozen=True)
class Thresholds:
    """ID and OOD scores sorted together once, with the weight of each sample left open.

    ``order`` sorts both descending, ``ends`` are the last positions of each run of equal scores, ``levels`` those
    scores, ``n_id`` the number of ID samples (they come first in the unsorted order), ``correct`` (n_id,) bool says
    which of them the head classified correctly, if known. A bootstrap replicate is a vector of weights.
    """

    order: np.ndarray
    ends: np.ndarray
    levels: np.ndarray
    n_id: int
    correct: np.ndarray | None = None

    @classmethod
    def of(cls, id_scores, ood_scores, correct=None) -> Thresholds:
        id_scores, ood_scores = _scores("id_scores", id_scores), _scores("ood_scores", ood_scores)
        if correct is not None:
            correct = _flags("correct", correct, len(id_scores))
        scores = np.concatenate([id_scores, ood_scores])
        order = np.argsort(-scores, kind="stable")
        ranked = scores[order]
        ends = np.append(np.flatnonzero(ranked[1:] != ranked[:-1]), len(ranked) - 1)
        return cls(order, ends, ranked[ends], len(id_scores), correct)

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics that can be computed: the last two need ``correct``."""
        return METRICS if self.correct is None else METRICS + WITH_CORRECT

    def counts(self, id_weights: np.ndarray, ood_weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Weights (N_id, ...) and (N_ood, ...) -> weight of ID and of OOD at or above each threshold, both (T, ...)."""
        weights = np.concatenate([id_weights, ood_weights])[self.order]
        everything = np.cumsum(weights, axis=0)[self.ends]
        weights[self.order >= self.n_id] = 0
        above_id = np.cumsum(weights, axis=0)[self.ends]
        return above_id, everything - above_id


def _flags(name: str, values, n: int) -> np.ndarray:
    values = as_numpy(values).astype(bool)
    if values.shape != (n,):
        raise ValueError(f"{name} has shape {values.shape}, the scores ({n},): give one value a sample")
    return values


def _first_reaching(recall: np.ndarray, other: np.ndarray) -> np.ndarray:
    """``other`` at the first threshold at which ``recall`` reaches 95 %; no interpolation."""
    at = (recall >= RECALL - 1e-12).argmax(axis=0)
    return np.take_along_axis(other, at[None], axis=0)[0]


def _average_precision(positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    steps = np.diff(positive, axis=0, prepend=0)
    flagged = positive + negative
    precision = np.divide(positive, flagged, out=np.zeros_like(flagged), where=flagged > 0)
    return (steps * precision).sum(axis=0) / positive[-1]


def _reversed(above: np.ndarray) -> np.ndarray:
    """Counts at or below each threshold, thresholds ascending, from counts at or above, descending."""
    return (above[-1] - np.concatenate([np.zeros_like(above[:1]), above[:-1]]))[::-1]


def all_metrics(thresholds: Thresholds, id_weights: np.ndarray, ood_weights: np.ndarray) -> dict[str, np.ndarray]:
    """Every metric for weights (N_id, ...), (N_ood, ...) float64; see the functions below for what each means.

    Samples come first and replicates last. This is the readable reference of ``bootstrap_kernels``.
    """
    above_id, above_ood = thresholds.counts(id_weights, ood_weights)
    share_id, share_ood = above_id / above_id[-1], above_ood / above_ood[-1]
    width = np.diff(share_id, axis=0, prepend=0)
    rise = np.diff(share_ood, axis=0, prepend=0)
    below_id, below_ood = _reversed(above_id), _reversed(above_ood)
    found = {
        "auroc": (width * (share_ood - rise / 2)).sum(axis=0),
        "fpr95_ood_pos": _first_reaching(share_ood, share_id),
        "fpr95_id_pos": _first_reaching(below_id / below_id[-1], below_ood / below_ood[-1]),
        "aupr_in": _average_precision(below_id, below_ood),
        "aupr_out": _average_precision(above_ood, above_id),
        "autc": _threshold_areas(thresholds.levels, width, rise),
    }
    if thresholds.correct is not None:
        hits = thresholds.correct.reshape(-1, *[1] * (id_weights.ndim - 1)) * id_weights
        above = thresholds.counts(hits, ood_weights)[0]
        found["oscr"] = (np.diff(above, axis=0, prepend=0) * (share_ood - rise / 2)).sum(axis=0) / above_id[-1]
        with np.errstate(invalid="ignore"):  # no ID sample is classified correctly: undefined
            found["auroc_correct"] = found["oscr"] * above_id[-1] / above[-1]
    return found


def _threshold_areas(levels: np.ndarray, width: np.ndarray, rise: np.ndarray) -> np.ndarray:
    """AUTC from the shares of ID (``width``) and OOD (``rise``) at each of the descending ``levels``."""
    levels = levels.reshape(-1, *[1] * (width.ndim - 1))
    present = (width > 0) | (rise > 0)
    with np.errstate(invalid="ignore"):  # an infinite score leaves no scale
        top = np.where(present, levels, -np.inf).max(axis=0)
        span = top - np.where(present, levels, np.inf).min(axis=0)
        apart = ((width - rise) * np.where(present, levels, 0)).sum(axis=0)  # mean of ID less mean of OOD
        area = 0.5 * (1 + apart / np.where(span > 0, span, 1))
    return np.where(span > 0, area, np.where(span == 0, 0.5, np.nan))


def _one(metric: str, id_scores, ood_scores, correct=None) -> float:
    thresholds = Thresholds.of(id_scores, ood_scores, correct)
    n_ood = len(thresholds.order) - thresholds.n_id
    return float(all_metrics(thresholds, np.ones(thresholds.n_id), np.ones(n_ood))[metric])


def auroc(id_scores, ood_scores) -> float:
    """Area under the ROC curve: the chance that an OOD sample scores above an ID sample, ties counting one half.

    Parameters
    ----------
    id_scores, ood_scores : (N,), (K,) arrays
        Higher = more OOD.

    Raises
    ------
    ValueError
        For an empty array, one that is not a vector, or NaN.
    """
    return _one("auroc", id_scores, ood_scores)


def fpr95_ood_pos(id_scores, ood_scores) -> float:
    """Share of ID rejected at the first threshold that catches 95 % of OOD: OOD is the positive class.

    The convention of OpenOOD. Parameters and errors as :func:`auroc`.
    """
    return _one("fpr95_ood_pos", id_scores, ood_scores)


def fpr95_id_pos(id_scores, ood_scores) -> float:
    """Share of OOD accepted at the first threshold that keeps 95 % of ID: ID is the positive class.

    The convention of ODIN, ViM, NINCO and Mahalanobis++. Parameters and errors as :func:`auroc`.
    """
    return _one("fpr95_id_pos", id_scores, ood_scores)


def aupr_in(id_scores, ood_scores) -> float:
    """Average precision with ID as the positive class (low scores first). Parameters and errors as :func:`auroc`."""
    return _one("aupr_in", id_scores, ood_scores)


def aupr_out(id_scores, ood_scores) -> float:
    """Average precision with OOD as the positive class. Parameters and errors as :func:`auroc`."""
    return _one("aupr_out", id_scores, ood_scores)


def autc(id_scores, ood_scores) -> float:
    """Area under the threshold curves (lower is better): how far a threshold can be off before errors appear.

    With the scores of both sides together scaled to [0, 1], AUTC = (AUFPR + AUFNR) / 2, the areas under the share of ID
    at or above, and of OOD below, a threshold that runs from 0 to 1. The areas of these steps are the scaled scores'
    means, so AUTC = (1 + mean ID - mean OOD) / 2 exactly; the authors' program integrates by trapezoids between the
    distinct scores. It depends on the scale of the scores, not on their order alone: one outlier squeezes it towards
    0.5, a monotonic transform changes it, and of unbounded scores it depends on how many there are: compare it between
    scores on one and the same set, not between sets. Equal scores throughout give 0.5, an infinite one NaN.

    Source: Humblot-Renaux, Escalera, Moeslund, "Beyond AUROC & co.", CVPR workshops 2023. Parameters and errors as
    :func:`auroc`.
    """
    return _one("autc", id_scores, ood_scores)


def oscr(id_scores, ood_scores, correct) -> float:
    """Area under the open-set classification rate curve (higher is better).

    The curve: the share of all ID samples that are accepted *and* classified correctly, against the share of OOD
    samples accepted, over all thresholds; between thresholds straight, so that ties count one half. It is the accuracy
    times the AUROC of the correctly classified.

    Source: Dhamija, Guenther, Boult, "Reducing network agnostophobia", NeurIPS 2018.

    Parameters
    ----------
    id_scores, ood_scores : (N,), (K,) arrays
        Higher = more OOD.
    correct : (N,) bool array
        Whether the head classified the ID sample correctly.
    """
    return _one("oscr", id_scores, ood_scores, correct)


def auroc_correct(id_scores, ood_scores, correct) -> float:
    """AUROC of OOD against the correctly classified ID samples alone; NaN if there is none. Parameters as :func:`oscr`.

    A score that reacts to the head's errors rejects ID samples whose label would be wrong anyway; here that costs
    nothing.
    """
    return _one("auroc_correct", id_scores, ood_scores, correct)


def risk_coverage(scores, failed) -> tuple[np.ndarray, np.ndarray]:
    """Selective risk at every coverage: ``(coverage (n,), risk (n,))``, coverage 1/n, 2/n, ..., 1.

    Samples are accepted from the lowest score up; the risk is the share of failures among those accepted. Where scores
    tie, it is the mean over all orders of the tied samples.

    Source: Geifman, El-Yaniv, "Selective classification for deep neural networks", NeurIPS 2017.

    Parameters
    ----------
    scores : (n,) array
    failed : (n,) bool array
        What ought to be rejected: errors of the head on ID samples, as here, or, after Jaeger et al. ("A call to
        reflect on evaluation practices for failure detection", ICLR 2023), OOD samples as well.
    """
    scores = _scores("scores", scores)
    failed = _flags("failed", failed, len(scores))
    order = np.argsort(scores, kind="stable")
    _, start, size = np.unique(scores[order], return_index=True, return_counts=True)
    mean = np.repeat(np.add.reduceat(failed[order].astype(np.float64), start) / size, size)  # failures a tied sample
    accepted = np.arange(1, len(scores) + 1)
    return accepted / len(scores), np.cumsum(mean) / accepted


def aurc(scores, failed) -> float:
    """Area under the risk-coverage curve: the mean of its n risks (lower is better). As :func:`risk_coverage`.

    Source: Geifman, Uziel, El-Yaniv, "Bias-reduced uncertainty estimation for deep neural classifiers", ICLR 2019.
    """
    return float(risk_coverage(scores, failed)[1].mean())


def errors_flagged(scores, failed) -> float:
    """Share of the failures that are flagged at the threshold that keeps 95 % of all these samples; NaN without any.

    The threshold is that of :func:`fpr95_id_pos` on the same ID samples: a score that flags at random finds 5 %.
    """
    scores = _scores("scores", scores)
    failed = _flags("failed", failed, len(scores))
    if not failed.any():
        return float("nan")
    return float((scores[failed] > np.quantile(scores, RECALL, method="inverted_cdf")).mean())


def tie_rate(id_scores, ood_scores) -> float:
    """Share of the samples, ID and OOD together, that share their score with another one: 0 for a score without ties.

    Sparse and rank scores tie often. All metrics here count ties exactly; a program that breaks them by position
    does not. Parameters and errors as :func:`auroc`.
    """
    both = np.concatenate([_scores("id_scores", id_scores), _scores("ood_scores", ood_scores)])
    counts = np.unique(both, return_counts=True)[1]
    return float(counts[counts > 1].sum() / len(both))
