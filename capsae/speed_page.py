"""The page on speed: made from the files that `make bench` writes, with what was never measured named as such."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from .display import figure_html
from .figures import BLUE, GREY, ORANGE, _figure

UNMEASURED = "**not measured**: no GPU was at hand"
# What the trainer is held to on a GPU: (row, target, part of the GPU's file, how its number is said).
GPU_TARGETS = (
    ("the paper's training: 128M vectors, d = 768, D = 7680, k = 128, bf16 products, AuxK", "at most 25 s", "paper"),
    ("d = 768, D = 16384, k = 32", "at least 7M vectors/s", "wide"),
    ("eight seeds of that in one call", "at most 8.2 times one seed", "seeds"),
    ("the same two against the libraries, fed from a GPU tensor", "at least 5 times the fastest", "peers"),
)
KEYS = ("d", "latents", "k", "batch")
CPU_TARGET, CPU_BATCH = 8, 4096  # times the fastest library
MAX_DEAD = 0.01


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
    kinds = read_results(folder)
    quality = folder / "sae_quality.csv"
    lines = [
        "<!-- Made by `python -m capsae.publish pages` from benchmarks/results; measure and make it again. -->",
        "",
        "# Speed",
        "",
        "Every number here is from a file under `benchmarks/results/`, which `make bench` writes (the comparison of "
        "quality by `python -m benchmarks.sae_quality`, which takes an hour): ours and others' programs in turn, "
        "medians over the rounds. A section says which machine it is from; what nobody has measured yet says so. To "
        "add a machine, run `make bench` there and commit its file.",
        "",
        *_targets(kinds, pd.read_csv(quality) if quality.exists() else None),
    ]
    for found in kinds["sae"]:
        lines += _training(found)
    if quality.exists():
        lines += _quality(pd.read_csv(quality))
    for found in kinds["sae-gpu"]:
        lines += _gpu(found)
    for found in kinds["ood-scores"]:
        lines += _scores(found)
    for found in kinds["extraction"]:
        lines += _extraction(found)
    return "\n".join(lines) + "\n"


def shape_text(row: dict) -> str:
    return f"d = {row['d']}, D = {row['latents']:,}, k = {row['k']}, batch {row['batch']:,}"


def _table(heads: list[str], rows: list[tuple]) -> list[str]:
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    return [*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows), ""]


def _same(one: dict, row: dict, trainer: str | None) -> bool:
    return one["trainer"] == trainer and all(one[key] == row[key] for key in KEYS)


def _load(loads: Any) -> str:
    loads = loads if isinstance(loads, list) else [loads]
    known = [f"{one:.1f}" for one in loads if one is not None]
    return " to ".join(dict.fromkeys(known)) if known else "unknown"


def _targets(kinds: dict[str, list[dict]], quality: pd.DataFrame | None) -> list[str]:
    rows, why = [], []
    for found in kinds["sae"]:
        for row in found["rates"]:
            if row["trainer"] != "capsae" or not row["of_fastest_peer"] or row["batch"] != CPU_BATCH:
                continue
            ratio = f"{row['of_fastest_peer']:.1f} times {row['fastest_peer']}"
            met = row["of_fastest_peer"] >= CPU_TARGET
            wanted = f"at least {CPU_TARGET} times the fastest library"
            rows.append((f"{found['machine']}: {shape_text(row)}", wanted, ratio, "met" if met else "not met"))
            floors = [one for one in found["floor"] if all(one[key] == row[key] for key in KEYS)]
            if not met and floors:
                share = floors[0]["product_ms"] / floors[0]["step_ms"]
                why.append(f"{shape_text(row)}: the encoder's bfloat16 product alone is {share:.0%} of our step there")
    if quality is not None:
        rows.append(_quality_target(summary(quality)))
    measured = {row["part"]: row for found in kinds["sae-gpu"] for row in found["results"]}
    said = {
        "paper": lambda r: (f"{r['seconds']:.1f} s", r["seconds"] <= 25),
        "wide": lambda r: (f"{r['rate'] / 1e6:.1f}M vectors/s", r["rate"] >= 7e6),
        "seeds": lambda r: (f"{r['times_one']:.2f} times", r["times_one"] <= 8.2),
    }
    for what, target, part in GPU_TARGETS:
        if part in measured and part in said:
            text, met = said[part](measured[part])
            rows.append((f"GPU: {what}", target, text, "met" if met else "not met"))
        else:
            rows.append((f"GPU: {what}", target, UNMEASURED if part not in measured else "see below", "open"))
    lines = ["## What the trainer is held to", ""]
    lines += _table(["where and what", "target", "measured", ""], rows)
    lines += ["Where the ratio is missed: " + "; ".join(why) + ".", ""] if why else []
    if not kinds["sae-gpu"]:
        lines += [
            "The GPU's step (Triton kernels, one CUDA graph a step) exists and is tested against the plain PyTorch "
            "step in Triton's interpreter, on a CPU; it has not run on a GPU. `python -m benchmarks.sae_gpu` checks it "
            "against float64 there first and then measures the rows above.",
            "",
        ]
    return lines


def _quality_target(found: pd.DataFrame) -> tuple:
    """The row that compares our FVU with that of the best library whose dead latents are few enough."""
    own = found[found.trainer == "capsae"]
    libraries = found[~found.trainer.str.startswith(("capsae", "plain")) & (found.dead <= MAX_DEAD)]
    what = "FVU of test rows after 60 epochs on imagenet20, at most 1 % dead latents"
    if not len(own) or not len(libraries):
        return what, "no worse than the best library's", "**not measured**", "open"
    ours, best = own.iloc[0], libraries.loc[libraries.fvu.idxmin()]
    met = ours.fvu <= best.fvu and ours.dead <= MAX_DEAD
    text = f"{ours.fvu:.4f}, {best.trainer} {best.fvu:.4f}"
    return what, "no worse than the best library's", text, "met" if met else "not met"


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


def _training(found: dict) -> list[str]:
    libraries = sorted({v for v in found["versions"].values() if " " in v})
    own = [f"{name} {version}" for name, version in found["versions"].items() if " " not in version]
    versions = ", ".join(own + libraries)
    lines = [f"## Training on a CPU: {found['machine']}", ""]
    lines += [
        f"{found['threads']} threads; {versions}. All trainers get the same rows on the same device, the "
        f"same batch size, epochs and learning rate ({found['lr']:g}), AuxK where they have it on by default "
        "(sparsify's signum has it off). "
        "**Ours multiplies in bfloat16 where the processor can**, as this file's did, and the libraries in float32, as "
        "they do on a CPU. These are short trainings for the rate alone, with the default start: FVU and dead latents "
        "after so few steps only show that all of them train, and hardly any latent is dead long enough for AuxK to "
        "have work (ours calls a latent dead after one epoch, the libraries after five). How well each learns is in "
        "{ref}`a section below <speed-quality>`. The ratio is the median of the rounds' ratios, with its range: few "
        "rounds on a shared machine leave it wide.",
        "",
    ]
    peaks = {(*(row[key] for key in KEYS), row["trainer"]): row["peak_mb"] for row in found["memory"]}
    heads = ["trainer", "vectors/s", "times the fastest library", "FVU", "dead, %", "peak memory, MB"]
    for shape in dict.fromkeys(shape_text(row) for row in found["rates"]):
        rows = []
        for row in (one for one in found["rates"] if shape_text(one) == shape):
            times = f"{row['of_fastest_peer']:.2f}" if row["of_fastest_peer"] else "–"
            fastest = next((one for one in found["rates"] if _same(one, row, row["fastest_peer"])), None)
            if row["trainer"] == "capsae" and fastest:
                ratios = [a / b for a, b in zip(row["rates"], fastest["rates"], strict=True)]
                times += f" ({min(ratios):.1f}–{max(ratios):.1f})"
            peak = peaks.get((*(row[key] for key in KEYS), row["trainer"]))
            dead = f"{100 * row['dead_fraction']:.1f}"
            cells = (f"{row['rate']:,.0f}", times, f"{row['fvu']:.3f}", dead, f"{peak:,.0f}" if peak else "–")
            rows.append((row["trainer"], *cells))
        halves = {row["trainer"]: row["rate"] for row in found.get("products", []) if shape_text(row) == shape}
        if halves:
            for products in ("float32", "bf16"):  # "capsae" was bf16 until November 2026, and is portable float32 now
                if (rate := halves.get(f"capsae-{products}")) is not None:
                    text = f"{rate / halves['capsae']:.2f} of capsae's"
                    rows.append((f"capsae, {products} products", text, "", "", "", ""))
        lines += [f"**{shape}** (load {_load(row.get('load'))})", "", *_table(heads, rows)]
    for name, reason in found.get("missing", {}).items():
        lines += [f"{name} was left out: {reason}.", ""]
    bars = pd.DataFrame(
        [
            {
                "shape": shape_text(row),
                "trainer": row["trainer"],
                "rate": row["rate"],
                "own": row["trainer"] == "capsae",
            }
            for row in found["rates"]
        ]
    )
    where = f"{found['machine']} · {found['file']}"
    slug = found["file"].removesuffix(".json")
    lines += [
        figure_html(
            rate_bars, bars, f"rates-{slug}",
            "Training rate, median of alternating blocks.",
            "Horizontal bars of vectors per second for each trainer, one panel a shape; ours in blue.",
            where,
        ),
        "",
    ]  # fmt: skip
    curves = [
        {"panel": panel, "x": row[key], "series": series, "ms": ms}
        for panel, key, other in (
            ("latents, D (k = 32)", "latents", ("k", 32)),
            ("k (D = 1,920)", "k", ("latents", 1920)),
        )
        for row in found["scan"]
        if row[other[0]] == other[1]
        for series, ms in (
            ("step", row["step_ms"]),
            ("product and one read (floor)", row["product_ms"] + row["read_ms"]),
        )
    ]
    if curves:
        lines += [
            "### Time against D and k, and the floor",
            "",
            "A step cannot do without the encoder's product and one read of what comes out of it. That floor is "
            "measured with the same threads; what lies above it is selection, decoding, the gradients and Adam.",
            "",
            figure_html(
                time_curves, pd.DataFrame(curves), f"scan-{slug}",
                "Time of a training step of 4,096 rows at d = 192, and the floor.",
                "Two logarithmic panels: time of a step and its floor against the number of latents and against k.",
                where,
            ),
            "",
        ]  # fmt: skip
    rows = [
        (shape_text(r), f"{r['step_ms']:.1f}", f"{r['product_ms']:.1f}", f"{r['read_ms']:.2f}", _load(r.get("load")))
        for r in found["floor"]
    ]
    if rows:
        lines += _table(["shape", "step, ms", "product, ms", "one read, ms", "load"], rows)
    return lines


def _quality(runs: pd.DataFrame) -> list[str]:
    lines = ["(speed-quality)=", "## What each learns in as many epochs", ""]
    lines += [
        "Embedded imagenet20 features (d = 192), D = 1,920, k = 32, batch 4,096, 60 epochs. Each trainer has its "
        "learning rate chosen on validation rows, at no more than 1 % dead latents where it reaches that; the FVU "
        "below is of test rows that chose nothing, its mean and standard deviation over seeds. A low FVU can be bought "
        "with dead latents, so the share of latents that fire for no training row stands beside it. The rates of the "
        "libraries were tried around what is known of them, one after the other as far as time went: the table says "
        "how many. More went into ours: some ten settings of rate, decay, AuxK and the encoder's scale were looked at "
        'on the validation rows before `init="fitted"` was settled. `capsae-transpose` is the default start, as in the '
        "rates above; it allows a lower rate only, and learns less.",
        "",
    ]
    rows = []
    for row in summary(runs).to_dict("records"):
        spread = f" ± {row['std']:.4f}" if row["seeds"] > 1 else ""
        dead = f"{100 * row['dead']:.1f}" + ("" if row["eligible"] else " (over 1 at every rate)")
        version = row["library"].removeprefix("capsae") or "this project"
        cells = (f"{row['lr']:g}", row["tried"], row["seeds"], f"{row['fvu']:.4f}{spread}", dead)
        rows.append((row["trainer"], version, *cells))
    heads = ["trainer", "version", "learning rate", "rates tried", "seeds", "FVU of test rows", "dead, %"]
    return lines + _table(heads, rows)


def _gpu(found: dict) -> list[str]:
    lines = [f"## Training on a GPU: {found['gpu']}", ""]
    rows = [
        (row["part"], f"{row['seconds']:.2f}", f"{row['rate']:,.0f}", f"{row['fvu'][0]:.4f}",
         f"{row['peak_bytes'] / 2**30:.1f}" if row["peak_bytes"] else "–")
        for row in found["results"] if "seconds" in row
    ]  # fmt: skip
    lines += _table(["what", "seconds", "vectors/s", "FVU", "peak memory, GiB"], rows)
    peers = [row for row in found["results"] if row["part"] == "peers" and "rate" in row]
    if peers:
        rows = [(shape_text(r), r["trainer"], f"{r['rate']:,.0f}", f"{r['fvu']:.4f}") for r in peers]
        lines += _table(["shape", "trainer", "vectors/s", "FVU"], rows)
    return lines


def _scores(found: dict) -> list[str]:
    from .detectors import info

    lines = [
        f"## Scores: {found['machine']}",
        "",
        f"Ours and pytorch-ood {found['versions']['pytorch-ood']} (how equal they are says {{doc}}`parity`) on "
        f"{found['train']:,} training and {found['test']:,} test rows of {found['d']} dimensions and "
        f"{found['classes']:,} classes, in turn in one run (`benchmarks/ood_scores.py`; threads: {found['threads']}, "
        f"rounds: {found['blocks']}, load {_load(found['load_before'])}). Seconds are CPU seconds of a fit and a "
        "score. A time with a star was measured on few rows and scaled to all. Memory is what a fit and a score add to "
        "the resident set, for the rows that were scored; what the process had freed and kept is used again and not "
        "counted, so that it is a lower bound.",
        "",
    ]
    rows = []
    for row in found["results"]:
        sides = row["pytorch-ood"], row["capsae"]
        times = []
        for side in sides:
            star = f"* ({side['rows']:,} rows)" if side["rows"] < found["test"] else ""
            times.append(f"{side['fit_s']:.2f}, {side['score_s']:.2f}{star}")
        memory = f"{sides[0]['peak_mb']:,}, {sides[1]['peak_mb']:,}"
        rows.append((info(row["method"])["title"], *times, f"{row['ratio']:.1f}", memory))
    heads = ["method", "pytorch-ood: fit, score (s)", "ours: fit, score (s)", "times as fast", "MiB: pytorch-ood, ours"]
    return lines + _table(heads, rows)


def _extraction(found: dict) -> list[str]:
    where, settings = found["machine"], found["settings"]
    rows = [
        (
            settings["model"],
            f"{settings['images']}, {settings['pixels'][0]} x {settings['pixels'][1]}",
            f"{found['bare_images_per_second']:.1f}",
            f"{found['whole_images_per_second']:.1f}",
            f"{found['ratio']:.2f}",
            _load(found["load_average"]),
        )
    ]
    heads = ["model", "images", "forward pass alone, images/s", "whole extraction, images/s", "ratio", "load"]
    return [f"## Feature extraction: {where['gpu'] or where['cpu']}, {where['cores']} cores", "", *_table(heads, rows)]
