"""CPU seconds per epoch of every variant of the SAE, against TopK: the compiled step, and the plain one.

Random features of the shape of experiment `imagenet20`: 8100 rows of 192 numbers, 1920 latents, k = 32, 256 rows a
batch. Rounds go through all variants in turn, each a training of one epoch and one of `1 + epochs`; their difference
leaves out what comes before the first step (`start_s` is that). Medians over rounds; CPU seconds of all threads
together, which other programs disturb least.

    python -m benchmarks.sae_variants        # a table; writes benchmarks/results/<machine>-sae-variants.json
"""

from __future__ import annotations

import argparse
import json
import re
import time
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median

import torch

from benchmarks.sae_training import Shape, features, load, machine
from capsae.features.probe import fit_linear_probe
from capsae.sae import SAEConfig, TopKSAE, train_sae
from capsae.sae.variants import thresholds as variants

SHAPE = Shape(192, 1920, 32, 256, batches=32, epochs=1, blocks=3)
ROWS, CLASSES = 8100, 20


def seconds(name: str, x: torch.Tensor, config: SAEConfig, compiled: bool | None, head) -> float:
    """CPU seconds of one training."""
    began = time.process_time()
    train_sae(x, config, "cpu", progress=False, compiled=compiled, head=head if name == "gsae" else None)
    return time.process_time() - began


def rounds(names: list[tuple[str, bool | None]], epochs: int, n: int) -> dict[tuple[str, bool | None], list[tuple]]:
    """For each (variant, compiled) and round: CPU seconds per epoch, and before the first step."""
    x = features(SHAPE, ROWS)
    base = SAEConfig(SHAPE.latents, SHAPE.k, epochs=1, batch_size=SHAPE.batch, lr=4e-3)
    normal = TopKSAE.untrained(SHAPE.d, base).normalize(x)
    labels = (normal @ torch.randn(SHAPE.d, CLASSES, generator=torch.Generator().manual_seed(1))).argmax(1)
    head = fit_linear_probe(normal.numpy(), labels.numpy(), CLASSES)
    found = {key: [] for key in names}
    for number in range(n + 1):
        for name, compiled in names:
            config = replace(base, variant=name)
            one = seconds(name, x, config, compiled, head)
            if number:  # the first round compiles and fills caches
                more = seconds(name, x, replace(config, epochs=1 + epochs), compiled, head)
                epoch = (more - one) / epochs
                found[name, compiled].append((epoch, one - epoch))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", nargs="+", default=list(variants.REGISTRY), choices=list(variants.REGISTRY))
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<machine>-sae-variants.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    before = load()
    names = [("topk", None), ("topk", False), *((name, None) for name in args.variants if name != "topk")]
    found = rounds(names, args.epochs, args.rounds)
    compiled, plain = (median(epoch for epoch, _ in found["topk", kind]) for kind in (None, False))
    rows = []
    for (name, kind), measured in found.items():
        epoch, start = (median(column) for column in zip(*measured, strict=True))
        step = "plain" if kind is False else "compiled" if name == "topk" else "variant"
        row = {"variant": name, "step": step, "epoch_cpu_s": epoch, "epochs_cpu_s": [e for e, _ in measured]}
        rows.append(row | {"start_s": start, "of_compiled_topk": epoch / compiled, "of_plain_topk": epoch / plain})
        ratios = f"x{epoch / compiled:6.2f} compiled  x{epoch / plain:5.2f} plain"
        print(f"{name:18} {step:9} {epoch:7.3f} s an epoch  {ratios}")
    table = {"machine": machine(), "threads": args.threads, "load": [before, load()], "rows": ROWS}
    table |= {"shape": asdict(SHAPE), "versions": {"torch": torch.__version__}, "results": rows}
    slug = re.sub(r"[^a-z0-9]+", "-", machine().lower()).strip("-")
    out = args.out or Path(__file__).parent / "results" / f"{slug}-sae-variants.json"
    out.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
