"""Tables of evaluation and comparison from scores, with a row of scores for each seed of the SAE.

:mod:`capsae.evaluation.evaluate` makes the scores; who stores them comes here without detectors or images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from ..metrics import HIGHER_IS_BETTER, OF_ERRORS, Thresholds, all_metrics, aurc, errors_flagged
from ..stats import (
    FPR95,
    bootstrap,
    bootstrap_errors,
    bootstrap_p,
    delong,
    delong_difference,
    exact_interval,
    interval,
    placements,
    seeds_and_images,
    verdicts,
)

COLUMNS = ["method", "set", "group", "metric", "value", "lo", "hi", "seeds"]
NO_INTERVAL = ("autc",)  # the bootstrap of a largest value is not consistent
COMPARED = ["method", "other", "set", "metric", "value", "lo", "hi", "p", "p_holm", "p_at_most", "seeds", "verdict"]
FULL_SPECTRUM = "full-spectrum"
Scores = Mapping[str, Mapping[str, np.ndarray]]  # method -> set -> (S, N), a row for each seed of the SAE


def group_of(set_name: str) -> str:
    """``near`` of ``near/imagenet980``; ValueError for a name without a group."""
    group, _, rest = set_name.partition("/")
    if group not in ("near", "far") or not rest:
        raise ValueError(f"OOD set {set_name!r}: name it near/<set> or far/<set>, so that it lands in the right mean")
    return group


def evaluate_scores(
    scores: Scores,
    known: Mapping[str, np.ndarray | None],
    ood_sets: Sequence[str],
    n_boot: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """The table of :func:`evaluate`, of scores as :func:`all_scores` gives them.

    ``known``: for "test" and each shifted set what :func:`capsae.evaluation.evaluate.correct` gives: accuracy and
    errors are over the samples with a label, what joins correctness with scores of all samples needs a label of each.
    """
    groups = {where: group_of(where) for where in ood_sets}
    whole = {where: _of_all(right) for where, right in known.items()}
    rows = _rows(_measure(scores, ["test"], ood_sets, whole["test"], n_boot, seed), scores, ["test"], groups)
    if len(known) > 1:
        labelled = None if any(right is None for right in whole.values()) else np.concatenate(list(whole.values()))
        measured = _measure(scores, list(known), ood_sets, labelled, n_boot, seed)
        full = {where: f"{FULL_SPECTRUM} {group}" for where, group in groups.items()}
        rows += _rows(measured, scores, list(known), full)
    rows += [_accuracy_row(where, right, n_boot, seed) for where, right in known.items() if right is not None]
    if known["test"] is not None:
        rows += _error_rows(scores, known["test"], n_boot, seed)
    return pd.DataFrame(rows, columns=COLUMNS)


def compare_scores(
    scores: Scores,
    ood_sets: Sequence[str],
    pairs: Sequence[tuple[str, str]],
    right: np.ndarray | None = None,
    metrics: Sequence[str] = (*FPR95, "auroc"),
    n_boot: int = 2000,
    seed: int = 0,
    alpha: float = 0.05,
) -> pd.DataFrame:
    """The table of :func:`compare`, of scores as :func:`all_scores` gives them; ``right`` (N,): the head on "test"."""
    scores = {name: scores[name] for name in dict.fromkeys(name for pair in pairs for name in pair)}
    by_bootstrap = [metric for metric in metrics if metric != "auroc"]
    measured = _measure(scores, ["test"], ood_sets, _of_all(right), n_boot if by_bootstrap else 0, seed, by_bootstrap)
    placed = {name: {where: _placed(of["test"], of[where]) for where in ood_sets} for name, of in scores.items()}
    columns, rows = {**{where: [where] for where in ood_sets}, "mean": list(ood_sets)}, []
    for metric in metrics:
        for where, over in columns.items():
            for a, b in pairs:
                if metric == "auroc":
                    cell = _by_delong([placed[a][w] for w in over], [placed[b][w] for w in over])
                else:
                    cell = _by_bootstrap(*(_mean(measured, name, metric, over) for name in (a, b)))
                rows.append({"method": a, "other": b, "set": where, "metric": metric, **cell})
    table = pd.DataFrame(rows)
    table["pair"] = [" / ".join(sorted(pair)) for pair in zip(table["method"], table["other"], strict=True)]
    key = ["metric", "set", "pair"]
    once = table.drop_duplicates(key).set_index(key)
    p_holm = verdicts(once["value"], once["p"], [once.index.get_level_values(level) for level in key[:2]])["p_holm"]
    table = table.join(p_holm, on=key)
    table["p_at_most"] = (table["metric"] != "auroc") & (table["seeds"] == 1) & (table["p"] <= 2 / (1 + n_boot))
    better = table["value"] * np.where(table["metric"].map(HIGHER_IS_BETTER), 1, -1)
    table["verdict"] = verdicts(better, table["p_holm"], level=alpha, corrected=True)["verdict"]
    return table[COMPARED]


def seed_values(scores: Scores, ood_sets: Sequence[str], metrics: Sequence[str] = (*FPR95, "auroc")) -> pd.DataFrame:
    """The mean over all OOD sets for every seed by itself. Columns: method, metric, seed (0, 1, ...), value."""
    measured = _measure(scores, ["test"], ood_sets, None, 0, 0, metrics)
    rows = [
        (name, metric, number, value)
        for name in scores
        for metric in metrics
        for number, value in enumerate(_mean(measured, name, metric, ood_sets)[0])
    ]
    return pd.DataFrame(rows, columns=["method", "metric", "seed", "value"])


def _placed(known: np.ndarray, ood: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Placements for each seed: (S, N_id), (S, N_ood)."""
    ids, oods = zip(*(placements(a, b) for a, b in zip(known, ood, strict=True)), strict=True)
    return np.stack(ids), np.stack(oods)


