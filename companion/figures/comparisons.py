"""Tidy data of the results chapter: who beats whom, over samples, sets and SAE seeds, and the numbers it records."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd

from capsae import metrics
from capsae.detectors import info
from capsae.detectors.baselines.pixels import PIXEL_CONTROLS, pixel_controls_verdict
from capsae.stats import critical_difference, win_tie_loss

from ..findings import Numbers, slug
from .tidy import METRIC_PANELS, percent

OUR_SCORES = ("rpd", "rpd+")  # registry names; pairs, numbers and claims follow
HEADLINE = "fpr95_ood_pos"  # the metric of verdicts: OpenOOD's FPR95, and so presumably the paper's
JUDGED = ("epd", *OUR_SCORES)  # each against all others
RANKED = (*JUDGED, "mds++", "rmds", "knn", "vim", "energy", "msp")  # a few: ranks of all would mean nothing
BESIDE = ("rmds", "mds++", "knn", "vim", "nnguide", "energy", "msp")  # baselines that are named beside EPD
CONTROLS = ("cosine", "euclidean", "code_flatness", "code_entropy", "code_energy", "sae_error", "epd_untrained")


def number_name(method: str) -> str:
    """A detector in the key of a recorded number, which has no plus: MDS++ is not MDS."""
    return slug(method.replace("+", "p"))


def title(name: str) -> str:
    """The title of a detector, with the ``" tuned"`` that the tuning notebook adds to a name."""
    plain, _, rest = name.partition(" ")
    return f"{info(plain)['title']} {rest}".strip()


def p_text(p: float, at_most: bool = False) -> str:
    """``p = 0.012``, ``p < 0.001``; ``p ≤ 0.012`` where a bootstrap could not tell it from less."""
    return "p < 0.001" if p < 0.001 else f"p {'≤' if at_most else '='} {p:.3f}"


def corrected(row: Mapping) -> str:
    """The corrected p of a row of :func:`capsae.evaluation.evaluate.compare`, as text."""
    return p_text(row["p_holm"], bool(row.get("p_at_most", False)))


def of_means(compared: pd.DataFrame, method: str, metric: str = HEADLINE) -> pd.DataFrame:
    """The rows of :func:`capsae.compare` that compare a method's mean over all sets, best difference first."""
    rows = compared[(compared["method"] == method) & (compared["set"] == "mean") & (compared["metric"] == metric)]
    if rows.empty:
        raise ValueError(f"the comparison holds no means of {method!r} in {metric!r}")
    sign = -1 if metrics.HIGHER_IS_BETTER[metric] else 1
    return rows.sort_values("value", key=lambda value: sign * value, kind="stable", ignore_index=True)


def pairs(table: pd.DataFrame) -> list[tuple[str, str]]:
    """EPD and our own scores against every other detector of an evaluation, but for those that read pixels alone."""
    others = [name for name in table["method"].unique() if name not in ("head", *PIXEL_CONTROLS)]
    return [(method, other) for method in JUDGED for other in others if other != method and method in others]


def shown(compared: pd.DataFrame, others: Iterable[str] = (*BESIDE, *CONTROLS, "epd")) -> pd.DataFrame:
    """Differences of means over all sets as text: one row a pair, a column a metric, with interval and corrected p."""
    rows = compared[(compared["set"] == "mean") & compared["other"].isin(list(others))]
    text = [f"{percent(cell).replace(' %', '')} {corrected(cell)}" for cell in rows.to_dict("records")]
    wide = rows.assign(text=text).pivot_table(
        index=["method", "other"], columns="metric", values="text", aggfunc="first", sort=False
    )
    wide = wide.reset_index().rename(columns={"other": "less", **METRIC_PANELS})
    return wide.assign(method=wide["method"].map(title), less=wide["less"].map(title))


def seed_dots(values: pd.DataFrame, table: pd.DataFrame, metric: str = HEADLINE) -> pd.DataFrame:
    """Every seed of what depends on the SAE beside its mean and interval, in %, best mean first.

    ``values`` of ``Run.seed_values``. Columns: method, title, seed, value, mean, lo, hi.
    """
    means = table[(table["set"] == "mean") & (table["group"] == "all") & (table["metric"] == metric)]
    means = means[means["seeds"] > 1].set_index("method")[["value", "lo", "hi"]].rename(columns={"value": "mean"})
    data = values[values["metric"] == metric].join(100 * means, on="method", how="inner")
    data = data.assign(title=data["method"].map(title), value=100 * data["value"])
    data = data.sort_values("mean", ascending=not metrics.HIGHER_IS_BETTER[metric], kind="stable", ignore_index=True)
    return data[["method", "title", "seed", "value", "mean", "lo", "hi"]]


