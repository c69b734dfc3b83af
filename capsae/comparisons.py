"""Tidy data and sentences of the results chapter: who beats whom, over samples, sets and SAE seeds.

Every sentence is made from a table, so that a test can hold it against the same table; none is typed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd

from . import metrics
from .detectors import info
from .detectors.pixels import PIXEL_CONTROLS, pixel_controls_verdict
from .stats import critical_difference, spread, win_tie_loss
from .tidy import METRIC_PANELS

HEADLINE = "fpr95_ood_pos"  # the metric of verdicts: OpenOOD's FPR95, and so presumably the paper's
RANKED = ("epd", "rpd", "mds++", "rmds", "knn", "vim", "energy", "msp")  # a few: ranks of all would mean nothing
SEEDS = (0, 1, 2, 3, 4)
_NAMES = {"fpr95_ood_pos": "FPR95 (OOD positive)", "fpr95_id_pos": "FPR95 (ID positive)", "auroc": "AUROC"}


def title(name: str) -> str:
    """The title of a detector, with the ``" tuned"`` that the tuning notebook adds to a name."""
    plain, _, rest = name.partition(" ")
    return f"{info(plain)['title']} {rest}".strip()


def p_text(p: float, at_most: bool = False) -> str:
    """``p = 0.012``, ``p < 0.001``; ``p ≤ 0.012`` where a bootstrap could not tell it from less."""
    return "p < 0.001" if p < 0.001 else f"p {'≤' if at_most else '='} {p:.3f}"


def corrected(row: Mapping) -> str:
    """The corrected p of a row of :func:`capsae.evaluate.compare`, in words."""
    return p_text(row["p_holm"], bool(row.get("p_at_most", False)))


def verdict(row: Mapping, where: str) -> str:
    """One row of :func:`capsae.evaluate.compare` as a sentence: whether its method is better than the other.

    >>> verdict({"method": "epd", "other": "msp", "metric": "auroc", "set": "mean", "value": .02, "lo": .01, "hi": .03,
    ...          "p_holm": .004, "verdict": "better"}, "digits")
    'EPD is better than MSP on digits: difference in mean AUROC +2.0 points (+1.0 to +3.0 uncorrected), p = 0.004 (Holm).'
    """  # noqa: E501
    told = {
        "better": "is better than {} on {}",
        "worse": "is not better than {} on {}, it is worse",
        "undecided": "is not better than {} on {}, nor clearly worse",
    }[row["verdict"]].format(title(row["other"]), where)
    mean = "mean " if row["set"] == "mean" else ""
    value, lo, hi = (f"{100 * row[key]:+.1f}" for key in ("value", "lo", "hi"))
    difference = f"difference in {mean}{_NAMES.get(row['metric'], row['metric'])} {value} points"
    return f"{title(row['method'])} {told}: {difference} ({lo} to {hi} uncorrected), {corrected(row)} (Holm)."


def of_means(compared: pd.DataFrame, method: str, metric: str = HEADLINE) -> pd.DataFrame:
    """The rows of :func:`capsae.evaluate.compare` that compare a method's mean over all sets, best difference first."""
    rows = compared[(compared["method"] == method) & (compared["set"] == "mean") & (compared["metric"] == metric)]
    if rows.empty:
        raise ValueError(f"the comparison holds no means of {method!r} in {metric!r}")
    sign = -1 if metrics.HIGHER_IS_BETTER[metric] else 1
    return rows.sort_values("value", key=lambda value: sign * value, kind="stable", ignore_index=True)


def tally(compared: pd.DataFrame, method: str, where: str, metric: str = HEADLINE) -> str:
    """How many baselines a method beats in the mean over all sets, in one sentence; controls would swell the count."""
    rows = of_means(compared, method, metric)
    rows = rows[rows["other"].map(lambda name: info(name)["group"] == "baseline")]
    better, worse, open_ = ((rows["verdict"] == word).sum() for word in ("better", "worse", "undecided"))
    return (
        f"On {where}, by mean {_NAMES[metric]}, {title(method)} is better than {better} of the {len(rows)} "
        f"baselines, worse than {worse}, and {open_} comparisons are undecided (Holm, level 0.05)."
    )


def forest(compared: pd.DataFrame, method: str, metric: str = HEADLINE) -> pd.DataFrame:
    """A method's differences from all others. Columns: other, label, kind, value, lo, hi (points), p_holm, verdict."""
    rows = of_means(compared, method, metric)
    told = rows["other"].map(lambda name: info(name))
    return pd.DataFrame(
        {
            "other": rows["other"],
            "label": told.map(lambda of: of["title"]),
            "kind": told.map(lambda of: of["group"]),
            **{key: 100 * rows[key] for key in ("value", "lo", "hi")},
            **{key: rows[key] for key in ("p_holm", "verdict")},
        }
    )


