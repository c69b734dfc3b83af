"""Do members of the zoo differ by more than chance? Numbers alone: what follows from them is typed in the notebook.

A member's number is the mean over its seeds. Intervals of OOD results hold seeds and images, those of all else seeds
alone, since the tables have no interval over images for it.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from capsae.stats import seeds_and_images, verdicts

from ..findings import Numbers
from .fitting import EPOCHS
from .summary import INTERPRETABILITY, NORMAL, OOD, SINGLE, STABILITY, by_member, fits

BASE, RANDOM = "topk", "random"
SCORES = (OOD["epd", "fpr95_ood_pos"], OOD["rpd", "fpr95_ood_pos"])  # the metric of the book's verdicts
WORDS = ("better", "worse", "undecided")
SEPARABILITY = SINGLE["separability"][1]
PERMUTATIONS, DRAWS = 9999, 2000
MANY_DEAD = 0.1


def lower_is_better(measure: str) -> bool:
    """Whether less of a measure is better."""
    return "FPR95" in measure or measure in ("FVU", INTERPRETABILITY)


def image_errors(table: pd.DataFrame) -> pd.DataFrame:
    """Standard error over images of each member's mean over seeds: a row a member, a column an OOD result.

    The mean of the seeds' own errors, which is at least the error of their mean: all seeds see the same images.
    """
    rows = table[(table["set"] == "mean") & (table["group"] == "all") & (table["seed"] >= 0)]
    column = [OOD.get(key) for key in zip(rows["method"], rows["measure"], strict=True)]
    rows = rows.assign(column=column, error=(rows["hi"] - rows["lo"]) / NORMAL).dropna(subset="column")
    return rows.pivot_table(index="member", columns="column", values="error", aggfunc="mean", sort=False)


def against(wide: pd.DataFrame, measure: str, base: str = BASE, errors: pd.DataFrame | None = None) -> pd.DataFrame:
    """Every member less `base`, corrected by Holm over all of them.

    Parameters
    ----------
    wide : a row a fit, of `summary.fits`
    errors : of :func:`image_errors`
        Errors of the two members are added as if their images were different ones: the tables keep no draws that pair
        them. Intervals are therefore too wide rather than too narrow.

    Returns
    -------
    DataFrame
        member, title, kind, seeds, mean, base (its mean), value (difference), lo, hi, p, p_holm, verdict ("better",
        "worse", "undecided"). Without any variation p is NaN and the verdict "undecided".
    """
    own, rows = wide.loc[wide["member"] == base, measure].to_numpy(), []
    known = errors is not None and measure in errors
    for name, part in wide[wide["member"] != base].groupby("member", sort=False):
        image = float(np.hypot(*errors.loc[[name, base], measure])) if known else 0.0
        found = seeds_and_images(part[measure].to_numpy(), image, own)
        about = {key: part[key].iloc[0] for key in ("member", "title", "kind")}
        cells = {key: found[key] for key in ("value", "lo", "hi", "p")} | ({} if found["error"] else {"p": np.nan})
        rows.append(about | {"seeds": len(part), "mean": part[measure].mean(), "base": own.mean()} | cells)
    table = pd.DataFrame(rows)
    gain = -table["value"] if lower_is_better(measure) else table["value"]
    return table.join(verdicts(gain, table["p"]))


def both(wide: pd.DataFrame, errors: pd.DataFrame, base: str = RANDOM) -> pd.DataFrame:
    """:func:`against` for both scores, corrected apart: its columns and score ("EPD", "RPD")."""
    return pd.concat([against(wide, measure, base, errors).assign(score=measure[:3]) for measure in SCORES])


def shown(compared: pd.DataFrame, order: list[str]) -> pd.DataFrame:
    """:func:`both` as a table: member, and for each score the difference in points, p by Holm and the verdict."""
    parts = {}
    for score, part in compared.set_index("member").groupby("score", sort=False):
        part = part.loc[[name for name in order if name in part.index]]
        cells = [f"{100 * r.value:+.1f} ({100 * r.lo:+.1f} to {100 * r.hi:+.1f})" for r in part.itertuples()]
        parts |= {"member": part["title"], f"{score}, points": cells}
        parts |= {f"{score}, p (Holm)": part["p_holm"], f"{score}, verdict": part["verdict"]}
    return pd.DataFrame(parts)


def counts(compared: pd.DataFrame, members: pd.DataFrame) -> dict[str, int]:
    """How many autoencoders and dictionaries of the same L0 are better, worse, undecided in a table of `against`."""
    own = members.loc[(members["kind"] != "control") & members["comparable"], "member"]
    found = compared.loc[compared["member"].isin(own), "verdict"].value_counts()
    return {word: int(found.get(word, 0)) for word in WORDS}


def best(members: pd.DataFrame, measure: str, controls: bool = False) -> pd.Series:
    """The best member by a mean over seeds: among controls, or among all others; with L0 near its target alone."""
    rows = members[(members["kind"] == "control") == controls]
    rows = rows[rows["comparable"]].dropna(subset=measure)
    if rows.empty:
        raise ValueError(f"no {'control' if controls else 'member'} with the same L0 has {measure!r}")
    return rows.loc[rows[measure].idxmin() if lower_is_better(measure) else rows[measure].idxmax()]


def agreement(members: pd.DataFrame, one: str, other: str, seed: int = 0) -> dict[str, float]:
    """Spearman's correlation of goodness by two measures over members: value, lo, hi, p, n.

    Goodness: each measure is turned so that more is better. Controls and members of another L0 are left out. ``p`` is
    two-sided, by permutation; the interval is a bootstrap over members. NaN with fewer than four members.
    """
    from scipy.stats import rankdata

    rows = members[(members["kind"] != "control") & members["comparable"]].dropna(subset=[one, other])
    a, b = ((-1 if lower_is_better(m) else 1) * rows[m].rank().to_numpy() for m in (one, other))
    n, rng = len(rows), np.random.default_rng(seed)
    if n < 4 or a.std() == 0 or b.std() == 0:
        return {"value": np.nan, "lo": np.nan, "hi": np.nan, "p": np.nan, "n": n}
    value = float(_correlations(a[None], b[None])[0])
    drawn = _correlations(a[None], rng.permuted(np.tile(b, (PERMUTATIONS, 1)), axis=1))
    p = (1 + (np.abs(drawn) >= abs(value) - 1e-12).sum()) / (1 + PERMUTATIONS)
    at = rng.integers(0, n, (DRAWS, n))
    lo, hi = np.nanquantile(_correlations(rankdata(a[at], axis=1), rankdata(b[at], axis=1)), [0.025, 0.975])
    return {"value": value, "lo": float(lo), "hi": float(hi), "p": float(p), "n": n}


def _correlations(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Pearson's correlation (r,) of the rows of a and b (r or 1, n); NaN where one is constant."""
    a, b = (one - one.mean(1, keepdims=True) for one in (a, b))
    size = np.sqrt((a**2).sum(1) * (b**2).sum(1))
    return np.divide((a * b).sum(1), size, out=np.full(size.shape, np.nan), where=size > 0)


