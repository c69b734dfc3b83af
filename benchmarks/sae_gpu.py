"""The Top-k SAE trainer on a CUDA GPU: right first, then rates, memory, floors and peers, in one run.

    python -m benchmarks.sae_gpu                  # writes benchmarks/results/<machine>-sae-gpu.json
    python -m benchmarks.sae_gpu --parts check,paper
    TRITON_INTERPRET=1 python -m benchmarks.sae_gpu --device cpu --quick --out /tmp/dry.json     # a dry run, no GPU

check    selection exact; 20 steps, each way of computing them, against the plain step in float64
floor    the card's product rate and bandwidth, measured; what follows for each training
terms    milliseconds of each part of a step
paper    d 768, D 7680, k 128: 1,281,167 rows, 100 epochs, bf16 products, AuxK on; seconds all in
wide     d 768, D 16384, k 32
seeds    eight seeds of `wide` in one call against one seed
peers    other libraries fed from a GPU tensor (benchmarks/sae_peers.py), blocks alternating, held-out FVU beside

Features are synthetic (as in sae_training.py): a rate does not depend on what the numbers mean, and the FVU of two
trainers on the same rows can be compared. No timing stands without `check`.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import re
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks import sae_peers
from benchmarks.sae_training import machine
from capsae.sae import SAEConfig, TopKSAE, train_saes
from capsae.sae.kernels.gpu_step import TritonStep, available
from capsae.sae.steps import PlainStep

PARTS = ("check", "floor", "terms", "paper", "wide", "seeds", "peers")


@dataclass(frozen=True)
class Shape:
    """A training of `rows` rows; `peer_rows` and `peer_epochs` where other libraries take part."""

    d: int
    latents: int
    k: int
    batch: int
    rows: int
    epochs: int
    lr: float
    peer_rows: int
    peer_epochs: int

    def config(self, **options) -> SAEConfig:
        own = {"epochs": self.epochs, "batch_size": self.batch, "lr": self.lr, "normalize": "none"}
        return SAEConfig(latents=self.latents, k=self.k, **(own | options))


FULL = {
    "paper": Shape(768, 7680, 128, 4096, 1_281_167, 100, 1e-3, 262_144, 4),
    "wide": Shape(768, 16384, 32, 8192, 1_281_167, 20, 1e-3, 262_144, 4),
}
QUICK = {name: Shape(11, 26, 3, 16, 40, 3, 1e-3, 40, 2) for name in FULL}
QUICK_PEERS = ("capsae", "plain")


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def features(shape: Shape, n: int, device: torch.device, seed: int = 0) -> torch.Tensor:
    """Sums of k/2 of 2 d unit atoms and noise, (n, d), each row of zero mean and unit std: made on the device."""
    rng = torch.Generator(device).manual_seed(seed)
    atoms = F.normalize(torch.randn(2 * shape.d, shape.d, generator=rng, device=device), dim=1)
    out = torch.empty(n, shape.d, device=device)
    for part in out.split(65_536):
        used = torch.randint(len(atoms), (len(part), max(1, shape.k // 2)), generator=rng, device=device)
        strength = torch.rand(used.shape, generator=rng, device=device) + 0.5
        part.copy_(F.embedding_bag(used, atoms, per_sample_weights=strength, mode="sum"))
        part += 0.1 * torch.randn(part.shape, generator=rng, device=device)
    std, mean = torch.std_mean(out, dim=1, keepdim=True)
    return out.sub_(mean).div_(std)


# -- right first ------------------------------------------------------------------------------------------------------


def check(shape: Shape, device: torch.device, steps: int) -> list[dict]:
    """Each way of a step against the plain one in float64, on one set of batches; raises where it is wrong."""
    check_selection(shape, device)
    x = features(shape, steps * shape.batch, device)
    start = TopKSAE.untrained(shape.d, shape.config()).to(device)
    reference = trained(PlainStep, copy.deepcopy(start).double(), x.double(), shape, "float32")
    rows = []
    for products in ("float32", "bf16"):
        for dense in (False, True):
            sae = TopKSAE.untrained(shape.d, shape.config()).to(device)
            step = trained(TritonStep, sae, x, shape, products, dense)
            off = {}
            for name, parameter in step.sae.named_parameters():
                expected, begun = dict(reference.sae.named_parameters())[name], dict(start.named_parameters())[name]
                moved = (expected - begun).norm().clamp_min(1e-12)
                off[name] = ((parameter.double() - expected).norm() / moved).item()
            fvu = step.fvu()
            row = {"part": "check", "products": products, "dense": dense, "steps": steps, "off": off}
            rows.append(row | {"fvu": fvu, "reference_fvu": reference.fvu(), "graph": bool(step.alone.graphs)})
            step.close()
            print(f"check {products:8} dense {dense}: off {max(off.values()):.1e}, fvu {fvu:.5f}")
            # What was chosen on a tie of rounding moves a weight by a whole step; bf16 decides more of them.
            limit, close = (0.05, 1e-3) if products == "float32" else (1.0, 2e-2)
            if not max(off.values()) < limit or not abs(fvu / reference.fvu() - 1) < close:
                raise SystemExit(f"wrong: {row}; no timing is worth anything before that is mended")
    return rows


def check_selection(shape: Shape, device: torch.device) -> None:
    from capsae.sae.kernels import gpu_topk

    for dtype in (torch.bfloat16, torch.float32):
        z = torch.randn(257 if device.type == "cuda" else 3, shape.latents, device=device).to(dtype)
        z[0] = -z[0].abs()
        z[1] = (4 * z[1]).round() / 4
        values = torch.full((len(z), shape.k), -7.0, device=device)  # nothing must stay unwritten
        indices = torch.full((len(z), shape.k), -7, dtype=torch.int32, device=device)
        gpu_topk.topk(z, shape.k, values, indices)
        expected = z.relu().float().sort(dim=1, descending=True, stable=True)
        same = torch.equal(indices.long().sort(1).values, expected.indices[:, : shape.k].sort(1).values)
        if not same or not torch.equal(values.sort(1, descending=True).values, expected.values[:, : shape.k]):
            raise SystemExit(f"wrong: the selection of {shape.k} of {shape.latents} {dtype}")


def trained(kind, sae: TopKSAE, x: torch.Tensor, shape: Shape, products: str, dense=None):
    sae.config = replace(shape.config(), products=products, aux_k=max(1, min(64, shape.d // 2)))
    step = kind(sae, float((x - x.mean(0)).square().sum(1).mean()), 10)
    step.idle[: shape.latents // 10] = 50  # AuxK takes part
    step.find_dead()
    if dense is not None:
        step.dense = dense
    for batch in x.split(shape.batch):
        step(batch, shape.lr)
    return step


# -- floors and terms -------------------------------------------------------------------------------------------------


def timed(call, device: torch.device) -> float:
    """Median seconds of ten calls, after two that do not count; of one where only the code is tried."""
    times, idle = [], 2 if device.type == "cuda" else 0
    for turn in range(idle + (10 if device.type == "cuda" else 1)):
        began = now(device)
        call()
        times += [now(device) - began] if turn >= idle else []
    return median(times)


def ceilings(device: torch.device) -> dict:
    """FLOP/s of a large bf16 product and bytes/s of a large copy (read plus written), of random numbers."""
    size = 8192 if device.type == "cuda" else 64
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    source = torch.randn(2**28 if device.type == "cuda" else 2**12, device=device)
    target = torch.empty_like(source)
    flops = 2 * size**3 / timed(lambda: a @ b, device)
    return {"flops": flops, "bytes_per_s": 8 * source.numel() / timed(lambda: target.copy_(source), device)}


def floor(shape: Shape, measured: dict) -> dict:
    """Seconds per million rows that no version beats by much: products at the measured rate, traffic at the measured
    bandwidth; gathers read cached rows, so they count with twice the bandwidth of memory."""
    n, d, m, k = 1e6, shape.d, shape.latents, shape.k
    encoder = 2 * n * d * m / measured["flops"]
    selection = 2 * n * m / measured["bytes_per_s"]
    products = 8 * n * d * m / measured["flops"]
    gathers = 8 * n * k * d / (2 * measured["bytes_per_s"])
    adam = n / shape.batch * 2 * m * d * 26 / measured["bytes_per_s"]
    parts = {"encoder": encoder, "selection": selection, "products": products, "gathers": gathers, "adam": adam}
    return parts | {"total": encoder + selection + min(products, gathers) + adam}


def terms(shape: Shape, device: torch.device) -> dict:
    """Milliseconds of a whole step, replayed and kernel by kernel, and of its parts."""
    x = features(shape, shape.batch, device)
    step = TritonStep(TopKSAE.untrained(shape.d, shape.config()).to(device), float(x.square().sum(1).mean()), 10**6)
    step.idle[: shape.latents // 10] = 10**6 + 1
    parts = {}
    for name in ("step", "step with AuxK on a tenth dead"):
        if parts:
            step.find_dead()
        for _ in range(4 if device.type == "cuda" else 1):
            step(x, 1e-4)  # recorded by now, where that is possible
        parts[name] = timed(lambda: step(x, 1e-4), device)
    batch, (encoder, decoder, bias), n = step.batch, step.copies, len(x)
    step.use_graphs = False
    parts["step, kernel by kernel"] = timed(lambda: step(x, 1e-4), device)
    parts["product and selection"] = timed(lambda: batch.select(n, encoder, bias), device)
    z = batch.z[: min(n, batch.chunk)]
    parts["product of a chunk"] = timed(lambda: torch.addmm(bias, batch.centred[: len(z)], encoder.t(), out=z), device)
    scale = step.scale(n)
    parts["decode"] = timed(lambda: batch.decode(n, decoder, step.fired, scale), device)
    step.fired.zero_()
    parts["update"] = timed(lambda: batch.update(n, step.weights(), None, scale, step.rates), device)
    found = {"part": "terms", "ms": {name: 1e3 * seconds for name, seconds in parts.items()}} | step.notes()
    step.close()
    return found


# -- rates ------------------------------------------------------------------------------------------------------------


def run(shape: Shape, device: torch.device, seeds: int = 1, blocks: int = 1, **options) -> dict:
    """Train, after a short training that compiles; seconds all in (of the median block), rate, memory, FVU."""
    x = features(shape, shape.rows + min(shape.rows, 16_384), device)
    train, held_out = x[: shape.rows], x[shape.rows :]
    configs = [shape.config(seed=seed, **options) for seed in range(seeds)]
    began = now(device)
    train_saes(train, [replace(c, epochs=1) for c in configs], device=device, progress=False)
    first = now(device) - began
    walls = []
    for _ in range(blocks):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        began = now(device)
        results = train_saes(train, configs, device=device, progress=False)
        walls.append(now(device) - began)
    history = results[0][1]
    vectors = shape.rows * shape.epochs * seeds
    return {
        "seeds": seeds, "seconds": median(walls), "blocks": walls, "rate": vectors / median(walls),
        "first_epoch_with_compiling": first, "fvu": [sae.fvu(held_out) for sae, _ in results],
        "dead": [float(h.dead_fraction.iloc[-1]) for _, h in results], "attrs": history.attrs,
        "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        "bytes_of_features": train.numel() * train.element_size(),
    }  # fmt: skip


def against_peers(shape: Shape, device: torch.device, blocks: int, only: tuple[str, ...] | None) -> list[dict]:
    """Alternating blocks of every library that imports, on the same rows; the learning rate is the same for all."""
    versions, missing = sae_peers.available()
    names = [n for n in sae_peers.TRAINERS if n in ("capsae", "plain") or n in versions]
    names = [n for n in names if only is None or n in only]
    x = features(shape, shape.peer_rows + min(shape.peer_rows, 8192), device)
    train, held_out = x[: shape.peer_rows], x[shape.peer_rows :]
    config = shape.config(epochs=shape.peer_epochs)
    rates, quality = {name: [] for name in names}, {}
    for block in range(blocks + 1):
        for name in [n for n in names if n not in missing]:
            try:
                result = sae_peers.TRAINERS[name](train, config if block else replace(config, epochs=1))
                if block:
                    rates[name].append(shape.peer_rows * shape.peer_epochs / result.seconds)
                    quality[name] = sae_peers.quality(result, held_out, train[:16_384])
            except Exception as error:  # a library may fail in any way: the others still count
                missing[name] = f"{type(error).__name__}: {error}"
    for name, reason in missing.items():
        print(f"left out: {name}: {reason}")
    return [
        {"part": "peers", "trainer": name, "version": versions.get(name), "rate": median(rates[name])}
        | {"rates": rates[name], "fvu": quality[name][0], "dead": quality[name][1]}
        for name in names
        if rates[name] and name not in missing
    ] + [{"part": "peers", "trainer": name, "missing": reason} for name, reason in missing.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--parts", default=",".join(PARTS), help="some of: " + ", ".join(PARTS))
    parser.add_argument("--quick", action="store_true", help="tiny shapes: does everything run?")
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--aux-rows", type=float, default=1.0, help="fraction of rows that AuxK looks at")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<machine>-sae-gpu.json")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device here: nothing was measured, nothing was written (a dry run: see the top of this file)")
    if not available() or (device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1"):
        sys.exit("the GPU's step needs triton, and on a CPU its interpreter (TRITON_INTERPRET=1)")
    wanted = args.parts.split(",")
    if not set(wanted) <= set(PARTS):
        sys.exit(f"--parts is {args.parts!r}; some of {', '.join(PARTS)} would do")

    shapes, blocks = (QUICK, 1) if args.quick else (FULL, args.blocks)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU"
    versions = {m.__name__: m.__version__ for m in (torch, np, __import__("triton"))}
    header = {"machine": machine(), "gpu": gpu, "threads": torch.get_num_threads()}
    header |= {"load_before": os.getloadavg()[0] if hasattr(os, "getloadavg") else None}
    header |= {"versions": versions | {"python": platform.python_version()}, "quick": args.quick}
    slug = re.sub(r"[^a-z0-9]+", "-", (gpu if device.type == "cuda" else machine()).lower()).strip("-")
    out = args.out or Path(__file__).parent / "results" / f"{slug}-sae-gpu.json"
    out.parent.mkdir(exist_ok=True)
    results: list[dict] = []

    def note(*rows: dict) -> None:
        """Add to the file at once: a run that is cut short keeps what it measured."""
        results.extend(rows)
        out.write_text(json.dumps(header | {"results": results}, indent=1) + "\n")

    def report(name: str, shape: Shape, found: dict) -> dict:
        kind = f"{found['attrs']['step']}, dense {found['attrs'].get('dense')}, dead {found['dead'][0]:.3f}"
        print(f"{name}: {found['seconds']:.2f} s, {found['rate']:,.0f} vectors/s, fvu {found['fvu'][0]:.4f}, {kind}")
        note({"part": name} | asdict(shape) | found)
        return found

    if "check" in wanted:
        note(*check(shapes["paper"], device, 4 if args.quick else 20))
    measured = ceilings(device) if "floor" in wanted else None
    if measured:
        note({"part": "ceilings"} | measured)
        for name, shape in shapes.items():
            found = floor(shape, measured)
            note({"part": "floor", "of": name} | found)
            print(f"floor of {name}: {found['total'] * shape.rows * shape.epochs / 1e6:.3f} s")
    for name, shape in shapes.items():
        if "terms" in wanted:
            found = terms(shape, device)
            note(found | {"of": name})
            print(f"{name}: " + ", ".join(f"{part} {ms:.3f} ms" for part, ms in found["ms"].items()))
    if "paper" in wanted:
        report("paper", shapes["paper"], run(shapes["paper"], device, blocks=1, aux_rows=args.aux_rows))
    one = None
    if "wide" in wanted or "seeds" in wanted:
        one = report("wide", shapes["wide"], run(shapes["wide"], device, blocks=blocks, aux_rows=args.aux_rows))
    if "seeds" in wanted:
        eight = run(shapes["wide"], device, seeds=2 if args.quick else 8, blocks=1, aux_rows=args.aux_rows)
        report("seeds", shapes["wide"], eight | {"times_one": eight["seconds"] / one["seconds"]})
        print(f"{eight['seeds']} seeds in one call take {eight['seconds'] / one['seconds']:.2f} times one")
    if "peers" in wanted:
        for name, shape in shapes.items():
            rows = against_peers(shape, device, blocks, QUICK_PEERS if args.quick else None)
            note(*(asdict(shape) | row for row in rows))
            for row in rows:
                if "rate" in row:
                    print(f"{name}: {row['trainer']:20} {row['rate']:12,.0f} vectors/s  fvu {row['fvu']:.4f}")


if __name__ == "__main__":
    main()
