"""The sentences of the chapter on what latents mean, each made from a table that a test can hold it against."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from ..stats import exact_interval
from .meaning import FDR, HOLD
from .neighbours import K

FOLLOW, HARDLY = 0.6, 0.2  # adjusted Rand index from which groups follow the classes, and under which hardly
_MEASURES = {
    "precision": ("Retrieval is", f"precision at {K}"),
    "map": ("Retrieval is", "mean average precision"),
    "nmi": ("k-means finds the classes", "normalised mutual information"),
    "ari": ("k-means finds the classes", "adjusted Rand index"),
    "purity": ("k-means finds the classes", "purity"),
}


def _percent(cell: Mapping, sign: str = "") -> str:
    return f"{100 * cell['value']:{sign}.1f} % ({100 * cell['lo']:{sign}.1f} to {100 * cell['hi']:{sign}.1f})"


def _gap(cell: Mapping) -> str:
    value, lo, hi = (100 * cell[key] for key in ("difference", "difference_lo", "difference_hi"))
    return f"{value:+.1f} points ({lo:+.1f} to {hi:+.1f})"


def _rate(fdr: float) -> str:
    return f"(false discovery rate {100 * fdr:.0f} %)"


def _sided(cell: Mapping) -> str:
    """ "more", "less" or "open": on which side of 0 the interval of a difference lies."""
    return "more" if cell["difference_lo"] > 0 else "less" if cell["difference_hi"] < 0 else "open"


def naming(shares: pd.DataFrame, where: str, hold: float = HOLD) -> str:
    """How many latents have a name. ``shares`` of :func:`meaning.compare_shares`; its first dictionary is told."""
    own = shares[shares["dictionary"] == shares["dictionary"].iloc[0]].set_index("kind")
    synset = f", {_percent(own.loc['synset'])} that of a synset" if own.loc["synset", "value"] > 0 else ""
    most = "Most latents have" if own.loc["named", "value"] > 0.5 else "Most latents do not have"
    return (
        f"{most} a name on {where}: the classes that hold {100 * hold:.0f} % of the energy give "
        f"{_percent(own.loc['class'])} of the latents the name of one class{synset}; "
        f"{100 * own.loc['none', 'value']:.1f} % stay without one, "
        f"{100 * own.loc['rare', 'value']:.1f} % fire too rarely and {100 * own.loc['dead', 'value']:.1f} % never."
    )


def against(shares: pd.DataFrame, other: str, kind: str = "named") -> str:
    """Whether the first dictionary of :func:`meaning.compare_shares` has more latents with a name than another."""
    first = shares["dictionary"].iloc[0]
    cell = shares[(shares["dictionary"] == other) & (shares["kind"] == kind)].iloc[0]
    told = {
        "more": "More latents have",
        "less": "Fewer latents have",
        "open": "Neither clearly more nor fewer latents have",
    }
    share = f"{100 * cell['value']:.1f} %"
    return f"{told[_sided(cell)]} a name among the {first} than in the {other} ({share}): difference {_gap(cell)}."


def holds(table: pd.DataFrame, other: str) -> str:
    """Whether the order of two dictionaries hangs on the threshold. ``table`` of :func:`meaning.over_holds`."""
    first = table["dictionary"].iloc[0]
    wide = table[table["kind"] == "named"].pivot(index="hold", columns="dictionary", values="value")
    ahead = wide.index[wide[first] > wide[other]]
    if len(ahead) == len(wide):
        return f"That {first} have more names than the {other} holds at every threshold tried."
    if not len(ahead):
        return f"At no threshold tried do {first} have more names than the {other}."
    text = ", ".join(f"{100 * hold:.0f} %" for hold in ahead)
    rest = ", ".join(f"{100 * hold:.0f} %" for hold in wide.index.difference(ahead))
    told = f"{first} have more names than the {other} at {text} of the energy, not at {rest}"
    return f"It hangs on the threshold: {told}."


def selective(q, n_latents: int, fdr: float = FDR) -> str:
    """How many latents are more selective than labels dealt at random leave them."""
    found = int((pd.Series(q) <= fdr).sum())
    if found > n_latents / 2:
        told = "so having no name is not having nothing to do with classes"
    else:
        told = "so most latents are not shown to have to do with the classes at all"
    return f"{found} of {n_latents} latents prefer some classes more than permuted labels allow {_rate(fdr)}, {told}."


def checked(summary: pd.DataFrame, where: str) -> str:
    """Whether names hold on test rows. ``summary`` of :func:`meaning.check_names`."""
    cells = summary[summary["kind"] == "named"].set_index("measure")
    if not cells.loc["lift", "latents"]:
        return f"No latent with a name fires on the test rows of {where}."
    told = "The names hold" if cells.loc["lift", "lo"] > 0 else "The names are not shown to hold"
    part = (
        "but a name promises little about when a latent fires: it" if cells.loc["recall", "value"] < 0.5 else "and it"
    )
    precision, chance = _percent(cells.loc["precision"]), 100 * cells.loc["base", "value"]
    return (
        f"{told} on the test rows of {where}: where a named latent fires, the image is of its classes in {precision}, "
        f"{chance:.1f} % being chance; {part} fires on {_percent(cells.loc['recall'])} of the images of these classes "
        f"(means over {cells.loc['lift', 'latents']} latents)."
    )


# --- two sets


def differs(row: Mapping, a: str, fdr: float = FDR) -> str:
    """One row of :func:`contrast.by_set` as a sentence."""
    often = f"more or less often in {row['set']} than in {a} {_rate(fdr)}"
    if not row["differs"]:
        return f"No latent is found to fire {often}."
    return (
        f"{row['differs']} of {row['alive']} latents fire {often}: {row['more_b']} more, {row['more_a']} less often; "
        f"the largest difference is {100 * row['largest']:.0f} points."
    )


def calibrated(splits: pd.DataFrame, where: str, fdr: float = FDR) -> str:
    """Whether halves of one set give no more than the rate allows. ``splits`` of :func:`contrast.halves`."""
    n, hits = len(splits), int((splits["found"] > 0).sum())
    lo, _ = exact_interval(hits / n, n)
    told = "as the rate promises" if lo <= fdr else "more often than the rate promises, so the correction fails here"
    return (
        f"Two random halves of {where} differ in some latent in {hits} of {n} splits, {told} (at most {100 * fdr:.0f} %"
        f"); {100 * splits['below'].mean():.1f} % of the p values are at most 0.05 before correction."
    )


def newcomers(table: pd.DataFrame, named, a: str, b: str) -> str:
    """Whether latents that fire more often in B have a name less often than those that fire more often in A."""
    from scipy.stats import fisher_exact

    known, more = named[table["latent"].to_numpy()], table["more"].to_numpy()
    (named_a, n_a), (named_b, n_b) = ((int(known[more == side].sum()), int((more == side).sum())) for side in "AB")
    if not n_a or not n_b:
        return f"Not both of {a} and {b} have latents that fire more often in them."
    p = float(fisher_exact([[named_a, n_a - named_a], [named_b, n_b - named_b]]).pvalue)
    told = "less often" if named_b / n_b < named_a / n_a else "more often"
    told = told if p <= 0.05 else "neither clearly more nor less often"
    return (
        f"The latents that fire more often in {b} have a name {told} than those that fire more often in {a}: {named_b} "
        f"of {n_b} against {named_a} of {n_a} (Fisher's exact test, p {'< 0.001' if p < 0.001 else f'= {p:.3f}'})."
    )


# --- together


def together(alone: Mapping, within: Mapping, null: Mapping, fdr: float = FDR) -> str:
    """What classes explain of latents that fire together. Each of :func:`together.found`."""
    if not alone["found"]:
        return f"No two of {alone['latents']} latents are found to fire together {_rate(fdr)}."
    most = "most" if within["found"] < alone["found"] / 2 else "less than half"
    return (
        f"{alone['found']} of {alone['pairs']} pairs of latents ({100 * alone['share']:.2f} %) fire together more "
        f"often than by chance {_rate(fdr)}. Classes explain {most} of it: {within['found']} pairs do so beyond what "
        f"their classes make of it. Latents whose rows are dealt anew within each class give {null['found']}."
    )


def followed(found: Mapping, n: int) -> str:
    """Whether groups of latents follow the classes. ``found`` of :func:`together.follow_classes`."""
    told = "follow" if found["lo"] >= FOLLOW else "hardly follow" if found["hi"] < HARDLY else "follow in part"
    return (
        f"{n} groups of latents that fire together {told} the {n} classes: adjusted Rand index {found['ari']:.2f} "
        f"({found['lo']:.2f} to {found['hi']:.2f}) with each latent's strongest class."
    )


# --- clusters and neighbours


def beside(row: Mapping, first: str) -> str:
    """One comparison of :func:`neighbours.retrieve` or :func:`neighbours.judge` as a sentence."""
    told = {"more": "better on", "less": "worse on", "open": "neither clearly better nor worse on"}[_sided(row)]
    what, name = _MEASURES[row["measure"]]
    return f"{what} {told} {first} than on {row['representation']}: {name} {_gap(row)}."
