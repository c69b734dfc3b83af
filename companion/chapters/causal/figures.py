"""Figures of the causal check: one function a figure, tidy data in, matplotlib Figure out."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ...figures.figures import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, _figure, _text_colour
from .curves import ORDERS

_KINDS = {"core deleted": BLUE, "APP": GREEN, "head": ORANGE}  # by a word of the title
_DASHES = [(BLUE, "-"), (ORANGE, "--"), (GREEN, "-."), (GREY, ":"), (PURPLE, (0, (5, 1)))]
_STYLES = dict(zip(ORDERS, _DASHES, strict=True))


def logit_changes(data: pd.DataFrame) -> Figure:
    """Heat map, class deleted by logit changed. Columns: deleted, logit (names), change."""
    import seaborn  # here, since it costs half a second

    names = list(dict.fromkeys(data["deleted"]))
    matrix = data.pivot(index="deleted", columns="logit", values="change").loc[names, names]
    figure, axes = _figure(7, 6.4)
    largest, ax = np.abs(matrix.to_numpy()).max(), axes[0, 0]
    shown = {"vmin": -largest, "vmax": largest, "cmap": "RdBu", "square": True}
    shown |= dict.fromkeys(("xticklabels", "yticklabels"), len(names) <= 30)
    seaborn.heatmap(matrix, ax=ax, cbar_kws={"label": "mean change of the logit", "shrink": 0.75}, **shown)
    ax.tick_params(labelsize=8)
    ax.set(xlabel="logit", ylabel="class whose core is deleted, in its own images")
    return figure


def interventions(data: pd.DataFrame) -> Figure:
    """Interventions beside each other. Columns: title, panel, value, lo, hi; means over classes with intervals."""
    titles, panels = list(dict.fromkeys(data["title"])), list(dict.fromkeys(data["panel"]))
    figure, axes = _figure(8, 1.5 + 0.34 * len(titles), 1, len(panels), sharey=True)
    for ax, panel in zip(axes[0], panels, strict=True):
        rows = data[data["panel"] == panel].set_index("title").loc[titles]
        gaps = np.abs(rows[["lo", "hi"]].to_numpy() - rows[["value"]].to_numpy()).T
        for i, title in enumerate(titles):
            known = [colour for word, colour in _KINDS.items() if word in title]
            style = {"fmt": "o", "color": known[0] if known else GREY, "markersize": 6}
            ax.errorbar(rows.loc[title, "value"], i, xerr=gaps[:, [i]], **style)
        ax.set(title=panel, ylim=(len(titles) - 0.5, -0.5))
        ax.axvline(0 if rows["value"].min() < 0 else 100, color=_text_colour(), linewidth=0.9)
    axes[0, 0].set_yticks(range(len(titles)), titles, fontsize=10)
    return figure


def dose_response(data: pd.DataFrame) -> Figure:
    """A logit's margin against the factor on the class's core. Columns: series, rows, alpha, measure, value, lo, hi."""
    kinds = ("of the class", "of other classes")
    figure, axes = _figure(8, 3.9, 1, 2)
    styles = {"core": (BLUE, "o", "the class's core"), "random": (GREY, "s", "random active latents, same energy")}
    for ax, kind in zip(axes[0], kinds, strict=True):
        for series, (colour, marker, label) in styles.items():
            rows = data[(data["rows"] == kind) & (data["series"] == series) & (data["measure"] == "margin")]
            ax.fill_between(rows["alpha"], rows["lo"], rows["hi"], color=colour, alpha=0.25, linewidth=0)
            ax.plot(rows["alpha"], rows["value"], color=colour, marker=marker, markersize=4, label=label)
        ax.axhline(0, color=_text_colour(), linewidth=0.9)
        ax.axvline(1, color=_text_colour(), linewidth=0.9, linestyle=":")
        ax.set(title=f"images {kind}", xlabel="factor on the latents (1: untouched)")
    axes[0, 0].set_ylabel("logit less the best other one")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


def number_curves(data: pd.DataFrame) -> Figure:
    """Sufficiency and necessity against the number of latents. Columns: order, test, n, measure, value, lo, hi."""
    panels = {"sufficiency": "only they are kept", "necessity": "they are deleted"}
    figure, axes = _figure(8, 4.3, 1, 2, sharey=True)
    for ax, (test, title) in zip(axes[0], panels.items(), strict=True):
        for order, (colour, dash) in _STYLES.items():
            chosen = (data["order"] == order) & (data["test"] == test) & (data["measure"] == "accuracy")
            rows = data[chosen & (data["n"] > 0)]
            band = 100 * rows[["lo", "hi"]].to_numpy().T
            ax.fill_between(rows["n"], *band, color=colour, alpha=0.2, linewidth=0)
            ax.plot(rows["n"], 100 * rows["value"], color=colour, linestyle=dash, label=ORDERS[order])
        ax.axhline(90 if test == "sufficiency" else 10, color=_text_colour(), linewidth=0.9, linestyle=":")
        ax.set(xscale="log", title=title, xlabel="number of latents a class")
        ax.xaxis.set_major_formatter("{x:.0f}")
    axes[0, 0].set(ylabel="accuracy kept, % of the head's", ylim=(-3, 104))
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, title="order")
    return figure


def suppression(data: pd.DataFrame) -> Figure:
    """What suppressing a class costs the others. Columns: method, class, n, fall, others_kept."""
    figure, axes = _figure(7, 4.6)
    ax = axes[0, 0]
    deletion = data[data["method"] == "deletion"]
    whole = deletion[deletion["n"] == deletion["n"].max()]
    dots = {"deletion": (whole, BLUE, "o", "whole core deleted")}
    for method, colour, marker, label in (
        ("app_core", ORANGE, "D", "APP on the core"),
        ("app_all", GREEN, "^", "APP on all latents"),
    ):
        dots[method] = data[data["method"] == method], colour, marker, label
    for rows, colour, marker, label in dots.values():
        ax.scatter(rows["fall"], 100 * rows["others_kept"], s=18, color=colour, alpha=0.45, marker=marker, linewidths=0)
        ax.scatter(
            rows["fall"].mean(), 100 * rows["others_kept"].mean(), s=90, color=colour, marker=marker, label=label,
            edgecolors=_text_colour(), linewidths=1, zorder=4,
        )  # fmt: skip
    line = deletion.groupby("n")[["fall", "others_kept"]].mean()
    label = "first n latents deleted, mean"
    ax.plot(line["fall"], 100 * line["others_kept"], color=RED, marker=".", label=label, zorder=3)
    for n in (1, 2, 10, 41, 124):
        if n in line.index:
            at = line.loc[n, "fall"], 100 * line.loc[n, "others_kept"]
            ax.annotate(f"n = {n}", at, xytext=(-4, -13), textcoords="offset points", fontsize=9, ha="right")
    ax.set(xlabel="fall of the class's logit in its own images", ylabel="accuracy kept on other classes, %")
    figure.legend(loc="outside upper center", ncols=2)
    return figure
