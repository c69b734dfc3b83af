"""What the page on dark matter says: every sentence is made from a table, so that a test can hold it against it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from .. import tidy
from ..comparisons import HEADLINE, corrected
from .dark_matter import CROSSED, THREE
from .dark_matter_scores import COLUMNS, INVARIANT, title

_NAME = {
    "reconstruction": "the reconstruction",
    "linear": "the linear part of the error",
    "rest": "the rest of the error",
}


def pick(table: pd.DataFrame, **wanted) -> dict:
    """The one row of a table whose columns have these values; ValueError if there is none, or several."""
    rows = table[np.logical_and.reduce([table[key] == value for key, value in wanted.items()])]
    if len(rows) != 1:
        raise ValueError(f"the table holds {len(rows)} rows of {wanted}: expected one")
    return rows.iloc[0].to_dict()


def whole(value: float) -> str:
    """A share in whole per cent, never "-0"."""
    return f"{round(100 * value) + 0:d}"


def percent(row: Mapping) -> str:
    """``29 % (28 to 30)``."""
    return f"{whole(row['value'])} % ({whole(row['lo'])} to {whole(row['hi'])})"


# --- predictability


def predictable(table: pd.DataFrame, where: str) -> str:
    """How much of the first coder's error is linear in the input, and whether that is more than nothing."""
    coder, told = table["coder"].iloc[0], []
    for target, name in (("vector", "the error vector"), ("norm2", "its squared norm")):
        row = pick(table, coder=coder, target=target, fit="unseen")
        told.append(f"{percent(row)} of {name}" + ("" if row["lo"] > 0 else ", which is not clearly over 0"))
    return (
        f"On {where}, a linear map of the input, fitted on rows that {coder} was not trained on, predicts {told[0]} "
        f"and {told[1]} on ID test rows (R², 95 % interval over rows; the fit and the SAE stay as they are)."
    )


def shrinkage(table: pd.DataFrame, where: str) -> str:
    """How much of the predictable part is one number times the input."""
    coder = table["coder"].iloc[0]
    full, one = (pick(table, coder=coder, target="vector", fit=fit) for fit in ("rescaled", "one number"))
    if not full["lo"] > 0:
        return f"On {where}, the map fitted on training rows predicts nothing clear of the error vector of {coder}."
    told = "more than half" if one["value"] > full["value"] / 2 else "less than half"
    return (
        f"On {where}, the map fitted on training rows and rescaled predicts {percent(full)} of the error vector, and "
        f"{told} of that is mere shrinkage: a single number times the input predicts {percent(one)}."
    )


def memory(table: pd.DataFrame, where: str) -> str:
    """Whether errors of training rows are like those of others, and what that does to a fit on training rows."""
    coder = table["coder"].iloc[0]
    row = pick(table, coder=coder, target="norm2", fit="train")
    ratio = row["fvu_test"] / row["fvu_train"]
    shares = f"{coder} leaves {100 * row['fvu_train']:.1f} % of the variance of its training rows unexplained"
    shares += f" and {100 * row['fvu_test']:.1f} % of that of test rows"
    if ratio < 1.25:
        return f"On {where}, {shares}: errors of training rows stand for those of others."
    norm = "is worse than a constant" if row["value"] < 0 else "still holds"
    return (
        f"On {where}, {shares}, {ratio:.1f} times as much: errors of training rows do not stand for those of others. A "
        f"regression for the squared norm fitted on them {norm} on test rows (R² {row['value']:.2f})."
    )


def control(table: pd.DataFrame, name: str, where: str) -> str:
    """Whether the first coder's error vector is more predictable than a control's (intervals that do not meet)."""
    coder = table["coder"].iloc[0]
    own, other = (pick(table, coder=one, target="vector", fit="unseen") for one in (coder, name))
    told = "neither clearly more nor clearly less predictable than"
    if own["lo"] > other["hi"]:
        told = "more predictable than"
    elif own["hi"] < other["lo"]:
        told = "less predictable than"
    return (
        f"On {where}, the error vector of {coder} is {told} that of *{name}*: {percent(own)} against {percent(other)}."
    )


def over_k(table: pd.DataFrame, where: str) -> str:
    """How the predictable share of the vector goes with k: falls or rises throughout, or neither."""
    rows = table[table["coder"].str.startswith("SAE, k") & (table["target"] == "vector") & (table["fit"] == "unseen")]
    rows = rows.assign(k=rows["coder"].str.extract(r"(\d+)$")[0].astype(int)).sort_values("k")
    if len(rows) < 2:
        return f"On {where}, one k was tried."
    first, last, steps = rows.iloc[0], rows.iloc[-1], np.diff(rows["value"])
    told = "goes up and down"
    if (steps < 0).all() and last["hi"] < first["lo"]:
        told = "falls"
    elif (steps > 0).all() and last["lo"] > first["hi"]:
        told = "rises"
    elif first["lo"] <= last["hi"] and last["lo"] <= first["hi"]:
        told = "does not clearly change"
    values = ", ".join(f"{whole(row.value)} % at k = {row.k}" for row in rows.itertuples())
    return f"On {where}, the predictable share of the error vector {told} as k grows: {values} (one seed each)."


# --- structure


