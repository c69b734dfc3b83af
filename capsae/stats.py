"""Uncertainty of detection metrics: bootstrap over both the ID and the OOD samples, DeLong, Holm, ranks over sets.

The ID replicates are shared by all methods and all OOD sets (same seed), so differences of methods are paired and a
mean over sets keeps the sets' common dependence on the ID samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import pandas as pd

from .metrics import OF_ERRORS, RECALL, Thresholds, _flags, _scores, all_metrics

_CELLS = 2**22  # replicates x samples held at a time
FPR95 = ("fpr95_ood_pos", "fpr95_id_pos")
_AREAS = ("auroc", "aupr_in", "aupr_out", "autc", "oscr", "auroc_correct")  # as bootstrap_kernels.areas returns them


@cache
def _kernels():
    """The compiled loops, or None where numba is missing or unable: numpy then does the same, thirty times slower."""
    try:
        from . import bootstrap as bootstrap_kernels
    except (ImportError, RuntimeError):
        return None
    return bootstrap_kernels


def _draws(rng: np.random.Generator, n: int, replicates: int) -> np.ndarray:
    """(replicates, n) int32: how often each of n samples was drawn in n draws with replacement."""
    drawn = rng.integers(0, n, size=(replicates, n)) + np.arange(replicates)[:, None] * n
    return np.bincount(drawn.ravel(), minlength=replicates * n).reshape(replicates, n).astype(np.int32)


def bootstrap(
    methods: dict[str, Thresholds],
    n_boot: int,
    seed: int = 0,
    stream: int = 0,
    metrics: Sequence[str] | None = None,
) -> dict[str, dict[str, np.ndarray]]:
    """Bootstrap replicates of the metrics, the same draws for all methods.

    ``seed`` seeds the ID draws (two calls with equal N and seed draw the same ID samples) and, with ``stream``, the
    number of the OOD set, the OOD draws. ``metrics``: by default all that the thresholds allow. Gives method -> metric
    -> (n_boot,) float64.
    """
    first = next(iter(methods.values()))
    metrics = first.metrics if metrics is None else tuple(metrics)
    n_id, n_ood = first.n_id, len(first.order) - first.n_id
    id_rng, ood_rng = np.random.default_rng([seed, 0]), np.random.default_rng([seed, 1 + stream])
    out = {method: {metric: np.empty(n_boot) for metric in metrics} for method in methods}
    chunk = max(1, min(256, _CELLS // (n_id + n_ood)))
    for start in range(0, n_boot, chunk):
        part = slice(start, min(start + chunk, n_boot))
        size = part.stop - part.start
        drawn = np.concatenate([_draws(id_rng, n_id, size), _draws(ood_rng, n_ood, size)], axis=1)
        weights = np.ascontiguousarray(drawn.T)
        for method, thresholds in methods.items():
            for metric, values in _replicates(thresholds, weights, metrics).items():
                out[method][metric][part] = values
    return out


def _replicates(of: Thresholds, weights: np.ndarray, metrics: Sequence[str]) -> dict[str, np.ndarray]:
    """The metrics for weights (N_id + N_ood, replicates)."""
    kernels = _kernels()
    if kernels is None:
        weights = weights.astype(np.float64)
        found = all_metrics(of, weights[: of.n_id], weights[of.n_id :])
        return {metric: found[metric] for metric in metrics}
    found = {}
    if set(metrics) & set(FPR95):
        found |= dict(zip(FPR95, kernels.fpr95(of.order, of.ends, of.n_id, weights, RECALL).T, strict=True))
    if set(metrics) - set(FPR95):
        correct = np.zeros(of.n_id, np.int32) if of.correct is None else of.correct.astype(np.int32)
        values = kernels.areas(of.order, of.ends, of.levels, of.n_id, correct, weights)
        found |= dict(zip(_AREAS, values.T, strict=True))
    return {metric: found[metric] for metric in metrics}


def bootstrap_errors(scores, failed, n_boot: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Replicates (n_boot,) of :func:`capsae.metrics.aurc` and ``errors_flagged``; the ID draws of :func:`bootstrap`."""
    scores = _scores("scores", scores)
    failed = _flags("failed", failed, len(scores))
    order = np.argsort(scores, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(order) - 1)
    rng, kernels, parts = np.random.default_rng([seed, 0]), _kernels(), []
    chunk = max(1, min(256, _CELLS // len(scores)))
    for start in range(0, n_boot, chunk):
        weights = _draws(rng, len(scores), min(chunk, n_boot - start))
        if kernels is not None:
            parts.append(kernels.errors(order, ends, failed.astype(np.int32), weights, RECALL))
            continue
        from . import metrics

        again = [np.repeat(np.arange(len(scores)), row) for row in weights]
        parts.append(np.array([[getattr(metrics, m)(scores[i], failed[i]) for m in OF_ERRORS] for i in again]))
    values = np.concatenate(parts) if parts else np.empty((0, len(OF_ERRORS)))
    return dict(zip(OF_ERRORS, values.T, strict=True))


def interval(replicates: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval (lo, hi) of replicates (n_boot,); NaN of none. Undefined (NaN) replicates are left out."""
    replicates = replicates[~np.isnan(replicates)]
    if not len(replicates):
        return float("nan"), float("nan")
    lo, hi = np.quantile(replicates, [(1 - level) / 2, (1 + level) / 2])
    return float(lo), float(hi)


def exact_interval(share: float, n: int, level: float = 0.95) -> tuple[float, float]:
    """Clopper and Pearson's interval (lo, hi) of a share of n samples, for where a bootstrap sees no variation."""
    from scipy.stats import beta

    if not n or np.isnan(share):
        return float("nan"), float("nan")
    hits, tail = round(share * n), (1 - level) / 2
    lo = beta.ppf(tail, hits, n - hits + 1) if hits else 0.0
    hi = beta.ppf(1 - tail, hits + 1, n - hits) if hits < n else 1.0
    return float(lo), float(hi)


def bootstrap_p(differences: np.ndarray) -> float:
    """Two-sided p of "no difference" from paired replicates (n_boot,): twice the share beyond zero, at most 1.

    One replicate is added to the share, so that p is never below 2 / (n_boot + 1): more replicates resolve more.
    """
    beyond = min((differences <= 1e-12).sum(), (differences >= -1e-12).sum())  # rounding is no difference
    return float(min(1.0, 2 * (1 + beyond) / (1 + len(differences))))


# --- seeds and images


def seeds_and_images(values, image_error: float, other=None, level: float = 0.95) -> dict[str, float | str]:
    """Interval and test of a mean over seeds, with both sources of doubt: the images and the seeds.

    ``SE^2 = image_error^2 + s^2 / S``, and a t distribution with the degrees of freedom of Welch and Satterthwaite.
    The images' part counts as known: its bootstrap has many more replicates than there are seeds. What a seed does to
    single images is in both parts, which makes the interval a little too wide rather than too narrow.

    Source: Satterthwaite, Biometrics Bulletin 1946; Welch, Biometrika 1947. That images and seeds are put together in
    this way is ours.

    Parameters
    ----------
    values : (S,) float
        A number for each seed, on all images. For a paired difference: the difference for each seed.
    image_error : float
        Standard error of the number *averaged over the seeds*, from replicates that draw the same images for all seeds
        (and both methods).
    other : (R,) float, optional
        Values of another method with seeds of its own, to be taken off; ``image_error`` is then of the difference.

    Returns
    -------
    dict
        ``value`` (the mean over seeds, less that of ``other``), ``lo``, ``hi``, ``p`` (two-sided, of "nothing"),
        ``error`` (SE), ``df``, ``seeds``, and ``holds``: "images and seeds" or, of one seed, "images".

    Examples
    --------
    >>> seeds_and_images([0.10, 0.12, 0.11], 0.01)["holds"], seeds_and_images([0.10], 0.01)["holds"]
    ('images and seeds', 'images')
    """
    from scipy.stats import t

    sides = [np.asarray(side, dtype=np.float64) for side in (values, other) if side is not None]
    if any(side.ndim != 1 or not len(side) for side in sides):
        raise ValueError(f"values have shape {sides[0].shape}: a number for each seed, (S,), would do")
    value = sides[0].mean() - (sides[1].mean() if len(sides) > 1 else 0.0)
    parts = [(side.var(ddof=1) / len(side), len(side) - 1) for side in sides if len(side) > 1]
    variance = float(image_error) ** 2 + sum(part for part, _ in parts)
    known = sum(part**2 / df for part, df in parts)
    # The share first: a variance of 1e-200 squared would be zero.
    df = 1 / sum((part / variance) ** 2 / df for part, df in parts) if variance > 0 and known > 0 else np.inf
    error = np.sqrt(variance)
    reach = t.ppf((1 + level) / 2, df) * error
    p = 2 * t.sf(abs(value) / error, df) if error > 0 else float(abs(value) < 1e-12)
    found = {"value": value, "lo": value - reach, "hi": value + reach, "p": p, "error": error, "df": df}
    seeds = len(sides[0]) if len(sides) == 1 else min(map(len, sides))
    return {key: float(x) for key, x in found.items()} | {
        "seeds": seeds,
        "holds": "images and seeds" if parts else "images",
    }


# --- DeLong


def placements(id_scores, ood_scores) -> tuple[np.ndarray, np.ndarray]:
    """Each sample's share of the other side's that it is ordered right with, ties one half: (N_id,), (N_ood,).

    Their means are both the AUROC. By sorting, O(n log n): a sample's place among the other side's is its midrank in
    both sides together less its midrank in its own (Sun, Xu, IEEE Signal Processing Letters 2014).
    """
    id_scores, ood_scores = _scores("id_scores", id_scores), _scores("ood_scores", ood_scores)
    ids, oods = np.sort(id_scores), np.sort(ood_scores)
    below = np.searchsorted(ids, ood_scores, "left") + np.searchsorted(ids, ood_scores, "right")
    under = np.searchsorted(oods, id_scores, "left") + np.searchsorted(oods, id_scores, "right")
    return 1 - under / (2 * len(oods)), below / (2 * len(ids))


def delong(of_sets: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[float, float]:
    """``(value, standard error)`` of an AUROC, or of its mean over OOD sets that share their ID samples.

    Placements are linear in all that matters: for the *paired difference* of two methods, hand in the differences of
    their placements.

    Source: DeLong, DeLong, Clarke-Pearson, Biometrics 1988. The mean over sets is ours: the ID parts are averaged over
    the sets before their variance is taken, the OOD parts are independent of each other.

    Parameters
    ----------
    of_sets : list of (placements of ID (N,), placements of OOD (K,)), one pair a set
    """
    known = np.mean([ids for ids, _ in of_sets], axis=0)
    variance = known.var(ddof=1) / len(known) if len(known) > 1 else np.nan
    for _, oods in of_sets:
        variance += (oods.var(ddof=1) / len(oods) if len(oods) > 1 else np.nan) / len(of_sets) ** 2
    return float(known.mean()), float(np.sqrt(variance))


def delong_difference(of_sets: Sequence, other_sets: Sequence, level: float = 0.95) -> dict[str, float]:
    """Paired test of two methods' (mean) AUROC: value, lo, hi, p. Arguments as :func:`delong`, on the same samples.

    ``p`` is two-sided, from the normal distribution; two methods that order all samples alike have p = 1.
    """
    from scipy.stats import norm

    parts = [(a - c, b - d) for (a, b), (c, d) in zip(of_sets, other_sets, strict=True)]
    value, error = delong(parts)
    reach = norm.isf((1 - level) / 2) * error
    p = 2 * norm.sf(abs(value) / error) if error > 0 else float(value == 0)
    return {"value": value, "lo": value - reach, "hi": value + reach, "p": float(p)}


# --- many comparisons, many sets


def holm(p: Sequence[float]) -> np.ndarray:
    """P values (m,) adjusted by Holm's step-down method (Scand. J. Statistics 1979), at most 1."""
    p = np.asarray(p, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return adjusted


def verdicts(effect, p, families=None, level: float = 0.05, corrected: bool = False) -> pd.DataFrame:
    """Holm's correction and a verdict for each of m comparisons: "better", "worse", "undecided".

    Parameters
    ----------
    effect : array (m,)
        The differences, signed so that more is better.
    p : array (m,)
        Their p values; NaN, a comparison without a test, is left out of the correction and undecided.
    families : array (m,), or list of them, optional
        Comparisons with equal labels are corrected together; without it, all are.
    level : float
        A corrected p below it decides.
    corrected : bool
        The p values are corrected already.

    Returns
    -------
    DataFrame
        p_holm, verdict; a row a comparison, in the given order and with the index of ``p`` if that is a Series.
    """
    adjusted = pd.Series(p, dtype=np.float64)
    if not corrected:
        known = adjusted.dropna()
        by = [np.zeros(len(adjusted))] if families is None else families if isinstance(families, list) else [families]
        by = [pd.Series(np.asarray(of), adjusted.index)[known.index] for of in by]
        adjusted = known.groupby(by, sort=False).transform(holm).reindex(adjusted.index)
    side = np.where(np.asarray(effect) > 0, "better", "worse")
    return pd.DataFrame({"p_holm": adjusted, "verdict": np.where(adjusted < level, side, "undecided")})


def win_tie_loss(compared: pd.DataFrame) -> pd.DataFrame:
    """Count the OOD sets on which a method is better, undecided, worse.

    ``compared`` as :func:`capsae.evaluation.evaluate.compare` gives it; its means are left out. Columns: method, other,
    metric, win, tie, loss.
    """
    sets = compared[compared["set"] != "mean"]
    counted = sets.groupby(["method", "other", "metric"], sort=False)["verdict"].value_counts().unstack(fill_value=0)
    counted = counted.reindex(columns=["better", "undecided", "worse"], fill_value=0).reset_index()
    return counted.rename(columns={"better": "win", "undecided": "tie", "worse": "loss"}).rename_axis(columns=None)


def critical_difference(values: pd.DataFrame, higher_is_better: bool, alpha: float = 0.05) -> dict:
    """Friedman's test over sets and Nemenyi's critical difference of mean ranks.

    Source: Demsar, "Statistical comparisons of classifiers over multiple data sets", JMLR 2006.

    Parameters
    ----------
    values : DataFrame
        One metric: a row an OOD set, a column a method.
    higher_is_better : bool
    alpha : float

    Returns
    -------
    dict
        ``ranks`` (Series, 1 = best, best first), ``p`` of Friedman's test, ``cd`` (two methods whose mean ranks differ
        by less are not significantly different), ``note``: "" or why the numbers say nothing, or little.
    """
    from scipy.stats import friedmanchisquare, studentized_range

    sets, methods = values.shape
    if methods < 2:
        raise ValueError(f"values has {methods} column: comparing takes two methods or more")
    ranks = values.rank(axis=1, ascending=not higher_is_better).mean().sort_values(kind="stable")
    cd = float(studentized_range.ppf(1 - alpha, methods, np.inf) * np.sqrt(methods * (methods + 1) / (12 * sets)))
    p = np.nan
    if sets > 1 and methods > 2:
        p = float(friedmanchisquare(*values.to_numpy().T).pvalue)
    note = ""
    if cd >= methods - 1:
        note = (
            f"{sets} OOD set{'s' * (sets > 1)} for {methods} methods: even a method that is best on every set and one "
            "that is worst on every set would not be distinguishable, so ranks over sets mean nothing here"
        )
    elif sets < 10:
        note = f"only {sets} OOD sets: the test is approximate below ten, and the sets are no random sample of any kind"
    return {"ranks": ranks, "p": p, "cd": cd, "note": note}
