"""Figures of the zoo's page: one function a figure, tidy data in, matplotlib Figure out."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ..figures.display import ink_on
from ..figures.figures import BLUE, GREEN, ORANGE, _figure, _text_colour
from .fitting import KINDS

# Colour and marker say the same.
_KINDS = {"variant": (BLUE, "o"), "dictionary": (GREEN, "s"), "control": (ORANGE, "^")}


def over_seeds(data: pd.DataFrame, unit: str = "%") -> Figure:
    """Every fit as a dot, a row a member in the data's order, the mean as a bar. Columns: panel, title, kind, value.

    A panel each for up to three results.
    """
    panels, titles = list(dict.fromkeys(data["panel"])), list(dict.fromkeys(data["title"]))
    place = {title: i for i, title in enumerate(titles)}
    figure, axes = _figure(8, 1.5 + 0.25 * len(titles), 1, len(panels), sharey=True)
    for ax, panel in zip(axes.flat, panels, strict=True):
        rows = data[data["panel"] == panel]
        for kind, (colour, marker) in _KINDS.items():
            part = rows[rows["kind"] == kind]
            y = part["title"].map(place)
            ax.scatter(part["value"], y, s=20, color=colour, marker=marker, linewidths=0, label=KINDS[kind])
        means = rows.groupby("title", sort=False)["value"].mean()
        ax.scatter(means, means.index.map(place), marker="|", s=130, linewidths=1.6, color=_text_colour(), zorder=1)
        ax.set(xlabel=f"{panel}, {unit}" if unit else panel, ylim=(len(titles) - 0.4, -0.6))
        ax.xaxis.label.set_size(10.5)
    axes[0, 0].set_yticks(range(len(titles)), titles, fontsize=9.5)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, fontsize=10)
    return figure


def scatter(data: pd.DataFrame, x: str, y: str) -> Figure:
    """One result against another, a labelled mark a member with its range over seeds.

    Columns: title, kind, x, x_lo, x_hi, y, y_lo, y_hi; ``x`` and ``y`` are the axes' labels.
    """
    figure, axes = _figure(8, 6.4)
    ax = axes[0, 0]
    for kind, (colour, marker) in _KINDS.items():
        part = data[data["kind"] == kind]
        if part.empty:
            continue
        gaps = [np.abs(part[[f"{axis}_lo", f"{axis}_hi"]].to_numpy() - part[[axis]].to_numpy()).T for axis in "xy"]
        ax.errorbar(
            part["x"], part["y"], xerr=gaps[0], yerr=gaps[1], fmt=marker, color=colour, markersize=6, elinewidth=1,
            label=KINDS[kind],
        )  # fmt: skip
    ax.set(xlabel=x, ylabel=y)
    figure.legend(loc="outside upper center", ncols=3, fontsize=10)
    # Names in a column at the height of their marks, or as near as leaves each a line of its own: marks may crowd.
    ordered = data.sort_values(["y", "x"], kind="stable")
    low, high = ax.get_ylim()
    places, line = ((ordered["y"] - low) / (high - low)).to_numpy(), 0.032
    steps = line * np.arange(len(places))
    places = np.minimum(np.maximum.accumulate(places - steps), 1 - steps[-1]) + steps
    leader = {"arrowstyle": "-", "linewidth": 0.6, "alpha": 0.7, "relpos": (0, 0.5), "shrinkA": 1, "shrinkB": 3}
    for place, row in zip(places, ordered.itertuples(), strict=True):
        ax.annotate(
            row.title, (row.x, row.y), (1.06, place), textcoords="axes fraction", va="center", fontsize=8.5,
            annotation_clip=False, arrowprops=leader | {"color": _KINDS[row.kind][0]},
        )  # fmt: skip
    return figure


def rank_heatmap(data: pd.DataFrame) -> Figure:
    """Ranks of members by every measure, 1 = best. Columns: title, measure, rank; both in the data's order."""
    titles, measures = list(dict.fromkeys(data["title"])), list(dict.fromkeys(data["measure"]))
    ranks = data.pivot(index="title", columns="measure", values="rank").loc[titles, measures].to_numpy(float)
    figure, axes = _figure(8, 2.2 + 0.26 * len(titles))
    ax = axes[0, 0]
    image = ax.imshow(ranks, cmap="cividis_r", aspect="auto", vmin=1, vmax=len(titles))
    for (i, j), rank in np.ndenumerate(ranks):
        if np.isnan(rank):
            continue
        ax.text(j, i, f"{rank:.0f}", ha="center", va="center", color=ink_on(image.cmap(image.norm(rank))), fontsize=8.5)
    ax.set_xticks(range(len(measures)), measures, rotation=90, fontsize=9)
    ax.set_yticks(range(len(titles)), titles, fontsize=9)
    ax.xaxis.tick_top()
    ax.grid(visible=False)
    figure.colorbar(image, ax=ax, label="rank, 1 = best", location="bottom", shrink=0.6, aspect=40)
    return figure
