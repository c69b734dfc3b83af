"""Training Top-k SAEs: one loop, for one SAE or several, on one process or several.

The features live on the device, a random permutation orders each epoch, and what is counted stays on the device until
the epoch ends: no DataLoader, and no step waits for the host. What one step does is in `steps.py`, in plain PyTorch
(any device, the reference), in `kernels/cpu_step.py` compiled for the CPU, in `kernels/gpu_step.py` for the GPU.

Memory on the device: one float32 copy of the features, normalised, beside what the caller holds; parameters, gradients
and optimiser; and one batch's pre-activations (`memory.memory`).
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from .. import distributed
from .checkpoint import Checkpoint, fingerprint, path_of
from .config import SAEConfig
from .kernels.cpu_step import CompiledStep
from .kernels.gpu_step import TritonStep
from .kernels.gpu_step import available as triton_kernels
from .memory import explain_out_of_memory, room
from .model import TopKSAE, model
from .progress import Bar, check_progress
from .rows import Rows, checked, geometric_median, prepare, sample, start, starts
from .select import compiled as numba_kernels
from .selfcheck import proven
from .steps import PlainStep, Step
from .variants.step import VariantStep
from .variants.thresholds import Variant

__all__ = ["geometric_median", "schedule", "start", "train_sae", "train_saes"]
log = logging.getLogger(__name__)


def train_sae(
    x: np.ndarray | torch.Tensor,
    config: SAEConfig,
    device: str | torch.device = "auto",
    held_out: np.ndarray | torch.Tensor | None = None,
    keep: str = "last",
    progress: bool = True,
    compiled: bool | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_seconds: float = 60.0,
    sharded: bool = False,
    head=None,
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
        Rows that are not trained on; their FVU is measured after each epoch. Thresholds of variants are first moved so
        that these rows' mean L0 is k (`variants.Levelled`).
    keep : {"last", "best"}
        The weights that are returned: the last, or those of the epoch with the lowest held-out FVU.
    progress : bool
        A progress bar on stderr.
    compiled : bool or None
        The numba steps (CPU), the Triton ones (GPU), or the plain ones. None: compiled where that is possible.
    checkpoint : path or None
        A folder, or a ``.safetensors`` file. A training that was killed there goes on where it stood when it is called
        again with the same arguments, and on one device ends with the same bits as without the kill. Removed at the
        end. One of other data or settings is refused; a damaged one is named in a warning and not used.
    checkpoint_seconds : float
        Between two writings of it.
    sharded : bool
        Data-parallel training: every rank of the torch.distributed group (`capsae.distributed.start`) calls this with
        rows of its own, `x` and `held_out`. Trained is on all of them, in the order of the ranks, as one process would;
        all ranks return the same SAE. Plain steps.
    head : LinearHead or None
        On the normalised rows, for the variant "gsae" alone.

    Returns
    -------
    sae : TopKSAE, on `device`
    history : DataFrame
        One row an epoch: epoch (from 1), loss (FVU of the batches plus the weighted AuxK), fvu (about the mean, of
        each batch before its step), l0, dead_fraction, held_out_fvu (with `held_out`), seconds (of the epoch).
        ``attrs``: best_epoch (the epoch whose weights are returned), device, products, portable (whether every CPU with
        fused multiply-add trains the same bits), step, rate (rows/s).

    Raises
    ------
    ValueError, TypeError
        Bad input: NaN or infinity (with the row), wrong shape, fewer than two rows, no variance at all; a checkpoint of
        another training.
    FloatingPointError
        Training diverged, in finite numbers or not: the learning rate is too high.
    MemoryError
        The GPU's memory is not enough; the message says for what it would be.
    """
    options = device, held_out, keep, progress, compiled, checkpoint, checkpoint_seconds, sharded, head
    return train_saes(x, [config], *options)[0]