def _by_delong(of_sets: Sequence, other_sets: Sequence) -> dict:
    """Difference of two (mean) AUROCs: the images' error is DeLong's, of placements averaged over the seeds."""
    mean = [[(ids.mean(0), oods.mean(0)) for ids, oods in side] for side in (of_sets, other_sets)]
    a, b = (np.mean([ids.mean(1) for ids, _ in side], axis=0) for side in (of_sets, other_sets))
    if len(a) == len(b) == 1:
        return delong_difference(*mean) | {"seeds": 1}
    differences = [(i - k, j - m) for (i, j), (k, m) in zip(*mean, strict=True)]
    return _with_seeds(a, b, delong(differences)[1])


def _by_bootstrap(side, other) -> dict:
    (a, draws_a), (b, draws_b) = side, other
    if len(a) == len(b) == 1:
        lo, hi = interval(draws_a - draws_b)
        return {"value": float(a[0] - b[0]), "lo": lo, "hi": hi, "p": bootstrap_p(draws_a - draws_b), "seeds": 1}
    return _with_seeds(a, b, _error(draws_a - draws_b))


def _with_seeds(a: np.ndarray, b: np.ndarray, image_error: float) -> dict:
    """Two methods on the same SAEs seed by seed; a method without seeds is one number; else seeds of their own."""
    paired = len(a) == len(b) or min(len(a), len(b)) == 1
    found = seeds_and_images(a - b, image_error) if paired else seeds_and_images(a, image_error, b)
    return {key: found[key] for key in ("value", "lo", "hi", "p")} | {"seeds": max(len(a), len(b))}


# --- what both are made of


def _of_all(right: np.ndarray | None) -> np.ndarray | None:
    """Correctness of every sample, or None."""
    return right if right is not None and right.dtype == bool else None


def _measure(
    scores: Scores,
    id_sets: Sequence[str],
    ood_sets: Sequence[str],
    right: np.ndarray | None,
    n_boot: int,
    seed: int,
    metrics: Sequence[str] | None = None,
) -> dict[str, dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]]:
    """Method -> OOD set -> metric -> (values (S,), replicates (n_boot,) of their mean); all share the draws."""
    found: dict = {name: {} for name in scores}
    for stream, where in enumerate(ood_sets):
        thresholds = {
            (name, number): Thresholds.of(np.concatenate([of[s][number] for s in id_sets]), of[where][number], right)
            for name, of in scores.items()
            for number in range(len(of[where]))
        }
        draws = bootstrap(thresholds, n_boot, seed, stream, metrics)
        exact = {
            key: all_metrics(one, np.ones(one.n_id), np.ones(len(one.order) - one.n_id))
            for key, one in thresholds.items()
        }
        for name, of in scores.items():
            keys = [(name, number) for number in range(len(of[where]))]
            found[name][where] = {
                metric: (
                    np.array([float(exact[key][metric]) for key in keys]),
                    np.mean([draws[key][metric] for key in keys], axis=0),
                )
                for metric in draws[keys[0]]
            }
    return found


