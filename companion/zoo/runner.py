"""`capsae zoo`: all fits and measures of an experiment, in processes of one thread each, and the tables they make.

In this order, and no earlier stage knows of a later one: every rate of the grid with the first seed; the choice of the
rates, on held-out ID rows; the other seeds; then, for the first time, test and OOD rows.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from functools import cache
from multiprocessing import get_context

import pandas as pd

from capsae.pipeline.run import Run

from . import measure, tables
from .fitting import RATES, SEEDS, choose, member, members, rates, seeds_of, settings
from .tasks import Task, perform, seconds

EXPERIMENTS = ("imagenet20", "mini80")
BACKBONES = "digits"  # two backbones that saw the same images: the one experiment whose backbone can be trained here
ITDA_ATOMS, ITDA_K = 128, 16
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
# About how long a task takes beside others of its kind: for the estimate of what is left, and to start long ones first.
_SLOW = {"topk": 0.4, "relu": 1.2, "gated": 1.3, "jumprelu": 1.2, "gba": 1.4, "top_afa": 1.4, "feature_choice": 1.4,
         "mp": 2.5, "archetypal": 2.0, "itda": 4.0, "random": 0.1, "pca": 0.1, "dense_relu": 0.1}  # fmt: skip
_KIND = {"fit": 1.0, "measure": 0.25, "stability": 0.4}


def weight(task: Task) -> float:
    """How long a task takes, in units of a usual fit."""
    return _KIND[task.kind] * (_SLOW.get(task.member, 1.0) if task.kind == "fit" else 1.0)


@dataclass
class Progress:
    """A line on stderr for each finished task, with an estimate of what is left by the work done so far."""

    total: float
    write: Callable[[str], object] = sys.stderr.write
    now: Callable[[], float] = time.monotonic
    done: float = 0.0
    count: int = 0
    started: float = field(default=0.0)

    def __post_init__(self):
        self.started = self.now()

    def finished(self, task: Task, told: str = "") -> None:
        """Tell that a task is done."""
        self.done, self.count = self.done + weight(task), self.count + 1
        passed = self.now() - self.started
        left = passed * max(0.0, self.total / self.done - 1)
        share = min(1.0, self.done / self.total)
        self.write(f"zoo {share:4.0%} {task}{told}; {passed / 60:.1f} min, about {left / 60:.1f} left\n")


def run_zoo(
    experiment: str,
    names: Iterable[str] | None = None,
    seeds: Sequence[int] = SEEDS,
    jobs: int = 2,
    grid: Sequence[float] = RATES,
    executor: Executor | None = None,
    write: Callable[[str], object] = sys.stderr.write,
) -> tuple[pd.DataFrame, pd.DataFrame, dict]:
    """Fit and measure members of an experiment; what the store holds is not made again.

    Parameters
    ----------
    experiment : name or path
    names : members, default all
    seeds : the first chooses the rates
    jobs : processes
    grid : learning rates
    executor : in place of processes of its own (tests)
    write : where progress goes

    Returns
    -------
    table : member, kind, seed, lr, and the columns of `measure`
    grid : member, lr, seed, held_out_fvu, held_out_l0, chosen, ...
    about : provenance, JSON
    """
    names, seeds = list(names or members()), tuple(seeds)
    for name in names:
        member(name)
    run, started = _run(str(experiment)), time.perf_counter()
    for name in run.experiment.sets:
        run.features(name)  # what all processes need is made once, here
    first = [Task("fit", str(experiment), name, lr, seeds[:1]) for name in names for lr in rates(name, grid)]
    expected = [Task("fit", "", name, None, (s,)) for name in names for s in seeds_of(name, seeds)[1:]]
    expected += [Task("measure", "", name, None, (s,)) for name in names for s in seeds_of(name, seeds)]
    expected += [Task("stability", "", name, None, seeds) for name in names if len(seeds_of(name, seeds)) > 1]
    progress = Progress(sum(map(weight, [*first, *expected])), write)
    with _pool(jobs, executor) as pool:
        tried = pd.concat([found.assign(member=task.member, lr=task.lr, seed=task.seeds[0])
                           for task, found in _all(pool, first, progress)], ignore_index=True)  # fmt: skip
        chosen = choose(tried, run.experiment.sae.k)
        rate = {name: None if pd.isna(lr) else float(lr) for name, lr in chosen.items()}
        more = [(name, seed) for name in names for seed in seeds_of(name, seeds)[1:]]
        fits = [Task("fit", str(experiment), name, rate[name], (seed,)) for name, seed in more]
        again = [found.assign(member=task.member, lr=task.lr, seed=task.seeds[0])
                 for task, found in _all(pool, fits, progress)]  # fmt: skip
        both = [(name, seed) for name in names for seed in seeds_of(name, seeds)]
        last = [Task("measure", str(experiment), name, rate[name], (seed,)) for name, seed in both]
        last += [Task("stability", str(experiment), name, rate[name], seeds_of(name, seeds))
                 for name in names if len(seeds_of(name, seeds)) > 1]  # fmt: skip
        measured = [found.assign(member=task.member, seed=task.seeds[0] if task.kind == "measure" else -1, lr=task.lr)
                    for task, found in _all(pool, last, progress)]  # fmt: skip
    work = sum(seconds(run, task) for task in [*first, *fits, *last])
    table = tables.tidy(pd.concat(measured, ignore_index=True), names)
    tried = pd.concat([tried, *again], ignore_index=True)
    tried = tables.tidy_grid(tried.assign(chosen=tried["lr"].eq(tried["member"].map(rate)) | tried["lr"].isna()), names)
    return (
        table,
        tried,
        tables.about(run, names, seeds, grid, time.perf_counter() - started, work, settings(run.experiment)),
    )


def run_backbones(jobs: int = 2) -> pd.DataFrame:
    """`measure.backbones` of the experiment whose backbone is trained here, with the backbone of another seed."""
    run, other = _run(BACKBONES), Run(BACKBONES, {"seed": 1, "pack": "none"}, device="cpu", progress=False)
    return measure.backbones(run, other, ITDA_ATOMS, ITDA_K)


def _all(pool: Executor, tasks: Sequence[Task], progress: Progress) -> Iterator[tuple[Task, pd.DataFrame]]:
    """Perform tasks, the longest first; yields them as they finish. The first error ends all."""
    waiting: dict[Future, Task] = {}
    for task in sorted(tasks, key=weight, reverse=True):
        waiting[pool.submit(_perform, task)] = task
    try:
        while waiting:
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                task = waiting.pop(future)
                found = future.result()
                progress.finished(task, _told(found))
                yield task, found
    finally:
        for future in waiting:
            future.cancel()


def _told(found: pd.DataFrame) -> str:
    if "held_out_fvu" not in found:
        return ""
    row = found.iloc[0]
    if pd.isna(row["held_out_fvu"]):
        return ": diverged"
    return f": FVU {row['held_out_fvu']:.4f}, L0 {row['held_out_l0']:.1f} held out, {row['train_cpu_s']:.1f} CPU s"


def _perform(task: Task) -> pd.DataFrame:
    return perform(_run(task.experiment), task)


@cache  # one a process
def _run(experiment: str) -> Run:
    return Run(experiment, device="cpu", progress=False)


@contextlib.contextmanager
def _pool(jobs: int, executor: Executor | None) -> Iterator[Executor]:
    if executor is not None:
        yield executor
        return
    before = {name: os.environ.get(name) for name in _THREADS}
    os.environ.update(dict.fromkeys(_THREADS, "1"))  # read when the libraries load, so before the processes start
    try:
        with ProcessPoolExecutor(jobs, get_context("spawn"), _one_thread) as pool:
            yield pool
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
