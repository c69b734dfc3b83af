"""The rows as a training sees them: normalised, on the device, one copy; and where the training starts from them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from .. import distributed
from .config import SAEConfig
from .model import TopKSAE, check_rows, model
from .select import compiled

CHUNK = 65_536  # rows normalised or summed at a time: what is held beside the one copy
MEDIAN_ROWS = 32_768
FITTED_ROWS = 1024


@dataclass(frozen=True)
class Rows:
    """This process's rows, and what all processes' rows have in common (without `sharded`, the same rows).

    The loss is measured in `variance`, the mean squared distance of all rows from their mean: so no batch size and no
    scale enters.
    """

    own: torch.Tensor  # (n, d) float32, normalised, on the device
    first: int  # place of own[0] among the rows of all
    total: int  # number of the rows of all
    variance: float
    sharded: bool = False

    def order(self, rng: torch.Generator, n_batches: int) -> list[torch.Tensor]:
        """A new random order of all rows: for each batch, the places in `own` of those of its rows that lie here."""
        order = torch.randperm(self.total, generator=rng, device=self.own.device)
        if not self.sharded:
            return list(order.tensor_split(n_batches))
        here = (order >= self.first) & (order < self.first + len(self.own))
        counts = torch.stack([part.sum() for part in here.tensor_split(n_batches)]).tolist()
        return list((order[here] - self.first).split(counts))


def start(x: torch.Tensor, config: SAEConfig, device: torch.device) -> tuple[TopKSAE, Rows]:
    """One SAE before its first step, which is also a control, and the rows."""
    saes, rows = starts(x, [config], device)
    return saes[0], rows


@torch.no_grad()
def starts(
    x: torch.Tensor, configs: list[SAEConfig], device: torch.device, sharded: bool = False
) -> tuple[list[TopKSAE], Rows]:
    """SAEs before their first step, on the device, and the rows that all of them share: `normalize` must be the same.

    Beside x itself, wherever it lies, one float32 copy of the rows is made, on the device (none if x is already what
    is wanted: float32, there, and ``normalize="none"``).
    """
    saes = [model(config).untrained(x.shape[1], config).to(device) for config in configs]
    if configs[0].normalize == "dataset":
        mean, std = _column_statistics(x, sharded)
        for sae in saes:
            sae.mean.copy_(mean)
            sae.std.copy_(std)
    rows = prepare(x, saes[0], device, sharded)
    for sae in saes:
        if sae.config.pre_bias == "mean":
            sae.pre_bias.copy_(_sum(_chunks(rows.own), sharded) / rows.total)
        elif sae.config.pre_bias == "geometric_median":
            sae.pre_bias.copy_(geometric_median(sample(rows, sae.config.seed)))
        if sae.config.init == "fitted":
            sae.encoder *= fitted_scale(sae, sample(rows, sae.config.seed)[:FITTED_ROWS])
    return saes, rows


def fitted_scale(sae: TopKSAE, x: torch.Tensor) -> float:
    """The number by which the encoder must be multiplied to reconstruct x (n, d) best, its bias being 0."""
    x_hat = sae.weighted_rows(*TopKSAE.code(sae, x))
    return _total((x - sae.pre_bias) * x_hat) / max(_total(x_hat.square()), 1e-12)


@torch.no_grad()
def prepare(x: torch.Tensor, sae: TopKSAE, device: torch.device, sharded: bool = False, name: str = "x") -> Rows:
    """Rows normalised as an SAE does it, on the device, with their variance."""
    there = torch.empty(0, device=device).device  # "cuda" is some one of them
    if sae.config.normalize == "none" and x.dtype == torch.float32 and x.device == there:
        own = x
    else:
        own = torch.empty(x.shape, device=device)
        for target, block in zip(own.split(CHUNK), x.split(CHUNK), strict=True):
            target.copy_(sae._normalized(block)[0])
    counts = distributed.all_gather(len(x)) if sharded else [len(x)]
    first = sum(counts[: distributed.rank()]) if sharded else 0
    return Rows(own, first, sum(counts), _variance(own, sum(counts), name, sharded), sharded)


def checked(x: np.ndarray | torch.Tensor, sharded: bool, at_least: int, name: str, d: int | None = None):
    """x as `check_rows` gives it. Where rows are sharded, one's error is raised on all ranks: none is left waiting."""
    if not sharded:
        return check_rows(x, d=d, at_least=at_least, name=name)
    error, rows = None, None
    try:
        rows = check_rows(x, d=d, at_least=0, name=name)
    except (TypeError, ValueError) as caught:
        error = caught
    found = distributed.all_gather((error and str(error), None if error else tuple(rows.shape)))
    for rank, (message, _) in enumerate(found):
        if message:
            raise ValueError(f"rank {rank}: {message}") from error
    if len(widths := {shape[1] for _, shape in found}) > 1:
        raise ValueError(f"{name} has {sorted(widths)} columns on different ranks; the same on all would do")
    if (n := sum(shape[0] for _, shape in found)) < at_least:
        raise ValueError(f"{name} has {n} rows on all ranks together; at least {at_least} would do")
    return rows


