"""``capsae compare A B``: two folders of images, or two sets of a profile, and the latents in which they differ."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from . import contrast, meaning

EXAMPLES = 3  # rows named for each latent and side


@dataclass(frozen=True)
class Side:
    """One of the two sets: what it was given as, its codes (N, k), names of its rows, and images that were skipped."""

    given: str
    what: str
    codes: object
    ids: np.ndarray
    bad: tuple[dict, ...] = ()


def side(run, given: str, checkpoint: str | Path | None = None, which: str = "A") -> Side:
    """Resolve a set name of the run's profile, an image file, or a folder of images, and encode it.

    A set's name wins over a folder of the same name; ``./test`` is the folder.

    Raises
    ------
    FileNotFoundError, ValueError
        If it is neither, a folder without images, or none of its images can be read.
    """
    if given in run.profile.sets:
        codes = run.codes(given)
        return Side(given, f"set {given} of profile {run.profile.name}", codes, run.features(given).ids)
    from ..scoring import find_images, observe

    if not Path(given).exists():
        raise FileNotFoundError(
            f"{which}, {given!r}, is no folder of images and no set of profile {run.profile.name!r}, which has "
            f"{', '.join(run.profile.sets)}"
        )
    images = find_images([given])
    logging.getLogger("capsae.features").setLevel(logging.ERROR)  # skipped images are named in the report
    observations, rows, bad = observe(run, images, checkpoint)
    if observations is None:
        raise ValueError(f"{which}, {given!r}: none of its {len(images)} images can be read ({bad[0]['why']})")
    return Side(given, f"images under {given}", observations.codes, np.array(list(rows)), tuple(bad))


def compare_sides(a: Side, b: Side, named: meaning.Named, fdr: float = contrast.FDR) -> pd.DataFrame:
    """:func:`contrast.compare` with each latent's name, kind, classes, and the rows that it fires in most.

    Columns beside those of :func:`contrast.compare`: name, kind, classes; examples_a, examples_b (joined by " | ").
    """
    table = contrast.compare(a.codes, b.codes, fdr)
    about = named.table.set_index("latent").loc[table["latent"], ["name", "kind", "classes"]].reset_index(drop=True)
    for i, column in enumerate(about):
        table.insert(1 + i, column, about[column])
    for key, of in (("examples_a", a), ("examples_b", b)):
        columns = of.codes.csr().tocsc()
        examples = [" | ".join(_strongest(columns, latent, of.ids)) for latent in table["latent"]]
        table[key] = pd.Series(
            examples, table.index, dtype=object
        )  # file names may be no UTF-8, which pandas' own strings refuse
    return table


def _strongest(columns, latent: int, ids: np.ndarray) -> list[str]:
    part = slice(columns.indptr[latent], columns.indptr[latent + 1])
    value, row = columns.data[part], columns.indices[part]
    return [str(ids[i]) for i in row[np.lexsort((row, -value))[:EXAMPLES]]]


def label(row) -> str:
    """What a latent is called: its name, or the classes that it fires in most."""
    if row.name:
        return row.name
    if row.kind in ("rare", "dead"):
        return f"no name: {meaning.KIND_TITLES[row.kind]} of the training images"
    return f"no name; most in {row.classes}"


def report(table: pd.DataFrame, a: Side, b: Side, fdr: float = contrast.FDR, top: int = 10) -> str:
    """The comparison in words: sizes, how many latents differ, those that do most, what is doubtful."""
    n_a, n_b = len(a.codes), len(b.codes)
    lines = [f"A: {a.what}, {n_a} image{'s' * (n_a != 1)}", f"B: {b.what}, {n_b} image{'s' * (n_b != 1)}"]
    shared = len(set(a.ids.tolist()) & set(b.ids.tolist()))
    tested = int(table["q"].notna().sum())
    doubts = contrast.doubts(n_a, n_b, tested)
    if shared:
        doubts.append(f"{shared} images are in A and in B: they hide differences")
    found = table[table["differs"]]
    by = found["more"].value_counts()
    strong = int((table["q_strength"] <= fdr).sum())
    lines += [
        "",
        f"{len(table)} latents fire in some image, {tested} of them often enough to be tested.",
    ]
    if tested:
        lines += [
            f"{len(found)} of {tested} differ in how often they fire (Fisher's exact test, false discovery rate "
            f"{100 * fdr:g} %): {by.get('B', 0)} more often in B, {by.get('A', 0)} more often in A.",
            f"{strong} of {int(table['q_strength'].notna().sum())} that fire in both differ in how strongly "
            "(Mann-Whitney, the same rate; this compares only the images in which a latent fires, which differ between "
            "A and B).",
        ]
    for which, other in (("B", "A"), ("A", "B")):
        part = found[found["more"] == which]
        part = part.reindex(part["difference"].abs().sort_values(ascending=False, kind="stable").index).head(top)
        if len(part):
            lines += ["", f"More often in {which} than in {other}, the largest differences:"]
        for row in part.itertuples(index=False):
            lines += _entry(row, which)
    if len(found):
        lines += [
            "",
            "Intervals are 95 % each, unadjusted: those of the largest differences, chosen of many, lie too far out.",
        ]
    if tested and not len(found):
        first = table.iloc[0]
        p = f"p = {first['p']:.2g}, {first['q']:.2g} adjusted"
        lines.append(f"The most certain difference is that of latent {first['latent']}: {p}.")
    lines += ["", *(f"Caution: {text}." for text in doubts)] if doubts else []
    lines += [
        "",
        "That sets differ does not say why; copies of an image count as further evidence and should go first.",
    ]
    return "\n".join(lines)


def _entry(row, which: str) -> list[str]:
    examples = (row.examples_b if which == "B" else row.examples_a).split(" | ")
    shares = f"{100 * row.frequency_a:.1f} % of A, {100 * row.frequency_b:.1f} % of B"
    reach = f"{100 * row.difference:+.1f} points ({100 * row.lo:+.1f} to {100 * row.hi:+.1f})"
    return [
        f"  latent {row.latent}  {label(row)}",
        f"    fires in {shares}, {reach}, q = {row.q:.1g}",
        f"    such as {', '.join(examples)}",
    ]
