"""Training rate of Top-k SAE trainers in one run: ours, the plain loop, and the libraries of `sae_peers`.

Blocks alternate between the trainers, each block a whole short training from the start, and medians count: another
program on the machine then disturbs all of them alike. AuxK is on where a trainer has it by default, and in ours. The
rows per CPU second, which include the set-up, are disturbed least. The FVU on rows that were not trained on stands
beside the rate, because a quick step that learns less is no gain; at equal learning rates and so few steps it says no
more than that (`sae_quality` compares quality).

    python -m benchmarks.sae_training                # tables; writes benchmarks/results/<machine>-sae.json
    python -m benchmarks.sae_training --parts rates  # leaves the other parts of the file as they are

The file: machine, threads, lr, versions, missing (peers that do not import, and why), and the parts, each with the load
of the machine before and after:

- rates: a row for each shape and trainer: rate (rows/s, median of `rates`), of_fastest_peer (the median over blocks of
  its rate to that of the fastest library), of_plain, rate_per_cpu_second, fvu, dead_fraction.
- products: the same for ours alone, with float32 products (portable, as all libraries' are float32) and with bfloat16.
- memory: peak_mb of a process that imports one trainer and makes two epochs of a shape.
- scan: our rate and the floor's against the number of latents and against k.
- floor: milliseconds for a batch: of our step, of the bfloat16 product alone, and of reading its result once.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.sae_peers import LIBRARIES, TRAINERS, available, quality
from capsae.sae import SAEConfig, TopKSAE, select


@dataclass(frozen=True)
class Shape:
    """A training: `batches` batches of rows, `epochs` times, in each of `blocks` blocks."""

    d: int
    latents: int
    k: int
    batch: int
    batches: int
    epochs: int
    blocks: int


SHAPES = (
    Shape(192, 1920, 32, 4096, batches=2, epochs=15, blocks=3),
    Shape(192, 1920, 32, 1024, batches=8, epochs=15, blocks=3),
    Shape(768, 7680, 128, 4096, batches=1, epochs=4, blocks=3),  # the paper's
)
PARTS = ("rates", "products", "memory", "floor", "scan")
SCAN_LATENTS = (480, 960, 1920, 3840, 7680)
SCAN_K = (8, 16, 32, 64, 128, 256)
SCAN_BASE = Shape(192, 1920, 32, 4096, batches=2, epochs=8, blocks=3)


def features(shape: Shape, n: int) -> torch.Tensor:
    """Sums of k/2 of 2 d unit atoms and noise, (n, d): something to learn, without a file."""
    dice = torch.Generator().manual_seed(0)
    atoms = F.normalize(torch.randn(2 * shape.d, shape.d, generator=dice), dim=1)
    used = torch.randint(len(atoms), (n, max(1, shape.k // 2)), generator=dice)
    strength = torch.rand(n, max(1, shape.k // 2), generator=dice) + 0.5
    clean = F.embedding_bag(used, atoms, per_sample_weights=strength, mode="sum")
    return clean + 0.1 * torch.randn(n, shape.d, generator=dice)


def config_of(shape: Shape, lr: float) -> SAEConfig:
    """The settings of a shape's trainings."""
    return SAEConfig(latents=shape.latents, k=shape.k, epochs=shape.epochs, batch_size=shape.batch, lr=lr)


def normalised(shape: Shape, n: int, config: SAEConfig) -> torch.Tensor:
    """The rows that every trainer gets, as ours normalises them."""
    return TopKSAE.untrained(shape.d, config).normalize(features(shape, n))


