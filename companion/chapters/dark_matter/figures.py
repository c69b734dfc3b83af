"""Figures of the page on dark matter: tidy data in, matplotlib Figure out."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ...figures.figures import BLUE, GREEN, GREY, ORANGE, PURPLE, _figure, _text_colour, results_heatmap, set_label

_FITS = {"unseen": ("rows not trained on", BLUE, "o"), "rescaled": ("training rows, rescaled", ORANGE, "s")}
_FITS |= {"one number": ("one number (shrinkage)", GREY, "D")}
_PARTS = {"reconstruction": ("reconstruction", BLUE), "linear": ("linear part of the error", ORANGE)}
_PARTS |= {"rest": ("rest of the error", GREEN), "cross": ("overlap of the three", PURPLE)}


def predictability(data: pd.DataFrame) -> Figure:
    """R^2 by coder, a panel a target. Columns: coder, target ("vector", "norm2"), fit, value, lo, hi (shares)."""
    coders = list(dict.fromkeys(data["coder"]))
    figure, axes = _figure(8, 1.6 + 0.46 * len(coders), 1, 2, sharey=True)
    for ax, (target, label) in zip(axes[0], (("vector", "error vector"), ("norm2", "squared norm")), strict=True):
        for n, (fit, (name, colour, marker)) in enumerate(_FITS.items()):
            rows = data[(data["target"] == target) & (data["fit"] == fit)]
            if rows.empty:
                continue
            y = np.array([coders.index(coder) for coder in rows["coder"]]) + 0.22 * (n - 1)
            value, lo, hi = (100 * rows[key].to_numpy(float) for key in ("value", "lo", "hi"))
            gap = np.vstack([value - lo, hi - value]).clip(0)
            ax.errorbar(value, y, xerr=gap, fmt=marker, color=colour, capsize=2, markersize=6, label=name)
        ax.axvline(0, color=_text_colour(), linewidth=0.8)
        ax.set(title=f"R² of the {label}", xlabel="%", xlim=(-6, 104), ylim=(len(coders) - 0.5, -0.5))
        ax.set_yticks(range(len(coders)), coders, fontsize=10.5)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def shares(data: pd.DataFrame) -> Figure:
    """Shares of the input's variance by set. Columns: set, group, what (part or "cross"), value, lo, hi."""
    sets = list(dict.fromkeys(data["set"]))
    figure, axes = _figure(8, 1.6 + 0.72 * len(sets))
    ax = axes[0, 0]
    for n, (part, (name, colour)) in enumerate(_PARTS.items()):
        rows = data[data["what"] == part].set_index("set").loc[sets]
        y = np.arange(len(sets)) + 0.2 * (n - 1.5)
        value, lo, hi = (100 * rows[key].to_numpy(float) for key in ("value", "lo", "hi"))
        ax.barh(y, value, height=0.18, color=colour, label=name, linewidth=0)
        gap = np.vstack([value - lo, hi - value]).clip(0)
        ax.errorbar(value, y, xerr=gap, fmt="none", ecolor=_text_colour(), elinewidth=1, capsize=2)
    ax.axvline(0, color=_text_colour(), linewidth=0.8)
    names = [f"ID {name}" if "/" not in name else f"{set_label(name)}\n({name.split('/')[0]})" for name in sets]
    ax.set_yticks(range(len(sets)), names)
    ax.set_ylim(len(sets) - 0.4, -0.6)
    ax.set(xlabel="share of the input's variance about the training mean, %")
    ax.grid(axis="y", visible=False)
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def heatmap(data: pd.DataFrame, metric: str) -> Figure:
    """Detectors by parts, means over all OOD sets. Columns: method, part, group, metric, value, lo, hi."""
    return results_heatmap(data.assign(set=data["part"]), metric)
