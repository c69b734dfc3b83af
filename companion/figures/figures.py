"""Figures of the book: one function a figure, tidy data in, matplotlib Figure out.

The data of each come from :mod:`companion.figures.tidy`; :func:`companion.figures.display.show` puts a figure into a
page, as one SVG that follows the theme. No function reads files, decides a path or computes a result.
"""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from .display import ink_on, result, show, style, table

__all__ = ["result", "show", "style", "table"]  # with the figures below, all a notebook needs

# seaborn's "colorblind" palette, its blue lightened so that it also holds on a dark page; one meaning keeps one colour.
BLUE, ORANGE, GREEN, RED, PURPLE = "#2b87c8", "#de8f05", "#029e73", "#d55e00", "#cc78bc"
BROWN, PINK, GREY, YELLOW, SKY = "#ca9161", "#fbafe4", "#949494", "#ece133", "#56b4e9"
ROLE = {"id": BLUE, "near": ORANGE, "far": GREEN, "train": SKY, "matched": ORANGE, "other": GREY}

METRICS = {
    "auroc": "AUROC",
    "fpr95_ood_pos": "FPR95, OOD positive",
    "fpr95_id_pos": "FPR95, ID positive",
    "aupr_in": "AUPR-in",
    "aupr_out": "AUPR-out",
    "autc": "AUTC",
    "oscr": "OSCR",
    "auroc_correct": "AUROC, correctly classified ID only",
    "aurc": "AURC, ID errors",
    "errors_flagged": "ID errors flagged",
    "accuracy": "accuracy",
}


def _figure(width: float, height: float, rows: int = 1, columns: int = 1, **kwargs):
    """A figure outside pyplot's global state, with its axes as an array (rows, columns)."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **kwargs)


def _panels(names: Sequence[str], height: float, extra: float = 0, columns: int = 2):
    """A figure with a panel of some height for each name, and the pairs of axes and name."""
    rows = -(-len(names) // columns)
    figure, axes = _figure(7, height * rows + extra, rows, columns)
    for ax in axes.flat[len(names) :]:
        ax.remove()
    return figure, list(zip(axes.flat, names, strict=False))


def _text_colour() -> str:
    return mpl.rcParams["text.color"]


def _colours(names: Sequence[str]) -> dict[str, str]:
    """A colour a name. EPD is ink and RPD purple wherever they stand; no other has these."""
    ours = {"EPD": _text_colour(), "RPD": PURPLE, "RPD (ours)": PURPLE}
    palette = [BLUE, ORANGE, GREEN, RED, BROWN, PINK, SKY, YELLOW, GREY]
    others = [name for name in names if name not in ours]
    found = ours | {name: palette[i % len(palette)] for i, name in enumerate(others)}
    return {name: found[name] for name in names}


def set_label(name: str) -> str:
    """The short name of a set: ``near/imagenet980`` -> ``imagenet980``."""
    return name.split("/")[-1].replace("_", " ")


def training_curves(data: pd.DataFrame, best_epoch: int | None = None) -> Figure:
    """Training history. Columns: epoch, panel ("FVU", "latents that never fire (%)", ...), series, value."""
    panels = list(dict.fromkeys(data["panel"]))
    figure, pairs = _panels(panels, 2.5)
    for ax, panel in pairs:
        rows = data[data["panel"] == panel]
        for (name, part), colour in zip(rows.groupby("series", sort=False), (BLUE, ORANGE, GREEN), strict=False):
            ax.plot(part["epoch"], part["value"], color=colour, label=name)
        if best_epoch is not None:
            ax.axvline(best_epoch, color=_text_colour(), linestyle=":", linewidth=1.2)
        ax.set(title=panel, xlabel="epoch")
        if rows["series"].nunique() > 1:
            ax.legend()
    return figure


def _boxes(ax, data: pd.DataFrame, colours: Sequence[str]) -> None:
    """Horizontal boxes from quantiles: whiskers 5-95 %, box 25-75 %, line at the median."""
    boxes = [
        {"whislo": r.q05, "q1": r.q25, "med": r.q50, "q3": r.q75, "whishi": r.q95, "label": r.label}
        for r in data.itertuples()
    ]
    drawn = ax.bxp(
        boxes, orientation="horizontal", showfliers=False, patch_artist=True, widths=0.62,
        medianprops={"color": _text_colour(), "linewidth": 1.6},
        whiskerprops={"color": _text_colour()}, capprops={"color": _text_colour()},
    )  # fmt: skip
    for patch, colour in zip(drawn["boxes"], colours, strict=True):
        patch.set(facecolor=colour, alpha=0.85)
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)


def decode_quality(data: pd.DataFrame) -> Figure:
    """Unexplained share of each sample's variance, by set. Columns: set, group, q05, q25, q50, q75, q95."""
    figure, axes = _figure(7, 0.9 + 0.38 * len(data))
    rows = data.assign(label=data["set"].map(set_label))
    _boxes(axes[0, 0], rows, [ROLE.get(group, GREY) for group in data["group"]])
    axes[0, 0].set(xlabel="share of variance the SAE leaves unexplained, per sample")
    return figure


