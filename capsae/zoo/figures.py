"""Figures of the zoo's page: one function a figure, tidy data in, matplotlib Figure out (see :mod:`capsae.figures`)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from ..figures import BLUE, GREEN, ORANGE, _figure, _text_colour
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
    figure, axes = _figure(8, 6)
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
    ax.margins(0.12)
    figure.legend(loc="outside upper center", ncols=3, fontsize=10)
    figure.draw_without_rendering()
    _label(ax, data["title"].tolist(), ax.transData.transform(data[["x", "y"]].to_numpy(float)))
    return figure


def _label(ax, texts: Sequence[str], points: np.ndarray, size: float = 8.5) -> None:
    """Write each text near its point (in pixels), where it covers the fewest other texts and points."""
    scale = ax.figure.dpi / 72
    taken, frame = [(x - 5, y - 5, x + 5, y + 5) for x, y in points], ax.get_window_extent()
    for text, (x, y) in zip(texts, points, strict=True):
        width, height = 0.56 * size * len(text) * scale, 1.15 * size * scale
        best = None
        others = [one for one in points if tuple(one) != (x, y)]
        for reach in (9, 18, 30, 44, 60, 80, 105):
            for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1)):
                left = x + dx * reach - (width if dx < 0 else 0 if dx > 0 else width / 2)
                low = y + dy * reach - height / 2
                box = (left, low, left + width, low + height)
                cost = sum(_overlap(box, other) for other in taken) + 4 * reach
                outside = box[0] < frame.x0 or box[2] > frame.x1 or box[1] < frame.y0 or box[3] > frame.y1
                cost += 1e5 * outside
                cost += 400 * any(_gap(box, other) < _gap(box, (x, y)) + 5 for other in others) * (reach == 9)
                cost += 200 * any(_gap(box, other) < 5 for other in others)
                if best is None or cost < best[0]:
                    best = (cost, box, reach)
        _, box, reach = best
        taken.append(box)
        at = ax.transData.inverted().transform((box[0], (box[1] + box[3]) / 2))
        if reach > 9:  # far from its point: a line leads there
            edge = (min(max(x, box[0]), box[2]), min(max(y, box[1]), box[3]))
            line = ax.transData.inverted().transform([(x, y), edge])
            ax.plot(line[:, 0], line[:, 1], color=_text_colour(), linewidth=0.6, alpha=0.7)
        drawn = ax.text(*at, text, fontsize=size, va="center", ha="left", color=_text_colour(), zorder=5)
        drawn.set_path_effects([withStroke(linewidth=2.5, foreground=ax.get_facecolor())])  # over the bars of seeds


def _gap(box: tuple, point: Sequence[float]) -> float:
    """Distance of a point from a box, 0 inside."""
    x, y = point
    return float(np.hypot(max(box[0] - x, 0, x - box[2]), max(box[1] - y, 0, y - box[3])))


def _overlap(a: tuple, b: tuple) -> float:
    return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))


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
        bright = image.cmap(image.norm(rank))
        ink = "#111111" if 0.299 * bright[0] + 0.587 * bright[1] + 0.114 * bright[2] > 0.5 else "#ffffff"
        ax.text(j, i, f"{rank:.0f}", ha="center", va="center", color=ink, fontsize=8.5)
    ax.set_xticks(range(len(measures)), measures, rotation=90, fontsize=9)
    ax.set_yticks(range(len(titles)), titles, fontsize=9)
    ax.xaxis.tick_top()
    ax.grid(visible=False)
    figure.colorbar(image, ax=ax, label="rank, 1 = best", location="bottom", shrink=0.6, aspect=40)
    return figure
