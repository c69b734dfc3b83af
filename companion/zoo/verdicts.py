"""Do members of the zoo differ by more than chance? Numbers alone: what follows from them is typed in the notebook.

A member's number is the mean over its seeds. Intervals of OOD results hold seeds and images, those of all else seeds
alone, since the tables have no interval over images for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace

import numpy as np
import pandas as pd

from capsae.stats import seeds_and_images, verdicts

from ..findings import Numbers
from .fitting import EPOCHS
from .summary import BETTER, INTERPRETABILITY, OOD, SINGLE, STABILITY

BASE, RANDOM = "topk", "random"
SCORES = (OOD["epd", "fpr95_ood_pos"], OOD["rpd", "fpr95_ood_pos"])  # the metric of the book's verdicts
SEPARABILITY = SINGLE["separability"][1]
PERMUTATIONS, DRAWS = 9999, 2000


def lower_is_better(measure: str) -> bool:
    """Whether less of a measure is better."""
    return not BETTER.get(measure, measure != INTERPRETABILITY)


def against(wide: pd.DataFrame, measure: str, base: str = BASE, errors: pd.DataFrame | None = None) -> pd.DataFrame:
    """Every member less `base`, corrected by Holm over all of them.

    ``wide``: a row a fit, of `summary.fits`. ``errors``, of `summary.image_errors`: those of the two members are added
    as if their images were different ones, since the tables keep no draws that pair them; intervals are therefore too
    wide rather than too narrow.

    Columns: member, title, kind, seeds, mean, base (its mean), value (difference), lo, hi, p, p_holm, verdict
    ("better", "worse", "undecided"). Without any variation p is NaN and the verdict "undecided".
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
    found = compared.loc[compared["member"].isin(_alike(members)["member"]), "verdict"].value_counts()
    return {verdict: int(found.get(verdict, 0)) for verdict in ("better", "worse", "undecided")}


def _alike(members: pd.DataFrame) -> pd.DataFrame:
    """Members that are no control and have the same L0."""
    return members[(members["kind"] != "control") & members["comparable"]]


def agreement(members: pd.DataFrame, one: str, other: str, seed: int = 0) -> dict[str, float]:
    """Spearman's correlation of goodness by two measures over members: value, lo, hi, p, n.

    Goodness: each measure is turned so that more is better. Controls and members of another L0 are left out. ``p`` is
    two-sided, by permutation; the interval is a bootstrap over members. NaN with fewer than four members.
    """
    from scipy.stats import rankdata

    rows = _alike(members).dropna(subset=[one, other])
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

    names = _alike(members).loc[members["seeds"] > 1, "member"]
    groups = [wide.loc[wide["member"] == name, measure].to_numpy() for name in names]
    sizes = {len(group) for group in groups}
    if len(groups) < 2 or len(sizes) != 1:
        raise ValueError(f"{len(groups)} members with {sorted(sizes)} seeds: the same number for two or more would do")
    n, (ratio, p) = sizes.pop(), f_oneway(*groups)
    df = (len(groups) - 1, len(groups) * (n - 1))
    ends = {"value": ratio, "lo": ratio / f.isf(0.025, *df), "hi": ratio / f.ppf(0.025, *df)}
    return {key: float((r - 1) / (r + n - 1)) for key, r in ends.items()} | {"F": float(ratio), "p": float(p)}


def numbers(experiments: Mapping[str, SimpleNamespace], backbones: pd.DataFrame, own: Mapping[str, float]) -> Numbers:
    """What the page records for its findings; keys begin with the name of the experiment.

    ``experiments`` of `study.of`, ``backbones`` of `tables.backbones`, ``own`` of `summary.own_sae`.
    """
    found = Numbers()
    for where, one in experiments.items():
        _of_scores(found, where, one.fits, one.members, one.errors)
        _of_fits(found, where, one.members, one.grid)
        alike = one.known[one.known["kind"] != "control"].dropna(subset=["rows", "covariance"])
        found.add(f"{where}_stability_members", len(alike))
        found.add(f"{where}_more_stable_than_rows", int((alike[STABILITY] > alike["rows"]).sum()))
    for group, value in backbones[backbones["measure"] == "jaccard"].set_index("group")["value"].items():
        found.add(f"itda_{group}", value, digits=2)
    for key in ("dead", "epd"):
        found.add(f"own_{key}", own[key], unit="%", digits=1)
    return found


def _of_scores(found: Numbers, where: str, wide: pd.DataFrame, members: pd.DataFrame, errors: pd.DataFrame) -> None:
    def add(key: str, of: Mapping[str, float], *more: str, **form) -> None:
        found.add(f"{where}_{key}", *(of[part] for part in ("value", "lo", "hi", *more)), **form)

    def add_counts(key: str, measure: str, base: str, errors: pd.DataFrame | None = None) -> None:
        for verdict, n in counts(against(wide, measure, base, errors), members).items():
            found.add(f"{where}_{key}_{verdict}_than_{base}", n)

    for method, measure in zip(("epd", "rpd"), SCORES, strict=True):
        for base in (RANDOM, BASE):
            add_counts(method, measure, base, errors)
        add(f"{method}_between", between(wide, members, measure), unit="%")
        for other, name in (("FVU", "fvu"), (INTERPRETABILITY, "interpretability")):
            add(f"{name}_{method}", agreement(members, other, measure), "p", digits=2)
    add("epd_rpd", agreement(members, *SCORES), "p", digits=2)
    add_counts("interpretability", INTERPRETABILITY, RANDOM)


def _of_fits(found: Numbers, where: str, members: pd.DataFrame, grid: pd.DataFrame) -> None:
    same, base = members[members["comparable"]], members.set_index("member").loc[BASE]
    density = (same["L0"] / same["latents"]).corr(same[SEPARABILITY], method="spearman")
    chosen = grid[grid["chosen"] & grid["lr"].notna()]
    last = chosen["best_epoch"] == EPOCHS.get(where, chosen["best_epoch"].max())
    found.add(f"{where}_density_separability", float(density), digits=2)
    found.add(f"{where}_topk_dead", base["dead"], unit="%", digits=1)
    found.add(f"{where}_topk_epd", base[SCORES[0]], unit="%", digits=1)
    found.add(f"{where}_last_epoch_best", float(last.mean()), unit="%", digits=0)
