"""What the tables of :mod:`capsae.analyses.layers` say, as tidy data for figures and as sentences made by rule."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from ..comparisons import corrected
from ..metrics import HIGHER_IS_BETTER
from ..sites import FINAL
from .layers import GROUPS

SHARE = 0.9  # of the value at the network's end that counts as "there"
_THERE = f"{100 * SHARE:.0f} % of its value at the end"
KIND_TITLES = {"cls": "CLS token", "attn": "Attention output at CLS", "patches": "Mean of patches"}
METHOD_TITLES = {
    "epd": "EPD, class by the final head",
    "epd_site": "EPD, class by the site's probe",
    "rpd": "RPD (ours), final head",
    "rpd_site": "RPD (ours), site's probe",
    "mds++": "MDS++ on the site's features",
    "knn": "KNN on the site's features",
}
MEASURE_TITLES = {
    "probe_accuracy": "linear probe, accuracy",
    "cap_accuracy": "nearest profile, accuracy",
    "top1_5": "5 latents a class, accuracy",
    "stability": "stability within a class, cosine",
    "between": "cosine between classes",
    "gap": "stability less cosine between classes",
    "core_overlap": "overlap of cores (Jaccard, top 5 %)",
    "fvu": "FVU of test rows",
    "dead": "latents that never fire",
}


def short(method: str) -> str:
    """``EPD`` of ``epd_site``, ``MDS++`` of ``mds++``."""
    return METHOD_TITLES[method].split(",")[0].split(" on ")[0]


def kind_of(site: str) -> str:
    """``attn`` of ``block03/attn``; ``final`` of ``final/cls``."""
    return "final" if site == FINAL else site.split("/")[1]


def depth_of(site: str, last: int) -> int:
    """3 of ``block03/attn``; the network's end comes one after the last block."""
    return last + 1 if site == FINAL else int(site.split("/")[0].removeprefix("block"))


def with_depth(data: pd.DataFrame) -> pd.DataFrame:
    """A table with the columns kind and depth; ``attrs["last"]`` is the number of blocks."""
    last = max(depth_of(site, 0) for site in data["site"].unique())
    data = data.assign(kind=data["site"].map(kind_of), depth=[depth_of(site, last) for site in data["site"]])
    data.attrs["last"] = last
    return data


def measured(table: pd.DataFrame) -> pd.DataFrame:
    """What was measured of SAE, profiles and probe. Columns: site, kind, depth, metric, seed, value, lo, hi."""
    rows = with_depth(table[table["method"] == "site"])
    return rows[["site", "kind", "depth", "metric", "seed", "value", "lo", "hi"]]


