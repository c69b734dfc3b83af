"""Figures on what latents mean: tidy data in, matplotlib Figure out."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from capsae.latents.naming import KIND_TITLES

from ...figures.figures import BLUE, GREEN, GREY, ORANGE, _colours, _figure, _text_colour, set_label

_KIND = {"class": BLUE, "synset": ORANGE, "none": GREY, "rare": GREEN}


def selectivity_density(data: pd.DataFrame) -> Figure:
    """Each latent's selectivity against its density. Columns: density, selectivity, kind."""
    figure, axes = _figure(7, 4.2)
    ax = axes[0, 0]
    for kind, colour in reversed(_KIND.items()):
        rows = data[data["kind"] == kind]
        if len(rows):
            label = f"{KIND_TITLES[kind]} ({len(rows)})"
            ax.scatter(rows["density"], rows["selectivity"], s=14, color=colour, alpha=0.7, linewidths=0, label=label)
    ax.set(xscale="log", xlabel="share of the training rows in which the latent fires", ylim=(-0.02, 1.02))
    ax.set_ylabel("selectivity, 1 = one class alone")
    ax.xaxis.set_major_formatter(lambda v, _: f"{100 * v:g} %")
    figure.legend(loc="outside lower center", ncols=2, markerscale=2)
    return figure


def names_by_hold(data: pd.DataFrame) -> Figure:
    """Share of latents with a name against the threshold. Columns: dictionary, hold, kind, value, lo, hi."""
    kinds = {"named": "one class or a synset", "class": "one class"}
    if not (data.loc[data["kind"] == "synset", "value"] > 0).any():
        del kinds["named"]  # names are classes alone
    figure, axes = _figure(7, 3.4, 1, len(kinds), sharey=True)
    titles = list(dict.fromkeys(data["dictionary"]))
    for ax, (kind, heading) in zip(axes.flat, kinds.items(), strict=True):
        for title, colour, mark in zip(titles, _colours(titles).values(), "osD^v", strict=False):
            rows = data[(data["dictionary"] == title) & (data["kind"] == kind)]
            reach = 100 * np.vstack([rows["value"] - rows["lo"], rows["hi"] - rows["value"]])
            style = {"marker": mark, "color": colour, "label": title, "capsize": 3}
            known = {} if np.isnan(reach).any() else {"yerr": reach}
            ax.errorbar(100 * rows["hold"], 100 * rows["value"], **known, **style)
        ax.set(title=heading, xlabel="activation that a name must hold, %", ylim=(0, None))
    axes[0, 0].set_ylabel("latents, %")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def volcano(data: pd.DataFrame, a: str, b: str) -> Figure:
    """Difference of firing frequency against its adjusted p, a dot a latent. Columns: difference, q, more."""
    figure, axes = _figure(7, 4.2)
    ax = axes[0, 0]
    height = -np.log10(np.maximum(data["q"], 1e-300))
    often = {name: f"more often in {set_label(name)}" for name in (a, b)}
    for more, colour, label in (
        ("", GREY, "no significant difference"),
        ("A", BLUE, often[a]),
        ("B", ORANGE, often[b]),
    ):
        of = (data["more"] == more).to_numpy()
        x, y, label = 100 * data["difference"][of], height[of], f"{label} ({of.sum()})"
        ax.scatter(x, y, s=16, color=colour, alpha=0.75, linewidths=0, label=label)
    ax.axvline(0, color=_text_colour(), linewidth=0.8)
    ax.set_yscale("symlog", linthresh=2)
    ax.set_ylim(bottom=-0.1)
    ax.set_yticks([t for t in (0, 1, 2, 5, 10, 20, 50, 100, 200) if t <= max(2, height.max() * 1.3)])
    ax.yaxis.set_major_formatter(lambda v, _: f"{v:g}")
    ax.set(xlabel=f"firing frequency in {set_label(b)} less {set_label(a)}, points", ylabel="−log₁₀ of the adjusted p")
    figure.legend(loc="outside lower center", ncols=1, markerscale=1.6)
    return figure


def contrast_bars(data: pd.DataFrame, a: str = "test") -> Figure:
    """Latents that differ from one set, by set. Columns: set, tested, more_a, more_b."""
    figure, axes = _figure(7, 1.6 + 0.42 * len(data))
    ax, place = axes[0, 0], np.arange(len(data))
    ax.barh(place, -100 * data["more_a"] / data["tested"], color=BLUE, height=0.7, label=f"less often than in {a}")
    ax.barh(place, 100 * data["more_b"] / data["tested"], color=ORANGE, height=0.7, label=f"more often than in {a}")
    ax.axvline(0, color=_text_colour(), linewidth=0.8)
    ax.set_yticks(place, [set_label(name) for name in data["set"]])
    ax.invert_yaxis()
    ax.xaxis.set_major_formatter(lambda v, _: f"{abs(v):g}")
    ax.set(xlabel="latents that differ, % of those tested")
    ax.grid(axis="y", visible=False)
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def community_classes(data: pd.DataFrame) -> Figure:
    """Where the latents of each group have their strongest class. Columns: community, class, latents; all pairs."""
    import seaborn  # here, since it costs half a second

    wide = data.pivot(index="community", columns="class", values="latents")[list(dict.fromkeys(data["class"]))]
    share = 100 * wide.div(wide.sum(axis=1).clip(lower=1), axis=0)
    order = np.lexsort((wide.index, share.to_numpy().argmax(axis=1)))
    share.index = [f"{c + 1} ({n})" for c, n in wide.sum(axis=1).items()]
    figure, axes = _figure(7, 2.0 + 0.24 * len(share))
    shown = {"cmap": "cividis", "vmin": 0, "vmax": 100, "xticklabels": True, "yticklabels": True}
    cbar = {"label": "latents of the group, %", "shrink": 0.8}
    seaborn.heatmap(share.iloc[order], ax=axes[0, 0], cbar_kws=cbar, **shown)
    axes[0, 0].set(xlabel="", ylabel="group (latents)")
    axes[0, 0].set_xticks(axes[0, 0].get_xticks(), wide.columns, rotation=45, ha="right", rotation_mode="anchor")
    axes[0, 0].tick_params(labelsize=9)
    return figure


def measured_dots(data: pd.DataFrame) -> Figure:
    """Representations side by side, a panel a measure. Columns: panel, representation, value, lo, hi."""
    panels = list(dict.fromkeys(data["panel"]))
    names = list(dict.fromkeys(data["representation"]))
    figure, axes = _figure(7, (1.1 + 0.3 * len(names)) * -(-len(panels) // 2), -(-len(panels) // 2), 2, sharey=True)
    for ax, panel in zip(axes.flat, panels, strict=False):
        rows = data[data["panel"] == panel].set_index("representation").loc[names]
        reach = np.vstack([rows["value"] - rows["lo"], rows["hi"] - rows["value"]]).clip(0)
        for i, (name, colour) in enumerate(_colours(names).items()):
            ax.errorbar(rows["value"].iloc[i], i, xerr=reach[:, [i]], fmt="o", color=colour, capsize=3, label=name)
        ax.set_yticks(range(len(names)), names, fontsize=10)
        ax.set(title=panel, ylim=(len(names) - 0.5, -0.5))
        ax.grid(axis="y", visible=False)
    for ax in axes.flat[len(panels) :]:
        ax.remove()
    return figure
