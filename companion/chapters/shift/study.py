"""Covariate shift of a run: all tables of the chapter, the numbers of its findings, and what its tables show."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace

import pandas as pd

from ...findings import Chapter, Numbers
from . import calibration, false_alarms, probes
from . import maths as shift

SERIES = ("cls", "codes", "caps", "random", "pca")  # of the figures over strength


def page(run, shifted: Mapping, fitted: tuple) -> tuple[Chapter, SimpleNamespace, Numbers]:
    """What the notebook needs: its captions and findings, all tables, and the numbers.

    ``shifted`` as :func:`.shift.sets` and ``fitted`` as :func:`.probes.fit_probes` give them.
    """
    known, tried = fitted
    measured, compared, chosen = shift.evaluate(run, shifted, known)
    alarms, rises = false_alarms.alarms(run, shifted)
    found = SimpleNamespace(
        probes=known, measured=measured, compared=compared, chosen=chosen, alarms=alarms, rises=rises,
        ways=shift.sensitivity(run, shifted, known, tried), seeds=shift.over_seeds(run, shifted, known),
    )  # fmt: skip
    return Chapter("11_shift", run), found, numbers(found)


def numbers(found: SimpleNamespace) -> Numbers:
    """What the chapter's findings rest on."""
    made, compared = Numbers(), found.compared
    for share in (True, False):
        rows = compared[compared["metric"].isin(calibration.SHARES) == share]
        made.rows(rows, "{representation}_less_{other}_{metric}_{place}", "points" if share else "")
        unit, columns = "%" if share else "", ["metric", "place"]
        own = rows[["representation", *columns, "own"]].set_axis(["representation", *columns, "value"], axis=1)
        than = rows[["other", *columns, "than"]].set_axis(own.columns, axis=1)
        own = pd.concat([own, than]).drop_duplicates(["representation", *columns])
        own = own[own["place"] != shift.LOSS]
        made.rows(own, "{representation}_{metric}_{place}", unit)
    single = compared[~compared["place"].isin([shift.CLEAN, shift.MEAN, shift.LOSS]) & (compared["other"] == "cls")]
    single = single[(single["representation"] == "codes") & (single["metric"] == "accuracy")]
    made.add("corruptions", len(single))
    for verdict in ("better", "worse"):
        made.add(f"corruptions_with_codes_{verdict}", int((single["verdict"] == verdict).sum()))
    for other in ("cls", "random"):
        ways = found.ways[found.ways["other"] == other].drop_duplicates(["codes chose", "other chose"])
        seeds = found.seeds.loc[found.seeds["place"] == shift.MEAN, f"less {other}"]
        for name, values in (("ways", ways["value"]), ("seeds", seeds)):
            made.add(f"{name}_less_{other}_least", values.min(), unit="points")
            made.add(f"{name}_less_{other}_most", values.max(), unit="points")
            made.add(f"{name}_{other}", len(values))
    every = found.rises[found.rises["group"] == "all"]
    made.add("detectors", len(every))
    made.add("detectors_that_rise", int(((every["p_holm"] < 0.05) & (every["value"] > 0)).sum()))
    made.rows(found.rises, "rise_{method}_{group}", "points")
    made.rows(every.nsmallest(1, "value"), "least_rise", "points")
    return made


# --- what the tables and figures of the page show


def chosen(found: SimpleNamespace) -> pd.DataFrame:
    """The classifiers, with what each reads and what was chosen for it."""
    names = found.chosen["representation"]
    texts = [shift.choice_text(c) if (c := found.probes[name].choice) else "" for name in names]
    table = found.chosen.assign(what=names.map(probes.READS), chosen=texts).rename(columns={"title": "probe on"})
    return table[["probe on", "what", "chosen", "temperature", "validation accuracy"]]


def by_strength(found: SimpleNamespace, metric: str) -> pd.DataFrame:
    """A metric (after temperature scaling) of some probes over corruptions and strengths, for the figures."""
    rows = found.measured[(found.measured["metric"] == metric) & found.measured["representation"].isin(SERIES)]
    rows = rows[rows["scaled"] == "after"]
    return shift.with_clean(rows).assign(series=lambda t: t["representation"].map(probes.TITLES))


def differences(found: SimpleNamespace) -> pd.DataFrame:
    """Accuracy less that of the probe on the CLS, points, for :func:`.shift_figures.differences`."""
    rows = found.compared
    rows = rows[(rows["metric"] == "accuracy") & (rows["place"] != shift.LOSS) & (rows["other"] == "cls")]
    ends = {column: 100 * rows[column] for column in ("value", "lo", "hi")}
    return rows.assign(panel=rows["place"], label=rows["representation"].map(probes.TITLES), **ends)


def ways(found: SimpleNamespace) -> pd.DataFrame:
    """Other choices of the probes, in %."""
    shares = {column: 100 * found.ways[column] for column in ("own", "than", "value", "lo", "hi")}
    return found.ways.assign(other=found.ways["other"].map(probes.TITLES), **shares)


def seeds(found: SimpleNamespace) -> pd.DataFrame:
    """Codes less CLS by seed and place, points."""
    wide = (100 * found.seeds.pivot(index="seed", columns="place", values="less cls")).reset_index()
    return wide[["seed", *dict.fromkeys(found.seeds["place"])]].round(1)


def measured(found: SimpleNamespace) -> pd.DataFrame:
    """Means over all shifted sets, a representation a row."""
    means = shift.means(found.measured)
    wide = means.pivot_table(index="representation", columns="column", values="value", sort=False).reset_index()
    digits = {c: 3 if "loss" in c or "Brier" in c else 1 for c in wide.columns[1:]}
    return wide.assign(representation=wide["representation"].map(probes.TITLES)).round(digits)


def compared(found: SimpleNamespace) -> pd.DataFrame:
    """The tests in the mean of all shifted sets."""
    rows = found.compared[found.compared["place"] == shift.MEAN]
    return rows.drop(columns=["p_at_most", "scaled", "place"]).round(4)


def flagged(found: SimpleNamespace) -> pd.DataFrame:
    """Shares flagged over strength, for the figures."""
    every = found.alarms[found.alarms["group"] == "all"]
    return shift.with_clean(every).assign(series=lambda t: t["title"])


def alarm_table(shares: pd.DataFrame, rises: pd.DataFrame) -> pd.DataFrame:
    """A row a detector, in %: flagged of clean images, of corrupted ones, their rise, and of the OOD sets (means)."""
    unknown = shares[shares["group"] == "ood"]
    caught = pd.DataFrame({
        f"{kind} OOD": 100 * unknown[unknown["set"].str.startswith(f"{kind}/")].groupby("method")["value"].mean()
        for kind in ("near", "far")
    })  # fmt: skip
    found = rises[rises["group"] == "all"].set_index("method")
    right = rises[rises["group"] == "correct"].set_index("method")
    table = pd.DataFrame({"detector": found["title"], "clean": 100 * found["clean"], "shifted": 100 * found["mean"]})
    spans = zip(100 * found["value"], 100 * found["lo"], 100 * found["hi"], strict=True)
    table["rise, points (95 %)"] = [f"{value:+.1f} ({lo:+.1f} to {hi:+.1f})" for value, lo, hi in spans]
    table["p (Holm)"] = found["p_holm"]
    table["shifted, head right"] = 100 * right["mean"]
    return table.join(caught).reset_index(drop=True)