def rates(shape: Shape, lr: float, names: list[str]) -> list[dict]:
    """Alternating blocks of all trainers: one row each."""
    config, n = config_of(shape, lr), shape.batch * shape.batches
    rows = normalised(shape, n + 2048, config)
    train, held_out = rows[:n], rows[n:]
    walls, cpus, good = {t: [] for t in names}, {t: [] for t in names}, {}
    for block in range(shape.blocks + 1):
        for name in names:
            began = time.process_time()
            trained = TRAINERS[name](train, config if block else replace(config, epochs=1))
            cpu_seconds = time.process_time() - began
            if block:  # the first one compiles and fills caches
                walls[name].append(n * shape.epochs / trained.seconds)
                cpus[name].append(n * shape.epochs / cpu_seconds)
            if block == shape.blocks:
                good[name] = quality(trained, held_out, train)
    libraries = [name for name in names if name in LIBRARIES]
    fastest = max(libraries, key=lambda name: median(walls[name]), default=None)

    def ratio(name: str, to: str | None) -> float | None:
        return median(a / b for a, b in zip(walls[name], walls[to], strict=True)) if to else None

    return [
        asdict(shape)
        | {"trainer": name, "rate": median(walls[name]), "rates": walls[name], "fastest_peer": fastest}
        | {"of_fastest_peer": ratio(name, fastest), "of_plain": ratio(name, "plain" if "plain" in names else None)}
        | {"rate_per_cpu_second": median(cpus[name]), "fvu": good[name][0], "dead_fraction": good[name][1]}
        for name in names
    ]


def peak_memory(shape: Shape, name: str) -> float | None:
    """Peak memory (MB) of a process that imports this trainer alone and makes two epochs; None where it fails."""
    command = [sys.executable, "-m", "benchmarks.sae_training", "--peak-memory-of", name, "--shape"]
    done = subprocess.run([*command, json.dumps(asdict(shape))], capture_output=True, text=True)
    return float(done.stdout.split()[-1]) if done.returncode == 0 else None


def print_peak_memory(name: str, shape: Shape) -> None:
    """What the process of `peak_memory` does."""
    available(name)
    config = config_of(replace(shape, epochs=2), 4e-3)
    TRAINERS[name](normalised(shape, shape.batch * shape.batches, config), config)
    print(own_peak())


def own_peak() -> float:
    """MB. Linux hands ru_maxrss down from the parent process; VmHWM starts anew with each program."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # macOS: bytes


def milliseconds(task: Callable[[], object], times: int) -> float:
    """Median time of a task."""
    task()
    spent = []
    for _ in range(times):
        began = time.perf_counter()
        task()
        spent.append(time.perf_counter() - began)
    return 1e3 * median(spent)


def floor(shape: Shape, lr: float, times: int = 7) -> dict:
    """A batch's time: our step's, and what it cannot do without: the product and one read of what comes out."""
    x = normalised(shape, shape.batch, config_of(shape, lr)).bfloat16()
    encoder, z = torch.randn(shape.latents, shape.d).bfloat16(), torch.empty(256, shape.latents, dtype=torch.bfloat16)
    keys = torch.randn(256, shape.latents).bfloat16().view(torch.int16)
    blocks, torch_threads = -(-shape.batch // 256), torch.get_num_threads()

    def product() -> None:
        for part in x.split(256):
            torch.mm(part, encoder.t(), out=z[: len(part)])

    read = milliseconds(lambda: keys.amax(1), times) * blocks
    row = asdict(shape) | {"product_ms": milliseconds(product, times), "read_ms": read, "threads": torch_threads}
    trained = [
        TRAINERS["capsae"](normalised(shape, shape.batch * shape.batches, c), c).seconds
        for c in [config_of(shape, lr)] * (shape.blocks + 1)
    ][1:]
    step = median(trained) / shape.epochs / shape.batches
    return row | {"step_ms": 1e3 * step, "rate": shape.batch / step}


def scan(lr: float) -> list[dict]:
    """Our rate against the number of latents and against k, beside the floor."""
    shapes = [replace(SCAN_BASE, latents=latents) for latents in SCAN_LATENTS]
    shapes += [replace(SCAN_BASE, k=k) for k in SCAN_K if k != SCAN_BASE.k]
    return [floor(shape, lr, times=3) for shape in shapes]


def machine() -> str:
    """The processor's name and the cores this process may use."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{found[1].strip() if found else platform.processor() or platform.machine()}, {cores} cores"


