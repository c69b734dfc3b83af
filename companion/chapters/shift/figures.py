"""Figures on covariate shift: one function a figure, tidy data in, matplotlib Figure out.

The data come from :mod:`companion.chapters.shift.maths`.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ...figures.figures import BLUE, GREY, RED, _colours, _figure, _text_colour

_STYLES = ["-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1))]
_MARKERS = "os^Dv*"
_VERDICTS = {"better": (BLUE, "o"), "undecided": (GREY, "D"), "worse": (RED, "s")}


def by_strength(data: pd.DataFrame, label: str = "accuracy, %") -> Figure:
    """A share against the strength of a corruption, one panel a corruption, with intervals.

    Columns: series, corruption, strength (0 = clean), value, lo, hi (shares).
    """
    panels, series = (list(dict.fromkeys(data[column])) for column in ("corruption", "series"))
    rows_of_panels = -(-len(panels) // 2)
    figure, axes = _figure(7, 2.6 * rows_of_panels + 0.7, rows_of_panels, min(2, len(panels)), sharey=True)
    colours = _colours(series)
    for ax, panel in zip(axes.flat, panels, strict=False):
        for i, name in enumerate(series):
            rows = data[(data["corruption"] == panel) & (data["series"] == name)].sort_values("strength")
            at = rows["strength"].to_numpy(float) + 0.06 * (i - (len(series) - 1) / 2)  # intervals stay apart
            value, lo, hi = (100 * rows[column].to_numpy(float) for column in ("value", "lo", "hi"))
            gaps = np.nan_to_num(np.vstack([value - lo, hi - value]).clip(0))
            ax.errorbar(
                at, value, gaps, color=colours[name], linestyle=_STYLES[i % len(_STYLES)], elinewidth=0.8,
                marker=_MARKERS[i % len(_MARKERS)], markersize=4, linewidth=1.4, label=name,
            )  # fmt: skip
        strengths = sorted(data.loc[data["corruption"] == panel, "strength"].unique())
        ax.set_xticks(strengths, ["clean" if s == 0 else f"{s:g}" for s in strengths])
        ax.set(title=panel, xlabel="strength")
    for ax in axes[:, 0]:
        ax.set(ylabel=label)
    for ax in axes.flat[len(panels) :]:
        ax.remove()
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=10)
    return figure


def differences(data: pd.DataFrame) -> Figure:
    """Each representation less the CLS, with 95 % intervals: a panel a place, a row a representation.

    Columns: panel, label, value, lo, hi (points), verdict.
    """
    panels, labels = (list(dict.fromkeys(data[column])) for column in ("panel", "label"))
    columns = min(3, len(panels))
    rows_of_panels = -(-len(panels) // columns)
    height = rows_of_panels * (0.75 + 0.24 * len(labels)) + 0.5
    figure, axes = _figure(7.6, height, rows_of_panels, columns, sharey=True, sharex=True)
    for ax, panel in zip(axes.flat, panels, strict=False):
        part = data[data["panel"] == panel].set_index("label").loc[labels]
        for verdict, (colour, marker) in _VERDICTS.items():
            at = (part["verdict"] == verdict).to_numpy()
            if at.any():
                value = part["value"].to_numpy()[at]
                gaps = np.abs(np.vstack([value - part["lo"].to_numpy()[at], part["hi"].to_numpy()[at] - value]))
                ax.errorbar(
                    value, np.arange(len(labels))[at], xerr=gaps, fmt=marker, color=colour, markersize=5, elinewidth=1.4
                )
        ax.axvline(0, color=_text_colour(), linewidth=0.9)
        ax.set_title(panel, fontsize=11)
        ax.set_ylim(len(labels) - 0.5, -0.5)
    for ax in axes[:, 0]:
        ax.set_yticks(range(len(labels)), labels, fontsize=9)
    for ax in axes.flat[len(panels) :]:
        ax.remove()
    shown = [(axes[0, 0].errorbar([], [], [], fmt=m, color=c, markersize=5), v) for v, (c, m) in _VERDICTS.items()]
    names = {"better": "better than the CLS", "worse": "worse than the CLS", "undecided": "undecided"}
    figure.legend([handle for handle, _ in shown], [names[v] for _, v in shown], loc="outside upper center", ncols=3)
    figure.supxlabel("accuracy less the CLS probe's, points", fontsize=11)
    return figure
