"""Training a Top-k SAE: one loop.

The features live on the device, a random permutation orders each epoch, and what is counted stays on the device until
the epoch ends: no DataLoader, and no step waits for the host. What one step does is in `steps.py`, in plain PyTorch
(any device, the reference) and compiled for the CPU.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import time

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from .config import SAEConfig
from .cpu_step import CompiledStep
from .model import TopKSAE, check_rows
from .select import compiled as numba_kernels
from .steps import PlainStep

log = logging.getLogger(__name__)
MEDIAN_ROWS = 32_768


def train_sae(
    x: np.ndarray | torch.Tensor,
    config: SAEConfig,
    device: str | torch.device = "auto",
    held_out: np.ndarray | torch.Tensor | None = None,
    keep: str = "last",
    progress: bool = True,
    compiled: bool | None = None,
) -> tuple[TopKSAE, pd.DataFrame]:
    """Train a Top-k SAE on features (arXiv 2604.26409; Gao et al. 2406.04093 for what that leaves open).

    Parameters
    ----------
    x : (N, d) floating point
        Raw features: the SAE normalises them itself.
    config : SAEConfig
    device : str
        "auto" takes a GPU where there is one.
    held_out : (N', d) or None
        Rows that are not trained on; their FVU is measured after each epoch.
    keep : {"last", "best"}
        The weights that are returned: the last, or those of the epoch with the lowest held-out FVU.
    progress : bool
        A progress bar on stderr.
    compiled : bool or None
        The numba steps (CPU) or the plain ones. None: compiled where that is possible.

    Returns
    -------
    sae : TopKSAE, on `device`
    history : DataFrame
        One row an epoch: epoch (from 1), loss (FVU of the batches plus the weighted AuxK), fvu (about the mean, of
        each batch before its step), l0, dead_fraction, held_out_fvu (with `held_out`), seconds (of the epoch).
        ``attrs``: best_epoch (the epoch whose weights are returned), device, products, step, rate (rows/s).

    Raises
    ------
    ValueError, TypeError
        Bad input: NaN or infinity (with the row), wrong shape, fewer than two rows, no variance at all.
    FloatingPointError
        The loss left the finite numbers: a learning rate far too high.
    """
    if keep not in ("last", "best"):
        raise ValueError(f"keep is {keep!r}; 'last' or 'best' would do")
    if keep == "best" and held_out is None:
        raise ValueError("keep='best' chooses the epoch by held-out FVU: give held_out, or keep='last'")
    x = check_rows(x, at_least=2)
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    sae, x, variance = start(x, config, device)
    if held_out is not None:
        held_out = sae.normalize(check_rows(held_out, d=x.shape[1], at_least=2, name="held_out").to(device))
        held_out_variance = _variance(held_out, "held_out")

    n_batches = math.ceil(len(x) / config.batch_size)
    n_steps = config.epochs * n_batches
    step = _step_kind(compiled, device)(sae, variance, window=max(1, round(config.dead_after_epochs * n_batches)))
    dice = torch.Generator(device).manual_seed(config.seed)
    lr = config.peak_lr
    records, best, done, began = [], None, 0, time.perf_counter()
    with contextlib.closing(step), tqdm(total=config.epochs, unit="epoch", desc="SAE", disable=not progress) as bar:
        for epoch in range(1, config.epochs + 1):
            epoch_began = time.perf_counter()
            for rows in torch.randperm(len(x), generator=dice, device=device).tensor_split(n_batches):
                step(x[rows], lr * schedule(done, n_steps, config.warmup, config.decay))
                done += 1
            record = {"epoch": epoch} | step.read()  # the epoch's only wait for the device
            if not math.isfinite(record["loss"]):
                raise FloatingPointError(f"the loss became {record['loss']} in epoch {epoch} at lr {lr:g}: lower lr")
            if held_out is not None:
                record["held_out_fvu"] = step.squared_error(held_out) / held_out_variance
                if keep == "best" and (best is None or record["held_out_fvu"] < best[0]):
                    best = record["held_out_fvu"], epoch, copy.deepcopy(step.result().state_dict())
            records.append(record | {"seconds": time.perf_counter() - epoch_began})
            bar.update()
            bar.set_postfix(fvu=f"{record['fvu']:.4f}", dead=f"{record['dead_fraction']:.3f}")
        sae.load_state_dict(best[2] if best else step.result().state_dict())

    if not all(p.isfinite().all() for p in sae.parameters()):
        raise FloatingPointError(f"the weights left the finite numbers in epoch {epoch} at lr {lr:g}: lower lr")
    history = pd.DataFrame(records)
    history.attrs = {
        "best_epoch": best[1] if best else config.epochs,
        "device": str(device),
        "products": step.products,
        "step": type(step).__name__,
        "rate": len(x) * config.epochs / (time.perf_counter() - began),
    }
    log.info("SAE trained: %s", history.attrs)
    return sae.eval(), history


def schedule(done: int, n_steps: int, warmup: float, decay: float) -> float:
    """The learning rate as a fraction of its peak, for the step after `done`: up, level, down to near 0."""
    rise, fall = warmup * n_steps, decay * n_steps
    return min(1.0, (done + 1) / (rise + 1), (n_steps - done) / (fall + 1))


@torch.no_grad()
def start(x: torch.Tensor, config: SAEConfig, device: torch.device) -> tuple[TopKSAE, torch.Tensor, float]:
    """The SAE before its first step, the normalised rows on the device, and their variance (summed over columns)."""
    sae = TopKSAE.untrained(x.shape[1], config)
    if config.normalize == "dataset":
        std, mean = torch.std_mean(x.double(), dim=0, correction=0)
        sae.mean.copy_(mean)
        sae.std.copy_(std.masked_fill(std <= 1e-6 * x.abs().amax(0), 1))  # a constant column stays finite
    sae.to(device)
    x = sae.normalize(x.to(device))
    variance = _variance(x, "x")
    if config.pre_bias == "mean":
        sae.pre_bias.copy_(x.double().mean(0))
    elif config.pre_bias == "geometric_median":
        sample = torch.randperm(len(x), generator=torch.Generator().manual_seed(config.seed))[:MEDIAN_ROWS]
        sae.pre_bias.copy_(geometric_median(x[sample.to(device)]))
    return sae, x, variance


def geometric_median(x: torch.Tensor, steps: int = 100, tolerance: float = 1e-6) -> torch.Tensor:
    """The point (d,) with the smallest summed distance to the rows of x (N, d), by Weiszfeld's iteration."""
    median = x.mean(0)
    for _ in range(steps):
        weight = 1 / (x - median).norm(dim=1, keepdim=True).clamp_min(1e-8)
        last, median = median, (x * weight).sum(0) / weight.sum()
        if (median - last).norm() <= tolerance * median.norm():
            break
    return median


def _variance(x: torch.Tensor, name: str) -> float:
    """Mean squared distance from the mean: the loss is measured in it, so no batch size and no scale enters."""
    mean = x.mean(0, dtype=torch.float64).float()
    variance = (x - mean).square().sum(1).mean(dtype=torch.float64).item()
    if variance <= 1e-12 * x.square().sum(1).mean().item():
        raise ValueError(f"{name} has {len(x)} rows that are all equal after normalisation: nothing to learn")
    return variance


def _step_kind(compiled: bool | None, device: torch.device) -> type[PlainStep] | type[CompiledStep]:
    possible = device.type == "cpu" and numba_kernels() is not None
    if compiled and not possible:
        raise ValueError(f"compiled steps need a CPU and numba; the device is {device}: compiled=None would do")
    return CompiledStep if possible and compiled is not False else PlainStep
