"""What a training shows while it runs, and when it has gone wrong."""

from __future__ import annotations

import logging
import math
import time

from tqdm.auto import tqdm

from .config import SAEConfig
from .steps import Step

log = logging.getLogger(__name__)
EVERY = 0.5  # seconds
__code_version__ = 1  # what is shown, and when a training is given up, changes no result: see capsae.pipeline.code


class Bar:
    """One bar over the vectors of all SAEs: rate, FVU, dead fraction; on a GPU once an epoch: no step waits."""

    def __init__(self, total: int, progress: bool) -> None:
        self.bar = tqdm(total=total, unit="vec", unit_scale=True, desc="SAE", disable=not progress, smoothing=0.1)
        self.finished, self.looked = 0, time.monotonic()

    def resume(self, vectors: int) -> None:
        """So many were done before this process began: they count, but not in the rate."""
        self.finished += vectors
        if not self.bar.disable:
            self.bar.n = self.finished
            self.bar.initial += vectors

    def look(self, steps: list[Step]) -> None:
        """Called after each step; does nothing most of the time."""
        on_gpu = steps[0].totals.device.type == "cuda"
        if self.bar.disable or on_gpu or time.monotonic() - self.looked < EVERY:
            return
        self.looked, rows = time.monotonic(), sum(int(step.totals[0]) for step in steps)
        dead = [(step.idle >= step.window).double().mean().item() for step in steps]
        self._show(self.finished + rows, [step.fvu() for step in steps if step.totals[0]], dead)

    def epoch(self, records: list[dict], vectors: int) -> None:
        """An epoch ended, with these records, one an SAE."""
        self.finished += vectors
        self._show(self.finished, [r["fvu"] for r in records], [r["dead_fraction"] for r in records])

    def close(self) -> None:
        self.bar.close()

    def _show(self, vectors: int, fvu: list[float], dead: list[float]) -> None:
        if fvu and not self.bar.disable:
            means = {"fvu": f"{sum(fvu) / len(fvu):.4f}", "dead": f"{sum(dead) / len(dead):.3f}"}
            self.bar.set_postfix(means, refresh=False)
            self.bar.update(vectors - self.bar.n)


def check_progress(records: list[dict], first_fvu: float, config: SAEConfig) -> None:
    """Raise FloatingPointError, naming lr and a remedy, if the epochs so far show that the learning rate is too high.

    The loss may leave the finite numbers, or stay finite: more than twice its start, and twice that of the data's mean,
    for three epochs after the warm-up or in the last one, or a hundred times at once. One bad epoch may be made good.
    """
    lr, now, limit = config.peak_lr, records[-1], max(2.0, 2 * first_fvu)
    remedy = f"lr {lr:g} is too high: try lr {lr / 10:.3g}, or a longer warmup than {config.warmup:g}"
    if not math.isfinite(now["loss"]):
        raise FloatingPointError(f"the loss became {now['loss']} in epoch {now['epoch']}; {remedy}")
    warm = [r["fvu"] > limit for r in records if r["epoch"] >= config.warmup * config.epochs]
    lasting = len(warm) >= 3 and all(warm[-3:]) or now["epoch"] == config.epochs and now["fvu"] > limit
    if lasting or any(warm[-1:]) and now["fvu"] > 100 * limit:
        raise FloatingPointError(
            f"training diverges: FVU {now['fvu']:.3g} in epoch {now['epoch']}, {first_fvu:.3g} in the first step; "
            f"{remedy}"
        )
    if now["epoch"] == config.epochs and now["fvu"] >= 1 and now["dead_fraction"] > 0.5:
        log.warning(
            "the SAE explains nothing (FVU %.3f, %.0f %% dead): lr %g may be too high",
            now["fvu"],
            100 * now["dead_fraction"],
            lr,
        )
