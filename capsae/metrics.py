"""Detection metrics of two arrays of scores, higher = more out of distribution, as shares in [0, 1].

FPR95 has two meanings in print, and on one and the same scores they can differ by 20 points. Both are here, named by
what counts as the positive class; there is no plain ``fpr95``. No metric ever decides a direction by itself.

A metric walks the thresholds between distinct scores, so ties are counted exactly, as scikit-learn does.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .caps import as_numpy

RECALL = 0.95


def _scores(name: str, scores) -> np.ndarray:
    scores = as_numpy(scores).astype(np.float64)
    if scores.ndim != 1 or not len(scores):
        raise ValueError(f"{name} must be a non-empty vector of scores, found shape {scores.shape}")
    if np.isnan(scores).any():
        raise ValueError(f"{name} holds NaN, the first in row {int(np.isnan(scores).argmax())}")
    return scores


@dataclass(frozen=True)
class Thresholds:
    """ID and OOD scores sorted together once, with the weight of each sample left open.

    ``order`` sorts both descending, ``ends`` are the last positions of each run of equal scores, ``n_id`` the number of
    ID samples (they come first in the unsorted order). A bootstrap replicate is a vector of weights.
    """

    order: np.ndarray
    ends: np.ndarray
    n_id: int

    @classmethod
    def of(cls, id_scores, ood_scores) -> Thresholds:
        id_scores, ood_scores = _scores("id_scores", id_scores), _scores("ood_scores", ood_scores)
        scores = np.concatenate([id_scores, ood_scores])
        order = np.argsort(-scores, kind="stable")
        ranked = scores[order]
        ends = np.append(np.flatnonzero(ranked[1:] != ranked[:-1]), len(ranked) - 1)
        return cls(order, ends, len(id_scores))

    def counts(self, id_weights: np.ndarray, ood_weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Weights (N_id, ...) and (N_ood, ...) -> weight of ID and of OOD at or above each threshold, both (T, ...)."""
        weights = np.concatenate([id_weights, ood_weights])[self.order]
        everything = np.cumsum(weights, axis=0)[self.ends]
        weights[self.order >= self.n_id] = 0
        above_id = np.cumsum(weights, axis=0)[self.ends]
        return above_id, everything - above_id


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

    Samples come first and replicates last: sums over samples then run over whole rows of replicates.
    """
    above_id, above_ood = thresholds.counts(id_weights, ood_weights)
    share_id, share_ood = above_id / above_id[-1], above_ood / above_ood[-1]
    width = np.diff(share_id, axis=0, prepend=0)
    rise = np.diff(share_ood, axis=0, prepend=0)
    below_id, below_ood = _reversed(above_id), _reversed(above_ood)
    return {
        "auroc": (width * (share_ood - rise / 2)).sum(axis=0),
        "fpr95_ood_pos": _first_reaching(share_ood, share_id),
        "fpr95_id_pos": _first_reaching(below_id / below_id[-1], below_ood / below_ood[-1]),
        "aupr_in": _average_precision(below_id, below_ood),
        "aupr_out": _average_precision(above_ood, above_id),
    }


METRICS = ("auroc", "fpr95_ood_pos", "fpr95_id_pos", "aupr_in", "aupr_out")
HIGHER_IS_BETTER = {"auroc": True, "fpr95_ood_pos": False, "fpr95_id_pos": False, "aupr_in": True, "aupr_out": True}


def _one(metric: str, id_scores, ood_scores) -> float:
    thresholds = Thresholds.of(id_scores, ood_scores)
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