def wins(compared: pd.DataFrame, method: str, others: Iterable[str], metric: str = HEADLINE) -> pd.DataFrame:
    """On how many OOD sets a method wins, ties, loses against some others (Holm within a set). Columns: against, ..."""
    counted = win_tie_loss(compared[(compared["method"] == method) & (compared["metric"] == metric)])
    counted = counted.set_index("other").loc[[name for name in others if name != method], ["win", "tie", "loss"]]
    return counted.reset_index().rename(columns={"other": "against"}).assign(against=lambda t: t["against"].map(title))


def ranks(table: pd.DataFrame, names: Sequence[str] = RANKED, metric: str = HEADLINE) -> dict:
    """:func:`capsae.stats.critical_difference` of some detectors over the OOD sets of an evaluation, with titles."""
    rows = table[(table["metric"] == metric) & table["group"].isin(["near", "far"]) & (table["set"] != "mean")]
    values = rows.pivot(index="set", columns="method", values="value")[list(names)]
    found = critical_difference(values.rename(columns=title), metrics.HIGHER_IS_BETTER[metric])
    return found | {"sets": len(values)}


def ranks_text(found: Mapping) -> str:
    """What :func:`ranks` says, in words."""
    if np.isnan(found["p"]) or "mean nothing" in found["note"]:
        return f"No ranking over sets is given: {found['note']}."
    mean = found["ranks"]
    behind = mean.index[mean - mean.iloc[0] > found["cd"]]
    return (
        f"Friedman's test over {found['sets']} sets: {p_text(found['p'])}. The best mean rank: {mean.index[0]} "
        f"({mean.iloc[0]:.1f}), the worst: {mean.index[-1]} ({mean.iloc[-1]:.1f}); ranks closer than "
        f"{found['cd']:.1f} are not told apart, which leaves {', '.join(behind) or 'no score'} behind the best."
        + (f" A caution: {found['note']}." if found["note"] else "")
    )


def on_codes(run) -> list[str]:
    """The detectors that depend on the SAE."""
    return [name for name in run.table()["method"].unique() if name != "head" and "codes" in info(name)["needs"]]


def over_seeds(run, names: Sequence[str] | None = None, seeds: Sequence[int] = SEEDS) -> pd.DataFrame:
    """Means over all OOD sets with the SAE trained from several seeds. Columns: seed, method, metric, value.

    All else stays: head, data, order of the classes. The other seeds' SAEs come from the store or are trained.
    """
    from .pipeline import Run

    frames = []
    for seed in seeds:
        other = run
        if seed != run.profile.sae.seed:
            other = Run(run.profile, {"sae.seed": seed, "n_boot": 0}, run.store, run.device, run.progress)
        table = other.table() if other is run else other.table(names or on_codes(run))
        rows = table[(table["set"] == "mean") & (table["group"] == "all") & table["metric"].isin(METRIC_PANELS)]
        frames.append(rows[rows["method"].isin(names or on_codes(run))].assign(seed=seed))
    return pd.concat(frames, ignore_index=True)[["seed", "method", "metric", "value"]]


