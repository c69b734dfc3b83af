"""``capsae compare A B``: two folders of images, or two sets of an experiment, and the latents in which they differ."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from ..latents import contrast
from ..latents import naming as meaning
from .report_arrays import aligned

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
    """Resolve a set name of the run's experiment, an image file, or a folder of images, and encode it.

    A set's name wins over a folder of the same name; ``./test`` is the folder.

    Raises
    ------
    FileNotFoundError, ValueError
        If it is neither, a folder without images, or none of its images can be read.
    """
    if given in run.experiment.sets:
        codes = run.codes(given)
        return Side(given, f"set {given} of experiment {run.experiment.name}", codes, run.features(given).ids)
    from ..pipeline.own_images import find_images, observe

    if not Path(given).exists():
        raise FileNotFoundError(
            f"{which}, {given!r}, is no folder of images and no set of experiment {run.experiment.name!r}, which has "
            f"{', '.join(run.experiment.sets)}"
        )
    images = find_images([given])
    logging.getLogger("capsae.features.extract").setLevel(logging.ERROR)  # skipped images are named in the report
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
        # File names may be no UTF-8, which pandas' own strings refuse.
        table[key] = pd.Series(examples, table.index, dtype=object)
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
    """What was compared, the latents that differ most on either side as a table, and what is doubtful."""
    found, tested, strong = table[table["differs"]], table["q"].notna(), table["q_strength"] <= fdr
    by = found["more"].value_counts()
    lines = [
        f"A: {a.what}, {len(a.codes)} images",
        f"B: {b.what}, {len(b.codes)} images",
        f"{tested.sum()} of {len(table)} latents that fire are tested. In frequency (Fisher, false discovery rate "
        f"{100 * fdr:g} %) {len(found)} differ: {by.get('B', 0)} more in B, {by.get('A', 0)} more in A; in strength "
        f"where they fire (Mann-Whitney) {strong.sum()} of {table['q_strength'].notna().sum()}.",
    ]
    for which in ("B", "A"):
        part = found[found["more"] == which]
        part = part.reindex(part["difference"].abs().sort_values(ascending=False, kind="stable").index).head(top)
        if len(part):
            lines += ["", f"More often in {which}; intervals are 95 % each, unadjusted:", aligned(_shown(part, which))]
    if tested.any() and not len(found):
        lines += ["", "The most certain difference:", aligned(_shown(table.head(1), "B"))]
    doubts = contrast.doubts(len(a.codes), len(b.codes), int(tested.sum()))
    if shared := len(set(a.ids.tolist()) & set(b.ids.tolist())):
        doubts.append(f"{shared} images are in A and in B: they hide differences")
    doubts.append("that sets differ does not say why; copies of an image count as further evidence")
    return "\n".join([*lines, "", *(f"Caution: {text}." for text in doubts)])


def _shown(rows: pd.DataFrame, which: str) -> pd.DataFrame:
    frequency = [f"{100 * r.difference:+.1f} ({100 * r.lo:+.1f} to {100 * r.hi:+.1f})" for r in rows.itertuples()]
    return pd.DataFrame(
        {
            "latent": rows["latent"],
            "name": [label(row) for row in rows.itertuples()],
            "A, %": rows["frequency_a"].map(lambda share: f"{100 * share:.1f}"),
            "B, %": rows["frequency_b"].map(lambda share: f"{100 * share:.1f}"),
            "B less A, points": frequency,
            "q": rows["q"].map("{:.1g}".format),
            "such as": rows["examples_b" if which == "B" else "examples_a"],
        }
    )
