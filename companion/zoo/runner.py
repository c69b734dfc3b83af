"""`capsae zoo`: all fits and measures of an experiment, in processes of one thread each, and the tables they make.

In this order, and no earlier stage knows of a later one: every rate of the grid with the first seed; the choice of the
rates, on held-out ID rows; the other seeds; then, for the first time, test and OOD rows.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Sequence
from functools import cache

import pandas as pd

from capsae.pipeline.run import Run

from . import measure, tables
from .fitting import RATES, SEEDS, choose, member, members, rates, seeds_of, settings
from .tasks import Task, perform, seconds

EXPERIMENTS = ("imagenet20", "mini80")
BACKBONES = "digits"  # two backbones that saw the same images: the one experiment whose backbone can be trained here
ITDA_ATOMS, ITDA_K = 128, 16


def run_zoo(
    experiment: str,
    names: Iterable[str] | None = None,
    seeds: Sequence[int] = SEEDS,
    jobs: int = 2,
    grid: Sequence[float] = RATES,
    write: Callable[[str], object] = sys.stderr.write,
) -> tuple[pd.DataFrame, pd.DataFrame, dict]:
    """Fit and measure members (default: all) of an experiment; what the store holds is not made again.

    The first seed chooses among the rates of ``grid``; ``jobs`` 1 works in this process; ``write`` takes progress.
    Returns the table (member, kind, seed, lr, columns of `measure`), the grid of fits, and their provenance.
    """
    names, seeds, experiment = list(names or members()), tuple(seeds), str(experiment)
    for name in names:
        member(name)
    run, started = _run(experiment), time.perf_counter()
    for name in run.experiment.sets:
        run.features(name)  # what all processes need is made once, here
    own = {name: seeds_of(name, seeds) for name in names}
    more = [(name, seed) for name in names for seed in own[name][1:]]
    repeated = [name for name in names if len(own[name]) > 1]

    first = [Task("fit", experiment, name, lr, seeds[:1]) for name in names for lr in rates(name, grid)]
    tried = _all(first, jobs, write)
    rate = {n: None if pd.isna(lr) else float(lr) for n, lr in choose(tried, run.experiment.sae.k).items()}
    fits = [Task("fit", experiment, name, rate[name], (seed,)) for name, seed in more]
    tried = pd.concat([tried, _all(fits, jobs, write)], ignore_index=True)
    last = [Task("measure", experiment, name, rate[name], (seed,)) for name in names for seed in own[name]]
    last += [Task("stability", experiment, name, rate[name], own[name]) for name in repeated]
    table = tables.tidy(_all(last, jobs, write), names)

    tried["chosen"] = tried["lr"].eq(tried["member"].map(rate)) | tried["lr"].isna()
    work, wall = sum(seconds(run, task) for task in [*first, *fits, *last]), time.perf_counter() - started
    about = tables.about(run, names, seeds, grid, wall, work, settings(run.experiment))
    return table, tables.tidy_grid(tried, names), about


def run_backbones() -> pd.DataFrame:
    """`measure.backbones` of the experiment whose backbone is trained here, with the backbone of another seed."""
    run, other = _run(BACKBONES), Run(BACKBONES, {"seed": 1, "pack": "none"}, device="cpu", progress=False)
    return measure.backbones(run, other, ITDA_ATOMS, ITDA_K)


def _all(tasks: Sequence[Task], jobs: int, write: Callable[[str], object]) -> pd.DataFrame:
    """Perform tasks, with a line for each; their tables, with member, lr and seed (-1: of all seeds) beside them."""
    from joblib import Parallel, delayed, parallel_config

    parts = []
    with parallel_config("loky", inner_max_num_threads=1):
        for task, found in Parallel(jobs, return_as="generator")(delayed(_perform)(task) for task in tasks):
            seed = task.seeds[0] if task.kind != "stability" else -1
            parts.append(found.assign(member=task.member, lr=task.lr, seed=seed))
            reached = f", held-out FVU {found['held_out_fvu'][0]:.4f}" if "held_out_fvu" in found else ""
            write(f"zoo {len(parts)} of {len(tasks)}: {task}{reached}\n")
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def _perform(task: Task) -> tuple[Task, pd.DataFrame]:
    return task, perform(_run(task.experiment), task)


@cache  # one a process
def _run(experiment: str) -> Run:
    return Run(experiment, device="cpu", progress=False)
