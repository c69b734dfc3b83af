"""Figures of comparisons: one function a figure, tidy data in, matplotlib Figure out (see
:mod:`companion.figures.figures`).

The data come from :mod:`companion.figures.comparisons` and :mod:`companion.chapters.tuning.criterion`.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from .figures import BLUE, GREY, ORANGE, RED, _colours, _figure, _text_colour

# Colour and marker say the same, so that neither is needed to tell verdicts apart.
_VERDICTS = {"better": (BLUE, "o"), "undecided": (GREY, "D"), "worse": (RED, "s")}


def forest(data: pd.DataFrame, method: str = "EPD", metric: str = "FPR95, OOD positive") -> Figure:
    """Differences of one method from all others with intervals. Columns: label, value, lo, hi (points), verdict."""
    figure, axes = _figure(7, 1.2 + 0.215 * len(data))
    ax, places = axes[0, 0], np.arange(len(data))
    for verdict, (colour, marker) in _VERDICTS.items():
        at = (data["verdict"] == verdict).to_numpy()
        if at.any():
            gaps = np.abs(data.loc[at, ["lo", "hi"]].to_numpy() - data.loc[at, ["value"]].to_numpy()).T
            ax.errorbar(
                data.loc[at, "value"], places[at], xerr=gaps, fmt=marker, color=colour, markersize=5, elinewidth=1.4,
                label={"better": f"{method} is better", "worse": f"{method} is worse"}.get(verdict, "undecided"),
            )  # fmt: skip
    ax.axvline(0, color=_text_colour(), linewidth=0.9)
    ax.set_yticks(places, data["label"], fontsize=9)
    ax.set(ylim=(len(data) - 0.4, -0.6), xlabel=f"{method} less the other, mean {metric}, points")
    figure.legend(loc="outside upper center", ncols=3)
    return figure


def seeds(data: pd.DataFrame, columns: int = 2) -> Figure:
    """Every seed as a dot, their mean as a bar with its interval.

    Columns: title (a row of the figure), seed, value, mean, lo, hi, and panel, if there is more than one.
    """
    panels = list(dict.fromkeys(data["panel"])) if "panel" in data else [""]
    columns = min(columns, len(panels))
    lines = [data if not panel else data[data["panel"] == panel] for panel in panels]
    height = 0.9 + 0.3 * max(part["title"].nunique() for part in lines)
    rows = -(-len(panels) // columns)
    figure, axes = _figure(7, 0.5 + height * rows, rows, columns)
    for ax, panel, part in zip(axes.ravel(), panels, lines, strict=False):
        titles = list(dict.fromkeys(part["title"]))
        place = part["title"].map(titles.index)
        means = part.drop_duplicates("title")
        gaps = np.abs(means[["lo", "hi"]].to_numpy() - means[["mean"]].to_numpy()).T
        ax.scatter(part["value"], place, s=16, color=GREY, alpha=0.8, linewidths=0, label="one seed", zorder=2)
        ax.errorbar(
            means["mean"], range(len(titles)), xerr=gaps, fmt="|", color=BLUE, markersize=11, elinewidth=1.6,
            label="mean, images and seeds", zorder=3,
        )  # fmt: skip
        ax.set_yticks(range(len(titles)), titles, fontsize=10)
        ax.set(xlabel=panel or "mean FPR95, OOD positive, %", ylim=(len(titles) - 0.4, -0.6))
    for ax in axes.ravel()[len(panels) :]:
        ax.set_visible(False)
    handles, labels = axes.ravel()[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2)
    return figure


def risk_coverage(data: pd.DataFrame) -> Figure:
    """Risk of the accepted ID samples against their share. Columns: method, coverage, risk."""
    figure, axes = _figure(7, 3.8)
    ax, methods = axes[0, 0], list(dict.fromkeys(data["method"]))
    colours = _colours(methods)
    dashes = dict(zip(methods, ["-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1))] * 4, strict=False))
    for method in methods:
        rows = data[data["method"] == method]
        ax.plot(rows["coverage"], 100 * rows["risk"], color=colours[method], linestyle=dashes[method], label=method)
    ax.set(
        xlabel="share of ID test rows accepted (lowest scores first)", ylabel="head's errors among them, %", xlim=(0, 1)
    )
    ax.set_ylim(bottom=0)
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def tuning_grid(data: pd.DataFrame) -> Figure:
    """The whole grid of each detector. Columns: label, setting, criterion (%), default, chosen (bool)."""
    labels = list(dict.fromkeys(data["label"]))
    figure, axes = _figure(7, 1.4 + 0.33 * len(labels))
    ax, place = axes[0, 0], {label: i for i, label in enumerate(labels)}
    data = data.dropna(subset="criterion")
    at = data["label"].map(place)
    ax.scatter(
        data["criterion"], at, s=20, color=GREY, alpha=0.8, linewidths=0, label="a setting of the grid", zorder=2
    )
    rows, mask = data["default"], data["chosen"]
    style = {"s": 80, "zorder": 3, "facecolors": "none", "linewidths": 2}
    ax.scatter(data["criterion"][rows], at[rows], marker="s", edgecolors=BLUE, label="default", **style)
    ax.scatter(data["criterion"][mask], at[mask], marker="D", color=ORANGE, s=26, label="chosen", zorder=4)
    ax.set_yticks(range(len(labels)), labels, fontsize=10)
    ax.set(xlabel="criterion on ID rows: mean of both FPR95 on held-out classes, %", ylim=(len(labels) - 0.4, -0.6))
    figure.legend(loc="outside upper center", ncols=3)
    return figure
