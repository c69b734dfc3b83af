"""What the chapter on covariate shift says in words: every sentence is made from its tables, none is typed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import pandas as pd

from ..comparisons import corrected
from .calibration import NAMES, SHARES
from .probes import TITLES
from .shift import CLEAN, LOSS, MEAN

_PLURAL = ("codes", "random")
_THAN = {"cls": "the CLS", "random": "codes of a random dictionary"}


def row_of(
    compared: pd.DataFrame, representation: str, metric: str = "accuracy", place: str = MEAN, other: str = "cls"
) -> dict:
    """One row of :func:`capsae.analyses.shift.compare`; ValueError where the table does not hold it."""
    asked = {"representation": representation, "metric": metric, "place": place, "other": other}
    at = (compared[list(asked)] == list(asked.values())).all(axis=1)
    if at.sum() != 1:
        told = ", ".join(asked.values())
        raise ValueError(f"the table holds {at.sum()} rows of {told}: expected one")
    return compared[at].iloc[0].to_dict()


def difference(row: Mapping) -> str:
    """``accuracy 70.3 % against 75.9 %, difference -5.6 points (-7.0 to -4.2 uncorrected), p = 0.016 (Holm)``."""
    share = row["metric"] in SHARES
    factor, form, unit, points = (100, "{:.1f}", " %", " points") if share else (1, "{:.3f}", "", "")
    signed = form.replace(":", ":+")
    own, than = (form.format(factor * row[key]) + unit for key in ("own", "than"))
    if row["place"] == LOSS:
        own, than = (signed.format(factor * row[key]) + points for key in ("own", "than"))
    value, lo, hi = (signed.format(factor * row[key]) for key in ("value", "lo", "hi"))
    return (
        f"{NAMES[row['metric']]} {own} against {than}, difference {value}{points} ({lo} to {hi} uncorrected), "
        f"{corrected(row)} (Holm)"
    )


def verdict(row: Mapping, where: str) -> str:
    """One row of :func:`capsae.analyses.shift.compare` as a sentence."""
    name, than = row["representation"], _THAN[row["other"]]
    verb = "are" if name in _PLURAL else "is"
    told = {
        "better": f"{verb} better than {than}",
        "worse": f"{verb} worse than {than}",
        "undecided": f"{verb} not clearly better or worse than {than}",
    }[row["verdict"]]
    place = {
        CLEAN: "on the clean images",
        MEAN: "in the mean of all shifted sets",
        LOSS: "in what the shift changes (mean of the shifted sets less clean)",
    }.get(row["place"], f"under {row['place']}")
    return f"On {where}, {TITLES[name]} {told} {place}: {difference(row)}."


def by_place(compared: pd.DataFrame, representation: str, metric: str) -> str:
    """On which corruptions a representation is better, worse or undecided against the CLS."""
    rows = compared[(compared["representation"] == representation) & (compared["metric"] == metric)]
    rows = rows[~rows["place"].isin([CLEAN, MEAN, LOSS]) & (rows["other"] == "cls")]
    found = {word: list(rows.loc[rows["verdict"] == word, "place"]) for word in ("better", "worse", "undecided")}
    told = "; ".join(f"{word}: {', '.join(of) or 'none'}" for word, of in found.items())
    return f"By corruption, {TITLES[representation]} against the CLS in {NAMES[metric]}: {told}."


def claim(compared: pd.DataFrame, ways: pd.DataFrame, where: str) -> str:
    """Whether codes are more accurate under shift than the CLS, in the mean: the paper's claim, as we read it.

    ``ways`` is what :func:`capsae.analyses.shift.sensitivity` gives: the answer is told with how it depends on them.
    """
    row = row_of(compared, "codes")
    told = {
        "better": f"is seen on {where}: probes on SAE codes are more accurate under shift than the probe on the CLS",
        "worse": f"is not seen on {where}; the opposite is: probes on SAE codes are less accurate under shift than the "
        "probe on the CLS",
        "undecided": f"is not seen on {where}: probes on SAE codes and on the CLS are not told apart under shift",
    }[row["verdict"]]
    return f"That SAE features improve OOD generalisation {told} ({difference(row)}; {_range(ways, 'cls')})."


def change_text(compared: pd.DataFrame) -> str:
    """Who loses less than the CLS from clean to shifted, and who more, by the corrected tests."""
    names = ("codes", "random", "pca", "normalised")
    rows = [row_of(compared, name, place=LOSS) for name in names]

    def of(row):
        return (
            f"{TITLES[row['representation']]} ({100 * row['value']:+.1f} points, {100 * row['lo']:+.1f} to "
            f"{100 * row['hi']:+.1f} uncorrected, {corrected(row)} Holm)"
        )

    told = []
    for word, text in (("better", "less accuracy is lost"), ("worse", "more is lost"), ("undecided", "undecided")):
        found = [of(row) for row in rows if row["verdict"] == word]
        told.append(f"{text}: {', '.join(found) or 'none'}")
    return f"From clean to shifted, against the CLS, {'; '.join(told)}."


def trained(compared: pd.DataFrame, ways: pd.DataFrame) -> str:
    """What training the dictionary is worth: codes less the random dictionary's, both chosen by the same rule."""
    row = row_of(compared, "codes", other="random")
    told = {
        "better": "Training the dictionary pays: under shift its codes are probed better than those of a random one",
        "worse": "Training the dictionary harms: under shift its codes are probed worse than those of a random one",
        "undecided": "Under shift, codes of the trained dictionary and of a random one are not told apart",
    }[row["verdict"]]
    return f"{told} ({difference(row)}; {_range(ways, 'random')})."


