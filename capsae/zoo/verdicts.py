"""What the zoo's table says, in tests and sentences. Every sentence is made from a table, so that a test can hold it.

The unit is the seed: members are compared by how their results vary when nothing but the random numbers of the fit
change. That says nothing of other images, for which the table has bootstrap intervals.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from ..comparisons import p_text
from ..stats import holm
from .fitting import member
from .summary import CHANCE, INTERPRETABILITY, INTERPRETABLE, OOD, SINGLE, STABILITY, by_member, fits

BASE = "topk"
SCORES = (OOD["epd", "fpr95_ood_pos"], OOD["rpd", "fpr95_ood_pos"])  # the metric of the book's verdicts
LEVEL = 0.05
PERMUTATIONS, DRAWS = 9999, 2000
LOWER = {"FVU": True, INTERPRETABILITY: True}  # FPR95 as well; all else: more is better


def lower_is_better(measure: str) -> bool:
    """Whether less of a measure is better."""
    return "FPR95" in measure or LOWER.get(measure, False)


def welch(a, b, level: float = LEVEL) -> dict[str, float]:
    """Welch's t for mean(a) - mean(b): value, lo, hi, p. A single value is taken as exact: it has no seeds."""
    from scipy.stats import t

    a, b = (np.asarray(one, dtype=np.float64) for one in (a, b))
    parts = [one.var(ddof=1) / len(one) if len(one) > 1 else 0.0 for one in (a, b)]
    value, error = a.mean() - b.mean(), np.sqrt(sum(parts))
    if error == 0:
        return {"value": float(value), "lo": np.nan, "hi": np.nan, "p": np.nan}
    df = sum(parts) ** 2 / sum(v**2 / (len(one) - 1) for v, one in zip(parts, (a, b), strict=True) if v > 0)
    reach = t.isf(level / 2, df) * error
    return {
        "value": float(value),
        "lo": value - reach,
        "hi": value + reach,
        "p": float(2 * t.sf(abs(value) / error, df)),
    }


def against_base(wide: pd.DataFrame, measure: str, base: str = BASE) -> pd.DataFrame:
    """Every member against TopK over seeds, Holm over all of them.

    Columns: member, title, kind, seeds, mean, least, largest, base (mean of TopK), value (difference), lo, hi, p,
    p_holm, verdict ("better", "worse", "undecided"; by p_holm < .05).
    """
    own = wide.loc[wide["member"] == base, measure]
    rows = []
    for name, part in wide[wide["member"] != base].groupby("member", sort=False):
        values = part[measure]
        about = {"member": name, "title": part["title"].iloc[0], "kind": part["kind"].iloc[0], "seeds": len(part)}
        about |= {"mean": values.mean(), "least": values.min(), "largest": values.max(), "base": own.mean()}
        rows.append(about | welch(values, own))
    found = pd.DataFrame(rows)
    known = found["p"].notna()
    found["p_holm"] = np.nan
    found.loc[known, "p_holm"] = holm(found.loc[known, "p"])
    sign = -1 if lower_is_better(measure) else 1
    side = np.where(sign * found["value"] > 0, "better", "worse")
    return found.assign(verdict=np.where(found["p_holm"] < LEVEL, side, "undecided"))


def best(members: pd.DataFrame, measure: str, controls: bool = False) -> pd.Series:
    """The best member by a mean over seeds: among controls, or among all others; with L0 near its target alone."""
    rows = members[(members["kind"] == "control") == controls]
    rows = rows[rows["comparable"]].dropna(subset=measure)
    if rows.empty:
        raise ValueError(f"no {'control' if controls else 'member'} with the same L0 has {measure!r}")
    at = rows[measure].idxmin() if lower_is_better(measure) else rows[measure].idxmax()
    return rows.loc[at]


def number(measure: str, value: float, sign: bool = False) -> str:
    """A value as its measure is written: per cent for FPR95, AUROC, probing and the head, else plain."""
    percent = any(word in measure for word in ("FPR95", "AUROC", "probing", "kept", "dead"))
    plus = "+" if sign else ""
    if not percent:
        return f"{value:{plus}.{1 if measure == INTERPRETABILITY else 3}f}"
    return f"{100 * value:{plus}.1f} {'points' if sign else '%'}"