def jaccard_heatmap(data: pd.DataFrame) -> Figure:
    """Overlap of the classes' core sets (after the paper's figure 2). Columns: class_a, class_b, jaccard."""
    import seaborn  # here, since it costs half a second

    names = list(dict.fromkeys(data["class_a"]))
    matrix = data.pivot(index="class_a", columns="class_b", values="jaccard").loc[names, names]
    own = np.eye(len(names), dtype=bool)  # 1 by definition: it would rule the scale
    figure, axes = _figure(7, 6.4)
    ax, named = axes[0, 0], len(names) <= 25
    seaborn.heatmap(
        matrix,
        ax=ax,
        mask=own,
        cmap="cividis",
        vmin=0,
        vmax=max(0.1, np.ceil(10 * matrix.to_numpy()[~own].max(initial=0)) / 10),
        square=True,
        xticklabels=names if named else False,
        yticklabels=names if named else False,
        cbar_kws={"label": "Jaccard index of core sets", "shrink": 0.8},
    )
    ax.tick_params(labelsize=9)
    ax.set(xlabel="" if named else "class", ylabel="" if named else "class")
    return figure


def profile_pair(data: pd.DataFrame) -> Figure:
    """One sample's profile against two classes' (after the paper's figure 3).

    Columns: panel, rank (position in the class's core, its largest latent first), expected (Q), profile (P).
    """
    panels = list(dict.fromkeys(data["panel"]))
    figure, axes = _figure(7, 2.5 * len(panels), len(panels), 1, sharey=True)
    for ax, panel in zip(axes.flat, panels, strict=True):
        rows = data[data["panel"] == panel].sort_values("rank")
        fired = rows[rows["profile"] > 0]
        ax.fill_between(rows["rank"], rows["expected"], step="mid", color=BLUE, alpha=0.35, label="class profile Q")
        ax.vlines(fired["rank"], 0, fired["profile"], color=ORANGE, linewidth=1.6, label="this sample P")
        ax.set(title=panel, ylabel="share of core energy", xlabel="latents of the core, most active first")
        ax.set_xscale("symlog", linthresh=10)
        ax.set_xlim(0.5, rows["rank"].max())
        ax.xaxis.set_major_formatter(mpl.ticker.ScalarFormatter())
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def core_activation(data: pd.DataFrame) -> Figure:
    """Mean activation of a class's core by ID samples, by OOD predicted as the class, by other OOD (paper's figure 5).

    Columns: class, kind ("ID", "OOD, predicted as this class", "OOD, predicted as another"), activation; a dot a class.
    """
    kinds = list(dict.fromkeys(data["kind"]))
    figure, axes = _figure(7, 3.4)
    ax = axes[0, 0]
    for place, (kind, colour) in enumerate(zip(kinds, (BLUE, ORANGE, GREY), strict=False)):
        activation = data.loc[data["kind"] == kind, "activation"]
        scatter = 0.5 * np.random.default_rng(0).random(len(activation)) - 0.25  # keeps equal dots apart
        ax.scatter(activation, place + scatter, s=28, color=colour, alpha=0.75, linewidths=0, zorder=2)
    means = data.groupby("kind")["activation"].mean()
    ax.set_yticks(range(len(kinds)), kinds)
    ax.set_ylim(len(kinds) - 0.5, -0.5)
    ax.scatter([means[k] for k in kinds], range(len(kinds)), marker="|", s=900, color=_text_colour(), zorder=3)
    ax.set(xlabel="mean activation of the class's core latents", ylabel="", xlim=(0, None))
    return figure