def between(wide: pd.DataFrame, members: pd.DataFrame, measure: str) -> dict[str, float]:
    """One-way analysis of variance over members: F, p, and the intraclass correlation with its interval.

    The intraclass correlation is the share of a single fit's variance that lies between members (Shrout and Fleiss
    1979, ICC(1,1)). Members with seeds and with L0 near its target; controls are left out. ValueError where members
    have different numbers of seeds.
    """
    from scipy.stats import f, f_oneway

    names = members[(members["kind"] != "control") & members["comparable"] & (members["seeds"] > 1)]["member"]
    groups = [wide.loc[wide["member"] == name, measure].to_numpy() for name in names]
    sizes = {len(group) for group in groups}
    if len(groups) < 2 or len(sizes) != 1:
        raise ValueError(f"{len(groups)} members with {sorted(sizes)} seeds: the same number for two or more would do")
    if not np.ptp(groups, axis=1).any():
        raise ValueError(f"{measure} does not vary over seeds: there is nothing to compare members with")
    n, (ratio, p) = sizes.pop(), f_oneway(*groups)
    df = (len(groups) - 1, len(groups) * (n - 1))
    ends = {"value": ratio, "lo": ratio / f.isf(0.025, *df), "hi": ratio / f.ppf(0.025, *df)}
    return {key: float((r - 1) / (r + n - 1)) for key, r in ends.items()} | {"F": float(ratio), "p": float(p)}


