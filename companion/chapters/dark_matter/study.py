"""Dark matter of a run: all tables of the chapter, the numbers of its findings, and what its tables show."""

from __future__ import annotations

import re
from types import SimpleNamespace

import numpy as np
import pandas as pd

from ...figures import tidy
from ...figures.comparisons import HEADLINE, corrected
from ...findings import Chapter, Numbers
from . import maths as dark_matter
from . import scores

CHANCE = 0.95  # FPR95 of a score that cannot tell
KS = (8, 96)  # tried beside the run's own k, where there is more than one OOD set


def page(run) -> tuple[Chapter, SimpleNamespace, Numbers]:
    """What the notebook needs: its captions and findings, all tables, and the numbers."""
    train, val, test = (run.features(name).cls for name in ("train", "val", "test"))
    sets, n_boot = run.experiment.ood_sets, run.experiment.n_boot
    coders = dark_matter.coders(run, ks=KS if len(sets) > 1 else ())
    observed = scores.observe(run, dark_matter.linear_part(run.sae, train, val), ("train", "val", "test", *sets))
    scorers = scores.fitted(run, observed["train"], observed["val"])
    ood = {name: observed[name] for name in sets}
    found = SimpleNamespace(
        r2=dark_matter.predictability(coders, train, val, test, n_boot=n_boot),
        table=scores.part_table(scorers, observed["test"], ood), lengths=scores.lengths(observed, ood),
        compared=scores.compared(scorers, observed["test"], ood),
        structure=dark_matter.structure(scores.arrays(observed), n_boot=n_boot),
        beside=scores.beside_epd(scorers, observed["test"], ood),
    )  # fmt: skip
    return Chapter("09_dark_matter", run), found, numbers(found)


def numbers(found: SimpleNamespace) -> Numbers:
    """What the chapter's findings rest on."""
    made, first = Numbers(), found.r2["coder"].iloc[0]
    own = found.r2["coder"].str.startswith("SAE, k")
    name = found.r2["coder"].map(lambda text: re.sub(r",? ?(first|largest) \d+.*", r" \1", text))
    made.rows(found.r2.assign(coder=name), "{target}_{fit}_{coder}", "%")
    made.rows(found.r2[own & (found.r2["coder"] == first)], "{target}_{fit}", "%")
    seen = found.r2[(found.r2["coder"] == first) & (found.r2["fit"] == "train")].iloc[0]
    made.add("unexplained_train", seen["fvu_train"], unit="%")
    made.add("unexplained_test", seen["fvu_test"], unit="%")
    for part, row in _grown(found.structure).items():
        made.add(f"sets_with_larger_{part}", row)
    made.add("sets", found.structure["set"].str.contains("/").groupby(found.structure["set"]).first().sum())
    made.rows(found.lengths[found.lengths["set"] == "mean"], "farther_{part}", "%")
    headline = found.table[(found.table["metric"] == HEADLINE) & (found.table["group"] == "all")]
    made.rows(headline[headline["set"] == "mean"], "{method}_{part}_{fit}", "%")
    pairs = found.compared[(found.compared["set"] == "mean") & (found.compared["metric"] == HEADLINE)]
    made.rows(pairs, "{method}_{part}_less_{other_part}_{fit}", "points")
    for part in ("reconstruction", "error"):
        made.add(f"kept_by_{part}", kept(found.table, part), unit="%")
    for verdict, name in (("better", "helped"), ("worse", "hurt")):
        made.add(f"sets_{name}", int((found.beside["verdict"] == verdict).sum()))
    return made


def _grown(structure: pd.DataFrame) -> dict[str, int]:
    """On how many OOD sets a part of the error is a larger share of the variance than on ID, intervals apart."""
    found = {}
    for part in ("linear", "rest"):
        rows = structure[structure["what"] == part]
        known = rows.loc[rows["group"] == "id", "hi"].iloc[0]
        found[part] = int((rows.loc[rows["set"].str.contains("/"), "lo"] > known).sum())
    return found


