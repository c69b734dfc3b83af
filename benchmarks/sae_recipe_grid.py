"""Which learning rate, batch and number of epochs suit a small training set: held-out FVU on ID rows alone.

The formula for large runs, 2e-4 / sqrt(M / 2^14), is meant for 10^5 steps; an experiment with some thousand rows takes
a few hundred or thousand. This trains on an experiment's "train" and measures on its "val" (rows held out of train): no
test and no OOD row is looked at. One line a run: the held-out FVU of the best epoch, which epoch that was, the dead
latents and the held-out FVU at the end, where the weights of the last epoch would stand.

    python benchmarks/sae_recipe_grid.py imagenet20 mini80        # writes benchmarks/results/sae_recipe_grid.csv
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from capsae.sae import SAEConfig, train_sae

RESULTS = Path(__file__).parent / "results" / "sae_recipe_grid.csv"
BASE = SAEConfig(latents=1920, k=32, epochs=100)
BATCH = (256, 1024, 4096)
LR = (None, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
# Small sets overfit long before 100 epochs are over, while the learning rate is still at its peak; so, too, fewer
# epochs with a fall over most of them.
SHORT_EPOCHS = (8, 12, 25, 50)
SHORT_BATCH = (128, 256, 1024)
SHORT_LR = (4e-3, 8e-3, 1.6e-2)
# A high rate kills most latents, and a dictionary of few generalises better on few rows: a low FVU can be bought with
# dead latents. What they would hold is missing from the profiles, so a recipe has at most this share of them.
MAX_DEAD = 0.01
SEEDS = (0, 1, 2)


def run(experiment: str, what: str, config: SAEConfig, train: np.ndarray, val: np.ndarray) -> dict:
    """One training, as a row of the table."""
    row = {"experiment": experiment, "what": what, "lr": config.peak_lr, "batch": config.batch_size}
    row |= {key: getattr(config, key) for key in ("epochs", "decay", "seed")}
    try:
        _, history = train_sae(train, config, held_out=val, keep="best", progress=False)
    except FloatingPointError:
        return row | {"held_out_fvu": np.nan}
    best = history.iloc[history.attrs["best_epoch"] - 1]
    row |= {"held_out_fvu": best.held_out_fvu, "best_epoch": int(best.epoch), "fvu": best.fvu}
    row |= {"dead_fraction": best.dead_fraction, "last_held_out_fvu": history.held_out_fvu.iloc[-1]}
    return row | {"seconds": history.seconds.sum()}


def long_grid() -> list[tuple[str, SAEConfig]]:
    """lr x batch over 100 epochs, the default schedule."""
    return [("lr x batch", replace(BASE, lr=lr, batch_size=batch)) for batch, lr in itertools.product(BATCH, LR)]


def short_grid() -> list[tuple[str, SAEConfig]]:
    """Fewer epochs with a longer fall."""
    return [
        ("short, decay .8", replace(BASE, lr=lr, batch_size=batch, epochs=epochs, decay=0.8))
        for batch, lr, epochs in itertools.product(SHORT_BATCH, SHORT_LR, SHORT_EPOCHS)
    ]


def best(table: pd.DataFrame, n: int) -> pd.DataFrame:
    """The n runs with the lowest held-out FVU among those whose dictionary lives."""
    return table[table.dead_fraction <= MAX_DEAD].nsmallest(n, "held_out_fvu")


def again(row: pd.Series) -> list[tuple[str, SAEConfig]]:
    """A run with the other seeds: is a difference more than chance?"""
    config = replace(BASE, lr=float(row.lr), batch_size=int(row.batch), epochs=int(row.epochs), decay=float(row.decay))
    return [(row.what, replace(config, seed=seed)) for seed in SEEDS[1:]]


def table_of(experiment: str, grid: list[tuple[str, SAEConfig]], train: np.ndarray, val: np.ndarray) -> pd.DataFrame:
    """All runs of an experiment."""
    table = pd.DataFrame([run(experiment, what, config, train, val) for what, config in tqdm(grid, desc=experiment)])
    seeds = [more for _, row in best(table, 2).iterrows() for more in again(row)]
    return pd.concat([table, pd.DataFrame([run(experiment, what, config, train, val) for what, config in seeds])])


def main() -> None:
    import capsae

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiments", nargs="+")
    parser.add_argument("--short", action="store_true", help="leave out the 100 epochs of the default schedule")
    args, tables = parser.parse_args(), []
    grid = short_grid() if args.short else long_grid() + short_grid()
    for experiment in args.experiments:
        train, val = (capsae.load_features(experiment, name).cls for name in ("train", "val"))
        tables.append(table_of(experiment, grid, train, val))
    RESULTS.parent.mkdir(exist_ok=True)
    pd.concat(tables).to_csv(RESULTS, index=False, float_format="%.6g")


if __name__ == "__main__":
    main()
