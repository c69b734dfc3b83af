"""What the tables of the layers say: tidy data for figures, the numbers of the findings, tables."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from types import SimpleNamespace

import numpy as np
import pandas as pd

from capsae.metrics import HIGHER_IS_BETTER
from capsae.stats import FPR95

from ...findings import Chapter, Numbers
from .maths import files
from .sites import FINAL

GROUPS = ("near", "far", "all")
SHARE = 0.9  # of the value at the network's end that counts as "there"
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
METRIC = {"auroc": "AUROC", "fpr95_ood_pos": "FPR95 (OOD positive)", "fpr95_id_pos": "FPR95 (ID positive)"}
MEASURES = ("probe_accuracy", "cap_accuracy", "top1_5", "stability", "gap")  # that rise along the depth


def page(run, read: tuple) -> tuple[Chapter, SimpleNamespace, Numbers]:
    """What the notebook needs: captions and findings, all tables, and the numbers; ``read``: :func:`.layers.read`."""
    table, against, made = read
    found = SimpleNamespace(
        table=table, against=against, made=made, best=best_sites(table, against), chosen=chosen_rows(table, against)
    )
    return Chapter("14_layers", source_line(made), run.experiment.name), found, numbers(found)


def numbers(found: SimpleNamespace) -> Numbers:
    """What the chapter's findings rest on."""
    made, table, against = Numbers(), found.table, found.against
    sites = [site for site in dict.fromkeys(table["site"])]
    made.add("sites", len(sites))
    made.add("blocks", max(depth_of(site, 0) for site in sites))
    for kind in [kind for kind in KIND_TITLES if any(kind_of(site) == kind for site in sites)]:
        for metric in MEASURES:
            values = over_seeds(table, metric)
            made.add(f"share_{metric}_{kind}", _along(values, kind).max() / values[FINAL], unit="%")
            first = first_depth(values, kind)
            if first is not None:
                made.add(f"block_{metric}_{kind}", first)
        between = over_seeds(table, "between")
        made.add(f"between_first_{kind}", _along(between, kind).iloc[0])
    made.add("between_end", between[FINAL])
    dead = over_seeds(table, "dead")
    made.add("dead_most", dead.max(), unit="%")
    made.add("dead_end", dead[FINAL], unit="%")
    for group in ("near", "far"):
        rows = spread(table, "epd", group)
        made.add(f"seed_half_{group}", rows["seed_half"].median() / 100, unit="points")
        made.add(f"image_half_{group}", rows["image_half"].median() / 100, unit="points")
        better = over_end(against).query("group == @group")["verdict"] == "better"
        made.add(f"sites_better_{group}", int(better.sum()))
        for method in ("epd", "epd_site", "mds++", "knn"):
            made.add(f"below_chance_{method}_{group}", int((over_seeds(table, "auroc", method, group) < 0.5).sum()))
    for method in ("epd", "mds++", "knn"):
        fall = falls(table, method)
        keys = ("points", "low", "high") if method == "epd" else ("points",)  # the others know no seed
        made.add(f"fall_{method}", *(fall[key] / 100 for key in keys), unit="points")
    of = {name: over_seeds(table, "auroc", name, "all") for name in ("epd", "epd_site", "mds++", "knn")}
    for other in ("mds++", "knn"):
        made.add(f"epd_above_{other}", int((of["epd"] > of[other]).sum()))
    early = [s for s in of["epd"].index if s != FINAL and depth_of(s, 0) <= made["blocks"].value / 3]
    made.add("head_ahead_early", int((of["epd"] > of["epd_site"])[early].sum()))
    made.add("early_sites", len(early))
    made.add("tests", len(against))
    made.add("tests_better", int((against["verdict"] == "better").sum()))
    made.add("picked_is_the_end", int(id_choice(table) == FINAL))
    for row in found.chosen[
        (found.chosen["group"] == "all") & found.chosen["method"].isin(["epd", "rpd"])
    ].itertuples():
        p = 1.0 if row.site == FINAL else row.p_holm
        made.add(f"picked_{row.method}", row.difference, row.lo, row.hi, p, unit="points")
    return made


# --- sites and depth


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


def first_depth(values: pd.Series, kind: str, share: float = SHARE) -> int | None:
    """The first block from which on, at its sites of one kind, a number reaches a share of its value at the end.

    None where no block does. Later blocks may fall below again.
    """
    rows = _along(values, kind)
    there = np.flatnonzero(rows.to_numpy() >= share * values[FINAL])
    return int(rows.index[there[0]]) if len(there) else None


def _along(values: pd.Series, kind: str) -> pd.Series:
    rows = values[[kind_of(site) == kind for site in values.index]]
    return rows.set_axis([depth_of(site, 0) for site in rows.index])


# --- against the network's end


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
    cell = {key: weakest[key] for key in ("lo", "hi", "p_holm", "p_at_most")}
    return row | {"difference": weakest["value"], **cell, "seeds": len(tests), "verdict": verdict}


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


def over_end(against: pd.DataFrame, method: str = "epd", metric: str = "auroc") -> pd.DataFrame:
    """Every site less the end over the seeds. Columns: site, group, value (mean), lo, hi (lowest and highest seed),
    verdict: that of every seed, else "undecided"."""
    rows = against[(against["method"] == method) & (against["metric"] == metric)]
    cells = rows.groupby(["site", "group"], sort=False)
    found = cells["value"].agg(value="mean", lo="min", hi="max")
    found["verdict"] = cells["verdict"].agg(lambda of: of.iloc[0] if of.nunique() == 1 else "undecided")
    return found.reset_index()


