"""Figures of the ontology chapter: tidy data in, matplotlib Figure out (see :mod:`companion.figures.figures`)."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ...figures.figures import BLUE, GREEN, GREY, ORANGE, _figure, _text_colour
from .study import CLS, EVERY, RANDOM, SAE

# Colour and marker (or dashes) say the same.
_LOOK = {SAE: (BLUE, "o", "-"), CLS: (ORANGE, "s", "--"), RANDOM: (GREY, "D", ":")}
_PART = (GREEN, "v", (0, (5, 1)))


def synset_dots(data: pd.DataFrame, methods: tuple[str, ...] = (RANDOM, CLS, SAE)) -> Figure:
    """F1 of the best unit by synset, by classes and by images, synsets as a tree.

    Columns: method, name, members, indent, f1, lo, hi, q, images. Filled: q < 0.05 by classes (NaN: not asked). The
    tick is the control that calls every class a member.
    """
    rows = data[data["method"] == SAE].reset_index(drop=True)
    places = np.arange(len(rows))
    figure, axes = _figure(7.6, 1.5 + 0.215 * len(rows), 1, 2, sharey=True)
    panels = (("f1", "F1 of the set of classes"), ("images", "F1 of the set of images"))
    for ax, (column, label) in zip(axes[0], panels, strict=True):
        for method in methods:
            part = data[data["method"] == method]
            colour, marker, _ = _LOOK[method]
            filled = method == SAE and column == "f1"
            if filled:
                ax.hlines(places, part["lo"], part["hi"], color=colour, linewidth=1.2, alpha=0.8)
            faces = np.where(part["q"] < 0.05, colour, "none") if filled else colour if method == SAE else "none"
            ax.scatter(
                part[column], places, s=30, marker=marker, edgecolors=colour, facecolors=faces, linewidths=1.3,
                label=method, zorder=3 if method == SAE else 2,
            )  # fmt: skip
        every = data[data["method"] == EVERY][column]
        ax.scatter(every, places, s=60, marker="|", color=_text_colour(), linewidths=1.1, label=EVERY)
        ax.set(xlim=(-0.04, 1.04), xticks=[0, 0.25, 0.5, 0.75, 1], xticklabels=["0", "", ".5", "", "1"], xlabel=label)
    names = [
        f"{'· ' * depth}{row['name']} ({row['members']})"
        for depth, (_, row) in zip(_depths(rows), rows.iterrows(), strict=True)
    ]
    axes[0, 0].set_yticks(places, names, fontsize=8.5, ha="left")
    longest = max(len(name) for name in names)
    axes[0, 0].tick_params(axis="y", pad=5.6 * longest * 0.8)
    axes[0, 0].set_ylim(len(rows) - 0.4, -0.6)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=10)
    return figure


def _depths(rows: pd.DataFrame) -> np.ndarray:
    """Indentation as shown: never more than one deeper than the row before."""
    shown = []
    for indent in rows["indent"]:
        shown.append(min(indent, shown[-1] + 1) if shown else 0)
    return np.array(shown)


def coverage_curves(data: pd.DataFrame) -> Figure:
    """Share of the synsets whose F1 reaches a bar. Columns: by, method, bar, share; a panel a way of judging."""
    panels = list(dict.fromkeys(data["by"]))
    figure, axes = _figure(7.6, 3.6, 1, len(panels), sharey=True)
    for ax, by in zip(axes[0], panels, strict=True):
        for method, part in data[data["by"] == by].groupby("method", sort=False):
            colour, _, dashes = (_text_colour(), "|", (0, (1, 3))) if method == EVERY else _LOOK.get(method, _PART)
            ax.plot(part["bar"], 100 * part["share"], color=colour, linestyle=dashes, label=method)
        ax.set(title=f"by {by}", xlabel="bar for F1", xlim=(0, 1), ylim=(0, 101), xticks=[0, 0.5, 1])
    axes[0, 0].set_ylabel("synsets that reach it, %")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=10)
    return figure


def distance_by_path(data: pd.DataFrame) -> Figure:
    """Distances between classes by path length: 5-95 %, 25-75 %, median. Columns: panel, path, pairs, q05 ... q95."""
    panels = list(dict.fromkeys(data["panel"]))
    figure, axes = _figure(7, 2.35 * len(panels), len(panels), 1, sharex=True)
    for ax, panel, colour in zip(axes[:, 0], panels, (BLUE, ORANGE, GREY), strict=False):
        part = data[data["panel"] == panel]
        ax.vlines(part["path"], part["q05"], part["q95"], color=colour, linewidth=1.4)
        ax.vlines(part["path"], part["q25"], part["q75"], color=colour, linewidth=7, alpha=0.65)
        ax.scatter(part["path"], part["q50"], marker="_", s=90, color=_text_colour(), linewidths=1.8, zorder=3)
        ax.set(title=panel, ylabel="distance")
    axes[-1, 0].set_xlabel("links between two classes in WordNet")
    axes[-1, 0].set_xticks(sorted(set(data["path"]))[:: 1 if data["path"].nunique() < 16 else 2])
    return figure


def ordered_heatmap(data: pd.DataFrame, label: str = "cosine distance of CAPs") -> Figure:
    """A distance between classes, in the order of WordNet's tree. Columns: class_a, class_b, distance."""
    names = list(dict.fromkeys(data["class_a"]))
    matrix = data["distance"].to_numpy().reshape(len(names), len(names))
    few = len(names) <= 25
    figure, axes = _figure(7.6, 6.6 if few else 7.4)
    ax = axes[0, 0]
    apart = matrix[~np.eye(len(names), dtype=bool)]
    image = ax.imshow(matrix, cmap="cividis", vmin=apart.min(), vmax=apart.max())
    ax.set_yticks(range(len(names)), names, fontsize=9 if few else 5.2)
    ax.set_xticks(range(len(names)), names if few else [], rotation=90, fontsize=9)
    ax.tick_params(length=0)
    ax.grid(visible=False)
    figure.colorbar(image, ax=ax, label=label, shrink=0.8)
    return figure
