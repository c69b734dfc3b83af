"""Figures of :mod:`companion.chapters.layers.maths`: one function a figure, tidy data in, matplotlib Figure out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ...figures.figures import BLUE, GREEN, GREY, ORANGE, RED, _figure, _text_colour
from .study import KIND_TITLES, MEASURE_TITLES, METHOD_TITLES

_STYLE = {"cls": (BLUE, "o", "-"), "attn": (ORANGE, "s", "--"), "patches": (GREEN, "^", "-.")}
_GROUP = {"near": "near OOD", "far": "far OOD", "all": "all OOD sets"}


def _curves(ax, rows: pd.DataFrame) -> None:
    """Value along the depth, a line a kind and seed, all seeds alike; a star for the network's end in each seed.

    A band (at the end a bar) is the rows' own interval over images, and stands only where no seed plays a part.
    """
    seeds = sorted(rows["seed"].unique())
    alone = len(seeds) == 1 and rows["lo"].notna().all()
    for kind, (colour, marker, line) in _STYLE.items():
        for seed in seeds:
            own = rows[(rows["kind"] == kind) & (rows["seed"] == seed)].sort_values("depth")
            if own.empty:
                continue
            ax.plot(own["depth"], own["value"], line, marker=marker, markersize=3.6, linewidth=1.5, color=colour,
                    label=KIND_TITLES[kind] if seed == seeds[0] else None)  # fmt: skip
            if alone:
                ax.fill_between(own["depth"], own["lo"], own["hi"], color=colour, alpha=0.16, linewidth=0)
    end = rows[rows["kind"] == "final"]
    ax.axhline(end["value"].mean(), color=_text_colour(), linewidth=0.9, linestyle=":")
    if alone:
        gap = np.abs(end[["lo", "hi"]].to_numpy() - end[["value"]].to_numpy()).T
        ax.errorbar(end["depth"], end["value"], gap, color=_text_colour(), elinewidth=1.2, capsize=2, fmt="none")
    ax.plot(end["depth"], end["value"], "*", color=_text_colour(), markersize=8, label="the network's end")


def _depth_axis(ax, last: int) -> None:
    step = 1 if last <= 6 else 2
    ticks = [*range(1, last + 1, step), last + 1]
    ax.set_xticks(ticks, [*map(str, ticks[:-1]), "end"], fontsize=10)
    ax.set_xlim(0.5, last + 1.6)


PANELS = ("probe_accuracy", "cap_accuracy", "top1_5", "gap", "stability", "between", "core_overlap", "fvu")


def forming(data: pd.DataFrame, metrics: Sequence[str] = PANELS) -> Figure:
    """Measures along the depth, a panel each. Columns: kind, depth, metric, seed, value, lo, hi."""
    rows_of_panels = -(-len(metrics) // 2)
    figure, axes = _figure(7, 2.35 * rows_of_panels + 0.5, rows_of_panels, 2)
    last = int(data["depth"].max()) - 1
    for ax, metric in zip(axes.flat, metrics, strict=False):
        _curves(ax, data[data["metric"] == metric])
        ax.set_title(MEASURE_TITLES[metric], fontsize=10.5)
        ax.set_ylim(0, 1.04 * ax.get_ylim()[1])
        _depth_axis(ax, last)
    for ax in axes[-1]:
        ax.set_xlabel("block")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def separation(data: pd.DataFrame, metric: str = "AUROC", methods: Sequence[str] = tuple(METHOD_TITLES)) -> Figure:
    """One metric along the depth, a row a method, near beside far, all on one scale; chance (50 %) is dashed.

    Columns: kind, depth, method, group, seed, value, lo, hi (%).
    """
    figure, axes = _figure(7, 2.25 * len(methods) + 0.6, len(methods), 2, sharey=True)
    last = int(data["depth"].max()) - 1
    for row, method in zip(axes, methods, strict=True):
        for ax, group in zip(row, ("near", "far"), strict=True):
            _curves(ax, data[(data["method"] == method) & (data["group"] == group)])
            if metric == "AUROC":
                ax.axhline(50, color=GREY, linewidth=1.2, linestyle=(0, (2, 2)))
            ax.set_title(f"{METHOD_TITLES[method].split(' on ')[0]}: {group}", fontsize=10.5)
            _depth_axis(ax, last)
        row[0].set_ylabel(f"{metric}, %")
    for ax in axes[-1]:
        ax.set_xlabel("block")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


_VERDICTS = {"better": (BLUE, "o"), "undecided": (GREY, "D"), "worse": (RED, "s")}


def against_end(data: pd.DataFrame, metric: str = "AUROC") -> Figure:
    """Every site less the network's end, near beside far. Columns as :func:`.layers_study.over_end` gives them."""
    sites = list(dict.fromkeys(data["site"]))
    figure, axes = _figure(7, 1.3 + 0.19 * len(sites), 1, 2, sharey=True, sharex=True)
    place = {site: i for i, site in enumerate(sites)}
    for ax, group in zip(axes.flat, ("near", "far"), strict=True):
        rows = data[data["group"] == group]
        for verdict, (colour, marker) in _VERDICTS.items():
            part = rows[rows["verdict"] == verdict]
            gaps = np.abs(100 * (part[["lo", "hi"]].to_numpy() - part[["value"]].to_numpy())).T
            label = "no significant difference" if verdict == "undecided" else f"{verdict} than the end"
            ax.errorbar(100 * part["value"], part["site"].map(place), xerr=gaps if len(part) else None, fmt=marker,
                        color=colour, markersize=4, elinewidth=1.2, label=label)  # fmt: skip
        ax.axvline(0, color=_text_colour(), linewidth=0.9)
        ax.set(title=_GROUP[group], xlabel=f"mean {metric}, points")
    axes[0, 0].set_yticks(range(len(sites)), sites, fontsize=8.5)
    axes[0, 0].set_ylim(len(sites) - 0.4, -0.6)
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure
