"""What the page on dark matter says: every sentence is made from a table, so that a test can hold it against it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from .. import tidy
from ..comparisons import HEADLINE, corrected
from .dark_matter import CROSSED, MAIN, THREE
from .dark_matter_scores import COLUMNS, FITS, HEADED, INVARIANT, JUDGED, title

CHANCE = 0.95  # FPR95 of a score that cannot tell

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
    """How much of the first coder's error is linear in the input by two fits, and whether that is more than nothing."""
    coder, told = table["coder"].iloc[0], []
    for target, name in (("vector", "the error vector"), ("norm2", "its squared norm")):
        rows = {fit: pick(table, coder=coder, target=target, fit=fit) for fit in (MAIN, "unseen")}
        cells = [percent(row) + ("" if row["lo"] > 0 else ", which is not clearly over 0") for row in rows.values()]
        told.append(f"{cells[0]} and {cells[1]} of {name}")
    counts = [f"{row['rows']:.0f}" for row in rows.values()]
    return (
        f"On {where}, linear maps of the input, fitted on {counts[0]} training rows and rescaled, or on {counts[1]} "
        f"rows that {coder} was not trained on, predict {told[0]}, and {told[1]} (R² on ID test rows, 95 % interval "
        f"over rows). Each is a lower bound: more rows would give more."
    )