def kept(table: pd.DataFrame, part: str, method: str = "mds") -> float:
    """The least share, over both fits, of the input's lead over chance in FPR95 that a part alone keeps."""
    rows = table[(table["method"] == method) & (table["set"] == "mean") & (table["group"] == "all")]
    lead = CHANCE - rows[rows["metric"] == HEADLINE].pivot(index="fit", columns="part", values="value")
    return float((lead[part] / lead["input"]).loc[list(scores.FITS)].min())


# --- what the tables and figures of the page show


def drawn_fits(found: SimpleNamespace) -> pd.DataFrame:
    """The fits that the figure shows."""
    return found.r2[~found.r2["fit"].isin(["train", "constant"])]


def r2_wide(found: SimpleNamespace) -> pd.DataFrame:
    """R² with intervals, a column a fit."""
    text = [f"{r.value:.3f} ({r.lo:.3f} to {r.hi:.3f})" for r in found.r2.itertuples()]
    fits = dark_matter.FITS | {"one number": "one number", "constant": "training rows' mean"}
    target = found.r2["target"].map(dark_matter.TARGETS)
    wide = found.r2.assign(text=text, fit=found.r2["fit"].map(fits), target=target)
    wide = wide.pivot_table(index=["coder", "target"], columns="fit", values="text", aggfunc="first", sort=False)
    return wide.fillna("").reset_index()


def means(found: SimpleNamespace, methods=scores.ON_PARTS) -> pd.DataFrame:
    """Means over all OOD sets of some detectors, both fits, with titles of detector, fit and part."""
    table = found.table
    rows = table[(table["set"] == "mean") & (table["group"] == "all") & table["method"].isin(list(methods))]
    name = [f"{scores.title(row.method)}, {scores.FITS[row.fit]}" for row in rows.itertuples()]
    return rows.assign(method=name, part=rows["part"].map(scores.COLUMNS))


def through_head(found: SimpleNamespace, metric: str = HEADLINE) -> pd.DataFrame:
    """Scores that need a head or the code, means over all OOD sets as text, a column a part."""
    table, parts = found.table, ("features", "reconstruction", "input")
    rows = table[(table["set"] == "mean") & (table["group"] == "all") & (table["metric"] == metric)]
    rows = rows[rows["fit"] == "train"]
    text = [f"{100 * r.value:.1f} ({100 * r.lo:.1f}–{100 * r.hi:.1f})" for r in rows.itertuples()]
    wide = rows.assign(text=text).pivot(index="method", columns="part", values="text")
    wide = wide.reindex(index=["epd", "rpd", "epd+error", *scores.through_head()], columns=parts).fillna("")
    wide = wide.rename(columns=scores.COLUMNS | {"input": "code and error"})
    return wide.reset_index().rename_axis(columns=None).assign(method=lambda t: t["method"].map(scores.title))


def differences(found: SimpleNamespace) -> pd.DataFrame:
    """Paired differences of the means as text for a page, a row a pair, a column a metric."""
    rows = found.compared[found.compared["set"] == "mean"]
    cells = [f"{tidy.percent(row).replace(' %', '')} {corrected(row)}" for row in tidy.records(rows)]
    part, less = (rows[column].map(scores.COLUMNS) for column in ("part", "other_part"))
    score, fit = rows["method"].map(scores.title), rows["fit"].map(scores.FITS)
    wide = rows.assign(score=score, fit=fit, part=part, less=less, text=np.array(cells)).pivot_table(
        index=["score", "fit", "part", "less"], columns="metric", values="text", aggfunc="first", sort=False
    )
    return wide.rename(columns=tidy.METRIC_PANELS).reset_index().rename_axis(columns=None)


def by_set(found: SimpleNamespace) -> pd.DataFrame:
    """What the error's length adds to EPD on each OOD set, points."""
    cells = {name: (100 * found.beside[name]).round(1) for name in ("value", "lo", "hi")}
    return found.beside.assign(**cells)[["set", *cells, "p_holm", "verdict"]]