def sorted_profiles(data: pd.DataFrame) -> Figure:
    """Mean profile with each sample's shares sorted (after the paper's figure 6). Columns: set, group, rank, share."""
    figure, axes = _figure(7, 4)
    ax = axes[0, 0]
    styles = {"id": "-", "near": "--", "far": ":"}
    colours = _colours(list(dict.fromkeys(data["set"])))
    for (name, group), rows in data.groupby(["set", "group"], sort=False):
        ax.plot(rows["rank"], rows["share"], styles.get(group, "-."), color=colours[name], label=set_label(name))
    ax.set(xlabel="rank of the latent within the sample's core", ylabel="mean share of core energy", yscale="log")
    ax.legend(ncols=2, fontsize=10)
    return figure


def _class_dots(data: pd.DataFrame, column: str, label: str, paper: tuple[float, str] | None) -> Figure:
    rows = data.sort_values(column)
    many = len(rows) > 30
    figure, axes = _figure(7, 3 if many else 1 + 0.26 * len(rows))
    ax = axes[0, 0]
    if many:
        ax.hist(rows[column], bins=24, color=BLUE, edgecolor=mpl.rcParams["axes.facecolor"])
        ax.set(ylabel="classes", xlabel=label)
    else:
        ax.hlines(range(len(rows)), 0, rows[column], color=BLUE, linewidth=1.2, alpha=0.8)
        ax.scatter(rows[column], range(len(rows)), color=BLUE, zorder=3)
        ax.set_yticks(range(len(rows)), rows["class"], fontsize=10)
        ax.set(xlabel=label)
    ax.axvline(rows[column].mean(), color=_text_colour(), linewidth=1.4, label="mean of the classes")
    if paper is not None:
        ax.axvline(paper[0], color=RED, linestyle="--", linewidth=1.4, label=paper[1])
    ax.set_xlim(left=0)
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def active_fraction(data: pd.DataFrame, paper: tuple[float, str] | None = None) -> Figure:
    """Share of the latents that fire at all in a class. Columns: class, active_fraction; ``paper`` = (value, label)."""
    return _class_dots(data, "active_fraction", "share of latents active in the class", paper)


def within_class_stability(data: pd.DataFrame) -> Figure:
    """Cosine between the profiles of two halves of a class's samples. Columns: class, stability."""
    return _class_dots(data, "stability", "cosine between the profiles of two halves of the class", None)


def embedding(data: pd.DataFrame) -> Figure:
    """Two-dimensional map of the features. Columns: x, y, set, group, class (ID only; empty otherwise)."""
    figure, axes = _figure(7, 5.6)
    ax = axes[0, 0]
    known = data[data["group"] == "id"]
    ax.scatter(known["x"], known["y"], s=12, color=GREY, alpha=0.6, label="in distribution", linewidths=0)
    sets = [name for name in dict.fromkeys(data["set"]) if name not in set(known["set"])]
    colours = _colours(sets)
    markers = dict(zip(sets, "ovs^D<>Pp*hX", strict=False))
    for name in sets:
        rows = data[data["set"] == name]
        ax.scatter(
            rows["x"], rows["y"], s=20, color=colours[name], marker=markers.get(name, "o"), alpha=0.8, linewidths=0,
            label=set_label(name),
        )  # fmt: skip
    for name, rows in known.groupby("class"):
        if name and known["class"].nunique() <= 25:
            centre = rows[["x", "y"]].median()
            ax.annotate(name, centre, ha="center", fontsize=8, color=_text_colour(), fontweight="bold")
    ax.set(xticks=[], yticks=[], xlabel="", ylabel="")
    ax.grid(visible=False)
    figure.legend(loc="outside lower center", ncols=3, fontsize=10, markerscale=1.6)
    return figure