def best_text(wide: pd.DataFrame, members: pd.DataFrame, measure: str, where: str) -> str:
    """Which member is best by a measure, and whether it is clearly better than TopK over seeds."""
    first, compared = best(members, measure), against_base(wide, measure).set_index("member")
    told = f"On {where}, by {measure}, the best of the autoencoders and dictionaries is {first['title']}"
    if first["member"] == BASE:
        behind = members[(members["kind"] != "control") & members["comparable"] & (members["member"] != BASE)]
        clear = [name for name in behind["member"] if compared.loc[name, "verdict"] == "worse"]
        return (
            f"{told} ({number(measure, first[measure])}); {len(clear)} of the {len(behind)} others are clearly worse."
        )
    row = compared.loc[first["member"]]
    return f"{told} ({_span(measure, row)}), against {number(measure, row['base'])} of TopK: {_clear(measure, row)}."


def control_text(wide: pd.DataFrame, members: pd.DataFrame, measure: str, where: str) -> str:
    """What the best control reaches beside TopK: a dictionary that nobody trained is what an autoencoder must beat."""
    first = best(members, measure, controls=True)
    row = against_base(wide, measure).set_index("member").loc[first["member"]]
    return (
        f"The best control on {where}, by {measure}, is {first['title']} ({_span(measure, row)}), against "
        f"{number(measure, row['base'])} of TopK: {_clear(measure, row)}."
    )


def tally_text(wide: pd.DataFrame, members: pd.DataFrame, measure: str, where: str) -> str:
    """How many of the others are clearly better or worse than TopK."""
    compared = against_base(wide, measure).set_index("member")
    names = members[(members["kind"] != "control") & members["comparable"] & (members["member"] != BASE)]["member"]
    of = {word: [compared.loc[n, "title"] for n in names if compared.loc[n, "verdict"] == word] for word in _WORDS}
    listed = {word: f" ({', '.join(titles)})" if titles else "" for word, titles in of.items()}
    return (
        f"Against TopK on {where}, by {measure}, {len(of['better'])} of the {len(names)} others are clearly better"
        f"{listed['better']}, {len(of['worse'])} clearly worse{listed['worse']}, {len(of['undecided'])} undecided."
    )


_WORDS = ("better", "worse", "undecided")


def _span(measure: str, row: Mapping) -> str:
    text = number(measure, row["mean"])
    if row["seeds"] == 1:
        return f"{text}, without seeds"
    least, largest = (number(measure, row[key]).removesuffix(" %") for key in ("least", "largest"))
    return f"{text}, seeds {least} to {largest}"


def _clear(measure: str, row: Mapping) -> str:
    if np.isnan(row["p"]):
        return "nothing varies over seeds, so no test says whether they differ"
    said = {
        "better": "clearly better than seeds explain",
        "worse": "clearly worse than seeds explain",
        "undecided": "no clear difference over seeds",
    }[row["verdict"]]
    value, lo, hi = (number(measure, row[key], sign=True).removesuffix(" points") for key in ("value", "lo", "hi"))
    unit = " points" if number(measure, 0, sign=True).endswith("points") else ""
    return f"{said} ({value}{unit}, {lo} to {hi} uncorrected, {p_text(row['p_holm'])} by Holm)"


# --- do two rankings agree


def agreement(members: pd.DataFrame, one: str, other: str, seed: int = 0) -> dict[str, float]:
    """Spearman's correlation of goodness by two measures over members: value, lo, hi, p, n.

    Goodness: each measure is turned so that more is better. Controls and members of another L0 are left out. ``p`` is
    two-sided, by permutation; the interval is a bootstrap over members.
    """
    from scipy.stats import rankdata

    rows = members[(members["kind"] != "control") & members["comparable"]].dropna(subset=[one, other])
    a, b = ((-1 if lower_is_better(m) else 1) * rows[m].rank().to_numpy() for m in (one, other))
    n, dice = len(rows), np.random.default_rng(seed)
    if n < 4 or a.std() == 0 or b.std() == 0:
        return {"value": np.nan, "lo": np.nan, "hi": np.nan, "p": np.nan, "n": n}
    value = float(_correlations(a[None], b[None])[0])
    drawn = _correlations(a[None], dice.permuted(np.tile(b, (PERMUTATIONS, 1)), axis=1))
    p = (1 + (np.abs(drawn) >= abs(value) - 1e-12).sum()) / (1 + PERMUTATIONS)
    at = dice.integers(0, n, (DRAWS, n))
    lo, hi = np.nanquantile(_correlations(rankdata(a[at], axis=1), rankdata(b[at], axis=1)), [0.025, 0.975])
    return {"value": value, "lo": float(lo), "hi": float(hi), "p": float(p), "n": n}