def means(table: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Means over sets. Columns: site, kind, depth, method, group, seed, value, lo, hi, in %."""
    rows = with_depth(table[(table["set"] == "mean") & (table["metric"] == metric)])
    rows = rows.assign(**{key: 100 * rows[key] for key in ("value", "lo", "hi")})
    return rows[["site", "kind", "depth", "method", "group", "seed", "value", "lo", "hi"]]


def over_seeds(table: pd.DataFrame, metric: str, method: str = "site", group: str = "id") -> pd.Series:
    """One number's mean over the seeds, by site in the order of the table."""
    rows = table[(table["metric"] == metric) & (table["method"] == method) & (table["group"] == group)]
    rows = rows[rows["set"] == ("" if method == "site" else "mean")]
    if rows.empty:
        raise ValueError(f"the table holds no {metric} of {method!r}, group {group!r}")
    return rows.groupby("site", sort=False)["value"].mean()


# --- where profiles form


def first_depth(values: pd.Series, kind: str, share: float = SHARE) -> int | None:
    """The first block from which on, at its sites of one kind, a number reaches a share of its value at the end.

    None where no block does. Later blocks may fall below again; :func:`forming` says so.
    """
    rows = _along(values, kind)
    there = np.flatnonzero(rows.to_numpy() >= share * values[FINAL])
    return int(rows.index[there[0]]) if len(there) else None


def _along(values: pd.Series, kind: str) -> pd.Series:
    rows = values[[kind_of(site) == kind for site in values.index]]
    return rows.set_axis([depth_of(site, 0) for site in rows.index])


def forming(table: pd.DataFrame) -> list[str]:
    """Where along the depth classes can be read and profiles form, a sentence a kind of site."""
    names = {"probe_accuracy": "a linear probe", "cap_accuracy": "the nearest profile", "top1_5": "5 latents a class"}
    values = {metric: over_seeds(table, metric) for metric in (*names, "stability", "between", "gap")}
    last, told = max(depth_of(site, 0) for site in values["gap"].index), []
    end = ", ".join(f"{name} {100 * values[metric][FINAL]:.1f} %" for metric, name in names.items())
    told.append(f"Accuracy at the network's end: {end}.")
    for kind in [k for k in KIND_TITLES if any(kind_of(site) == k for site in values["gap"].index)]:
        reached = ", ".join(f"by {name} {at_block(values[metric], kind, last)}" for metric, name in names.items())
        told.append(f"{KIND_TITLES[kind]}: {100 * SHARE:.0f} % of the accuracy at the end is reached {reached}.")
        told.append(_stability_text(values, kind, last))
    return [*told, _dead_text(over_seeds(table, "dead"))]


def _dead_text(dead: pd.Series) -> str:
    worst = dead.idxmax()
    text = (
        f"Latents that never fire: at most {100 * dead[worst]:.0f} % ({worst}), {100 * dead[FINAL]:.0f} % at the end."
    )
    if dead[worst] > dead[FINAL] + 0.1:
        text += " The recipe was settled for the end, and such sites use a part of the dictionary alone."
    return text


def at_block(values: pd.Series, kind: str, last: int) -> str:
    first = first_depth(values, kind)
    if first is None:
        return f"at no block (at most {100 * _along(values, kind).max() / values[FINAL]:.0f} %)"
    rows = _along(values, kind)
    again = [depth for depth in rows.index if depth > first and rows[depth] < SHARE * values[FINAL]]
    return f"at block {first} of {last}" + (f" (below it again at block {again[-1]})" if again else "")


def _stability_text(values: Mapping[str, pd.Series], kind: str, last: int) -> str:
    within, between = (_along(values[name], kind) for name in ("stability", "between"))
    opening, ends = within.index[0], {name: f"{of[FINAL]:.2f}" for name, of in values.items()}
    gap = f"less the cosine between classes it reaches {_THERE} ({ends['gap']}) {at_block(values['gap'], kind, last)}"
    if first_depth(values["stability"], kind) == opening:
        return (
            f"{KIND_TITLES[kind]}: stability is at least {_THERE} at block {opening} already ({within[opening]:.2f}, "
            f"at the end {ends['stability']}), where the cosine between profiles of different classes is "
            f"{between[opening]:.2f} (at the end {ends['between']}); {gap}."
        )
    reached = at_block(values["stability"], kind, last)
    return f"{KIND_TITLES[kind]}: stability reaches {_THERE} ({ends['stability']}) {reached}; {gap}."


# --- where OOD separates


def best_sites(table: pd.DataFrame, against: pd.DataFrame, metric: str = "auroc") -> pd.DataFrame:
    """The best site of each method and group on the *test* sets, an upper bound and no choice that one could make.

    Columns: method, group, metric, site, value, end (means over seeds), seeds, difference, lo, hi, p_holm, p_at_most
    (of the seed with the largest p), verdict: "better" where it is so in every seed, "end" where no site is above the
    network's end, else "undecided".
    """
    sign, rows = (1 if HIGHER_IS_BETTER[metric] else -1), []
    for method, group in _cells(against):
        values = over_seeds(table, metric, method, group)
        site = (sign * values).idxmax()
        if sign * values[site] <= sign * values[FINAL]:
            site = FINAL
        rows.append(_row(against, values, site, metric, method, group))
    return pd.DataFrame(rows)


def _cells(against: pd.DataFrame) -> list[tuple[str, str]]:
    groups = [group for group in GROUPS if group in set(against["group"])]
    return [(method, group) for method in dict.fromkeys(against["method"]) for group in groups]


def _row(against, values, site, metric, method, group) -> dict:
    row = {"method": method, "group": group, "metric": metric}
    row |= {"site": site, "value": values[site], "end": values[FINAL]}
    if site == FINAL:
        nothing = dict.fromkeys(("lo", "hi", "p_holm"), np.nan)
        return row | {"difference": 0.0, **nothing, "p_at_most": False, "seeds": 0, "verdict": "end"}
    keys = {"site": site, "metric": metric, "method": method, "group": group}
    tests = against[np.logical_and.reduce([against[key] == value for key, value in keys.items()])]
    verdict = tests["verdict"].iloc[0] if tests["verdict"].nunique() == 1 else "undecided"
    weakest = tests.loc[tests["p_holm"].idxmax()]
    told = {key: weakest[key] for key in ("lo", "hi", "p_holm", "p_at_most")}
    return row | {"difference": weakest["value"], **told, "seeds": len(tests), "verdict": verdict}


def id_choice(table: pd.DataFrame) -> str:
    """The site that ID rows alone would choose: the best nearest-profile accuracy on validation rows, the latest of
    equals."""
    values = over_seeds(table, "cap_accuracy_val")
    return values.index[np.flatnonzero(values == values.max())[-1]]


def chosen_rows(table: pd.DataFrame, against: pd.DataFrame, metric: str = "auroc") -> pd.DataFrame:
    """What each method has at the site of :func:`id_choice`; columns as :func:`best_sites`."""
    site = id_choice(table)
    cells = [(over_seeds(table, metric, *cell), *cell) for cell in _cells(against)]
    return pd.DataFrame([_row(against, values, site, metric, method, group) for values, method, group in cells])


METRIC = {"auroc": "AUROC", "fpr95_ood_pos": "FPR95 (OOD positive)", "fpr95_id_pos": "FPR95 (ID positive)"}
SETS = {"near": "near OOD", "far": "far OOD", "all": "all OOD sets"}


def best_text(row: Mapping) -> str:
    """A row of :func:`best_sites` in words."""
    what = f"{METHOD_TITLES[row['method']]}, {SETS[row['group']]}"
    end = f"{100 * row['end']:.1f} %"
    if row["verdict"] == "end":
        return f"{what}: no site is above the network's end in mean {METRIC[row['metric']]} ({end})."
    told = {
        "better": "clearly better than the end",
        "undecided": "not clearly better than the end",
        "worse": "worse than the end",
    }[row["verdict"]]
    return (
        f"{what}: the best site is {row['site']} with mean {METRIC[row['metric']]} {100 * row['value']:.1f} %, {told} "
        f"({end}): {_difference(row)}."
    )


def _difference(row: Mapping) -> str:
    value, lo, hi = (f"{100 * row[key]:+.1f}" for key in ("difference", "lo", "hi"))
    seed = f" in the least favourable of {row['seeds']} seeds" if row["seeds"] > 1 else ""
    return f"{value} points ({lo} to {hi} uncorrected){seed}, {corrected(row)} (Holm)"


def choice_text(table: pd.DataFrame, rows: pd.DataFrame) -> str:
    """What a choice by ID rows alone takes, and what EPD and RPD have there, in words."""
    site = id_choice(table)
    accuracy = over_seeds(table, "cap_accuracy_val")
    told = (
        f"A site must be picked on ID rows. By the accuracy of the nearest profile on validation rows the pick is "
        f"{site} ({100 * accuracy[site]:.1f} %, at the end {100 * accuracy[FINAL]:.1f} %)"
    )
    if site == FINAL:
        return told + ": the network's end itself, and nothing changes."
    words = {"better": "better than", "worse": "worse than", "undecided": "not significantly different from"}
    of = rows[(rows["group"] == "all") & rows["method"].isin(["epd", "rpd"])]
    parts = [
        f"{short(r['method'])} there is {words[r['verdict']]} {short(r['method'])} at the end by mean "
        f"{METRIC[r['metric']]} over all sets ({_difference(r)})"
        for r in of.to_dict("records")
    ]
    return told + "; " + "; ".join(parts) + "."


def borrowed_text(table: pd.DataFrame, metric: str = "auroc") -> str:
    """How much of EPD is the final head's class, in words, by thirds of the depth."""
    head, own = (over_seeds(table, metric, method, "all") for method in ("epd", "epd_site"))
    last, parts, ahead_early = max(depth_of(site, 0) for site in head.index), [], 0.0
    for blocks in np.array_split(np.arange(1, last + 1), min(3, last)):
        sites = [site for site in head.index if site != FINAL and depth_of(site, last) in blocks]
        ahead = (head[sites] > own[sites]).mean()
        ahead_early = ahead if not parts else ahead_early
        name = f"block {blocks[0]}" if len(blocks) == 1 else f"blocks {blocks[0]} to {blocks[-1]}"
        parts.append(
            f"{100 * head[sites].mean():.1f} and {100 * own[sites].mean():.1f} % in {name} (the head's class ahead at "
            f"{round(ahead * len(sites))} of {len(sites)} sites)"
        )
    return (
        f"EPD's mean AUROC over all sets, with the class of the final head and with that of the site's own probe: "
        f"{', '.join(parts)}."
        + (" What EPD has in the first of these is in part the head's, read at the end." if ahead_early > 0.5 else "")
    )


def beside_text(table: pd.DataFrame, metric: str = "auroc") -> str:
    """At how many sites EPD is above scores that know no SAE, in words."""
    of = {method: over_seeds(table, metric, method, "all") for method in ("epd", "mds++", "knn")}
    sites = len(of["epd"])
    counts = {name: int((of["epd"] > of[name]).sum()) for name in ("mds++", "knn")}
    peak = {name: of[name].idxmax() for name in of}
    heights = ", ".join(f"{short(name)} {100 * of[name].max():.1f} % at {peak[name]}" for name in of)
    return (
        f"Of {sites} sites, EPD (class by the final head) has the higher mean AUROC over all sets at {counts['mds++']} "
        f"against MDS++ and at {counts['knn']} against KNN on the same features. The largest over the sites: {heights}."
    )


def best_shown(tables: list[pd.DataFrame]) -> pd.DataFrame:
    """:func:`best_sites` of several metrics as text, a row a method and group."""
    words = {"end": "end", "better": "better", "undecided": "not clear", "worse": "worse"}
    rows: dict = {}
    for data in tables:
        for r in data.to_dict("records"):
            row = rows.setdefault((r["method"], r["group"]), {"score": METHOD_TITLES[r["method"]], "OOD": r["group"]})
            name = "end" if r["site"] == FINAL else r["site"]
            row[METRIC[r["metric"]]] = (
                f"{name} {100 * r['value']:.1f} (end {100 * r['end']:.1f}): {words[r['verdict']]}"
                if r["verdict"] != "end"
                else f"end {100 * r['end']:.1f}"
            )
    return pd.DataFrame(rows.values())


def sites_shown(table: pd.DataFrame) -> pd.DataFrame:
    """A row a site, a column a measure: the mean over seeds and, in brackets, the lowest and the highest of them."""
    rows = table[(table["method"] == "site") & table["metric"].isin(MEASURE_TITLES)]
    cells = rows.groupby(["site", "metric"], sort=False)["value"]
    wide = cells.agg(_mean_and_range).unstack()[list(MEASURE_TITLES)].reindex(dict.fromkeys(rows["site"]))
    return wide.rename(columns=MEASURE_TITLES).rename_axis("site").reset_index()


def _mean_and_range(of: pd.Series) -> str:
    return f"{of.mean():.2f}" + (f" ({of.min():.2f}–{of.max():.2f})" if len(of) > 1 else "")