def score_histograms(data: pd.DataFrame) -> Figure:
    """Densities of scores, one panel a method. Columns: method, group ("id", "near", "far"), left, right, density."""
    figure, pairs = _panels(list(dict.fromkeys(data["method"])), 2.5, 0.4)
    for ax, method in pairs:
        for group, rows in data[data["method"] == method].groupby("group", sort=False):
            edges = np.append(rows["left"], rows["right"].iloc[-1])
            ax.stairs(rows["density"], edges, fill=True, alpha=0.35, color=ROLE[group])
            ax.stairs(rows["density"], edges, color=ROLE[group], linewidth=1.6, label=_GROUP[group])
        ax.set(title=method, yticks=[], xlabel="score, higher = more OOD")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


_GROUP = {"id": "ID test", "near": "near OOD", "far": "far OOD", "all": "all OOD"}


def roc_curves(data: pd.DataFrame) -> Figure:
    """ROC curves, one panel an OOD set, OOD positive. Columns: set, method, fpr, tpr."""
    sets, methods = list(dict.fromkeys(data["set"])), list(dict.fromkeys(data["method"]))
    figure, pairs = _panels(sets, 2.9, 0.5)
    colours = _colours(methods)
    dashes = dict(zip(methods, ["-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1))] * 4, strict=False))
    for ax, name in pairs:
        for method in methods:
            rows = data[(data["set"] == name) & (data["method"] == method)]
            ax.plot(rows["fpr"], rows["tpr"], color=colours[method], linestyle=dashes[method], label=method)
        ax.axhline(0.95, color=_text_colour(), linewidth=0.8, linestyle=":")
        ax.set(xscale="log", xlim=(1e-3, 1), ylim=(0, 1.01), title=set_label(name))
        ax.xaxis.set_major_formatter(mpl.ticker.FuncFormatter(lambda share, _: f"{100 * share:g} %"))
        ax.set(xlabel="ID rejected", ylabel="OOD found")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def results_heatmap(data: pd.DataFrame, metric: str = "fpr95_ood_pos", intervals: bool = True) -> Figure:
    """One metric, methods by sets, with intervals or without. Columns: method, set, group, metric, value, lo, hi."""
    rows = data[data["metric"] == metric].copy()
    rows["column"] = np.where(rows["set"] == "mean", "mean " + rows["group"], rows["set"].map(set_label))
    methods = list(dict.fromkeys(rows["method"]))
    columns = sorted(dict.fromkeys(rows["column"]), key=lambda name: not name.startswith("mean "))
    value, lo, hi = (
        100 * rows.pivot(index="method", columns="column", values=name).loc[methods, columns].to_numpy(float)
        for name in ("value", "lo", "hi")
    )
    # At most 8 inches wide, or it would scroll sideways on a page.
    figure, axes = _figure(min(8.0, 3.2 + 0.7 * len(columns)), 2.2 + (0.36 if intervals else 0.225) * len(methods))
    ax = axes[0, 0]
    good_is_low = metric.startswith("fpr")
    limits = (0, max(50, np.nanmax(value))) if good_is_low else (min(50, np.nanmin(value)), 100)
    cmap = "cividis_r" if good_is_low else "cividis"
    image = ax.imshow(value, cmap=cmap, vmin=limits[0], vmax=limits[1], aspect="auto")
    for (i, j), v in np.ndenumerate(value):
        ink = ink_on(image.cmap(image.norm(v)))
        ax.text(j, i - 0.16 * intervals, f"{v:.1f}", ha="center", va="center", color=ink, fontsize=9.5)
        if intervals and np.isfinite([lo[i, j], hi[i, j]]).all():
            ax.text(j, i + 0.25, f"{lo[i, j]:.1f}–{hi[i, j]:.1f}", ha="center", va="center", color=ink, fontsize=8)
    ax.set_xticks(range(len(columns)), columns, rotation=35, ha="left", rotation_mode="anchor")
    ax.set_yticks(range(len(methods)), methods, fontsize=10)
    ax.tick_params(axis="x", labelsize=10)
    ax.xaxis.tick_top()
    ax.grid(visible=False)
    figure.colorbar(image, ax=ax, label=f"{METRICS.get(metric, metric)}, %", location="bottom", shrink=0.6, aspect=40)
    return figure


def ablation(data: pd.DataFrame, columns: int = 2) -> Figure:
    """A metric against a setting, with intervals.

    Columns: panel, setting (text, in order), series, value, lo, hi (as shares), chosen (bool: the experiment's own
    value).
    """
    panels = list(dict.fromkeys(data["panel"]))
    figure, pairs = _panels(panels, 2.8, 0.4, min(columns, len(panels)))
    series = list(dict.fromkeys(data["series"]))
    colours = _colours(series)
    for ax, panel in pairs:
        part = data[data["panel"] == panel]
        settings = list(dict.fromkeys(part["setting"]))
        place = {setting: i for i, setting in enumerate(settings)}
        for n, name in enumerate(series):
            rows = part[part["series"] == name]
            if rows.empty:
                continue
            x = np.array([place[setting] for setting in rows["setting"]]) + 0.12 * (n - (len(series) - 1) / 2)
            value, lo, hi = (100 * rows[c].to_numpy(float) for c in ("value", "lo", "hi"))
            gap = np.nan_to_num(np.vstack([value - lo, hi - value]).clip(0))
            ax.errorbar(x, value, gap, fmt="os^Dv"[n % 5], color=colours[name], capsize=2, markersize=6, label=name)
        for setting in part.loc[part["chosen"], "setting"].unique():
            ax.axvspan(place[setting] - 0.4, place[setting] + 0.4, color=GREY, alpha=0.18, linewidth=0)
        turned = sum(map(len, settings)) > 26
        ax.set_xticks(range(len(settings)), settings, rotation=40 if turned else 0, ha="right" if turned else "center")
        ax.set(title=panel, ylabel="%")
        ax.grid(axis="x", visible=False)
    drawn = {label: handle for ax in figure.axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(drawn.values(), drawn.keys(), loc="outside lower center", ncols=3)
    return figure


def explanation(data: pd.DataFrame) -> Figure:
    """What makes one sample's score. Columns: label (latent and its classes), kind, share; the largest shares first."""
    figure, axes = _figure(7, 1.1 + 0.36 * len(data))
    ax = axes[0, 0]
    kinds = list(dict.fromkeys(data["kind"]))
    colours = dict(zip(kinds, (RED, BLUE, ORANGE, GREY, PURPLE), strict=False))
    places = np.arange(len(data))
    for kind in kinds:
        at = (data["kind"] == kind).to_numpy()
        ax.barh(places[at], data["share"].to_numpy()[at], color=colours[kind], label=kind, height=0.7)
    ax.axvline(0, color=_text_colour(), linewidth=0.8)
    ax.set_yticks(places, data["label"], fontsize=10)
    ax.invert_yaxis()
    ax.set(xlabel="contribution to the score, nats")
    ax.grid(axis="y", visible=False)
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def image_grid(data: pd.DataFrame, images: Sequence) -> Figure:
    """Rows of images with a title each. Columns: row (its heading), title; ``images`` holds one PIL image a data row.

    Only for experiments with ``show_images``: photographs of others must not end up in a notebook's output.
    """
    if len(images) != len(data):
        raise ValueError(f"data has {len(data)} rows, images {len(images)}: give one image a row")
    headings = list(dict.fromkeys(data["row"]))
    widest = int(data.groupby("row").size().max())
    figure, axes = _figure(7, 0.98 * len(headings) * 8 / max(widest, 6), len(headings), widest)
    for ax in axes.flat:
        ax.set_axis_off()
    places = data.groupby("row").cumcount()
    for (row, title), column, image in zip(data[["row", "title"]].itertuples(index=False), places, images, strict=True):
        ax = axes[headings.index(row), column]
        ax.imshow(image, cmap="gray", interpolation="nearest")  # as it is, and it compresses well
        ax.set_title(title, fontsize=8, pad=2)
        if column == 0:
            ax.text(-0.1, 0.5, row, transform=ax.transAxes, ha="right", va="center", fontsize=9)
    return figure