def forest(compared: pd.DataFrame, method: str, metric: str = HEADLINE) -> pd.DataFrame:
    """A method's differences from all others. Columns: other, label, kind, value, lo, hi (points), p_holm, verdict."""
    rows = of_means(compared, method, metric)
    about = rows["other"].map(info)
    return pd.DataFrame(
        {
            "other": rows["other"],
            "label": about.map(lambda of: of["title"]),
            "kind": about.map(lambda of: of["group"]),
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


def rank_table(found: Mapping) -> pd.DataFrame:
    """:func:`ranks` as a table; critical difference and p hold for all rows, and the note says what they are worth."""
    mean = found["ranks"].rename_axis("method").rename("mean rank").reset_index()
    differs = {"differs from the best": mean["mean rank"] - mean["mean rank"].iloc[0] > found["cd"]}
    differs["differs from the best"] = differs["differs from the best"].map({True: "yes", False: ""})
    return mean.assign(**differs, **{"p of Friedman's test": found["p"], "note": found["note"]})


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


def pixel_wins(table: pd.DataFrame) -> pd.DataFrame:
    """Where a control that reads nothing but pixel statistics does better than every score, in any metric.

    Columns: metric, group, set, control, control_value, method, method_value, broken; empty without pixel statistics.
    """
    of = {metric: pixel_controls_verdict(table, metric) for metric in METRIC_PANELS}
    return pd.concat([found.assign(metric=metric) for metric, found in of.items()], ignore_index=True)


def pixels_shown(table: pd.DataFrame) -> pd.DataFrame:
    """:func:`pixel_wins` by AUROC for a page: the best pixel control of each set beside the best score, in %."""
    rows = pixel_wins(table)
    rows = rows[rows["metric"] == "auroc"] if len(rows) else rows.reindex(columns=["set", "group", "control", "method"])
    where = np.where(rows["set"] == "mean", "mean of " + rows["group"], rows["set"])
    columns = {"set": where, "best control": [title(name) for name in rows["control"]]}
    columns |= {"best control, %": 100 * rows.get("control_value", pd.Series(dtype=float))}
    columns |= {"best score": [title(name) for name in rows["method"]]}
    columns |= {"best score, %": 100 * rows.get("method_value", pd.Series(dtype=float))}
    broken = rows.get("broken", pd.Series(dtype=bool))
    return pd.DataFrame(columns | {"broken": broken.map({True: "yes", False: ""})})


def recorded(table: pd.DataFrame, compared: pd.DataFrame) -> Numbers:
    """What the page records for its findings and for the claims: means of some detectors, and all differences of means.

    The p of a difference is not corrected: a family of findings is corrected where it is judged.
    """
    numbers = Numbers()
    means = table[(table["set"] == "mean") & (table["group"] == "all")]
    named = means[means["metric"].isin(METRIC_PANELS) & means["method"].isin([*JUDGED, *BESIDE, *CONTROLS])]
    numbers.rows(named.assign(method=named["method"].map(number_name)), "{method} {metric}", unit="%")
    differences = compared[compared["set"] == "mean"].drop(columns="p_holm")
    numbers.rows(
        differences.assign(**{key: differences[key].map(number_name) for key in ("method", "other")}),
        "{method} less {other} {metric}",
        unit="points",
    )
    accuracy = table[(table["method"] == "head") & (table["set"] == "test")]
    numbers.rows(accuracy, "accuracy", unit="%")
    scores = means[(means["metric"] == HEADLINE) & ~means["method"].isin(PIXEL_CONTROLS)]
    numbers.add("detectors", len(scores))
    for name in (one for one in JUDGED if one in set(scores["method"])):
        value = scores.set_index("method")["value"]
        numbers.add(f"{number_name(name)} rank", int((value < value[name]).sum()) + 1)
        rows = of_means(compared, name)
        rows = rows[rows["other"].map(lambda other: info(other)["group"] == "baseline")]
        for word in ("better", "worse", "undecided"):
            numbers.add(f"{number_name(name)} {word} than baselines", int((rows["verdict"] == word).sum()))
        numbers.add(f"{number_name(name)} baselines", len(rows))
    wins = pixel_wins(table)
    if len(wins):
        numbers.add("pixel wins", int(wins["broken"].sum()))
        numbers.add("pixel wins of means", int((wins["broken"] & (wins["set"] == "mean")).sum()))
    return numbers


# --- tuning


def tuning_grid(tuned: Mapping) -> pd.DataFrame:
    """The grids of ``tuning.tune`` in one table, criterion in %. Columns as there, and label."""
    grid = pd.concat([one.table for one in tuned.values()], ignore_index=True)
    return grid.assign(label=grid["method"].map(title), criterion=100 * grid["criterion"])


def grid_shown(grid: pd.DataFrame) -> pd.DataFrame:
    """:func:`tuning_grid` for a page."""
    names = {"label": "method", "criterion": "criterion, %"}
    shown = grid[["label", "setting", "criterion", "default", "chosen", "refused"]].rename(columns=names)
    return shown.replace({True: "yes", False: ""})


def tuned_shown(compared: pd.DataFrame, grid: pd.DataFrame) -> pd.DataFrame:
    """Tuned less default, means over all OOD sets, as text, with the setting chosen."""
    gap = compared[compared["method"] == compared["other"] + " tuned"]
    setting = grid[grid["chosen"]].set_index("method")["setting"]
    chosen = {title(name): setting[name] for name in gap["other"].unique()}
    wide = shown(gap, gap["other"]).drop(columns="method").rename(columns={"less": "method"})
    return wide.assign(chosen=wide["method"].map(chosen))


def against_tuned(compared: pd.DataFrame, metric: str = HEADLINE) -> pd.DataFrame:
    """Scores as the experiment has them less tuned baselines. Columns: method, less, points, lo, hi, p, verdict."""
    rows = compared[compared["other"].str.endswith(" tuned") & (compared["set"] == "mean")]
    rows = rows[
        (rows["metric"] == metric) & rows["other"].map(lambda name: info(name.split()[0])["group"] == "baseline")
    ]
    cells = {"method": rows["method"].map(title), "less": rows["other"].map(title)}
    cells |= {name: (100 * rows[key]).round(1) for name, key in {"points": "value", "lo": "lo", "hi": "hi"}.items()}
    return pd.DataFrame(cells | {"p": rows.apply(corrected, axis=1), "verdict": rows["verdict"]})


def left_out_shown(left_out: pd.DataFrame) -> pd.DataFrame:
    """Means over the sets of ``tuning.leave_one_set_out``, in %, one row a detector."""
    if left_out.empty:
        return left_out
    names = {"value": "chosen on the other sets", "peeking": "peeking at each set"}
    means = 100 * left_out.groupby("method", sort=False)[["default", *names]].mean()
    return means.round(1).rename(columns=names).reset_index().assign(method=lambda t: t["method"].map(title))


def recorded_of_tuning(compared: pd.DataFrame, tuned: Mapping, left_out: pd.DataFrame) -> Numbers:
    """What the page on tuning records: differences tuned less default, how many help and hurt, what peeking gains."""
    numbers = Numbers()
    gap = compared[(compared["method"] == compared["other"] + " tuned") & (compared["set"] == "mean")]
    numbers.rows(gap.assign(other=gap["other"].map(number_name)), "{other} tuned {metric}", unit="points")
    verdict = gap[gap["metric"] == HEADLINE]["verdict"]
    for name, word in {"helped": "better", "hurt": "worse", "undecided": "undecided"}.items():
        numbers.add(name, int((verdict == word).sum()))
    numbers.add("detectors", len(tuned))
    numbers.add("default kept", len(tuned) - len(verdict))
    if len(left_out):
        means = left_out.groupby("method")[["default", "value", "peeking"]].mean()
        numbers.add("gain of peeking", (means["default"] - means["peeking"]).median(), unit="points")
        numbers.add("gain of other sets", (means["default"] - means["value"]).median(), unit="points")
    return numbers
