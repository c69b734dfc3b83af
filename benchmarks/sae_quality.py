"""Quality of the trainers at an equal budget: held-out FVU on the embedded imagenet20 features, 60 epochs each.

Per trainer, learning rates around its known optimum are tried with one seed; the one with the lowest FVU on "val" rows
among those with at most 1 % dead latents is run with three seeds in all. What counts is the FVU on "test" rows, which
nothing is chosen by. A latent is dead when it fires for no training row. A low FVU can be bought with dead latents (few
latents generalise better on few rows), so a trainer stands with its dead fraction.

The learning rate falls linearly over the last 20 % of the steps in every trainer that lets us say so; sparsify's Adam
falls all the way, its signum has no schedule, as is their way. Ours starts with ``init="fitted"``; with the default,
"transpose", it needs a lower rate for as few dead latents. All get the same normalised rows. The CSV
holds all that was run, in that order; where a trainer has fewer rates, time on two cores was too short.

    python -m benchmarks.sae_quality                     # goes on where benchmarks/results/sae_quality.csv ends
    python -m benchmarks.sae_quality --summary           # only the table of what is there
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch

import capsae
from benchmarks.sae_peers import TRAINERS, available, quality
from capsae.sae import SAEConfig, TopKSAE

RESULTS = Path(__file__).parent / "results" / "sae_quality.csv"
BASE = SAEConfig(latents=1920, k=32, epochs=60, batch_size=4096)
LR = {
    "capsae": (1e-2, 1.4e-2, 7e-3, 5e-3),
    "capsae-transpose": (7e-3, 1e-2, 1.4e-2, 2e-2),
    "sparsify-adam": (1e-2, 1.4e-2, 7e-3, 2e-2),
    "sae-lens": (1e-3, 2e-3, 5e-4, 4e-3),
    "dictionary-learning": (4e-3, 2e-3, 8e-3, 1e-3),
    "sparsify-signum": (5e-3, 1e-2, 2.5e-3, 1.4e-2),
    "overcomplete": (2e-3, 1e-3, 5e-4, 4e-3),
    "plain": (4e-3, 7e-3, 1e-2, 2e-3),
}
MAX_DEAD, SEEDS = 0.01, (0, 1, 2)


def done() -> pd.DataFrame:
    """The runs so far."""
    return pd.read_csv(RESULTS) if RESULTS.exists() else pd.DataFrame(columns=["trainer", "lr", "seed"])


def chosen(runs: pd.DataFrame) -> float | None:
    """The learning rate of the lowest validation FVU (seed 0) at few enough dead latents; else of the fewest dead."""
    first = runs[runs.seed == SEEDS[0]]
    alive = first[first.dead_fraction <= MAX_DEAD]
    if len(alive):
        return float(alive.loc[alive.val_fvu.idxmin(), "lr"])
    return float(first.loc[first.dead_fraction.idxmin(), "lr"]) if len(first) else None


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """One row a trainer: the chosen rate, its mean FVU on test rows over the seeds, the dead fraction."""
    rows = []
    for trainer, runs in table.groupby("trainer", sort=False):
        own = runs[runs.lr == chosen(runs)]
        rows.append(
            {"trainer": trainer, "lr": chosen(runs), "rates tried": runs.lr.nunique(), "seeds": len(own)}
            | {"val FVU": own.val_fvu.mean(), "test FVU": own.test_fvu.mean(), "std": own.test_fvu.std()}
            | {"dead": own.dead_fraction.mean()}
        )
    return pd.DataFrame(rows).sort_values("test FVU")


def run(trainer: str, lr: float, seed: int, sets: dict[str, torch.Tensor], library: str) -> None:
    """Train once and append a line."""
    config = SAEConfig(**vars(BASE) | {"lr": lr, "seed": seed})
    if trainer == "capsae":
        config = replace(config, init="fitted")
    trained = TRAINERS[trainer.removesuffix("-transpose")](sets["train"], config)
    val, dead = quality(trained, sets["val"], sets["train"])
    row = {"trainer": trainer, "lr": lr, "seed": seed, "epochs": config.epochs, "val_fvu": val}
    row |= {"test_fvu": quality(trained, sets["test"], sets["test"])[0], "dead_fraction": dead, "library": library}
    print(row, flush=True)
    pd.DataFrame([row]).to_csv(RESULTS, mode="a", header=not RESULTS.exists(), index=False, float_format="%.6g")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trainers", nargs="+", default=list(LR), choices=list(LR))
    parser.add_argument("--rates", type=int, default=4, help="only the first so many learning rates")
    parser.add_argument("--summary", action="store_true")
    args = parser.parse_args()
    if not args.summary:
        versions, missing = available()
        experiment = capsae.load_experiment("imagenet20")
        normalise = TopKSAE.untrained(192, BASE).normalize
        sets = {
            name: normalise(torch.from_numpy(capsae.load_features(experiment, name).cls))
            for name in ("train", "val", "test")
        }
        wanted = [(t, lr, SEEDS[0]) for lr in range(args.rates) for t in args.trainers]
        for trainer, lr, seed in [(t, LR[t][i], seed) for t, i, seed in wanted] + [
            (t, None, seed) for t in args.trainers for seed in SEEDS[1:]
        ]:
            if trainer in missing:
                print(f"{trainer}: left out, {missing[trainer]}")
                continue
            table = done()
            lr = lr or chosen(table[table.trainer == trainer])
            if not ((table.trainer == trainer) & (table.lr == lr) & (table.seed == seed)).any():
                run(trainer, lr, seed, sets, versions.get(trainer, "capsae"))
    print(summary(done()).to_string(index=False))


if __name__ == "__main__":
    main()