def _mean(measured: Mapping, name: str, metric: str, over: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Unweighted mean over sets: values (S,) and replicates (n_boot,)."""
    values, draws = zip(*(measured[name][where][metric] for where in over), strict=True)
    return np.mean(values, axis=0), np.mean(draws, axis=0)


def _rows(measured: Mapping, scores: Scores, id_sets: Sequence[str], groups: Mapping[str, str]) -> list[tuple]:
    """Rows of the table: each set, then the means over each group and over all."""
    cells = [(where, group, [where]) for where, group in groups.items()]
    of_group = {group: [w for w in groups if groups[w] == group] for group in groups.values()}
    cells += [("mean", group, of_group[group]) for group in sorted(of_group, key=lambda g: not g.endswith("near"))]
    everything = " ".join([*next(iter(groups.values())).split(" ")[:-1], "all"])
    cells.append(("mean", everything, list(groups)))
    rows = []
    for name, sets in measured.items():
        n_id = sum(scores[name][where].shape[1] for where in id_sets)
        for metric in next(iter(sets.values())):
            for label, group, over in cells:
                values, draws = _mean(measured, name, metric, over)
                value, (lo, hi) = float(values.mean()), _interval(values, draws)
                if metric in NO_INTERVAL:
                    lo, hi = np.nan, np.nan
                if lo == hi and metric in FPR95:
                    # No replicate saw what few samples cannot show; the exact interval of a share does. Of a mean of
                    # such shares: the means of their ends, which is wider than it need be.
                    n_of = {w: n_id if metric == "fpr95_ood_pos" else scores[name][w].shape[1] for w in over}
                    ends = [exact_interval(float(sets[w][metric][0].mean()), n_of[w]) for w in over]
                    lo, hi = (float(end) for end in np.mean(ends, axis=0))
                rows.append((name, label, group, metric, value, lo, hi, len(values)))
    return rows


def _interval(values: np.ndarray, draws: np.ndarray) -> tuple[float, float]:
    """Of a share: images and seeds where there are seeds, kept within 0 and 1; else the images' percentiles."""
    if len(values) == 1 or not len(draws):
        return interval(draws)
    found = seeds_and_images(values, _error(draws))
    return max(0.0, found["lo"]), min(1.0, found["hi"])


def _error(draws: np.ndarray) -> float:
    """Standard error from replicates; those that are undefined are left out."""
    draws = draws[~np.isnan(draws)]
    return float(draws.std(ddof=1)) if len(draws) > 1 else np.nan


def _accuracy_row(where: str, right: np.ndarray, n_boot: int, seed: int) -> tuple:
    right = right[~np.isnan(right)]
    draws = np.random.default_rng(seed).binomial(len(right), right.mean(), n_boot) / len(right)
    lo, hi = interval(draws)
    if lo == hi:
        lo, hi = exact_interval(float(right.mean()), len(right))
    return ("head", where, "id", "accuracy", float(right.mean()), lo, hi, 1)


def _error_rows(scores: Scores, right: np.ndarray, n_boot: int, seed: int) -> list[tuple]:
    """How each method's scores deal with the head's errors on ID: no OOD sample takes part."""
    rows, known = [], ~np.isnan(right)
    failed = right[known] == 0
    for name, of in scores.items():
        of_seeds = of["test"][:, known]
        draws = [bootstrap_errors(row, failed, n_boot, seed) for row in of_seeds]
        for metric, function in zip(OF_ERRORS, (aurc, errors_flagged), strict=True):
            values = np.array([function(row, failed) for row in of_seeds])
            mean = np.mean([one[metric] for one in draws], axis=0)
            rows.append((name, "test", "id", metric, float(values.mean()), *_interval(values, mean), len(values)))
    return rows