def controls(
    compared: pd.DataFrame, metric: str = "accuracy", names: Iterable[str] = ("normalised", "random", "pca")
) -> str:
    """How the controls, which have no trained dictionary, do against the CLS in the mean of all shifted sets."""
    rows = [row_of(compared, name, metric) for name in names]
    told = "; ".join(f"{TITLES[row['representation']]} {row['verdict']}, {difference(row)}" for row in rows)
    return f"Controls without a trained dictionary against the CLS, mean of all shifted sets: {told}."


def _range(ways: pd.DataFrame, other: str) -> str:
    """How a difference depends on the choice of probes: its range, and how many intervals leave out 0."""
    rows = ways[ways["other"] == other].drop_duplicates(["codes chose", "other chose"])
    values, n = 100 * rows["value"], len(rows)
    below, above = int((rows["hi"] < 0).sum()), int((rows["lo"] > 0).sum())
    return (
        f"over {n} different choices of the two probes on ID rows {values.min():+.1f} to {values.max():+.1f} points, "
        f"of {n} uncorrected intervals {below} wholly below 0 and {above} above"
    )


def seeds_text(seeds: pd.DataFrame, other: str = "cls") -> str:
    """Whether the SAE's seed changes the sign of codes less CLS (or random) in the mean of all shifted sets."""
    values = 100 * seeds.loc[seeds["place"] == MEAN, f"less {other}"]
    same = (values > 0).all() or (values < 0).all()
    return (
        f"Over {len(values)} seeds of the SAE, codes less {_THAN[other]} in mean accuracy under shift lies between "
        f"{values.min():+.1f} and {values.max():+.1f} points: "
        + ("its sign does not depend on the seed." if same else "its sign depends on the seed.")
    )


def alarm_text(rises: pd.DataFrame, alpha: float = 0.05) -> str:
    """How many detectors flag more corrupted ID images than clean ones, by the paired test, in one sentence."""
    rows = rises[rises["group"] == "all"]
    more = rows[(rows["p_holm"] < alpha) & (rows["value"] > 0)]
    start = f"{len(more)} of {len(rows)} detectors clearly raise more alarms on shifted ID images than on clean ones"
    low, high = rows.loc[rows["value"].idxmin()], rows.loc[rows["value"].idxmax()]

    def of(row):
        return (
            f"{100 * row['value']:+.1f} points ({row['title']}, {100 * row['lo']:+.1f} to {100 * row['hi']:+.1f}, "
            f"{corrected(row)} Holm)"
        )

    return f"{start}: the rise in the mean of the shifted sets lies between {of(low)} and {of(high)}."


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