def load() -> float | None:
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def show_rates(rows: list[dict]) -> None:
    print("   d      M    k     B  trainer                 rows/s  x fastest peer  x plain     FVU    dead  rows/CPU s")
    for row in rows:
        shape = f"{row['d']:4} {row['latents']:6} {row['k']:4} {row['batch']:5}"
        print(
            f"{shape}  {row['trainer']:20} {row['rate']:9,.0f} {row['of_fastest_peer'] or 0:15.2f}"
            f" {row['of_plain'] or 0:8.2f} {row['fvu']:7.4f} {row['dead_fraction']:7.4f}"
            f" {row['rate_per_cpu_second']:11,.0f}"
        )


def show_memory(rows: list[dict]) -> None:
    print("   d      M    k     B  trainer               peak MB")
    for row in rows:
        shape = f"{row['d']:4} {row['latents']:6} {row['k']:4} {row['batch']:5}"
        print(f"{shape}  {row['trainer']:20} {row['peak_mb'] or 0:8,.0f}")


def show_floor(rows: list[dict]) -> None:
    print("   d      M    k     B   ms a step   product   one read   rows/s")
    for row in rows:
        shape = f"{row['d']:4} {row['latents']:6} {row['k']:4} {row['batch']:5}"
        print(f"{shape} {row['step_ms']:11.2f} {row['product_ms']:9.2f} {row['read_ms']:10.2f} {row['rate']:8,.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--shapes", nargs="+", type=int, default=range(len(SHAPES)), help="of SHAPES, by number")
    parser.add_argument("--trainers", nargs="+", default=list(TRAINERS), choices=list(TRAINERS))
    parser.add_argument("--blocks", type=int, help="instead of those of the shapes, for a busy machine")
    parser.add_argument("--epochs", type=int, help="instead of those of the shapes, for a busy machine")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<machine>-sae.json")
    parser.add_argument("--peak-memory-of", choices=list(TRAINERS), help=argparse.SUPPRESS)
    parser.add_argument("--shape", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak_memory_of:
        print_peak_memory(args.peak_memory_of, Shape(**args.shape))
        return
    torch.set_num_threads(args.threads)
    versions, missing = available()
    for name, reason in missing.items():
        print(f"{name} is left out: {reason}")
    if select.compiled() is None:
        print("numba is missing: ours is the plain step")
    names = [name for name in args.trainers if name not in missing]
    measure = {
        "rates": lambda shape: rates(shape, args.lr, names),
        "products": lambda shape: rates(shape, args.lr, ["capsae", "capsae-bf16"]),
        "memory": lambda shape: [asdict(shape) | {"trainer": n, "peak_mb": peak_memory(shape, n)} for n in names],
        "floor": lambda shape: [floor(shape, args.lr)],
        "scan": lambda _: scan(args.lr),
    }
    show = {"rates": show_rates, "products": show_rates, "memory": show_memory, "floor": show_floor, "scan": show_floor}
    slug = re.sub(r"[^a-z0-9]+", "-", machine().lower()).strip("-")
    out = args.out or Path(__file__).parent / "results" / f"{slug}-sae.json"
    table = json.loads(out.read_text()) if out.exists() else {}
    table = {part: [] for part in PARTS} | table
    shapes = [replace(s, blocks=args.blocks or s.blocks, epochs=args.epochs or s.epochs) for s in SHAPES]
    shapes = [shapes[i] for i in args.shapes]
    for part in args.parts:
        before, rows = load(), []
        for shape in shapes if part != "scan" else [None]:
            new = measure[part](shape)
            show[part](new)
            rows += new
        loads = [before, load()]
        for row in rows:
            row.setdefault("load", loads)
        if part != "scan":  # shapes that were not measured now stay
            rows += [r for r in table[part] if all((r["d"], r["batch"]) != (s.d, s.batch) for s in shapes)]
            rows.sort(key=lambda r: (r["d"], -r["batch"]))
        table[part] = rows
        own = {m.__name__: m.__version__ for m in (torch, np)} | {"python": platform.python_version()}
        if select.compiled() is not None:
            own["numba"] = version("numba")
        header = {"machine": machine(), "threads": args.threads, "lr": args.lr, "versions": own | versions}
        table = header | {"missing": missing} | {p: table[p] for p in PARTS}
        out.parent.mkdir(exist_ok=True)
        out.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
