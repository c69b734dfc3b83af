"""Seeds, depth, chance and the number of tests in the tables of :mod:`capsae.analyses.layers`, and what made them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import pandas as pd

from ..stats import holm
from .layers import files
from .layers_told import KIND_TITLES, METHOD_TITLES, SETS, SHARE, at_block, depth_of, kind_of, over_seeds, short

# --- seeds, chance, families


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


def spread_text(table: pd.DataFrame, group: str = "far") -> str:
    """How far the SAE's seed moves EPD, beside the images, in words."""
    rows = spread(table, "epd", group)
    width = rows["high"] - rows["low"]
    seeds = table.loc[table["method"] == "epd", "seed"].nunique()
    half, images = rows["seed_half"].median(), rows["image_half"].median()
    more = "more than the images do" if half > images else "no more than the images do"
    return (
        f"EPD, {SETS[group]}: {seeds} SAEs that differ by their seed alone lie {width.median():.1f} points of mean "
        f"AUROC apart in the median over {len(rows)} sites, {width.max():.1f} at {rows['site'][width.idxmax()]}. The "
        f"seed moves the score {more} (1.96 standard deviations over seeds: {half:.1f} points, half a 95 % interval "
        f"over images for a given SAE: {images:.1f}, medians over sites), and a seed's value lies outside another's "
        f"interval over images in {100 * rows['outside'].mean():.0f} % of the pairs."
    )


def chance_text(table: pd.DataFrame, group: str = "far", methods=("epd", "epd_site", "mds++", "knn")) -> str:
    """At which sites a score's mean AUROC is below chance, in words."""
    parts = []
    for method in methods:
        rows = table[(table["method"] == method) & (table["metric"] == "auroc") & (table["group"] == group)]
        below = []
        for site, part in rows[rows["set"] == "mean"].groupby("site", sort=False)["value"]:
            if part.mean() < 0.5:
                seeds = f", {int((part < 0.5).sum())} of {len(part)} seeds" if len(part) > 1 else ""
                below.append(f"{site} ({100 * part.mean():.1f} %{seeds})")
        parts.append(f"{METHOD_TITLES[method]}: {', '.join(below) if below else 'no site'}")
    return f"Mean AUROC below chance (50 %), {SETS[group]}: {'; '.join(parts)}."


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


def fall_text(table: pd.DataFrame, group: str = "far") -> str:
    """Whether scores rise along the depth, in words."""
    of = {method: falls(table, method, group) for method in ("epd", "mds++", "knn")}
    epd, parts = of["epd"], []
    for method in ("mds++", "knn"):
        fall = of[method]
        where = f" ({fall['of']} to {fall['to']})" if fall["of"] else ""
        parts.append(f"{short(method)} {fall['points']:.1f}{where}")
    if not epd["of"]:
        beside = ", ".join(parts)
        return f"EPD's mean AUROC, {SETS[group]}, falls at no block. The largest falls of others: {beside} points."
    others = max(of[method]["points"] for method in ("mds++", "knn"))
    end = ", less than half of it" if others < epd["points"] / 2 else ""
    return (
        f"EPD (class by the final head), {SETS[group]}, does not simply rise with the depth: its mean AUROC falls by "
        f"{epd['points']:.1f} points from {epd['of']} to {epd['to']} (seeds: {epd['low']:+.1f} to {epd['high']:+.1f}). "
        f"The largest falls of scores that know no SAE: {', '.join(parts)} points{end}."
    )


def families_text(against: pd.DataFrame) -> str:
    """How many tests stand behind the verdicts, and what one correction over all of them would leave, in words."""
    families = against.groupby(["seed", "method", "group", "metric"]).ngroups
    sites = against["site"].nunique()
    good = against["verdict"] == "better"
    strict = int((good & (holm(against["p"].to_numpy()) < 0.05)).sum())
    cells = against.groupby(["site", "method", "group", "metric"])["verdict"].agg(lambda of: set(of) == {"better"})
    return (
        f"{len(against)} tests in {families} families of {sites} sites (a seed, a score, a group of sets and a metric "
        f"each); Holm's correction runs within a family, not over them. {int(good.sum())} tests say better "
        f"({strict} if Holm ran over all tests at once); of {len(cells)} combinations of site, score, group and "
        f"metric, {int(cells.sum())} are better in every seed. The best of {sites} sites is picked on the very rows "
        "that give its difference and interval, and both flatter it."
    )