def seed_table(seeds: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """Spread of :func:`over_seeds` in %, beside the bootstrap interval of the profile's own seed; best mean first.

    Columns: method, metric, seeds, mean, std, least, largest, own, lo, hi.
    """
    own = table[(table["set"] == "mean") & (table["group"] == "all")].set_index(["method", "metric"])
    rows = []
    for (method, metric), part in seeds.groupby(["method", "metric"], sort=False):
        cell = own.loc[(method, metric)]
        values = spread(part["value"]) | {"own": cell["value"], "lo": cell["lo"], "hi": cell["hi"]}
        rows.append({"method": method, "metric": metric, "seeds": len(part)} | {k: 100 * v for k, v in values.items()})
    data = pd.DataFrame(rows)
    order = data[data["metric"] == HEADLINE].set_index("method")["mean"]
    return data.sort_values("method", key=lambda names: names.map(order), kind="stable", ignore_index=True)


def seed_shown(data: pd.DataFrame) -> pd.DataFrame:
    """:func:`seed_table` as text for a page: mean ± std (least to largest) of each metric, one row a detector."""
    text = [f"{r.mean:.1f} ± {r.std:.1f} ({r.least:.1f}–{r.largest:.1f})" for r in data.itertuples()]
    cells = data.assign(text=text, column=data["metric"].map(METRIC_PANELS))
    wide = cells.pivot_table(index="method", columns="column", values="text", aggfunc="first", sort=False).reset_index()
    return wide[["method", *METRIC_PANELS.values()]].assign(method=wide["method"].map(title))


def tie_rates(scores: pd.DataFrame) -> pd.Series:
    """Mean over the OOD sets of :func:`capsae.metrics.tie_rate`, by method; ``scores`` of ``scores_table``."""
    found = {}
    for method, rows in scores.groupby("method", sort=False):
        known = rows.loc[rows["set"] == "test", "score"].to_numpy()
        sets = rows[rows["group"] != "id"].groupby("set")["score"]
        found[method] = float(np.mean([metrics.tie_rate(known, of.to_numpy()) for _, of in sets]))
    return pd.Series(found, name="tie_rate")


def reliability(table: pd.DataFrame, scores: pd.DataFrame) -> pd.DataFrame:
    """What AUROC leaves out, in % (AURC per mille), in the order of the mean FPR95. Columns: method, AUROC, ..."""
    means = table[((table["set"] == "mean") & (table["group"] == "all")) | (table["set"] == "test")]
    wide = means[means["method"] != "head"].pivot(index="method", columns="metric", values="value")
    wide = wide.sort_values(HEADLINE, kind="stable")
    shown = {"auroc": "AUROC", "auroc_correct": "AUROC, correct ID only", "oscr": "OSCR", "autc": "AUTC"}
    shown |= {"aurc": "AURC of ID errors, ‰", "errors_flagged": "ID errors flagged"}
    data = pd.DataFrame({text: 100 * wide[name] for name, text in shown.items() if name in wide})
    if "aurc" in wide:
        data[shown["aurc"]] *= 10
    data["tie rate"] = 100 * tie_rates(scores).reindex(wide.index)
    return data.rename_axis("method").reset_index().assign(method=lambda t: t["method"].map(title))


def risk_curves(run, scores: pd.DataFrame, names: Sequence[str], points: int = 200) -> pd.DataFrame:
    """Risk-coverage curves of the head's errors on ID test rows, thinned. Columns: method, coverage, risk."""
    obs = run.observations("test")
    known, rows = obs.labels >= 0, []
    failed, n = (obs.predicted != obs.labels)[known], int(known.sum())
    keep = np.unique(np.linspace(n // 50, n - 1, points).round().astype(int))  # the first few are noise
    for name in names:
        of = scores[(scores["method"] == name) & (scores["set"] == "test")].sort_values("row")["score"].to_numpy()
        coverage, risk = metrics.risk_coverage(of[known], failed)
        rows.append(pd.DataFrame({"method": title(name), "coverage": coverage[keep], "risk": risk[keep]}))
    return pd.concat(rows, ignore_index=True)


def pixel_verdict(table: pd.DataFrame, where: str) -> str:
    """Whether a control that reads nothing but pixel statistics wins anywhere: then the benchmark is broken there."""
    found = pd.concat([pixel_controls_verdict(table, metric) for metric in METRIC_PANELS], ignore_index=True)
    if found.empty:
        return f"The features of {where} come without pixel statistics, so no pixel control could be tried."
    beside, broken = _beside_epd(table), found[found["broken"]]
    if len(broken):
        names = {}
        for row in broken.itertuples():
            place = f"the mean of {row.group} sets" if row.set == "mean" else row.set
            names.setdefault(place, []).append(title(row.control))
        places = ", ".join(f"{place} ({', '.join(dict.fromkeys(of))})" for place, of in names.items())
        means = "" if (broken["set"] == "mean").any() else " In the means over sets none wins."
        return f"This benchmark is broken on {where} where a pixel control wins: {places}.{means}{beside}"
    best = pixel_controls_verdict(table, "auroc")
    best = best[(best["set"] == "mean") & (best["group"] == "all")].iloc[0]
    return (
        f"No pixel control wins on {where}, on any set, in any mean, by FPR95 or AUROC: the best in mean AUROC "
        f"is {title(best['control'])} with {100 * best['control_value']:.1f} %, against "
        f"{100 * best['method_value']:.1f} % of {title(best['method'])}.{beside}"
    )


def _beside_epd(table: pd.DataFrame) -> str:
    """A sentence on the sets on which a pixel control does better than EPD, by AUROC; none where there is none."""
    alone = table[table["method"].isin((*PIXEL_CONTROLS, "epd"))]
    found = pixel_controls_verdict(alone, "auroc")
    ahead = found[found["broken"] & (found["set"] != "mean")]
    told = [f"{row.set} ({title(row.control)} {100 * row.control_value:.1f} %)" for row in ahead.itertuples()]
    return f" By AUROC a pixel control does better than EPD on {', '.join(told)}." if told else ""


def tuned_text(row: Mapping, where: str) -> str:
    """What tuning by an ID-only criterion changed on the OOD sets, from a row of ``compare`` (tuned less default)."""
    told = {
        "better": "Tuning helps {} on {}",
        "worse": "Tuning hurts {} on {}",
        "undecided": "Tuning makes no clear difference to {} on {}",
    }[row["verdict"]].format(title(row["other"]), where)
    value, lo, hi = (f"{100 * row[key]:+.1f}" for key in ("value", "lo", "hi"))
    return f"{told}: mean {_NAMES[row['metric']]} {value} points ({lo} to {hi} uncorrected), {corrected(row)} (Holm)."