# --- seeds


def spread(table: pd.DataFrame, method: str = "epd", group: str = "far", metric: str = "auroc") -> pd.DataFrame:
    """What the SAE's seed does to a score, a row a site, in points.

    Columns: site, mean, low, high (of the seeds), seed_half (1.96 standard deviations of the seeds), image_half (half a
    95 % interval over images for a given SAE, mean over seeds), outside (share of ordered pairs of seeds where one's
    value lies outside the other's interval).
    """
    rows = table[(table["method"] == method) & (table["metric"] == metric) & (table["group"] == group)]
    found = []
    for site, part in rows[rows["set"] == "mean"].groupby("site", sort=False):
        value, lo, hi = (100 * part[key].to_numpy() for key in ("value", "lo", "hi"))
        n = len(value)
        if n < 2:
            raise ValueError(f"{method} at {site} has one seed: its spread needs two or more")
        outside = (value[:, None] < lo) | (value[:, None] > hi)
        found.append((site, value.mean(), value.min(), value.max(), 1.96 * value.std(ddof=1), ((hi - lo) / 2).mean(),
                      outside.sum() / (n * (n - 1))))  # fmt: skip
    names = ["site", "mean", "low", "high", "seed_half", "image_half", "outside"]
    return pd.DataFrame(found, columns=names)


def falls(table: pd.DataFrame, method: str, group: str = "far") -> dict:
    """The largest fall of mean AUROC from a block to a later one, over all kinds of sites.

    ``points`` (of the means over seeds, 0 where a score only rises), ``of`` and ``to`` (sites), ``low`` and ``high``
    (the same fall in the seeds).
    """
    values, worst = over_seeds(table, "auroc", method, group), {"points": 0.0, "of": "", "to": "", "low": 0, "high": 0}
    for kind in KIND_TITLES:
        sites = [site for site in values.index if kind_of(site) == kind]
        for i, first in enumerate(sites):
            for later in sites[i + 1 :]:
                if 100 * (values[first] - values[later]) > worst["points"]:
                    worst |= {"points": 100 * (values[first] - values[later]), "of": first, "to": later}
    if worst["of"]:
        rows = table[(table["method"] == method) & (table["metric"] == "auroc") & (table["group"] == group)]
        wide = rows[rows["set"] == "mean"].pivot(index="seed", columns="site", values="value")
        each = 100 * (wide[worst["of"]] - wide[worst["to"]])
        worst |= {"low": each.min(), "high": each.max()}
    return worst


# --- what the tables of the page show


def best_of_metrics(found: SimpleNamespace) -> pd.DataFrame:
    """:func:`best_shown` of AUROC and both FPR95."""
    return best_shown([found.best, *(best_sites(found.table, found.against, metric) for metric in FPR95)])


def best_shown(tables: list[pd.DataFrame]) -> pd.DataFrame:
    """:func:`best_sites` of several metrics as text, a row a method and group."""
    texts = {"better": "better", "undecided": "not clear", "worse": "worse"}
    rows: dict = {}
    for data in tables:
        for r in data.to_dict("records"):
            row = rows.setdefault((r["method"], r["group"]), {"score": METHOD_TITLES[r["method"]], "OOD": r["group"]})
            name = "end" if r["site"] == FINAL else r["site"]
            row[METRIC[r["metric"]]] = (
                f"{name} {100 * r['value']:.1f} (end {100 * r['end']:.1f}): {texts[r['verdict']]}"
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


# --- what made the tables


def _sha256(experiment: str, key: str) -> str:
    return hashlib.sha256(files(experiment)[key].read_bytes()).hexdigest()


def source_line(made: Mapping) -> str:
    """Where the numbers of this page come from, to stand under each figure: not from the experiment's pack."""
    return (
        f"Experiment {made['experiment']} · backbone {made['backbone']}, weights {made['weights_sha256'][:12]} · data: "
        "all "
        f"sites read from the images, book/layers/{made['experiment']}.csv, "
        f"digest {_sha256(made['experiment'], 'table')[:12]} · code {made['code']['layers'][:12]}"
    )


def made_rows(made: Mapping) -> pd.DataFrame:
    """The provenance of the committed tables. Columns: item, value."""
    rows = [("command", made["command"]), ("backbone", made["backbone"]), ("weights, sha256", made["weights_sha256"])]
    names = {key: path.name for key, path in files(made["experiment"]).items() if key != "provenance"}
    rows += [(f"sha256, {name}", _sha256(made["experiment"], key)) for key, name in names.items()]
    rows += [("SAE, epochs", made["sae"]["epochs"]), ("SAE, seeds", ", ".join(map(str, made["seeds"])))]
    rows += [(f"images, {name}", digest) for name, digest in made["images"].items()]
    rows += [(f"vectors of all sites, {name}", digest) for name, digest in made["vectors"].items()]
    end = max(made["end_against_experiment"].values())
    rows.append(("final/cls against the experiment's features, largest distance as a share of length", end))
    rows += [(f"code, {name}", digest) for name, digest in (made["code"] | made.get("code_recorded_only", {})).items()]
    rows += [(f"version, {name}", version) for name, version in made["versions"].items()]
    return pd.DataFrame([(item, str(value)) for item, value in rows], columns=["item", "value"])