def train_saes(
    x: np.ndarray | torch.Tensor,
    configs: Sequence[SAEConfig],
    device: str | torch.device = "auto",
    held_out: np.ndarray | torch.Tensor | None = None,
    keep: str = "last",
    progress: bool = True,
    compiled: bool | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_seconds: float = 60.0,
    sharded: bool = False,
    head=None,
) -> list[tuple[TopKSAE, pd.DataFrame]]:
    """Train several SAEs on the same features: other seeds, k, learning rates, sizes.

    Parameters, errors and each result are those of `train_sae` called for each config; on one CPU bit for bit. SAEs
    with the same `normalize`, `epochs` and `batch_size` share one copy of the features and step in turn, so that a
    GPU can take their steps together; others follow one after the other.
    """
    configs = list(configs)
    if not configs:
        raise ValueError("configs is empty; a list of SAEConfig would do")
    if keep not in ("last", "best"):
        raise ValueError(f"keep is {keep!r}; 'last' or 'best' would do")
    if keep == "best" and held_out is None:
        raise ValueError("keep='best' chooses the epoch by held-out FVU: give held_out, or keep='last'")
    if sharded and (shares := [c.aux_rows for c in configs if c.aux_rows < 1]):
        raise ValueError(f"aux_rows is {shares[0]}: sharded training, whose batches lie on several ranks, knows only 1")
    if sharded and any(c.aux_scale != "input" for c in configs):
        raise ValueError("aux_scale is 'residual': sharded training, whose batches lie on several ranks, knows 'input'")
    x = checked(x, sharded, at_least=2, name="x")
    if held_out is not None:
        held_out = checked(held_out, sharded, at_least=2, name="held_out", d=x.shape[1])
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    kind = PlainStep if sharded else _step_kind(compiled, device)
    others = [c.variant for c in configs if model(c) is not TopKSAE]
    if others and (sharded or compiled):
        raise ValueError(f"sharded and compiled training are for variant='topk', found {others[0]!r}; neither would do")

    parts: dict[tuple, list[int]] = {}
    for i, c in enumerate(configs):
        parts.setdefault((c.normalize, c.epochs, c.batch_size, c.variant == "topk"), []).append(i)
    paths = [path_of(checkpoint, number) for number in range(len(parts))]
    n_all = sum(distributed.all_gather(len(x))) if sharded else len(x)
    results = {}
    with contextlib.closing(Bar(n_all * sum(c.epochs for c in configs), progress and distributed.rank() == 0)) as bar:
        for members, path in zip(parts.values(), paths, strict=True):
            own = [configs[i] for i in members]
            saving = path, checkpoint_seconds, len(parts) > 1
            try:
                own_kind = kind if own[0].variant == "topk" else VariantStep
                if own_kind is TritonStep and any(c.aux_scale != "input" for c in own):
                    own_kind = PlainStep  # the kernels know the input's scale alone
                trained = _train_together(x, own, device, held_out, keep, own_kind, bar, sharded, *saving, head)
            except torch.cuda.OutOfMemoryError as error:
                n_held_out = 0 if held_out is None else len(held_out)
                raise MemoryError(explain_out_of_memory(len(x), x.shape[1], own, n_held_out, room(device))) from error
            results |= dict(zip(members, trained, strict=True))
    for path in paths:
        if path is not None and distributed.rank() == 0:
            path.unlink(missing_ok=True)
    return [results[i] for i in range(len(configs))]


@dataclass
class Curve:
    """What was measured of one SAE's training so far."""

    records: list[dict] = field(default_factory=list)  # one an epoch
    first_fvu: float = math.inf  # of the first batch, before any step
    best: tuple[float, int] | None = None  # lowest held-out FVU, its epoch
    best_weights: dict[str, torch.Tensor] = field(default_factory=dict)

    def add(self, record: dict, weights: Callable[[], dict] | None) -> None:
        """An epoch's record; with `weights`, they are kept if it is the best so far."""
        self.records.append(record)
        if weights and (self.best is None or record["held_out_fvu"] < self.best[0]):
            self.best = record["held_out_fvu"], record["epoch"]
            self.best_weights = copy.deepcopy(weights())


