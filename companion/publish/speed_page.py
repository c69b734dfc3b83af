"""The page on speed: `templates/speed.md` filled from the files that `make bench` writes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from ..figures.display import figure_html
from ..figures.figures import BLUE, GREY, ORANGE, _figure
from ..findings import render

KEYS = ("d", "latents", "k", "batch")
CPU_TARGET, CPU_BATCH = 8, 4096  # times the fastest library
MAX_DEAD = 0.01
# What the trainer is held to on a GPU, by part of the GPU's file: number, its format, the largest or least that is met.
GPU_TARGETS = {
    "paper": ("seconds", "{:.1f} s", lambda seconds: seconds <= 25),
    "wide": ("rate", "{:,.0f} vectors/s", lambda rate: rate >= 7e6),
    "seeds": ("times_one", "{:.2f} times", lambda times: times <= 8.2),
}


def read_results(folder: Path) -> dict[str, list[dict]]:
    """All machines' files by kind: "sae", "sae-gpu", "ood-scores", "extraction"."""
    kinds: dict[str, list[dict]] = {"sae": [], "sae-gpu": [], "ood-scores": [], "extraction": []}
    for path in sorted(folder.glob("*.json")):
        for kind, found in kinds.items():
            if path.stem.endswith(f"-{kind}"):
                found.append(json.loads(path.read_text(encoding="utf-8")) | {"file": path.name})
    return kinds


def speed_page(folder: Path) -> str:
    """The Markdown of speed.md from the files of a folder (benchmarks/results)."""
    from capsae.detectors import info

    kinds, quality = read_results(folder), folder / "sae_quality.csv"
    learnt = summary(pd.read_csv(quality)) if quality.exists() else None
    return render(
        "speed.md",
        training=[found | _training(found) for found in kinds["sae"]],
        cpu_targets=[target for found in kinds["sae"] for target in _cpu_targets(found)],
        cpu_target=CPU_TARGET,
        gpu=kinds["sae-gpu"],
        gpu_targets={part: _gpu_target(kinds["sae-gpu"], part) for part in (*GPU_TARGETS, "peers")},
        learnt=[] if learnt is None else learnt.to_dict("records"),
        learnt_target=None if learnt is None else _learnt_target(learnt),
        scores=kinds["ood-scores"],
        extraction=kinds["extraction"],
        titled=lambda name: info(name)["title"],
        load=_load,
        shape=shape_text,
    )


def shape_text(row: dict) -> str:
    return f"d = {row['d']}, D = {row['latents']:,}, k = {row['k']}, batch {row['batch']:,}"


def _load(loads: Any) -> str:
    loads = loads if isinstance(loads, list) else [loads]
    known = [f"{one:.1f}" for one in loads if one is not None]
    return " to ".join(dict.fromkeys(known)) if known else "unknown"


def _cpu_targets(found: dict) -> Iterator[dict]:
    """Each shape that has a target: its ratio, and what the encoder's product alone takes of our step."""
    floors = {shape_text(one): one["product_ms"] / one["step_ms"] for one in found["floor"]}
    for row in found["rates"]:
        if row["trainer"] == "capsae" and row["of_fastest_peer"] and row["batch"] == CPU_BATCH:
            about = {"machine": found["machine"], "shape": shape_text(row), "floor": floors.get(shape_text(row))}
            ratio = {"ratio": row["of_fastest_peer"], "peer": row["fastest_peer"]}
            yield about | ratio | {"met": row["of_fastest_peer"] >= CPU_TARGET}


def _gpu_target(files: list[dict], part: str) -> tuple[str, str] | None:
    """What was measured and whether it is met; None where it was not measured."""
    rows = [row for found in files for row in found["results"] if row["part"] == part]
    if not rows or part not in GPU_TARGETS:
        return ("see below", "open") if rows else None
    key, form, met = GPU_TARGETS[part]
    return form.format(rows[-1][key]), "met" if met(rows[-1][key]) else "not met"


def _learnt_target(found: pd.DataFrame) -> dict | None:
    """Our FVU beside that of the best library whose dead latents are few enough; None where one of them is missing."""
    own = found[found.trainer == "capsae"]
    libraries = found[~found.trainer.str.startswith(("capsae", "plain")) & (found.dead <= MAX_DEAD)]
    if not len(own) or not len(libraries):
        return None
    ours, best = own.iloc[0], libraries.loc[libraries.fvu.idxmin()]
    met = bool(ours.fvu <= best.fvu and ours.dead <= MAX_DEAD)
    return {"fvu": ours.fvu, "trainer": best.trainer, "theirs": best.fvu, "met": met}


def summary(runs: pd.DataFrame) -> pd.DataFrame:
    """Quality by trainer: the learning rate that validation rows choose, FVU on test rows and dead share at it."""
    rows = []
    for trainer, mine in runs.groupby("trainer", sort=False):
        first = mine[mine.seed == mine.seed.min()]
        alive = first[first.dead_fraction <= MAX_DEAD]
        lr = alive.loc[alive.val_fvu.idxmin(), "lr"] if len(alive) else first.loc[first.dead_fraction.idxmin(), "lr"]
        own = mine[mine.lr == lr]
        numbers = {"fvu": own.test_fvu.mean(), "std": own.test_fvu.std(), "dead": own.dead_fraction.mean()}
        counts = {"tried": mine.lr.nunique(), "seeds": len(own), "eligible": bool(len(alive))}
        rows.append({"trainer": trainer, "library": own.library.iloc[0], "lr": lr} | numbers | counts)
    return pd.DataFrame(rows).sort_values("fvu")