def _correlations(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Pearson's correlation (r,) of the rows of a and b (r or 1, n); NaN where one is constant."""
    a, b = (one - one.mean(1, keepdims=True) for one in (a, b))
    size = np.sqrt((a**2).sum(1) * (b**2).sum(1))
    return np.divide((a * b).sum(1), size, out=np.full(size.shape, np.nan), where=size > 0)


def agreement_text(members: pd.DataFrame, one: str, other: str, where: str) -> str:
    """Whether the rankings by two measures agree, in words."""
    found = agreement(members, one, other)
    if np.isnan(found["value"]):
        return f"On {where} there are too few members to compare the rankings by {one} and by {other}."
    said = "neither agree nor oppose clearly"
    if found["p"] < LEVEL:
        said = "agree" if found["value"] > 0 else "oppose each other"
    return (
        f"On {where} the rankings by {one} and by {other} {said}: Spearman {found['value']:+.2f} "
        f"({found['lo']:+.2f} to {found['hi']:+.2f}) over {found['n']} members, {p_text(found['p'])} by permutation."
    )


# --- more than seeds?


def between(wide: pd.DataFrame, members: pd.DataFrame, measure: str) -> dict[str, float]:
    """One-way analysis of variance over members: F, p, and the intraclass correlation with its interval.

    The intraclass correlation is the share of a single fit's variance that lies between members (Shrout and Fleiss
    1979, ICC(1,1)). Members with seeds and with L0 near its target; controls are left out. ValueError where members
    have different numbers of seeds.
    """
    from scipy.stats import f

    names = members[(members["kind"] != "control") & members["comparable"] & (members["seeds"] > 1)]["member"]
    groups = [wide.loc[wide["member"] == name, measure].to_numpy() for name in names]
    sizes = {len(group) for group in groups}
    if len(groups) < 2 or len(sizes) != 1:
        raise ValueError(f"{len(groups)} members with {sorted(sizes)} seeds: the same number for two or more would do")
    values, n = np.array(groups), sizes.pop()
    among = n * values.mean(1).var(ddof=1)
    within = values.var(axis=1, ddof=1).mean()
    if within == 0:
        raise ValueError(f"{measure} does not vary over seeds: there is nothing to compare members with")
    ratio, df = among / within, (len(values) - 1, len(values) * (n - 1))
    lo, hi = ratio / f.isf(0.025, *df), ratio / f.ppf(0.025, *df)
    share = {key: float((r - 1) / (r + n - 1)) for key, r in (("value", ratio), ("lo", lo), ("hi", hi))}
    spread = {"sd_between": float(values.mean(1).std(ddof=1)), "sd_within": float(np.sqrt(within))}
    return {**share, **spread, "F": float(ratio), "df": list(df), "p": float(f.sf(ratio, *df)), "n": len(values)}


def between_text(wide: pd.DataFrame, members: pd.DataFrame, measure: str, where: str) -> str:
    """Whether the differences between members are more than seeds make."""
    found = between(wide, members, measure)
    said = "are more than seeds make" if found["p"] < LEVEL else "are not told from what seeds make"
    return (
        f"On {where}, by {measure}, the differences between {found['n']} members {said}: {100 * found['value']:.0f} % "
        f"({100 * found['lo']:.0f} to {100 * found['hi']:.0f}) of a fit's variance lies between members, "
        f"F({found['df'][0]}, {found['df'][1]}) = {found['F']:.1f}, {p_text(found['p'])}."
    )


# --- all of a page


def sentences(table: pd.DataFrame, grid: pd.DataFrame, where: str, k: int = 32) -> dict[str, list[str]]:
    """All that a page says of one profile's table and grid, by section: "budget", "ood", "fvu", "interpretability",
    "agree", "seeds", "stability"."""
    wide = fits(table)
    members = by_member(wide, table, k)
    told: dict[str, list[str]] = {
        "budget": [l0_text(members, where, k), rates_text(grid, where), dead_text(members, where)]
    }
    told["ood"] = [text(wide, members, m, where) for m in SCORES for text in (best_text, tally_text, control_text)]
    told["fvu"] = [best_text(wide, members, "FVU", where), agreement_text(members, "FVU", SCORES[0], where)]
    told["fvu"].append(agreement_text(members, "FVU", SCORES[1], where))
    singles = [SINGLE[name][1] for name in INTERPRETABLE]
    told["interpretability"] = [best_text(wide, members, m, where) for m in (INTERPRETABILITY, *singles)]
    told["interpretability"].append(control_text(wide, members, INTERPRETABILITY, where))
    told["agree"] = [agreement_text(members, m, INTERPRETABILITY, where) for m in SCORES]
    told["agree"].append(agreement_text(members, *SCORES, where))
    told["seeds"] = [between_text(wide, members, m, where) for m in (*SCORES, INTERPRETABILITY, "FVU")]
    told["stability"] = [stability_text(members, where)]
    return told


# --- budgets and stability


def l0_text(members: pd.DataFrame, where: str, k: int = 32) -> str:
    """Who missed the common L0, and so stands in the table but in no comparison."""
    off = members[~members["comparable"]]
    if off.empty:
        return f"On {where} the mean L0 of every member is within a tenth of {k}."
    listed = ", ".join(f"{row['title']} ({row['L0']:.0f})" for _, row in off.iterrows())
    return (
        f"On {where} {len(off)} of {len(members)} members miss L0 = {k} by more than a tenth: {listed}. They stand "
        "in the tables, and no sentence names them best."
    )


def rates_text(grid: pd.DataFrame, where: str) -> str:
    """How many members took a rate at an end of the grid, where another might have been better still."""
    first = grid[grid["lr"].notna() & (grid["seed"] == grid["seed"].min())]
    chosen, tried = first[first["chosen"]], sorted(first["lr"].unique())
    ends = {"smallest": tried[0], "largest": tried[-1]}
    titles = {
        word: [member(n).title for n in chosen.loc[chosen["lr"] == rate, "member"]] for word, rate in ends.items()
    }
    parts = [f"{len(of)} the {word}, {ends[word]:g} ({', '.join(of)})" for word, of in titles.items() if of]
    told = f"Of the learning rates tried on {where} ({', '.join(f'{rate:g}' for rate in tried)}), "
    if not parts:
        return f"{told}no member took one at an end."
    return f"{told}members took ends, beyond which better ones may lie: {'; '.join(parts)}."


def dead_text(members: pd.DataFrame, where: str, share: float = 0.1) -> str:
    """Whose latents are dead: the rate is chosen by FVU alone, and a large one kills latents."""
    rows = members[members["dead"] > share].sort_values("dead", ascending=False, kind="stable")
    if rows.empty:
        return f"On {where} no member has more than a tenth of its latents dead on training rows."
    listed = ", ".join(f"{row['title']} ({number('dead', row['dead'])})" for _, row in rows.iterrows())
    return (
        f"On {where} {len(rows)} of {len(members)} members have more than a tenth of their latents dead on training "
        f"rows: {listed}. The rule looks at FVU alone."
    )


def stability_text(members: pd.DataFrame, where: str) -> str:
    """How alike the dictionaries of two seeds are, beside two random ones."""
    rows = members[(members["kind"] != "control")].dropna(subset=[STABILITY, CHANCE])
    above = rows.assign(above=rows[STABILITY] - rows[CHANCE]).sort_values("above", ascending=False, kind="stable")
    most, least = above.iloc[0], above.iloc[-1]
    base = rows[rows["member"] == BASE]
    told = ""
    if len(base):
        told = f" TopK has {base[STABILITY].iloc[0]:.2f}, two random dictionaries {base[CHANCE].iloc[0]:.2f}."
    return (
        f"Matched one to one, the atoms of two seeds on {where} are most alike, beyond chance, in {most['title']} "
        f"(mean cosine {most[STABILITY]:.2f}, by chance {most[CHANCE]:.2f}) and least in {least['title']} "
        f"({least[STABILITY]:.2f}, by chance {least[CHANCE]:.2f}).{told}"
    )


def backbones_text(table: pd.DataFrame, where: str) -> str:
    """Whether ITDA chose the same images for two backbones more often than by chance, and than for two seeds."""
    value = table[table["measure"] == "jaccard"].set_index("group")["value"]
    said = "more than chance" if value["backbones"] > value["chance"] else "no more than chance"
    return (
        f"ITDA dictionaries of two backbones on {where} share training images {said}: Jaccard index "
        f"{value['backbones']:.2f}, by chance {value['chance']:.2f}, and {value['seeds']:.2f} for one backbone with "
        "another order of the rows. One pair of backbones: no interval can be given."
    )