def _train_together(
    x: torch.Tensor,
    configs: list[SAEConfig],
    device: torch.device,
    held_out: torch.Tensor | None,
    keep: str,
    kind: type[Step],
    bar: Bar,
    sharded: bool,
    path: Path | None,
    checkpoint_seconds: float,
    save_result: bool,
    head=None,
) -> list[tuple[TopKSAE, pd.DataFrame]]:
    """Train SAEs whose normalisation, epochs and batches are the same, each step of all in one call."""
    saes, rows = starts(x, configs, device, sharded)
    held = None if held_out is None else prepare(held_out, saes[0], device, sharded, "held_out")
    n_batches = math.ceil(rows.total / configs[0].batch_size)
    n_steps = configs[0].epochs * n_batches
    if not kind.proven:
        kind = proven(kind, saes, rows, math.ceil(rows.total / n_batches))
    rngs = {c.seed: torch.Generator(device).manual_seed(c.seed) for c in configs}
    curves = [Curve() for _ in configs]
    for sae in saes:
        if isinstance(sae, Variant):
            sae.begin(sample(rows, sae.config.seed), rows.variance, n_steps, head)

    with contextlib.ExitStack() as stack:
        steps: list[Step] = []
        for sae in saes:
            window = max(1, round(sae.config.dead_after_epochs * n_batches))
            steps.append(stack.enter_context(contextlib.closing(kind(sae, rows.variance, window))))
            steps[-1].sharded = sharded
        step_all = kind.together(steps)
        of_seed = {step.config.seed: step for step in steps}  # SAEs of one seed share their batches

        checkpoint = Checkpoint(path, checkpoint_seconds, _identity(rows, held, keep, steps) if path else {})
        found = checkpoint.load()
        done, seconds = _resume(*found, steps, rngs, curves) if found else (0, 0.0)
        bar.resume(rows.total * (done // n_batches) * len(steps))

        while done < n_steps:
            epoch, position = done // n_batches + 1, done % n_batches  # not 0 where a killed run goes on
            began = time.perf_counter() - seconds
            before = {seed: d.get_state() for seed, d in rngs.items()}
            orders = {seed: rows.order(d, n_batches) for seed, d in rngs.items()}
            for at in range(position, n_batches):
                batches = {seed: of_seed[seed].take(rows.own, order[at]) for seed, order in orders.items()}
                lrs = [c.peak_lr * schedule(done, n_steps, c.warmup, c.decay) for c in configs]
                step_all([batches[c.seed] for c in configs], lrs)
                done += 1
                if done == 1:
                    for step, curve in zip(steps, curves, strict=True):
                        curve.first_fvu = step.fvu()
                bar.look(steps)
                if checkpoint.due and at + 1 < n_batches:
                    checkpoint.save(*_state(done, time.perf_counter() - began, steps, before, curves))

            records = [{"epoch": epoch} | step.read() for step in steps]  # the epoch's only wait for the device
            for record, step, curve in zip(records, steps, curves, strict=True):
                check_progress([*curve.records, record], curve.first_fvu, step.config)
                if held is not None:
                    step.calibrate(held.own)
                    record["held_out_fvu"] = _held_out_fvu(step, held)
            seconds = time.perf_counter() - began
            for record, step, curve in zip(records, steps, curves, strict=True):
                curve.add(record | {"seconds": seconds}, step.result().state_dict if keep == "best" else None)
            bar.epoch(records, rows.total * len(steps))
            seconds = 0.0
            if checkpoint.due or (path and save_result and done == n_steps and distributed.rank() == 0):
                states = {seed: d.get_state() for seed, d in rngs.items()}
                checkpoint.save(*_state(done, seconds, steps, states, curves))
        return [_finish(step, curve, rows, device) for step, curve in zip(steps, curves, strict=True)]


def _finish(step: Step, curve: Curve, rows: Rows, device: torch.device) -> tuple[TopKSAE, pd.DataFrame]:
    """The SAE with the weights that were asked for, and the history."""
    sae, config = step.sae, step.config
    sae.load_state_dict(curve.best_weights or step.result().state_dict())
    if not all(p.isfinite().all() for p in sae.parameters()):
        raise FloatingPointError(
            f"the weights left the finite numbers in the last epoch; lr {config.peak_lr:g} is too high: lower it"
        )
    history = pd.DataFrame(curve.records)
    history.attrs = {
        "best_epoch": curve.best[1] if curve.best else config.epochs,
        "device": str(device),
        "products": step.products,
        "portable": step.portable,
        "step": type(step).__name__,
        "rate": rows.total * config.epochs / history["seconds"].sum(),
    } | step.notes()
    log.info("SAE trained: %s", history.attrs)
    return sae.eval(), history


def _held_out_fvu(step: Step, held: Rows) -> float:
    error = step.squared_error(held.own) * len(held.own) if len(held.own) else 0.0
    if held.sharded:
        error = distributed.all_reduce(torch.tensor(error, dtype=torch.float64)).item()
    return error / held.total / held.variance


def _state(
    done: int, seconds: float, steps: list[Step], rngs: dict[int, torch.Tensor], curves: list[Curve]
) -> tuple[dict[str, torch.Tensor], dict]:
    """What a checkpoint holds: tensors, and the rest as JSON. `rngs` are the generators' states as the epoch began."""
    tensors = {f"rng.{seed}": state for seed, state in rngs.items()}
    for i, (step, curve) in enumerate(zip(steps, curves, strict=True)):
        tensors |= {f"{i}.step.{name}": tensor for name, tensor in step.state().items()}
        tensors |= {f"{i}.best.{name}": tensor for name, tensor in curve.best_weights.items()}
    # Pairs, since a JSON object forgets the order of its keys, which is that of the history's columns.
    records = [[list(record.items()) for record in c.records] for c in curves]
    measured = [{"records": r, "first_fvu": c.first_fvu, "best": c.best} for r, c in zip(records, curves, strict=True)]
    return tensors, {"done": done, "seconds": seconds, "curves": measured}


def _resume(
    tensors: dict[str, torch.Tensor],
    progress: dict,
    steps: list[Step],
    rngs: dict[int, torch.Generator],
    curves: list[Curve],
) -> tuple[int, float]:
    """Put everything back where `_state` saw it; the steps done and the seconds spent in the epoch."""
    for seed, generator in rngs.items():
        generator.set_state(tensors[f"rng.{seed}"])
    for i, (step, curve) in enumerate(zip(steps, curves, strict=True)):
        named = {kind: f"{i}.{kind}." for kind in ("step", "best")}
        of = {k: {n.removeprefix(p): t for n, t in tensors.items() if n.startswith(p)} for k, p in named.items()}
        step.load_state(of["step"])
        measured = progress["curves"][i]
        curve.records, curve.first_fvu = [dict(record) for record in measured["records"]], measured["first_fvu"]
        curve.best, curve.best_weights = measured["best"] and tuple(measured["best"]), of["best"]
    return progress["done"], progress["seconds"]


def _identity(rows: Rows, held: Rows | None, keep: str, steps: list[Step]) -> dict:
    """What a checkpoint must be of to be gone on from: with any of it other, the result would be."""
    statistics = [t.double().sum().item() for t in (steps[0].sae.mean, steps[0].sae.std)]  # normalize="dataset"
    return {
        "settings": [asdict(step.config) for step in steps],
        "x": {"rows": rows.total, "columns": rows.own.shape[1], "content": fingerprint(rows), "statistics": statistics},
        "held_out": held and {"rows": held.total, "content": fingerprint(held)},
        "keep": keep,
        "device": rows.own.device.type,
        "step": type(steps[0]).__name__,
        "products": [step.products for step in steps],
        "ranks": distributed.world_size() if rows.sharded else 1,
    }


def schedule(done: int, n_steps: int, warmup: float, decay: float) -> float:
    """The learning rate as a fraction of its peak, for the step after `done`: up, level, down to near 0."""
    rise, fall = warmup * n_steps, decay * n_steps
    return min(1.0, (done + 1) / (rise + 1), (n_steps - done) / (fall + 1))


def _step_kind(compiled: bool | None, device: torch.device) -> type[Step]:
    if device.type == "cuda" and triton_kernels():
        return PlainStep if compiled is False else TritonStep
    possible = device.type == "cpu" and numba_kernels() is not None
    if compiled and not possible:
        raise ValueError(f"compiled steps need numba on a CPU, triton on a GPU; here: {device}; compiled=None would do")
    return CompiledStep if possible and compiled is not False else PlainStep
