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
from .fitting import EPOCHS, member
from .summary import INTERPRETABILITY, INTERPRETABLE, OOD, SINGLE, SPLIT, STABILITY, by_member, fits

BASE, RANDOM = "topk", "random"
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
    """Every member against TopK, or another `base`, over seeds, Holm over all of them.

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


def counts(wide: pd.DataFrame, members: pd.DataFrame, measure: str, base: str) -> dict[str, list[str]]:
    """Titles of the autoencoders and dictionaries of the same L0 that are better, worse, undecided against `base`."""
    compared = against_base(wide, measure, base).set_index("member")
    names = members.loc[(members["kind"] != "control") & members["comparable"], "member"]
    return {word: [compared.loc[n, "title"] for n in names if compared.loc[n, "verdict"] == word] for word in _WORDS}


def beaten_text(wide: pd.DataFrame, members: pd.DataFrame, measure: str, where: str) -> str:
    """How many beat a random dictionary, and how many the best control."""
    told = counts(wide, members, measure, RANDOM)
    first = best(members, measure, controls=True)
    text = (
        f"On {where}, by {measure}, {len(told['better'])} of the {sum(map(len, told.values()))} autoencoders and "
        f"dictionaries with the same number of active latents {_do(told['better'])} clearly better than a random "
        f"dictionary{_listed(told['better'])}, {len(told['worse'])} clearly worse, {len(told['undecided'])} undecided"
    )
    if first["member"] == RANDOM:
        return f"{text}; the random dictionary is the best control."
    told = counts(wide, members, measure, first["member"])
    return (
        f"{text}; than the best control, {first['title']}, {len(told['better'])} {_do(told['better'])} clearly better"
        f"{_listed(told['better'])}, {len(told['worse'])} clearly worse, {len(told['undecided'])} undecided."
    )


def _do(titles: list[str]) -> str:
    return "is" if len(titles) == 1 else "are"


def _listed(titles: list[str]) -> str:
    return f" ({', '.join(titles)})" if titles else ""


def answer(tables: Mapping[str, pd.DataFrame], k: int = 32) -> list[str]:
    """What the chapter opens with, of the tables by profile: does training a dictionary pay for OOD detection?"""
    lines, better, worse, of = [], 0, 0, 0
    for where, table in tables.items():
        wide = fits(table)
        members = by_member(wide, table, k)
        parts = []
        for measure in SCORES:
            told = counts(wide, members, measure, RANDOM)
            better, worse = better + len(told["better"]), worse + len(told["worse"])
            of += sum(map(len, told.values()))
            first = best(members, measure, controls=True)
            part = f"by {measure} {_three(told)} against the random dictionary"
            if first["member"] != RANDOM:
                part += f" and {_three(counts(wide, members, measure, first['member']))} against {first['title']}, "
                part += "the best control"
            parts.append(part)
        lines.append(f"On {where}, better / worse / undecided: {'; '.join(parts)}.")
    said = "seldom pays" if better < worse else "pays more often than it harms"
    first = (
        f"For OOD detection, training a dictionary {said} here: of {of} comparisons of an autoencoder or dictionary "
        f"with a random dictionary (two scores, {len(tables)} profiles), {better} are clearly better and {worse} "
        "clearly worse."
    )
    return [first, *lines]


def _three(told: Mapping[str, list[str]]) -> str:
    return " / ".join(f"{len(told[word])}" + (_listed(told[word]) if word == "better" else "") for word in _WORDS)


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


def agreements(members: pd.DataFrame, pairs: list[tuple[str, str]], where: str) -> list[str]:
    """`agreement_text` of several pairs of measures, their p corrected by Holm."""
    raw = np.array([agreement(members, *pair)["p"] for pair in pairs])
    known, corrected = ~np.isnan(raw), raw.copy()
    corrected[known] = holm(raw[known])
    return [agreement_text(members, *pair, where, p) for pair, p in zip(pairs, corrected, strict=True)]


def agreement_text(members: pd.DataFrame, one: str, other: str, where: str, p_holm: float | None = None) -> str:
    """Whether the rankings by two measures agree, in words; by the p of Holm where it is given."""
    found = agreement(members, one, other)
    p, by = (found["p"], "by permutation") if p_holm is None else (p_holm, "by permutation and Holm")
    if np.isnan(found["value"]):
        return f"On {where} there are too few members to compare the rankings by {one} and by {other}."
    said = "neither agree nor oppose clearly"
    if p < LEVEL:
        said = "agree" if found["value"] > 0 else "oppose each other"
    return (
        f"On {where} the rankings by {one} and by {other} {said}: Spearman {found['value']:+.2f} "
        f"({found['lo']:+.2f} to {found['hi']:+.2f}) over {found['n']} members, {p_text(p)} {by}."
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
        f"{_without(wide, members, measure)}"
    )


def _without(wide: pd.DataFrame, members: pd.DataFrame, measure: str, n: int = 3) -> str:
    """How much of that is left without the few members farthest from the median."""
    own = members[(members["kind"] != "control") & members["comparable"] & (members["seeds"] > 1)]
    if len(own) < 2 * n:
        return ""
    far = (own[measure] - own[measure].median()).abs().sort_values(kind="stable").index[-n:]
    rest = between(wide, members.drop(index=far), measure)
    listed = ", ".join(own.loc[far, "title"])
    return f" Without the {n} farthest from the median ({listed}) it is {100 * rest['value']:.0f} %."


# --- all of a page


def sentences(table: pd.DataFrame, grid: pd.DataFrame, where: str, k: int = 32) -> dict[str, list[str]]:
    """All that a page says of one profile's table and grid, by section: "budget", "ood", "fvu", "interpretability",
    "agree", "seeds"."""
    wide = fits(table)
    members = by_member(wide, table, k)
    told: dict[str, list[str]] = {
        "budget": [l0_text(members, where, k), rates_text(grid, where), epochs_text(grid, where)]
    }
    told["budget"].append(dead_text(members, where))
    texts = (beaten_text, best_text, tally_text, control_text)
    told["ood"] = [text(wide, members, m, where) for m in SCORES for text in texts]
    pairs = [("FVU", m) for m in SCORES] + [(m, INTERPRETABILITY) for m in SCORES] + [SCORES]
    agreed = agreements(members, pairs, where)
    told["fvu"] = [best_text(wide, members, "FVU", where), *agreed[:2]]
    singles = [SINGLE[name][1] for name in INTERPRETABLE]
    told["interpretability"] = [best_text(wide, members, m, where) for m in (INTERPRETABILITY, *singles)]
    told["interpretability"] += [control_text(wide, members, m, where) for m in (INTERPRETABILITY, *singles)]
    told["interpretability"].append(density_text(members, where))
    told["agree"] = agreed[2:]
    told["seeds"] = [between_text(wide, members, m, where) for m in (*SCORES, INTERPRETABILITY, "FVU")]
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
        f"rows: {listed}. The rule looks at FVU alone.{_halves(rows)}"
    )


def _halves(rows: pd.DataFrame) -> str:
    split = rows.loc[rows["member"].isin(SPLIT), "title"]
    if split.empty:
        return ""
    return f" Of {', '.join(split)} it is half-latents that are counted: a direction has one for each sign."


def epochs_text(grid: pd.DataFrame, where: str) -> str:
    """Whether the chosen trainings had come to an end: the epoch with the lowest held-out FVU is kept."""
    rows = grid[grid["chosen"] & grid["lr"].notna()].dropna(subset="best_epoch")
    epochs = EPOCHS.get(where, int(rows["best_epoch"].max()))
    last = int((rows["best_epoch"] == epochs).sum())
    said = "rankings are of early training, not of trainings that have converged" if 2 * last > len(rows) else (
        "most had their best before the end"
    )  # fmt: skip
    return f"On {where} the last of {epochs} epochs was the best in {last} of {len(rows)} chosen trainings: {said}."


def recipe_text(members: pd.DataFrame, own: Mapping[str, float], where: str) -> str:
    """How the zoo's TopK differs from the book's own SAE, which is a TopK, too."""
    base = members.set_index("member").loc[BASE]
    return (
        f"The TopK of this page is not the book's own SAE on {where}: that one trains {own['epochs']} epochs with a "
        f"rate of {own['lr']:g}, chosen with under 1 % of the latents dead ({number('dead', own['dead'])} here), "
        f"and has an EPD of {number(SCORES[0], own['epd'])} ({SCORES[0]}; one seed); the zoo's has a rate of "
        f"{base['lr']:g}, chosen by FVU alone, {number('dead', base['dead'])} dead and "
        f"{number(SCORES[0], base[SCORES[0]])}."
    )


def density_text(members: pd.DataFrame, where: str) -> str:
    """Whether concept separability goes with how often a latent fires: L0 over the number of latents."""
    name = SINGLE["separability"][1]
    rows = members[members["comparable"]].assign(density=lambda m: m["L0"] / m["latents"])
    first, base = rows.loc[rows[name].idxmax()], rows.set_index("member").loc[BASE]
    value = rows["density"].corr(rows[name], method="spearman")
    said = "goes with" if value > 0.5 else "does not clearly go with"
    return (
        f"On {where} {name} {said} how often latents fire (Spearman {value:+.2f} over {len(rows)} members and "
        f"controls): the largest is that of {first['title']} ({first[name]:.3f}), where a latent fires on "
        f"{100 * first['density']:.1f} % of the rows, against {100 * base['density']:.1f} % of TopK ({base[name]:.3f})."
    )


def core_text(members: pd.DataFrame, fraction: float, where: str) -> str:
    """How many latents EPD's core has in each member: one share of very different numbers."""
    sizes = (fraction * members["latents"]).round().astype(int)
    parts = [f"{n} ({', '.join(members.loc[sizes == n, 'title'])})" for n in sorted(set(sizes)) if n != sizes.mode()[0]]
    told = f"EPD is compared at one core fraction, {fraction:g} of the latents: on {where} {sizes.mode()[0]} of them"
    listed = "; ".join(parts)
    return f"{told}{f', but for {listed}' if parts else ' in every member'}."


