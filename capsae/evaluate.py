"""Detectors x OOD sets -> one tidy table, and paired comparisons of detectors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd

from .caps import as_numpy
from .detectors import Detector, Observations
from .metrics import HIGHER_IS_BETTER, OF_ERRORS, Thresholds, all_metrics, aurc, errors_flagged
from .stats import (
    FPR95,
    bootstrap,
    bootstrap_errors,
    bootstrap_p,
    delong_difference,
    exact_interval,
    holm,
    interval,
    placements,
)

COLUMNS = ["method", "set", "group", "metric", "value", "lo", "hi"]
NO_INTERVAL = ("autc",)  # the bootstrap of a largest value is not consistent
COMPARED = ["method", "other", "set", "metric", "value", "lo", "hi", "p", "p_holm", "p_at_most", "verdict"]
FULL_SPECTRUM = "full-spectrum"


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
    detectors,
    id_test: Observations,
    ood: Mapping[str, Observations],
    n_boot: int = 1000,
    seed: int = 0,
    shifted: Mapping[str, Observations] | None = None,
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

    Returns
    -------
    DataFrame
        Columns method, set, group, metric, value, lo, hi. Metrics are shares in [0, 1] (see :mod:`capsae.metrics`),
        ``lo`` and ``hi`` a 95 % percentile interval; where all replicates of an FPR95 or accuracy are equal,
        Clopper and Pearson's; none for AUTC, which hangs on the largest score. Unweighted means over sets
        have ``set`` "mean" and ``group`` "near", "far" or "all". With ``shifted``, the same rows again with the
        groups "full-spectrum near", "full-spectrum far", "full-spectrum all": ID is then the test set and all
        shifted sets in one heap.

        If labels of ``id_test`` are known, there are rows for OSCR and for the AUROC of correctly classified ID, and
        with ``set`` "test" and ``group`` "id" for each method's AURC and share of errors flagged, and, method "head",
        for its accuracy. Shifted sets with labels have an accuracy of their own; the full spectrum has OSCR and the
        like where all of them have labels.

    Raises
    ------
    ValueError
        For no detector, no OOD set, an empty set, a set without near/ or far/ (shifted/), or scores that are NaN or
        misshapen.
    """
    detectors, shifted = _named(detectors), dict(shifted or {})
    groups = _check(detectors, id_test, ood, shifted)
    scores = _all_scores(detectors, {"id_test": id_test, **shifted, **ood})
    measured = _measure(scores, ["id_test"], list(ood), _correct([id_test]), n_boot, seed)
    rows = _rows(measured, groups, len(id_test), ood)
    if shifted:
        known = _correct([id_test, *shifted.values()])
        measured = _measure(scores, ["id_test", *shifted], list(ood), known, n_boot, seed)
        full = {where: f"{FULL_SPECTRUM} {group}" for where, group in groups.items()}
        rows += _rows(measured, full, len(id_test) + sum(map(len, shifted.values())), ood)
    for where, obs in {"test": id_test, **shifted}.items():
        if obs.labels is not None:
            rows.append(_accuracy_row(where, obs, n_boot, seed))
    if id_test.labels is not None:
        rows += _error_rows({name: of["id_test"] for name, of in scores.items()}, id_test, n_boot, seed)
    return pd.DataFrame(rows, columns=COLUMNS)


