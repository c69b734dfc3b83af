"""What the chapter on covariate shift says in words: every sentence is made from its tables, none is typed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import pandas as pd

from ..comparisons import corrected
from .calibration import NAMES, SHARES
from .corruptions import CORRUPTIONS
from .probes import TITLES
from .shift import CLEAN, LOSS, MEAN

_PLURAL = ("codes", "codes_unscaled", "random")


def row_of(compared: pd.DataFrame, representation: str, metric: str, place: str = MEAN) -> dict:
    """One row of :func:`capsae.analyses.shift.compare`; ValueError where the table does not hold it."""
    at = (compared["representation"] == representation) & (compared["metric"] == metric) & (compared["place"] == place)
    if at.sum() != 1:
        raise ValueError(f"the table holds {at.sum()} rows of {representation}, {metric}, {place}: expected one")
    return compared[at].iloc[0].to_dict()


def difference(row: Mapping) -> str:
    """``accuracy 70.3 % against 75.9 %, difference -5.6 points (-7.0 to -4.2 uncorrected), p = 0.016 (Holm)``."""
    share = row["metric"] in SHARES
    factor, form, unit, points = (100, "{:.1f}", " %", " points") if share else (1, "{:.3f}", "", "")
    signed = form.replace(":", ":+")
    own, cls = (form.format(factor * row[key]) + unit for key in ("own", "cls"))
    if row["place"] == LOSS:
        own, cls = (signed.format(factor * row[key]) + points for key in ("own", "cls"))
    value, lo, hi = (signed.format(factor * row[key]) for key in ("value", "lo", "hi"))
    return (
        f"{NAMES[row['metric']]} {own} against {cls}, difference {value}{points} ({lo} to {hi} uncorrected), "
        f"{corrected(row)} (Holm)"
    )


def verdict(row: Mapping, where: str) -> str:
    """One row of :func:`capsae.analyses.shift.compare` as a sentence."""
    name = row["representation"]
    verb = "are" if name in _PLURAL else "is"
    told = {
        "better": f"{verb} better than the CLS",
        "worse": f"{verb} worse than the CLS",
        "undecided": f"{verb} not clearly better or worse than the CLS",
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
    rows = rows[~rows["place"].isin([CLEAN, MEAN, LOSS])]
    found = {word: list(rows.loc[rows["verdict"] == word, "place"]) for word in ("better", "worse", "undecided")}
    told = "; ".join(f"{word}: {', '.join(of) or 'none'}" for word, of in found.items())
    return f"By corruption, {TITLES[representation]} against the CLS in {NAMES[metric]}: {told}."


def claim(compared: pd.DataFrame, where: str) -> str:
    """Whether codes generalise better than the CLS, by mean accuracy: the claim of the second paper, as we read it."""
    row = row_of(compared, "codes", "accuracy")
    told = {
        "better": f"is seen on {where}: probes on SAE codes are more accurate under shift than the probe on the CLS",
        "worse": f"is not seen on {where}; the opposite is: probes on SAE codes are less accurate under shift than the "
        "probe on the CLS",
        "undecided": f"is not seen on {where}: probes on SAE codes and on the CLS are not told apart under shift",
    }[row["verdict"]]
    return f"That SAE features improve OOD generalisation {told} ({difference(row)})."


def controls(
    compared: pd.DataFrame, metric: str = "accuracy", names: Iterable[str] = ("normalised", "random", "pca")
) -> str:
    """How the controls, which have no trained dictionary, do against the CLS in the mean of all shifted sets."""
    rows = [row_of(compared, name, metric) for name in names]
    told = "; ".join(f"{TITLES[row['representation']]} {row['verdict']}, {difference(row)}" for row in rows)
    return f"Controls without a trained dictionary against the CLS, mean of all shifted sets: {told}."


def seeds_text(seeds: pd.DataFrame) -> str:
    """Whether the SAE's seed changes the sign of codes less CLS in the mean of all shifted sets."""
    values = 100 * seeds.loc[seeds["place"] == MEAN, "difference"]
    same = (values > 0).all() or (values < 0).all()
    return (
        f"Over {len(values)} seeds of the SAE, codes less CLS in mean accuracy under shift lies between "
        f"{values.min():+.1f} and {values.max():+.1f} points: "
        + ("its sign does not depend on the seed." if same else "its sign depends on the seed.")
    )


def alarm_shares(alarms: pd.DataFrame, group: str = "all") -> pd.DataFrame:
    """Mean share flagged over the corruptions, method (title) by strength; sets without strengths are left out."""
    rows = alarms[(alarms["group"] == group) & alarms["corruption"].isin([CLEAN, *CORRUPTIONS])]
    wide = rows.groupby(["title", "strength"], sort=False)["value"].mean().unstack("strength")
    return wide.reindex(columns=sorted(wide.columns))


def alarm_text(alarms: pd.DataFrame, method: str) -> str:
    """How a detector's false alarms grow with strength, in one sentence."""
    rows = alarms[alarms["method"] == method]
    title = rows["title"].iloc[0]
    whole, right = (alarm_shares(rows, group).loc[title] for group in ("all", "correct"))
    strengths = [s for s in whole.index if s > 0]
    if not strengths:
        return f"{title}: no corruption with strengths was measured."
    low, high = strengths[0], strengths[-1]
    grown = "raises more alarms" if whole[high] > whole[0] else "raises no more alarms"
    return (
        f"{title} {grown} under corruption: at the threshold that keeps 95 % of the ID validation rows it flags "
        f"{100 * whole[0]:.1f} % of the clean images, {100 * whole[low]:.1f} % at strength {low:g} and "
        f"{100 * whole[high]:.1f} % at strength {high:g} (means over corruptions); of those that the head still "
        f"classifies correctly {100 * right[0]:.1f}, {100 * right[low]:.1f} and {100 * right[high]:.1f} %."
    )