def grows(table: pd.DataFrame, where: str) -> str:
    """On how many OOD sets the error (its linear part and its rest together) is a clearly larger share than on ID."""
    shares = table[table["measure"] == "share"]
    wanted = {name: shares[shares["what"] == name].set_index("set") for name in ("linear", "rest")}
    sets = [name for name in wanted["rest"].index if "/" in name]
    told = []
    for name, of in wanted.items():
        known = next(row for row in of.itertuples() if row.group == "id")
        more = [one for one in sets if of.loc[one, "lo"] > known.hi]
        told.append(f"{_NAME[name]} is clearly larger than on ID test rows on {len(more)} of {len(sets)}")
    return f"On {where}, as a share of the input's variance, {' OOD sets, and '.join(told)}."


# --- where the OOD signal is


def _difference(row: Mapping) -> str:
    value, lo, hi = (f"{100 * row[key]:+.1f}" for key in ("value", "lo", "hi"))
    return f"{value} points ({lo} to {hi} uncorrected), {corrected(row)} (Holm)"


def _pair(compared: pd.DataFrame, method: str, part: str, other_part: str) -> dict:
    return pick(compared, method=method, part=part, other_part=other_part, set="mean", metric=HEADLINE)


def lost(compared: pd.DataFrame, method: str, where: str) -> str:
    """Whether a score of the reconstruction alone is worse than the same score of the whole input."""
    row = _pair(compared, method, "reconstruction", "input")
    told = {
        "worse": "loses by seeing the reconstruction alone",
        "better": "gains by seeing the reconstruction alone",
        "undecided": "neither clearly loses nor gains by seeing the reconstruction alone",
    }[row["verdict"]]
    return f"{title(method)} {told} on {where}: mean FPR95 (OOD positive) {_difference(row)}."


def carries_most(compared: pd.DataFrame, table: pd.DataFrame, method: str, where: str) -> str:
    """Which part a score does best on, and whether it is clearly better than the others; invariant scores: of two."""
    parts = [part for part in THREE if method not in INVARIANT or part != "linear"]
    value = {p: pick(table, method=method, part=p, set="mean", group="all", metric=HEADLINE)["value"] for p in parts}
    best, *others = sorted(parts, key=value.get)
    clear = {}
    for a, b in CROSSED:
        if best in (a, b) and {a, b} <= set(parts):
            clear[b if best == a else a] = _pair(compared, method, a, b)["verdict"] != "undecided"
    numbers = " and ".join(f"{100 * value[part]:.1f} % of {_NAME[part]}" for part in others)
    numbers = f"mean FPR95 (OOD positive) {100 * value[best]:.1f} % against {numbers}"
    tail = "" if len(parts) == 3 else f" ({title(method)} cannot tell the linear part from the whole input.)"
    if all(clear.values()):
        return f"By {title(method)} on {where}, {_NAME[best]} carries most of the OOD signal: {numbers} (Holm).{tail}"
    close = " or ".join(_NAME[part] for part in others if not clear[part])
    told = f"no part clearly carries most: {_NAME[best]} leads, {numbers}, but not clearly over {close} (Holm)"
    return f"By {title(method)} on {where}, {told}.{tail}"


def beside_pca(compared: pd.DataFrame, method: str, where: str) -> str:
    """Whether the SAE's error tells more of OOD than that of a PCA with the same unexplained share."""
    row = _pair(compared, method, "error", "pca_rest")
    told = {
        "better": "tells more than",
        "worse": "tells less than",
        "undecided": "tells neither clearly more nor less than",
    }
    words = f"the SAE's error {told[row['verdict']]} PCA's of equal size"
    return f"By {title(method)} on {where}, {words}: mean FPR95 (OOD positive) {_difference(row)}."


def added(compared: pd.DataFrame, where: str) -> str:
    """Whether EPD gains by the length of the error."""
    row = _pair(compared, "epd+error", "input", "reconstruction")
    told = {"better": "helps", "worse": "hurts", "undecided": "makes no clear difference to"}[row["verdict"]]
    return f"The error's length, added to EPD, {told} EPD on {where}: mean FPR95 (OOD positive) {_difference(row)}."


def shown(table: pd.DataFrame, methods, parts=tuple(COLUMNS), metric: str = HEADLINE) -> pd.DataFrame:
    """Means over all OOD sets as text for a page, a row a detector, a column a part; blank where not applicable."""
    rows = table[(table["set"] == "mean") & (table["group"] == "all") & (table["metric"] == metric)]
    text = [f"{100 * r.value:.1f} ({100 * r.lo:.1f}–{100 * r.hi:.1f})" for r in rows.itertuples()]
    wide = rows.assign(text=text).pivot(index="method", columns="part", values="text")
    wide = wide.reindex(index=list(methods), columns=list(parts)).fillna("").rename(columns=COLUMNS)
    return wide.reset_index().rename_axis(columns=None).assign(method=lambda t: t["method"].map(title))


def differences(compared: pd.DataFrame) -> pd.DataFrame:
    """Paired differences of the means as text for a page, a row a pair, a column a metric."""
    means = compared[compared["set"] == "mean"]
    cells = [f"{tidy.percent(row).replace(' %', '')} {corrected(row)}" for row in tidy.records(means)]
    part, less = (means[column].map(COLUMNS) for column in ("part", "other_part"))
    score = means["method"].map(title)
    wide = means.assign(score=score, part=part, less=less, text=cells).pivot_table(
        index=["score", "part", "less"], columns="metric", values="text", aggfunc="first", sort=False
    )
    return wide.rename(columns=tidy.METRIC_PANELS).reset_index().rename_axis(columns=None)