def stability_text(known: pd.DataFrame, where: str) -> str:
    """How alike the dictionaries of two seeds are, beside two that know the data alone: `summary.with_nulls`."""
    rows = known[known["kind"] != "control"].dropna(subset=["rows", "covariance"])
    above = rows.assign(above=rows[STABILITY] - rows["rows"]).sort_values("above", ascending=False, kind="stable")
    over = above.loc[above["above"] > 0]
    below = above.loc[above[STABILITY] < above["covariance"]]
    listed = ", ".join(f"{r['title']} {r[STABILITY]:.2f}, rows {r['rows']:.2f}" for _, r in over.iterrows())
    told = (
        f"Matched one to one, the atoms of two seeds on {where} are more alike than two random choices of "
        f"training rows in {len(over)} of {len(rows)} members{f' ({listed})' if listed else ''}; in {len(below)} they "
        "are less alike than random directions with the rows' covariance."
    )
    base = above[above["member"] == BASE]
    if len(base):
        row = base.iloc[0]
        told += f" TopK has {row[STABILITY]:.2f}, rows {row['rows']:.2f}, such directions {row['covariance']:.2f}."
    return told


def backbones_text(table: pd.DataFrame, where: str) -> str:
    """Whether ITDA chose the same images for two backbones more often than by chance, and than for two seeds."""
    value = table[table["measure"] == "jaccard"].set_index("group")["value"]
    said = "more than chance" if value["backbones"] > value["chance"] else "no more than chance"
    return (
        f"ITDA dictionaries of two backbones on {where} share training images {said}: Jaccard index "
        f"{value['backbones']:.2f}, by chance {value['chance']:.2f}, and {value['seeds']:.2f} for one backbone with "
        "another order of the rows. One pair of backbones: no interval can be given."
    )
