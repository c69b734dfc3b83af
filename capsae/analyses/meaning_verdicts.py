"""The sentences of the chapter on what latents mean, each made from a table that a test can hold it against."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from ..stats import exact_interval
from .meaning import BROAD, FDR, HOLD
from .neighbours import K

FOLLOW, HARDLY = 0.6, 0.2  # adjusted Rand index from which groups follow the classes, and under which hardly
_MEASURES = {
    "precision": f"precision at {K}",
    "map": "mean average precision",
    "nmi": "normalised mutual information",
    "ari": "adjusted Rand index",
    "purity": "purity",
}


def _percent(cell: Mapping, sign: str = "") -> str:
    return f"{100 * cell['value']:{sign}.1f} % ({100 * cell['lo']:{sign}.1f} to {100 * cell['hi']:{sign}.1f})"


def _gap(cell: Mapping) -> str:
    value, lo, hi = (100 * cell[key] for key in ("difference", "difference_lo", "difference_hi"))
    return f"{value:+.1f} points, {lo:+.1f} to {hi:+.1f}"


def _rate(fdr: float) -> str:
    return f"(false discovery rate {100 * fdr:.0f} %)"


def _sided(cell: Mapping) -> str:
    """ "more", "less" or "open": on which side of 0 the interval of a difference lies."""
    return "more" if cell["difference_lo"] > 0 else "less" if cell["difference_hi"] < 0 else "open"


def naming(shares: pd.DataFrame, where: str, hold: float = HOLD) -> str:
    """How many latents have a name. ``shares`` of :func:`meaning.compare_shares` at ``hold``: its first dictionary."""
    own = shares[shares["dictionary"] == shares["dictionary"].iloc[0]].set_index("kind")
    most = "Most latents have" if own.loc["named", "value"] > 0.5 else "Most latents do not have"
    text = (
        f"{most} a name on {where}: the classes that hold {100 * hold:.0f} % of a latent's summed activation give "
        f"{_percent(own.loc['class'])} of the latents the name of one class"
    )
    if own.loc["synset", "value"] > 0:
        text += (
            f" and {_percent(own.loc['synset'])} that of a synset; {_percent(own.loc['narrow'])} have a name of "
            f"classes with at most {100 * BROAD:.0f} % of the images"
        )
    return text + "."


def synsets(counts: pd.DataFrame, top: int = 5) -> str:
    """Whether names of synsets tell much. ``counts`` of :func:`meaning.name_counts`."""
    if not len(counts):
        return "No latent has the name of a synset."
    total, broad = counts["latents"].sum(), counts.loc[counts["base"] > BROAD, "latents"].sum()
    first = counts.head(top)
    listed = ", ".join(f"{row.name} ({row.latents})" for row in first.itertuples(index=False))
    most = "Most" if broad > total / 2 else "Not most"
    return (
        f"{most} names of synsets tell little: {broad} of {total} are of classes with more than {100 * BROAD:.0f} % of "
        f"the images; the most frequent, {listed}, are {100 * first['latents'].sum() / total:.0f} % of all."
    )


def holds(table: pd.DataFrame, other: str, kind: str = "named") -> str:
    """Which of two dictionaries has more names, threshold by threshold. ``table`` of :func:`meaning.over_holds`."""
    first, what = table["dictionary"].iloc[0], {"named": "a name", "class": "the name of one class"}[kind]
    rows = table[(table["dictionary"] == other) & (table["kind"] == kind)].to_dict("records")
    sides = [_sided(row) for row in rows]
    words = {"more": "more", "less": "fewer", "open": "no significant difference"}
    listed = ", ".join(
        f"{words[side]} at {100 * row['hold']:.0f} % ({_gap(row)})" for side, row in zip(sides, rows, strict=True)
    )
    if len(set(sides)) > 1:
        text = f"Whether more latents have {what} among the {first} than in the {other} depends on the threshold: "
    elif sides[0] == "open":
        text = f"No significant difference between the {first} and the {other} in how many latents have {what}: "
    else:
        text = f"{words[sides[0]].capitalize()} latents have {what} among the {first} than in the {other}: "
    return f"{text}{listed}."


def selective(q, n_latents: int, fdr: float = FDR) -> str:
    """How many latents are more selective than permuted labels leave them."""
    found = int((pd.Series(q) <= fdr).sum())
    if found > n_latents / 2:
        told = "so a latent without a name may still depend on the classes"
    else:
        told = "so most latents are not shown to depend on the classes at all"
    return f"{found} of {n_latents} latents prefer some classes more than permuted labels allow {_rate(fdr)}, {told}."


def checked(summary: pd.DataFrame, where: str) -> str:
    """Whether names hold on test rows. ``summary`` of :func:`meaning.check_names`."""
    cells = summary[summary["kind"] == "named"].set_index("measure")
    if not cells.loc["lift", "latents"]:
        return f"No latent with a name fires on the test rows of {where}."
    told = "The names hold" if cells.loc["lift", "lo"] > 0 else "The names are not shown to hold"

    def against(of):
        lift, lo, hi = (100 * of.loc["lift", key] for key in ("value", "lo", "hi"))
        return (
            f"{_percent(of.loc['precision'])}, chance being {100 * of.loc['base', 'value']:.1f} % (lift {lift:+.1f} "
            f"points, {lo:+.1f} to {hi:+.1f})"
        )

    narrow = summary[summary["kind"] == "narrow"].set_index("measure")
    part = ""
    if 0 < narrow.loc["lift", "latents"] < cells.loc["lift", "latents"]:
        part = (
            f"; for the {narrow.loc['lift', 'latents']} names of at most {100 * BROAD:.0f} % of the images in "
            f"{against(narrow)}"
        )
    return (
        f"{told} on the test rows of {where}: where a named latent fires, the image is of its classes in "
        f"{against(cells)}{part}. A named latent fires on {_percent(cells.loc['recall'])} of the images of its classes "
        f"(means over {cells.loc['lift', 'latents']} latents)."
    )


# --- two sets


def differs(row: Mapping, a: str, fdr: float = FDR) -> str:
    """One row of :func:`contrast.by_set` as a sentence."""
    often = f"more or less often in {row['set']} than in {a} {_rate(fdr)}"
    if not row["differs"]:
        return f"No latent is found to fire {often}."
    return (
        f"{row['differs']} of {row['tested']} latents tested fire {often}: {row['more_b']} more, {row['more_a']} less "
        f"often; the largest difference is {100 * row['largest']:.0f} points."
    )


def calibrated(splits: pd.DataFrame, where: str, fdr: float = FDR) -> str:
    """Whether halves of one set give no more than the rate allows. ``splits`` of :func:`contrast.halves`."""
    n, hits = len(splits), int((splits["found"] > 0).sum())
    lo, hi = exact_interval(hits / n, n)
    told = "compatible with" if lo <= fdr else "more often than"
    wrong = "" if lo <= fdr else ", so the correction fails here"
    return (
        f"Two random halves of {where} differ in some latent in {hits} of {n} splits, {100 * hits / n:.1f} % "
        f"({100 * lo:.1f} to {100 * hi:.1f} if splits were independent), {told} the {100 * fdr:.0f} % that the rate "
        f"allows{wrong}; {100 * splits['below'].mean():.1f} % of the p values are at most 0.05 before correction."
    )


def newcomers(table: pd.DataFrame, a: str) -> str:
    """Names among latents that fire more often in other sets than in A. ``table``: :func:`contrast.by_set`, named."""
    of = table[(table["more_a"] > 0) & (table["more_b"] > 0)]
    if not len(of):
        return f"No set has both latents that fire more often in it than in {a} and latents that fire less often."
    new, old = 100 * of["named_b"] / of["more_b"], 100 * of["named_a"] / of["more_a"]
    below = int((new < old).sum())
    return (
        f"Latents that fire more often in an OOD set than in {a} have a name less often than those that fire less "
        f"often in {below} of {len(of)} sets ({new.min():.1f} to {new.max():.1f} % against {old.min():.1f} to "
        f"{old.max():.1f} %). This describes, it does not test: latents of one dictionary overlap, the sets share the "
        f"rows of {a}, and names come from ID classes, so a latent that prefers ID images is more likely to have one."
    )


# --- together


def together(alone: Mapping, within: Mapping, null: Mapping, excess: float, fdr: float = FDR) -> str:
    """What classes explain of latents that fire together. Each of :func:`together.found`; :func:`together.excess`."""
    if not alone["found"]:
        return f"No two of {alone['latents']} latents are found to fire together {_rate(fdr)}."
    remain = f"{within['found']} pairs remain detectable" if within["found"] else "no pair is detectable"
    return (
        f"{alone['found']} of {alone['pairs']} pairs of latents ({100 * alone['share']:.2f} %) fire together more "
        f"often than by chance {_rate(fdr)}; {remain} within classes ({null['found']} where each latent's rows are "
        f"permuted within each class); classes account for {100 * excess:.0f} % of the rows in which the former meet "
        "beyond chance (a description, without interval)."
    )


def followed(found: Mapping, n: int) -> str:
    """Whether groups of latents follow the classes. ``found`` of :func:`together.follow_classes`."""
    told = "follow" if found["lo"] >= FOLLOW else "hardly follow" if found["hi"] < HARDLY else "follow in part"
    return (
        f"{n} groups of latents that fire together {told} the {n} classes: adjusted Rand index {found['ari']:.2f} "
        f"({found['lo']:.2f} to {found['hi']:.2f}) with each latent's strongest class."
    )


# --- clusters and neighbours


def beside(rows: pd.DataFrame, first: str) -> str:
    """One representation in :func:`neighbours.retrieve` or :func:`neighbours.judge`, all of its measures."""
    words = {"more": "better by ", "less": "worse by ", "open": "no significant difference in "}
    by: dict[str, list[str]] = {side: [] for side in words}
    for row in rows.to_dict("records"):
        by[_sided(row)].append(f"{_MEASURES[row['measure']]} ({_gap(row)})")
    listed = "; ".join(words[side] + ", ".join(each) for side, each in by.items() if each)
    return f"{first} against {rows['representation'].iloc[0]}: {listed}."
