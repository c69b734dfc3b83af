"""Detectors x OOD sets -> one tidy table, and paired comparisons of detectors."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd

from ..data.asarray import as_numpy, as_real
from ..detectors import Detector, Observations
from ..stats import FPR95
from .tables import COLUMNS, COMPARED, Scores, compare_scores, evaluate_scores, group_of

__all__ = ["COLUMNS", "COMPARED", "all_scores", "compare", "correct", "evaluate", "group_of", "scores_table"]


def _named(detectors) -> dict[str, Detector]:
    if isinstance(detectors, Mapping):
        return dict(detectors)
    named = {getattr(d, "name", None) or type(d).__name__: d for d in detectors}
    if len(named) < len(detectors):
        raise ValueError("two detectors of one class in a list: give a dict {name: detector}")
    return named


def _scores(name: str, detector: Detector, where: str, obs: Observations) -> np.ndarray:
    scores = as_real(detector.score(obs), f"{name} on {where}")
    if scores.shape != (len(obs),):
        raise ValueError(f"{name} gave scores of shape {scores.shape} for {where}, expected ({len(obs)},)")
    if np.isnan(scores).any():
        raise ValueError(f"{name} gave NaN for {where}, first in row {int(np.isnan(scores).argmax())}")
    return scores


def scores_table(detectors, sets: Mapping[str, Observations]) -> pd.DataFrame:
    """Scores of every sample, tidy: method, set, group ("id" for names without near/ or far/), row, score."""
    frames = []
    for where, obs in sets.items():
        group = where.split("/")[0] if "/" in where else "id"
        for name, detector in _named(detectors).items():
            scores = _scores(name, detector, where, obs)
            about = {"method": name, "set": where, "group": group, "row": np.arange(len(scores))}
            frames.append(pd.DataFrame(about | {"score": scores}))
    return pd.concat(frames, ignore_index=True)


def evaluate(
    detectors,
    id_test: Observations,
    ood: Mapping[str, Observations],
    n_boot: int = 1000,
    seed: int = 0,
    shifted: Mapping[str, Observations] | None = None,
    seeds: Iterable[tuple[Mapping, Mapping[str, Observations]]] = (),
) -> pd.DataFrame:
    """Compare fitted detectors on one ID set and several OOD sets.

    Parameters
    ----------
    detectors : dict of fitted Detector, or a list of them
    id_test : Observations
        ID samples that trained nothing.
    ood : dict of Observations
        Keys ``near/<set>`` or ``far/<set>``.
    n_boot : int
        Bootstrap replicates over both sides; 0 leaves ``lo`` and ``hi`` NaN.
    seed : int
    shifted : dict of Observations, optional
        Keys ``shifted/<set>``: known classes in other conditions. They count as ID in further rows of the table, the
        full spectrum of OpenOOD v1.5, and not in any other row.
    seeds : of (detectors, sets), optional
        The same images seen by SAEs of other seeds: those of the detectors that depend on the SAE, fitted on its codes,
        and a dict of all sets, with the ID test set as "test". Taken one after the other, so a generator will do.

    Returns
    -------
    DataFrame
        Columns method, set, group, metric, value, lo, hi, seeds. Metrics are shares in [0, 1] (see
        :mod:`capsae.metrics`). Where ``seeds`` is 1, ``lo`` and ``hi`` are a 95 % percentile interval over images
        alone; where there are more, ``value`` is the mean over them and the interval holds images and seeds
        (:func:`capsae.stats.seeds_and_images`). Where all replicates of an FPR95 or accuracy are equal, Clopper and
        Pearson's; none for AUTC, which hangs on the largest score. Unweighted means over sets
        have ``set`` "mean" and ``group`` "near", "far" or "all". With ``shifted``, the same rows again with the
        groups "full-spectrum near", "full-spectrum far", "full-spectrum all": ID is then the test set and all
        shifted sets in one heap.

        If all labels of ``id_test`` are known, there are rows for OSCR and for the AUROC of correctly classified ID.
        With ``set`` "test" and ``group`` "id" there are each method's AURC and share of errors flagged, and, method
        "head", the accuracy, all over the rows that have a label (-1 is none). Shifted sets with labels have an
        accuracy of their own; the full spectrum has OSCR and the like where all rows of all of them have labels.

    Raises
    ------
    ValueError
        For no detector, no OOD set, an empty set, a set without near/ or far/ (shifted/), or scores that are NaN or
        misshapen.
    """
    known = {"test": id_test, **(shifted or {})}
    _check(_named(detectors), id_test, ood, shifted or {})
    scores = all_scores(detectors, {**known, **ood}, seeds)
    return evaluate_scores(scores, {name: correct(obs) for name, obs in known.items()}, list(ood), n_boot, seed)


def compare(
    detectors,
    id_test: Observations,
    ood: Mapping[str, Observations],
    against: str | Iterable[tuple[str, str]] = "epd",
    metrics: Sequence[str] = (*FPR95, "auroc"),
    n_boot: int = 20_000,
    seed: int = 0,
    alpha: float = 0.05,
    seeds: Iterable[tuple[Mapping, Mapping[str, Observations]]] = (),
) -> pd.DataFrame:
    """Test differences of detectors on each OOD set and in the mean over all sets.

    A replicate draws the samples once and scores both methods on them, so what makes a draw easy or hard for both
    cancels; overlapping intervals of :func:`evaluate` do not mean that a difference is undecided.

    Parameters
    ----------
    detectors, id_test, ood, seed, seeds
        As for :func:`evaluate`.
    against : name, or (method, other) names
        Every other detector is compared with this one, or the pairs are those given.
    metrics : names of :data:`capsae.metrics.METRICS`
    n_boot : int
        Paired replicates. Without ``seeds`` no p value can be below 2 / (n_boot + 1), and none of m comparisons is
        "better" unless m times that is under alpha: take 20 m / alpha or more. With them the replicates give a
        standard error alone, and 1,000 do. AUROC is tested by DeLong's method instead.
    alpha : float
        Level of the verdict.

    Returns
    -------
    DataFrame
        Columns method, other, set, metric, value, lo, hi, p, p_holm, p_at_most, seeds, verdict. ``value`` is the metric
        of ``method`` less that of ``other``, a share, with a 95 % interval that is not corrected for how many there
        are. Where one of both has more seeds than one, ``value`` is of means over seeds, and interval and p hold images
        and seeds: two methods on the same SAEs are compared seed by seed.
        ``p_holm`` is corrected by Holm over one column of the table: all pairs on one metric and one set (or "mean"),
        a pair and its reverse counting once. ``p_at_most``: no replicate lay beyond zero, so p is an upper bound.
        ``verdict`` on ``method``: "better" or "worse" where p_holm < alpha, else "undecided".
    """
    detectors = _named(detectors)
    if isinstance(against, str):
        if against not in detectors:
            raise ValueError(f"against={against!r} is not among the detectors: {', '.join(detectors)}")
        against = [(name, against) for name in detectors if name != against]
    pairs = list(against)
    missing = sorted({name for pair in pairs for name in pair} - set(detectors))
    if missing:
        raise ValueError(f"no detector {missing[0]!r} to compare; there are {', '.join(detectors)}")
    if not pairs:
        raise ValueError("compare needs at least two detectors")
    detectors = {name: detectors[name] for name in dict.fromkeys(name for pair in pairs for name in pair)}
    _check(detectors, id_test, ood, {})
    scores = all_scores(detectors, {"test": id_test, **ood}, seeds)
    return compare_scores(scores, list(ood), pairs, correct(id_test), metrics, n_boot, seed, alpha)


# --- what both are made of


def _check(detectors: Mapping, id_test: Observations, ood: Mapping, shifted: Mapping) -> None:
    """ValueError for what cannot be evaluated."""
    if not detectors or not ood:
        raise ValueError("evaluate needs at least one detector and one OOD set")
    for where in shifted:
        if not (where.startswith("shifted/") and where != "shifted/"):
            raise ValueError(f"covariate-shifted set {where!r}: name it shifted/<set>")
    for where, obs in {"id_test": id_test, **shifted, **ood}.items():
        if not len(obs):
            raise ValueError(f"{where} has no rows")
    for where in ood:
        group_of(where)


def all_scores(
    detectors, sets: Mapping[str, Observations], seeds: Iterable[tuple[Mapping, Mapping[str, Observations]]] = ()
) -> Scores:
    """Method -> set -> scores (S, N): a row for each seed, one for a detector that ``seeds`` does not have again.

    ``detectors``, ``seeds`` as for :func:`evaluate`, whose scores come first.
    """
    found: dict = {}
    for number, (fitted, of) in enumerate(itertools.chain([(_named(detectors), sets)], seeds)):
        for name, detector in fitted.items():
            if number and name not in found:
                raise ValueError(f"seeds hold {name!r}, which is not among the detectors: {', '.join(found)}")
            for where in sets:
                found.setdefault(name, {}).setdefault(where, []).append(_scores(name, detector, where, of[where]))
    stacked: dict[str, dict] = {}
    for name, of_sets in found.items():
        for where, rows in of_sets.items():
            if len({len(row) for row in rows}) > 1:
                raise ValueError(f"{where} has {len(rows[0])} samples for the first seed, others for a later one")
            stacked.setdefault(name, {})[where] = np.stack(rows)
    return stacked


def correct(obs: Observations) -> np.ndarray | None:
    """Whether the head classified each sample correctly (N,): bool, or float with NaN where some have no label (-1).

    None for a set without labels.
    """
    if obs.labels is None or (as_numpy(obs.labels) < 0).all():
        return None
    labels = as_numpy(obs.labels)
    hit = obs.predicted == labels
    return hit if (labels >= 0).all() else np.where(labels >= 0, hit, np.nan)