def rate_bars(data: pd.DataFrame) -> Figure:
    """Training rates, one panel a shape. Columns: shape, trainer, rate, own."""
    shapes = list(dict.fromkeys(data["shape"]))
    most = max((data["shape"] == shape).sum() for shape in shapes)
    figure, axes = _figure(7.5, 0.7 + len(shapes) * (0.6 + 0.3 * most), len(shapes), 1)
    for ax, shape in zip(axes.flat, shapes, strict=True):
        rows = data[data["shape"] == shape].sort_values("rate")
        bars = ax.barh(rows["trainer"], rows["rate"], color=[BLUE if own else GREY for own in rows["own"]])
        ax.bar_label(bars, [f"{rate:,.0f}" for rate in rows["rate"]], padding=3, fontsize=10)
        ax.set_title(shape, loc="left")
        ax.set_xlim(0, 1.18 * rows["rate"].max())
        ax.xaxis.set_major_locator(MaxNLocator(4))
        ax.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        ax.grid(False, axis="y")
    axes.flat[-1].set_xlabel("vectors per second (median)")
    return figure


def time_curves(data: pd.DataFrame) -> Figure:
    """Time of a step against D and against k. Columns: panel, x, series, ms."""
    panels = list(dict.fromkeys(data["panel"]))
    figure, axes = _figure(7.5, 3.2, 1, len(panels))
    styles = {"step": (BLUE, "o", "-"), "product and one read (floor)": (ORANGE, "s", "--")}
    for ax, panel in zip(axes.flat, panels, strict=True):
        for series, (colour, marker, line) in styles.items():
            rows = data[(data["panel"] == panel) & (data["series"] == series)].sort_values("x")
            ax.plot(rows["x"], rows["ms"], color=colour, marker=marker, linestyle=line, label=series)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ticks = sorted(data.loc[data["panel"] == panel, "x"].unique())
        ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        ax.set_xlabel(panel)
        ax.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        ax.yaxis.set_minor_formatter(NullFormatter())
    axes.flat[0].set_ylabel("ms for 4,096 rows")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


def _training(found: dict) -> dict:
    """What the section on one machine shows: its versions, a table of rates for each shape, both figures."""
    versions = sorted(found["versions"].items(), key=lambda item: (" " in item[1], item[1] if " " in item[1] else ""))
    named = dict.fromkeys(version if " " in version else f"{name} {version}" for name, version in versions)
    rates, where = pd.DataFrame(found["rates"]), f"{found['machine']} · {found['file']}"
    rates["shape"] = [shape_text(row) for row in found["rates"]]
    peaks = {(shape_text(row), row["trainer"]): row["peak_mb"] for row in found["memory"]}
    rates["peak_mb"] = [peaks.get(key) for key in zip(rates["shape"], rates["trainer"], strict=True)]
    by_trainer = rates.set_index(["shape", "trainer"])["rates"]
    rates["ratios"] = [
        [a / b for a, b in zip(r.rates, by_trainer[r.shape, r.fastest_peer], strict=True)]
        if r.trainer == "capsae" and (r.shape, r.fastest_peer) in by_trainer
        else None
        for r in rates.itertuples()
    ]
    products = {(shape_text(row), row["trainer"]): row["rate"] for row in found.get("products", [])}
    shapes = [
        {
            "shape": shape,
            "load": _load(part["load"].iloc[0] if "load" in part else None),
            "rows": part.to_dict("records"),
            "float32": products[shape, "capsae-float32"] / products[shape, "capsae"]
            if (shape, "capsae") in products
            else None,
        }
        for shape, part in rates.groupby("shape", sort=False)
    ]
    slug, curves = found["file"].removesuffix(".json"), _curves(found["scan"])
    bars = rates[["shape", "trainer", "rate"]].assign(own=rates["trainer"] == "capsae")
    return {
        "libraries": ", ".join(named),
        "shapes": shapes,
        "bars": figure_html(
            rate_bars, bars, f"rates-{slug}",
            "Training rate, median of alternating blocks.",
            "Horizontal bars of vectors per second for each trainer, one panel a shape; ours in blue.",
            where,
        ),
        "curves": figure_html(
            time_curves, curves, f"scan-{slug}",
            "Time of a training step of 4,096 rows at d = 192, and the floor.",
            "Two logarithmic panels: time of a step and its floor against the number of latents and against k.",
            where,
        ) if len(curves) else "",
    }  # fmt: skip


def _curves(scan: list[dict]) -> pd.DataFrame:
    """Tidy data of :func:`time_curves`."""
    rows, panels = [], (("latents, D (k = 32)", "latents", "k", 32), ("k (D = 1,920)", "k", "latents", 1920))
    for panel, key, other, fixed in panels:
        for row in (one for one in scan if one[other] == fixed):
            times = {"step": row["step_ms"], "product and one read (floor)": row["product_ms"] + row["read_ms"]}
            rows += [{"panel": panel, "x": row[key], "series": name, "ms": ms} for name, ms in times.items()]
    return pd.DataFrame(rows)
