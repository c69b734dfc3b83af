"""Detectors x OOD sets -> one tidy table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd

from .caps import as_numpy
from .detectors import Detector, Observations
from .metrics import METRICS, Thresholds, all_metrics
from .stats import bootstrap, interval

COLUMNS = ["method", "set", "group", "metric", "value", "lo", "hi"]


def group_of(set_name: str) -> str:
    """``near`` of ``near/imagenet980``; ValueError for a name without a group."""
    group, _, rest = set_name.partition("/")
    if group not in ("near", "far") or not rest:
        raise ValueError(f"OOD set {set_name!r}: name it near/<set> or far/<set>, so that it lands in the right mean")
    return group


def _named(detectors) -> dict[str, Detector]:
    if isinstance(detectors, Mapping):
        return dict(detectors)
    named = {getattr(d, "name", None) or type(d).__name__: d for d in detectors}
    if len(named) < len(detectors):
        raise ValueError("two detectors of one class in a list: give a dict {name: detector}")
    return named


def _scores(name: str, detector: Detector, where: str, obs: Observations) -> np.ndarray:
    scores = as_numpy(detector.score(obs)).astype(np.float64)
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
            frames.append(
                pd.DataFrame(
                    {"method": name, "set": where, "group": group, "row": np.arange(len(scores)), "score": scores}
                )
            )
    return pd.concat(frames, ignore_index=True)


def evaluate(
    detectors, id_test: Observations, ood: Mapping[str, Observations], n_boot: int = 1000, seed: int = 0
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

    Returns
    -------
    DataFrame
        Columns method, set, group, metric, value, lo, hi. Metrics are shares in [0, 1] (see :mod:`capsae.metrics`),
        ``lo`` and ``hi`` a 95 % percentile interval. Unweighted means over sets have ``set`` "mean" and ``group``
        "near", "far" or "all". If labels of ``id_test`` are known, one row holds the head's accuracy: method "head",
        set "test", group "id", metric "accuracy".

    Raises
    ------
    ValueError
        For no detector, no OOD set, an empty set, a set without near/ or far/, or scores that are NaN or misshapen.
    """
    detectors = _named(detectors)
    if not detectors or not ood:
        raise ValueError("evaluate needs at least one detector and one OOD set")
    groups = {where: group_of(where) for where in ood}
    for where, obs in {"id_test": id_test, **ood}.items():
        if not len(obs):
            raise ValueError(f"{where} has no rows")

    id_scores = {name: _scores(name, detector, "id_test", id_test) for name, detector in detectors.items()}
    values: dict[tuple[str, str], dict[str, float]] = {}
    draws: dict[tuple[str, str], dict[str, np.ndarray]] = {}
    for stream, (where, obs) in enumerate(ood.items()):
        thresholds = {
            name: Thresholds.of(id_scores[name], _scores(name, detector, where, obs))
            for name, detector in detectors.items()
        }
        for name, one in thresholds.items():
            values[name, where] = all_metrics(one, np.ones(len(id_test)), np.ones(len(obs)))
        if n_boot:
            found = bootstrap(thresholds, n_boot, seed, stream)
            draws |= {(name, where): found[name] for name in detectors}

    singles = [(where, groups[where], [where]) for where in ood]
    means = [("mean", group, [w for w in ood if groups[w] == group]) for group in ("near", "far")]
    rows = []
    for name in detectors:
        for metric in METRICS:
            for label, group, over in [*singles, *(m for m in means if m[2]), ("mean", "all", list(ood))]:
                value = float(np.mean([values[name, where][metric] for where in over]))
                bounds = (np.nan, np.nan)
                if n_boot:
                    bounds = interval(np.mean([draws[name, where][metric] for where in over], axis=0))
                rows.append((name, label, group, metric, value, *bounds))
    if id_test.labels is not None:
        rows.append(_accuracy_row(id_test, n_boot, seed))
    return pd.DataFrame(rows, columns=COLUMNS)


def paired_differences(
    detectors,
    id_test: Observations,
    ood: Mapping[str, Observations],
    pairs: Iterable[tuple[str, str]],
    n_boot: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Differences of detectors' means over all OOD sets, with paired bootstrap intervals.

    A replicate draws the samples once and scores both methods on them, so what makes a draw easy or hard for both
    cancels; overlapping intervals of :func:`evaluate` do not mean that a difference is undecided.

    Parameters
    ----------
    detectors, id_test, ood, n_boot, seed
        As for :func:`evaluate`.
    pairs : (method, other) names
        The difference is the metric of ``method`` less that of ``other``.

    Returns
    -------
    DataFrame
        Columns method, other, metric, value, lo, hi: shares, 95 % percentile intervals.
    """
    pairs = list(pairs)
    detectors = {name: detectors[name] for name in dict.fromkeys(name for pair in pairs for name in pair)}
    id_scores = {name: _scores(name, detector, "id_test", id_test) for name, detector in detectors.items()}
    means = {name: dict.fromkeys(METRICS, 0.0) for name in detectors}
    draws = {name: {metric: np.zeros(n_boot) for metric in METRICS} for name in detectors}
    for stream, (where, obs) in enumerate(ood.items()):
        thresholds = {
            name: Thresholds.of(id_scores[name], _scores(name, detector, where, obs))
            for name, detector in detectors.items()
        }
        found = bootstrap(thresholds, n_boot, seed, stream)
        for name, one in thresholds.items():
            exact = all_metrics(one, np.ones(len(id_test)), np.ones(len(obs)))
            for metric in METRICS:
                means[name][metric] += float(exact[metric]) / len(ood)
                draws[name][metric] += found[name][metric] / len(ood)
    rows = [
        (a, b, m, means[a][m] - means[b][m], *interval(draws[a][m] - draws[b][m])) for a, b in pairs for m in METRICS
    ]
    return pd.DataFrame(rows, columns=["method", "other", "metric", "value", "lo", "hi"])


def _accuracy_row(id_test: Observations, n_boot: int, seed: int) -> tuple:
    hit = (id_test.predicted == as_numpy(id_test.labels)).astype(np.float64)
    lo = hi = np.nan
    if n_boot:
        draws = np.random.default_rng(seed).binomial(len(hit), hit.mean(), n_boot) / len(hit)
        lo, hi = interval(draws)
    return ("head", "test", "id", "accuracy", float(hit.mean()), lo, hi)
