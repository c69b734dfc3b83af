"""Training rate of the Top-k SAE against the plain loop, in one run, at the same learning rate.

Blocks alternate between the trainers, each block a whole short training from the start, and the median rate counts:
another program on the machine then disturbs all of them alike (and with `--threads 1` the rows per CPU second, which
include the set-up, hardly at all). The FVU on rows that were not trained on stands beside
the rate, because a quick step that learns less is no gain.

    python benchmarks/sae_training.py                   # table; writes benchmarks/results/<machine>-sae.json

A peer is one function, `(x, config) -> (seconds of its loop, reconstruct)`, and one line in TRAINERS.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import numba
import numpy as np
import torch
import torch.nn.functional as F

from capsae.sae import SAEConfig, TopKSAE, train_sae
from capsae.sae.train import schedule

Reconstruct = Callable[[torch.Tensor], torch.Tensor]


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
    Shape(192, 1920, 32, 4096, batches=4, epochs=12, blocks=5),
    Shape(192, 1920, 32, 1024, batches=8, epochs=12, blocks=5),
    Shape(768, 7680, 128, 4096, batches=2, epochs=4, blocks=3),  # the paper's
)


def features(shape: Shape, n: int) -> torch.Tensor:
    """Sums of k/2 of 2 d unit atoms and noise, (n, d): something to learn, without a file."""
    dice = torch.Generator().manual_seed(0)
    atoms = F.normalize(torch.randn(2 * shape.d, shape.d, generator=dice), dim=1)
    used = torch.randint(len(atoms), (n, shape.k // 2), generator=dice)
    strength = torch.rand(n, shape.k // 2, generator=dice) + 0.5
    clean = F.embedding_bag(used, atoms, per_sample_weights=strength, mode="sum")
    return clean + 0.1 * torch.randn(n, shape.d, generator=dice)


def ours(x: torch.Tensor, config: SAEConfig) -> tuple[float, Reconstruct]:
    """capsae.train_sae as everybody calls it."""
    sae, history = train_sae(x, config, device="cpu", progress=False)
    return history.seconds.sum(), lambda rows: reconstruct(sae, sae.normalize(rows))


def plain(x: torch.Tensor, config: SAEConfig) -> tuple[float, Reconstruct]:
    """The loop that one writes first: float32, torch.topk, embedding_bag, autograd, Adam; unit decoder rows."""
    torch.manual_seed(config.seed)
    sae = TopKSAE.untrained(x.shape[1], config)
    x = sae.normalize(x)
    sae.pre_bias.data = x.mean(0)
    variance = (x - x.mean(0)).square().sum(1).mean()
    adam = torch.optim.Adam(sae.parameters(), lr=config.peak_lr)
    steps, n_steps = 0, config.epochs * -(-len(x) // config.batch_size)
    began = time.perf_counter()
    for _ in range(config.epochs):
        for rows in torch.randperm(len(x)).split(config.batch_size):
            adam.param_groups[0]["lr"] = config.peak_lr * schedule(steps, n_steps, config.warmup, config.decay)
            batch = x[rows]
            loss = (batch - reconstruct(sae, batch)).square().sum(1).mean() / variance
            adam.zero_grad()
            loss.backward()
            adam.step()
            sae.decoder.data = F.normalize(sae.decoder.data, dim=1)
            steps += 1
    return time.perf_counter() - began, lambda rows: reconstruct(sae, sae.normalize(rows))


def reconstruct(sae: TopKSAE, normalized: torch.Tensor) -> torch.Tensor:
    """x_hat of normalised rows by torch.topk and embedding_bag, differentiable."""
    values, indices = torch.topk(sae.preactivations(normalized).relu(), sae.config.k, dim=1)
    return F.embedding_bag(indices, sae.decoder, per_sample_weights=values, mode="sum") + sae.pre_bias


TRAINERS: dict[str, Callable[[torch.Tensor, SAEConfig], tuple[float, Reconstruct]]] = {"capsae": ours, "plain": plain}


def measure(shape: Shape, lr: float) -> list[dict]:
    """Alternating blocks of all trainers: one row each."""
    n = shape.batch * shape.batches
    rows = features(shape, n + 4096)
    train, held_out = rows[:n], rows[n:]
    config = SAEConfig(latents=shape.latents, k=shape.k, epochs=shape.epochs, batch_size=shape.batch, lr=lr)
    target = TopKSAE.untrained(shape.d, config).normalize(held_out).double()
    variance = (target - target.mean(0)).square().sum()
    rates, cpu_rates, fvu = {name: [] for name in TRAINERS}, {name: [] for name in TRAINERS}, {}
    for block in range(shape.blocks + 1):
        for name, trainer in TRAINERS.items():
            warm_up = SAEConfig(**asdict(config) | {"epochs": 1})
            cpu_began = time.process_time()
            seconds, predict = trainer(train, config if block else warm_up)
            cpu_seconds = time.process_time() - cpu_began
            if block:  # the first one compiles and fills caches
                rates[name].append(n * shape.epochs / seconds)
                cpu_rates[name].append(n * shape.epochs / cpu_seconds)
                with torch.no_grad():
                    fvu[name] = ((target - predict(held_out)).square().sum() / variance).item()
    return [
        asdict(shape)
        | {"trainer": name, "rate": median(rates[name]), "rates": rates[name], "fvu": fvu[name]}
        | {"speedup": median(a / b for a, b in zip(rates[name], rates["plain"], strict=True))}
        | {"rate_per_cpu_second": median(cpu_rates[name])}
        for name in TRAINERS
    ]


def machine() -> str:
    """The processor's name and the cores this process may use."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{found[1].strip() if found else platform.processor() or platform.machine()}, {cores} cores"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="only the first so many shapes")
    parser.add_argument("--quick", action="store_true", help="a third of the epochs, three blocks: for a busy machine")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<machine>-sae.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    results = []
    print("   d      M    k     B  trainer      rows/s  x plain     FVU  rows per CPU second")
    for shape in SHAPES[: args.shapes]:
        shape = replace(shape, epochs=-(-shape.epochs // 3), blocks=3) if args.quick else shape
        for row in measure(shape, args.lr):
            print(
                f"{row['d']:4} {row['latents']:6} {row['k']:4} {row['batch']:5}  {row['trainer']:8}"
                f" {row['rate']:10,.0f} {row['speedup']:8.2f} {row['fvu']:7.4f} {row['rate_per_cpu_second']:10,.0f}"
            )
            results.append(row)
    versions = {m.__name__: m.__version__ for m in (torch, numba, np)} | {"python": platform.python_version()}
    threads = torch.get_num_threads()
    header = {"machine": machine(), "threads": threads, "load_before": load, "versions": versions, "lr": args.lr}
    slug = re.sub(r"[^a-z0-9]+", "-", header["machine"].lower()).strip("-")
    out = args.out or Path(__file__).parent / "results" / f"{slug}-sae.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(header | {"results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