def geometric_median(x: torch.Tensor, steps: int = 100, tolerance: float = 1e-6) -> torch.Tensor:
    """The point (d,) with the smallest summed distance to the rows of x (N, d), by Weiszfeld's iteration."""
    kernels = compiled() if x.device.type == "cpu" else None
    if kernels is not None:  # row by row, in their order
        rows, sums = x.float().contiguous().numpy(), np.zeros(x.shape[1])
    median = (_sum(_chunks(x), False) / len(x)).float()
    for _ in range(steps):
        last = median
        if kernels is not None:
            weights = kernels.weigh_rows(rows, last.numpy(), sums)
            median = torch.from_numpy((sums / weights).astype(np.float32))
        else:
            weight = 1 / (x - last).norm(dim=1, keepdim=True).clamp_min(1e-8)
            median = (x * weight).sum(0) / weight.sum()
        if math.sqrt(_total((median - last)[None].square())) <= tolerance * math.sqrt(_total(median[None].square())):
            break
    return median


def sample(rows: Rows, seed: int) -> torch.Tensor:
    """Up to MEDIAN_ROWS of the rows of all, the same ones in the same order on every rank."""
    places = torch.randperm(rows.total, generator=torch.Generator().manual_seed(seed))[:MEDIAN_ROWS]
    if not rows.sharded:
        return rows.own[places.to(rows.own.device)]
    here = (places >= rows.first) & (places < rows.first + len(rows.own))
    sample = torch.zeros(len(places), rows.own.shape[1], device=rows.own.device)
    slots = here.nonzero().ravel().to(sample.device)
    sample[slots] = rows.own[(places[here] - rows.first).to(sample.device)]
    return distributed.all_reduce(sample)  # the others have zeros there: the sum is exact


def _column_statistics(x: torch.Tensor, sharded: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and std (d,) of the columns, float64; 1 in place of a std that is rounding alone."""
    n = _sum([torch.tensor([[float(len(x))]])], sharded)
    mean = _sum(_chunks(x), sharded) / n.to(x.device)
    std = (_sum(((block - mean).square() for block in _chunks(x)), sharded) / n.to(x.device)).sqrt()
    largest = torch.stack([torch.zeros_like(mean), *(b.abs().amax(0) for b in _chunks(x) if len(b))]).amax(0)
    largest = distributed.all_reduce(largest, "max") if sharded else largest
    return mean, std.masked_fill(std <= 1e-6 * largest, 1)  # a constant column stays finite


def _variance(x: torch.Tensor, n: int, name: str, sharded: bool) -> float:
    mean = (_sum(_chunks(x), sharded) / n).float()
    about_mean = math.fsum(_sum(((block - mean).square() for block in x.split(CHUNK)), sharded).tolist())
    about_zero = math.fsum(_sum((block.square() for block in x.split(CHUNK)), sharded).tolist())
    if about_mean <= 1e-12 * about_zero:
        raise ValueError(f"{name} has {n} rows that are all equal after normalisation: nothing to learn")
    return about_mean / n


def _chunks(x: torch.Tensor):
    return (block.double() for block in x.split(CHUNK))


def _total(x: torch.Tensor) -> float:
    return math.fsum(_sum([x], False).tolist())


def _sum(blocks, sharded: bool) -> torch.Tensor:
    """Sum over the rows of all blocks (n, d), of all ranks, float64; on a CPU with numba row by row, in their order."""
    total = None
    for block in blocks:
        if total is None:
            total = torch.zeros(block.shape[1], dtype=torch.float64, device=block.device)
        if block.device.type == "cpu" and (kernels := compiled()) is not None:
            kernels.add_columns(block.contiguous().numpy(), total.numpy())
        else:
            total += block.sum(0, dtype=torch.float64)
    return distributed.all_reduce(total) if sharded else total