def over_end(against: pd.DataFrame, method: str = "epd", metric: str = "auroc") -> pd.DataFrame:
    """Every site less the end over the seeds. Columns: site, group, value (mean), lo, hi (lowest and highest seed),
    verdict: that of every seed, else "undecided"."""
    rows = against[(against["method"] == method) & (against["metric"] == metric)]
    cells = rows.groupby(["site", "group"], sort=False)
    found = cells["value"].agg(value="mean", lo="min", hi="max")
    found["verdict"] = cells["verdict"].agg(lambda of: of.iloc[0] if of.nunique() == 1 else "undecided")
    return found.reset_index()


def answer(table: pd.DataFrame, against: pd.DataFrame) -> list[str]:
    """What the page says, in three sentences."""
    accuracy = over_seeds(table, "cap_accuracy")
    last = max(depth_of(site, 0) for site in accuracy.index)
    rows, parts = over_end(against), []
    for group in ("near", "far"):
        sites = rows[(rows["group"] == group) & (rows["verdict"] == "better")]["site"].tolist()
        parts.append(f"{SETS[group]} {', '.join(sites) if sites else 'none'}")
    first = [kind for kind in KIND_TITLES if any(kind_of(site) == kind for site in accuracy.index)][0]
    return [
        f"Along the {KIND_TITLES[first]}, the nearest profile reaches {100 * SHARE:.0f} % of its accuracy at the end "
        f"{at_block(accuracy, first, last)}.",
        f"Sites where EPD's mean AUROC is above the end's in every seed, after Holm's correction within a seed: "
        f"{'; '.join(parts)} (of {rows['site'].nunique()}).",
        fall_text(table).split(" The largest falls of")[0],
    ]


# --- what made the tables


def made_text(made: Mapping) -> str:
    """What the provenance of the committed tables says, in a sentence."""
    about, sae = made["machine"], made["sae"]
    return (
        f"{len(made['sites'])} sites of {made['backbone']}; SAEs with {sae['latents']} latents, k = {sae['k']}, "
        f"{sae['epochs']} epochs, seeds {', '.join(map(str, made['seeds']))}; made on {about['system']} "
        f"{about['machine']} with PyTorch {made['versions']['torch']}. {_end_text(made['end_against_profile'])}"
    )


def _end_text(end: Mapping[str, float]) -> str:
    far = max(end.values())
    if far == 0:
        return "The vectors read at the end are the profile's own, bit for bit as stored."
    return f"The vectors read at the end lie at most {100 * far:.2g} % of their length from the profile's own."


def _sha256(profile: str, key: str) -> str:
    return hashlib.sha256(files(profile)[key].read_bytes()).hexdigest()


def source_line(made: Mapping) -> str:
    """Where the numbers of this page come from, to stand under each figure: not from the profile's pack."""
    return (
        f"Profile {made['profile']} · backbone {made['backbone']}, weights {made['weights_sha256'][:12]} · data: all "
        f"sites read from the images, book/layers/{made['profile']}.csv, "
        f"digest {_sha256(made['profile'], 'table')[:12]} · code {made['code']['layers'][:12]}"
    )


def made_rows(made: Mapping) -> pd.DataFrame:
    """The provenance of the committed tables. Columns: item, value."""
    rows = [("command", made["command"]), ("backbone", made["backbone"]), ("weights, sha256", made["weights_sha256"])]
    names = {key: path.name for key, path in files(made["profile"]).items() if key != "provenance"}
    rows += [(f"sha256, {name}", _sha256(made["profile"], key)) for key, name in names.items()]
    rows += [("SAE, epochs", made["sae"]["epochs"]), ("SAE, seeds", ", ".join(map(str, made["seeds"])))]
    rows += [(f"images, {name}", digest) for name, digest in made["images"].items()]
    rows += [(f"vectors of all sites, {name}", digest) for name, digest in made["vectors"].items()]
    end = max(made["end_against_profile"].values())
    rows.append(("final/cls against the profile's features, largest distance as a share of length", end))
    rows += [(f"code, {name}", digest) for name, digest in (made["code"] | made["code_recorded_only"]).items()]
    rows += [(f"version, {name}", version) for name, version in made["versions"].items()]
    return pd.DataFrame([(item, str(value)) for item, value in rows], columns=["item", "value"])