def compare(
    detectors,
    id_test: Observations,
    ood: Mapping[str, Observations],
    against: str | Iterable[tuple[str, str]] = "epd",
    metrics: Sequence[str] = (*FPR95, "auroc"),
    n_boot: int = 20_000,
    seed: int = 0,
    alpha: float = 0.05,
) -> pd.DataFrame:
    """Test differences of detectors on each OOD set and in the mean over all sets.

    A replicate draws the samples once and scores both methods on them, so what makes a draw easy or hard for both
    cancels; overlapping intervals of :func:`evaluate` do not mean that a difference is undecided.

    Parameters
    ----------
    detectors, id_test, ood, seed
        As for :func:`evaluate`.
    against : name, or (method, other) names
        Every other detector is compared with this one, or the pairs are those given.
    metrics : names of :data:`capsae.metrics.METRICS`
    n_boot : int
        Paired replicates. No p value can be below 2 / (n_boot + 1), and none of m comparisons is "better" unless m
        times that is under alpha: take 20 m / alpha or more. AUROC is tested by DeLong's method instead.
    alpha : float
        Level of the verdict.

    Returns
    -------
    DataFrame
        Columns method, other, set, metric, value, lo, hi, p, p_holm, p_at_most, verdict. ``value`` is the metric of
        ``method`` less that of ``other``, a share, with a 95 % interval that is not corrected for how many there are.
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
    scores = _all_scores(detectors, {"id_test": id_test, **ood})
    correct, by_bootstrap = _correct([id_test]), [metric for metric in metrics if metric != "auroc"]
    measured = _measure(scores, ["id_test"], list(ood), correct, n_boot if by_bootstrap else 0, seed, by_bootstrap)
    placed = {name: {where: placements(of["id_test"], of[where]) for where in ood} for name, of in scores.items()}
    columns = {**{where: [where] for where in ood}, "mean": list(ood)}
    rows = []
    for metric in metrics:
        for where, over in columns.items():
            for a, b in pairs:
                if metric == "auroc":
                    cell = delong_difference([placed[a][w] for w in over], [placed[b][w] for w in over])
                else:
                    (value_a, draws_a), (value_b, draws_b) = (_mean(measured, name, metric, over) for name in (a, b))
                    lo, hi = interval(draws_a - draws_b)
                    cell = {"value": value_a - value_b, "lo": lo, "hi": hi, "p": bootstrap_p(draws_a - draws_b)}
                rows.append({"method": a, "other": b, "set": where, "metric": metric, **cell})
    table = pd.DataFrame(rows)
    key = ["metric", "set", "pair"]
    table["pair"] = [" / ".join(sorted(pair)) for pair in zip(table["method"], table["other"], strict=True)]
    once = table.drop_duplicates(key)
    once = once.assign(p_holm=once.groupby(["metric", "set"])["p"].transform(holm))
    table["p_holm"] = table[key].merge(once[[*key, "p_holm"]], how="left")["p_holm"].to_numpy()
    table["p_at_most"] = (table["metric"] != "auroc") & (table["p"] <= 2 / (1 + n_boot))
    good = table["value"] * np.where(table["metric"].map(HIGHER_IS_BETTER), 1, -1) > 0
    table["verdict"] = np.where(table["p_holm"] < alpha, np.where(good, "better", "worse"), "undecided")
    return table[COMPARED]


# --- what both are made of


def _check(detectors: Mapping, id_test: Observations, ood: Mapping, shifted: Mapping) -> dict[str, str]:
    """The group of each OOD set; ValueError for what cannot be evaluated."""
    if not detectors or not ood:
        raise ValueError("evaluate needs at least one detector and one OOD set")
    for where in shifted:
        if not (where.startswith("shifted/") and where != "shifted/"):
            raise ValueError(f"covariate-shifted set {where!r}: name it shifted/<set>")
    for where, obs in {"id_test": id_test, **shifted, **ood}.items():
        if not len(obs):
            raise ValueError(f"{where} has no rows")
    return {where: group_of(where) for where in ood}


def _all_scores(detectors: Mapping, sets: Mapping[str, Observations]) -> dict[str, dict[str, np.ndarray]]:
    """Method -> set -> scores (N,)."""
    return {
        name: {where: _scores(name, detector, where, obs) for where, obs in sets.items()}
        for name, detector in detectors.items()
    }


def _correct(sets: Sequence[Observations]) -> np.ndarray | None:
    """Whether the head classified each sample correctly (N,), all sets in a row; None if a set has no labels."""
    if any(obs.labels is None for obs in sets):
        return None
    return np.concatenate([obs.predicted == as_numpy(obs.labels) for obs in sets])


def _measure(
    scores: Mapping[str, Mapping[str, np.ndarray]],
    id_sets: Sequence[str],
    ood_sets: Sequence[str],
    correct: np.ndarray | None,
    n_boot: int,
    seed: int,
    metrics: Sequence[str] | None = None,
) -> dict[str, dict[str, dict[str, tuple[float, np.ndarray]]]]:
    """Method -> OOD set -> metric -> (value, replicates (n_boot,)), ``id_sets`` in one heap; draws are shared."""
    found: dict = {name: {} for name in scores}
    for stream, where in enumerate(ood_sets):
        thresholds = {
            name: Thresholds.of(np.concatenate([of[s] for s in id_sets]), of[where], correct)
            for name, of in scores.items()
        }
        draws = bootstrap(thresholds, n_boot, seed, stream, metrics)
        for name, one in thresholds.items():
            exact = all_metrics(one, np.ones(one.n_id), np.ones(len(one.order) - one.n_id))
            found[name][where] = {metric: (float(exact[metric]), of) for metric, of in draws[name].items()}
    return found


def _mean(measured: Mapping, name: str, metric: str, over: Sequence[str]) -> tuple[float, np.ndarray]:
    """Unweighted mean over sets: value and replicates."""
    values, draws = zip(*(measured[name][where][metric] for where in over), strict=True)
    return float(np.mean(values)), np.mean(draws, axis=0)


def _rows(measured: Mapping, groups: Mapping[str, str], n_id: int, ood: Mapping[str, Observations]) -> list[tuple]:
    """Rows of the table: each set, then the means over each group and over all."""
    cells = [(where, group, [where]) for where, group in groups.items()]
    of_group = {group: [w for w in groups if groups[w] == group] for group in groups.values()}
    cells += [("mean", group, of_group[group]) for group in sorted(of_group, key=lambda g: not g.endswith("near"))]
    everything = " ".join([*next(iter(groups.values())).split(" ")[:-1], "all"])
    cells.append(("mean", everything, list(groups)))
    rows = []
    for name, sets in measured.items():
        for metric in next(iter(sets.values())):
            for label, group, over in cells:
                value, draws = _mean(measured, name, metric, over)
                lo, hi = interval(draws) if metric not in NO_INTERVAL else (np.nan, np.nan)
                if lo == hi and metric in FPR95:
                    # No replicate saw what few samples cannot show; the exact interval of a share does. Of a mean of
                    # such shares: the means of their ends, which is wider than it need be.
                    n_of = {where: n_id if metric == "fpr95_ood_pos" else len(ood[where]) for where in over}
                    ends = [exact_interval(sets[where][metric][0], n_of[where]) for where in over]
                    lo, hi = (float(end) for end in np.mean(ends, axis=0))
                rows.append((name, label, group, metric, value, lo, hi))
    return rows


def _accuracy_row(where: str, obs: Observations, n_boot: int, seed: int) -> tuple:
    hit = (obs.predicted == as_numpy(obs.labels)).astype(np.float64)
    draws = np.random.default_rng(seed).binomial(len(hit), hit.mean(), n_boot) / len(hit)
    lo, hi = interval(draws)
    if lo == hi:
        lo, hi = exact_interval(float(hit.mean()), len(hit))
    return ("head", where, "id", "accuracy", float(hit.mean()), lo, hi)


def _error_rows(scores: Mapping[str, np.ndarray], id_test: Observations, n_boot: int, seed: int) -> list[tuple]:
    """How each method's scores deal with the head's errors on ID: no OOD sample takes part."""
    failed, rows = ~np.asarray(_correct([id_test])), []
    for name, of in scores.items():
        draws = bootstrap_errors(of, failed, n_boot, seed)
        for metric, value in zip(OF_ERRORS, (aurc(of, failed), errors_flagged(of, failed)), strict=True):
            rows.append((name, "test", "id", metric, value, *interval(draws[metric])))
    return rows