def shrinkage(table: pd.DataFrame, where: str) -> str:
    """How much of the predictable part is one number times the input."""
    coder = table["coder"].iloc[0]
    full, one = (pick(table, coder=coder, target="vector", fit=fit) for fit in (MAIN, "one number"))
    if not full["lo"] > 0:
        return f"On {where}, the map fitted on training rows predicts nothing clear of the error vector of {coder}."
    told = "more than half" if one["value"] > full["value"] / 2 else "less than half"
    return (
        f"On {where}, of the {percent(full)} that the rescaled fit predicts, {told} is mere shrinkage: a single number "
        f"times the input predicts {percent(one)}."
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
    fixed = pick(table, coder=coder, target="norm2", fit="constant")["value"]
    norm = "is worse than the test rows' own mean" if row["value"] < 0 else "still holds on test rows"
    return (
        f"On {where}, {shares}, {ratio:.1f} times as much: errors of training rows do not stand for those of others. A "
        f"regression for the squared norm fitted on them {norm} (R² {row['value']:.2f}); the constant that the same "
        f"rows give has {fixed:.2f}."
    )


def control(table: pd.DataFrame, name: str, where: str) -> str:
    """Whether the first coder's error vector is more predictable than a control's (intervals that do not meet)."""
    coder = table["coder"].iloc[0]
    own, other = (pick(table, coder=one, target="vector", fit=MAIN) for one in (coder, name))
    told, tail = "neither clearly more nor clearly less predictable than", ""
    if own["lo"] > other["hi"]:
        told, tail = "more predictable than", ", intervals apart"
    elif own["hi"] < other["lo"]:
        told, tail = "less predictable than", ", intervals apart"
    return (
        f"On {where}, the error vector of {coder} is {told} that of *{name}*: {percent(own)} against "
        f"{percent(other)}{tail}."
    )


def over_k(table: pd.DataFrame, where: str) -> str:
    """How the predictable share of the vector goes with k: falls or rises throughout, or neither."""
    rows = table[table["coder"].str.startswith("SAE, k") & (table["target"] == "vector") & (table["fit"] == MAIN)]
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
    what = "the share of the error vector that the rescaled fit predicts"
    return f"On {where}, {what} {told} as k grows: {values} (one seed each)."


# --- structure


def grows(table: pd.DataFrame, where: str) -> str:
    """On which OOD sets the parts of the error are a larger share of the variance than on ID, by intervals apart."""
    wanted = {name: table[table["what"] == name].set_index("set") for name in ("linear", "rest")}
    sets, told = [name for name in wanted["rest"].index if "/" in name], []
    for name, of in wanted.items():
        known = next(row for row in of.itertuples() if row.group == "id")
        more = [one for one in sets if of.loc[one, "lo"] > known.hi]
        if len(sets) == 1:
            told.append(f"{_NAME[name]} is {'' if more else 'not clearly '}larger than on ID test rows on {sets[0]}")
        else:
            told.append(f"{_NAME[name]} is larger than on ID test rows on {len(more)} of {len(sets)} OOD sets")
    tail = ", its one OOD set" if len(sets) == 1 else ""
    return f"On {where}, as a share of the input's variance, {', and '.join(told)}{tail} (95 % intervals apart)."


def shorter(lengths: pd.DataFrame, where: str) -> str:
    """Whether reconstructions of OOD rows lie nearer to the training mean than those of ID rows, and errors farther."""
    told, cells = [], []
    for part in ("reconstruction", "error"):
        row = pick(lengths, part=part, set="mean")
        cells.append(tidy.percent(row))
        known = (
            "shorter than"
            if row["hi"] < 0.5
            else "longer than"
            if row["lo"] > 0.5
            else "not clearly shorter or longer than"
        )
        told.append(f"OOD {part}s are {known} ID ones")
    return (
        f"On {where}, {' and '.join(told)}: an OOD row's reconstruction lies farther from the training mean than an ID "
        f"test row's in {cells[0]} of pairs, its error in {cells[1]} ({over(lengths)})."
    )


# --- where the OOD signal is


def over(table: pd.DataFrame) -> str:
    """What a mean of a table is over, in words."""
    sets = [name for name in dict.fromkeys(table["set"]) if name != "mean"]
    return f"on {sets[0]}, the one OOD set" if len(sets) == 1 else f"mean over all {len(sets)} OOD sets"


def _metric(table: pd.DataFrame) -> str:
    return (
        "FPR95 (OOD positive)"
        if (table["set"] != "mean").sum() and table["set"].nunique() == 2
        else "mean FPR95 (OOD positive)"
    )


def _difference(row: Mapping) -> str:
    value, lo, hi = (f"{100 * row[key]:+.1f}" for key in ("value", "lo", "hi"))
    return f"{value} points ({lo} to {hi} uncorrected), {corrected(row)} (Holm)"


def _pair(compared: pd.DataFrame, method: str, part: str, other_part: str, fit: str = "train") -> dict:
    wanted = {"method": method, "part": part, "other_part": other_part, "fit": fit}
    return pick(compared, **wanted, set="mean", metric=HEADLINE)


def _by_both(compared: pd.DataFrame, method: str, parts: tuple[str, str], told: Mapping, question: str) -> str:
    """The verdict on which both fits agree, with both differences; or that they do not."""
    rows = {fit: _pair(compared, method, *parts, fit) for fit in FITS}
    numbers = "; ".join(f"fitted on {FITS[fit]} {_difference(row)}" for fit, row in rows.items())
    verdicts = {row["verdict"] for row in rows.values()}
    if len(verdicts) == 1:
        return f"{told[verdicts.pop()]}: {_metric(compared)}, {numbers}."
    return f"{question} is open, for the two fits do not agree: {_metric(compared)}, {numbers}."


def lost(compared: pd.DataFrame, method: str, where: str) -> str:
    """Whether a score of the reconstruction alone is worse than the same score of the whole input, by both fits."""
    told = {
        "worse": "loses by seeing the reconstruction alone",
        "better": "gains by seeing the reconstruction alone",
        "undecided": "neither clearly loses nor gains by seeing the reconstruction alone",
    }
    name = title(method)
    told = {verdict: f"{name} {words} on {where}" for verdict, words in told.items()}
    question = f"Whether {name} loses by seeing the reconstruction alone on {where}"
    return _by_both(compared, method, ("reconstruction", "input"), told, question)


def _leads(compared: pd.DataFrame, table: pd.DataFrame, method: str, fit: str) -> tuple[str, list[str], dict]:
    """The part a score does best on, the other parts that it is not clearly better than, and all values."""
    parts = [part for part in THREE if method not in INVARIANT or part != "linear"]
    wanted = {"method": method, "fit": fit, "set": "mean", "group": "all", "metric": HEADLINE}
    value = {part: pick(table, part=part, **wanted)["value"] for part in parts}
    best, close = min(parts, key=value.get), []
    for a, b in CROSSED:
        if best in (a, b) and {a, b} <= set(parts) and _pair(compared, method, a, b, fit)["verdict"] == "undecided":
            close.append(b if best == a else a)
    return best, close, value


def named(compared: pd.DataFrame, table: pd.DataFrame, method: str) -> str | None:
    """The part that a score does clearly best on by both fits; None where there is none."""
    found = [_leads(compared, table, method, fit) for fit in FITS]
    return found[0][0] if found[0][0] == found[1][0] and not any(close for _, close, _ in found) else None


def carries_most(compared: pd.DataFrame, table: pd.DataFrame, method: str, where: str) -> str:
    """Which part a score does best on, clear of the others by both fits; invariant scores: of two."""
    told = []
    for fit, words in FITS.items():
        best, close, value = _leads(compared, table, method, fit)
        others = " and ".join(f"{100 * v:.1f} % of {_NAME[part]}" for part, v in value.items() if part != best)
        unclear = f", not clearly over {' or '.join(_NAME[part] for part in close)}" if close else ""
        told.append(f"fitted on {words}, {_NAME[best]} leads, {100 * value[best]:.1f} % against {others}{unclear}")
    part = named(compared, table, method)
    verdict = f"{_NAME[part]} carries most of the OOD signal" if part else "no part carries most by both fits"
    tail = "" if method not in INVARIANT else f" ({title(method)} cannot tell the linear part from the whole input.)"
    return (
        f"By {title(method)} on {where}, {verdict}: {_metric(compared)}, by Holm's correction, {'; '.join(told)}.{tail}"
    )


def beside_pca(compared: pd.DataFrame, method: str, where: str) -> str:
    """Whether the SAE's error tells more of OOD than that of a PCA with the same unexplained share, by both fits."""
    told = {
        "better": "tells more than",
        "worse": "tells less than",
        "undecided": "tells neither clearly more nor less than",
    }
    start = f"By {title(method)} on {where}, "
    told = {verdict: f"{start}the SAE's error {words} PCA's of equal size" for verdict, words in told.items()}
    question = f"{start}whether the SAE's error tells more than PCA's of equal size"
    return _by_both(compared, method, ("error", "pca_rest"), told, question)


def through(compared: pd.DataFrame, method: str, where: str) -> str:
    """Whether a score through the head is worse on the reconstruction than on the features."""
    row = _pair(compared, method, "reconstruction", "features")
    told = {"worse": "loses", "better": "gains", "undecided": "neither clearly loses nor gains"}[row["verdict"]]
    words = f"{title(method)} {told} by reading the reconstruction instead of the features on {where}"
    return f"{words}: {_metric(compared)} {_difference(row)}."


def added(beside: pd.DataFrame, where: str) -> str:
    """On which OOD sets EPD gains or loses by the length of the error; no mean, which hides sets of opposite sign."""
    told = []
    for verdict, words in (
        ("worse", "hurts on"),
        ("better", "helps on"),
        ("undecided", "makes no clear difference on"),
    ):
        rows = [row for row in tidy.records(beside) if row["verdict"] == verdict]
        cells = [
            f"{r['set']} {100 * r['value']:+.1f} points ({100 * r['lo']:+.1f} to {100 * r['hi']:+.1f})" for r in rows
        ]
        if cells:
            told.append(f"{words} {', '.join(cells)}")
    return (
        f"The error's length, added to EPD on {where}, {'; it '.join(told)}: FPR95 (OOD positive), intervals "
        f"uncorrected, verdicts by Holm over the sets."
    )


# --- the answer


def kept(table: pd.DataFrame, part: str, method: str = "mds") -> float:
    """The least share, over both fits, of the input's lead over chance in FPR95 that a part alone keeps."""
    wanted = {"method": method, "set": "mean", "group": "all", "metric": HEADLINE}
    leads = [[CHANCE - pick(table, part=p, fit=fit, **wanted)["value"] for p in (part, "input")] for fit in FITS]
    return min(own / whole for own, whole in leads)


def answer(found: pd.DataFrame, table: pd.DataFrame, compared: pd.DataFrame, where: str) -> list[str]:
    """Three sentences: how much is linear, where the OOD signal is, and whether the code is a bottleneck."""
    coder = found["coder"].iloc[0]
    full, other, one = (pick(found, coder=coder, target="vector", fit=f) for f in (MAIN, "unseen", "one number"))
    low, high = sorted((full["value"], other["value"]))
    told = [
        f"On {where}, a linear map of the input predicts {whole(low)} to {whole(high)} % of the error vector of "
        f"{coder}, by the fit (a lower bound), and shrinkage alone predicts {whole(one['value'])} %."
    ]
    shares = {part: kept(table, part) for part in ("reconstruction", "error")}
    much = [part for part, share in shares.items() if share > 0.5]
    verdict = {2: "is redundant", 1: f"is mostly in the {''.join(much)}", 0: "is in neither alone"}[len(much)]
    parts = {method: named(compared, table, method) for method in JUDGED}
    yes = [f"{title(m)} ({_NAME[part]})" for m, part in parts.items() if part]
    no = [title(m) for m, part in parts.items() if not part]
    most = (
        f"by both fits, one part carries most by {' and '.join(yes)}" if yes else "no score names a part by both fits"
    )
    most += f", none by {' or '.join(no)}" if yes and no else ""
    told.append(
        f"The OOD signal {verdict}: by {title('mds')}, the reconstruction alone keeps at least "
        f"{whole(shares['reconstruction'])} % of the whole input's lead over chance in FPR95, the error alone "
        f"{whole(shares['error'])} %; {most}."
    )
    rows = {title(m): _pair(compared, m, "reconstruction", "features") for m in HEADED}
    worse = [row["verdict"] == "worse" for row in rows.values()]
    words = "the code is no clear bottleneck for either tested"
    if any(worse):
        some = "whether the code is a bottleneck goes by the score"
        words = "the code is a bottleneck for both tested" if all(worse) else some
    numbers = " and ".join(f"{100 * r['value']:+.1f} points for {name} ({r['verdict']})" for name, r in rows.items())
    told.append(
        f"Of scores through the head, {words}: reading the reconstruction instead of the features changes "
        f"{_metric(compared)} by {numbers}."
    )
    return told


def means(table: pd.DataFrame, methods) -> pd.DataFrame:
    """Means over all OOD sets of some detectors, both fits, with titles of detector, fit and part."""
    rows = table[(table["set"] == "mean") & (table["group"] == "all") & table["method"].isin(list(methods))]
    name = [f"{title(row.method)}, {FITS[row.fit]}" for row in rows.itertuples()]
    return rows.assign(method=name, part=rows["part"].map(COLUMNS))


def shown(table: pd.DataFrame, methods, parts=tuple(COLUMNS), metric: str = HEADLINE) -> pd.DataFrame:
    """Means over all OOD sets, fitted on training rows, as text for a page, a row a detector, a column a part."""
    rows = table[(table["set"] == "mean") & (table["group"] == "all") & (table["metric"] == metric)]
    rows = rows[rows["fit"] == "train"]
    text = [f"{100 * r.value:.1f} ({100 * r.lo:.1f}–{100 * r.hi:.1f})" for r in rows.itertuples()]
    wide = rows.assign(text=text).pivot(index="method", columns="part", values="text")
    wide = wide.reindex(index=list(methods), columns=list(parts)).fillna("").rename(columns=COLUMNS)
    return wide.reset_index().rename_axis(columns=None).assign(method=lambda t: t["method"].map(title))


def differences(compared: pd.DataFrame) -> pd.DataFrame:
    """Paired differences of the means as text for a page, a row a pair, a column a metric."""
    means = compared[compared["set"] == "mean"]
    cells = [f"{tidy.percent(row).replace(' %', '')} {corrected(row)}" for row in tidy.records(means)]
    part, less = (means[column].map(COLUMNS) for column in ("part", "other_part"))
    score, fit = means["method"].map(title), means["fit"].map(FITS)
    wide = means.assign(score=score, fit=fit, part=part, less=less, text=cells).pivot_table(
        index=["score", "fit", "part", "less"], columns="metric", values="text", aggfunc="first", sort=False
    )
    return wide.rename(columns=tidy.METRIC_PANELS).reset_index().rename_axis(columns=None)