def numbers(
    tables: Mapping[str, pd.DataFrame],
    grids: Mapping[str, pd.DataFrame],
    known: Mapping[str, pd.DataFrame],
    backbones: pd.DataFrame,
    own: Mapping[str, float],
    k: int = 32,
) -> Numbers:
    """What the page records for its findings; keys begin with the name of the experiment.

    Parameters
    ----------
    tables, grids : committed tables by experiment, of `tables.load` and `tables.load_grid`
    known : members with the stability of dictionaries that know the data alone, of `summary.with_nulls`
    backbones : of `tables.backbones`
    own : the book's own SAE, of `summary.own_sae`
    """
    found = Numbers()
    for where, table in tables.items():
        wide = fits(table)
        members = by_member(wide, table, k)
        _of_scores(found, where, wide, members, image_errors(table))
        _of_fits(found, where, members, grids[where])
        alike = known[where][known[where]["kind"] != "control"].dropna(subset=["rows", "covariance"])
        found.add(f"{where}_stability_members", len(alike))
        found.add(f"{where}_more_stable_than_rows", int((alike[STABILITY] > alike["rows"]).sum()))
        found.add(f"{where}_less_stable_than_covariance", int((alike[STABILITY] < alike["covariance"]).sum()))
    for group, value in backbones[backbones["measure"] == "jaccard"].set_index("group")["value"].items():
        found.add(f"itda_{group}", value, digits=2)
    for key in ("dead", "epd"):
        found.add(f"own_{key}", own[key], unit="%", digits=1)
    return found


def _of_scores(found: Numbers, where: str, wide: pd.DataFrame, members: pd.DataFrame, errors: pd.DataFrame) -> None:
    for method, measure in zip(("epd", "rpd"), SCORES, strict=True):
        bases = {"random": RANDOM, "control": best(members, measure, controls=True)["member"], "topk": BASE}
        for name, base in bases.items():
            compared = against(wide, measure, base, errors)
            for word, n in counts(compared, members).items():
                found.add(f"{where}_{method}_{word}_than_{name}", n)
        first = compared[compared["member"] == best(members, measure)["member"]].assign(key=f"{where}_{method}")
        found.rows(first, "{key}_best_less_topk", "points")  # none where TopK itself is the best
        found.add(f"{where}_{method}_between", *_cells(between(wide, members, measure)), unit="%")
        for other, name in (("FVU", "fvu"), (INTERPRETABILITY, "interpretability")):
            found.add(f"{where}_{name}_{method}", *_cells(agreement(members, other, measure), "p"), digits=2)
    found.add(f"{where}_epd_rpd", *_cells(agreement(members, *SCORES), "p"), digits=2)
    for word, n in counts(against(wide, INTERPRETABILITY, RANDOM), members).items():
        found.add(f"{where}_interpretability_{word}_than_random", n)


def _of_fits(found: Numbers, where: str, members: pd.DataFrame, grid: pd.DataFrame) -> None:
    same, base = members[members["comparable"]], members.set_index("member").loc[BASE]
    density = (same["L0"] / same["latents"]).corr(same[SEPARABILITY], method="spearman")
    chosen = grid[grid["chosen"] & grid["lr"].notna()]
    first = chosen[chosen["seed"] == chosen["seed"].min()]
    last = chosen["best_epoch"] == EPOCHS.get(where, chosen["best_epoch"].max())
    found.add(f"{where}_members", int((members["kind"] != "control").sum()))
    found.add(f"{where}_other_l0", int((~members["comparable"]).sum()))
    found.add(f"{where}_many_dead", int((members["dead"] > MANY_DEAD).sum()))
    found.add(f"{where}_density_separability", float(density), digits=2)
    found.add(f"{where}_topk_dead", base["dead"], unit="%", digits=1)
    found.add(f"{where}_topk_epd", base[SCORES[0]], unit="%", digits=1)
    found.add(f"{where}_rates_at_ends", int(first["lr"].isin([grid["lr"].min(), grid["lr"].max()]).sum()))
    found.add(f"{where}_last_epoch_best", float(last.mean()), unit="%", digits=0)


def _cells(found: Mapping[str, float], *more: str) -> list[float]:
    return [found[key] for key in ("value", "lo", "hi", *more)]
