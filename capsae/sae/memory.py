"""What a training needs of a GPU's memory, and what to say when that is not there."""

from __future__ import annotations

import math

import torch

from .config import SAEConfig


def memory(n: int, d: int, config: SAEConfig) -> dict[str, int]:
    """Bytes that training holds on the device: "rows" (the one copy), "weights" (with optimiser), "per_row" of a batch.

    A kind of step may do with less for each row of a batch: this is the plain one's, and the most any needs.
    """
    parameters = 2 * config.latents * d + config.latents + d
    # weights, gradients, two moments, one temporary of the optimiser or of the result that is kept, the average
    copies = 5 + (config.ema is not None)
    half = config.products != "float32"
    # pre-activations, their relu, the gradients of both; the row, centred, x_hat, residual, their gradients; the code
    per_row = config.latents * 4 * (2 if half else 4) + 8 * 4 * d + 6 * 4 * config.k
    return {"rows": 4 * n * d, "weights": 4 * parameters * copies, "per_row": per_row}


def room(device: torch.device) -> int:
    """Bytes of a GPU that this process could have: free, or held by it."""
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)


def explain_out_of_memory(n: int, d: int, configs: list[SAEConfig], n_held_out: int, room: int) -> str:
    """What a training that ran out of GPU memory needs, and what would fit."""
    each = [memory(n, d, config) for config in configs]
    rows = each[0]["rows"] + 4 * n_held_out * d
    weights, per_row = sum(e["weights"] for e in each), max(e["per_row"] for e in each)
    left = room - rows - weights
    batch = configs[0].batch_size
    need = (
        f"out of GPU memory: {rows / 1e9:.2f} GB for {n + n_held_out} rows of {d}, {weights / 1e9:.2f} GB for weights "
        f"and optimiser of {len(configs)} SAE{'s' * (len(configs) > 1)}, up to {batch * per_row / 1e9:.2f} GB for a "
        f"batch of {batch}; this process can have {room / 1e9:.2f} GB"
    )
    if left >= per_row:
        fits = 2 ** int(math.log2(0.9 * left / per_row))
        return f"{need}. batch_size={min(fits, max(1, batch // 2))} would fit"
    if rows + each[0]["weights"] + per_row <= room:
        fits = (room - rows - per_row) // each[0]["weights"]
        return f"{need}. {fits} of these SAEs at a time would fit"
    if rows < room:
        fits = int((room - rows) / (each[0]["weights"] + batch * per_row) * configs[0].latents)
        return f"{need}. latents={max(1, fits)} would fit"
    return (
        f"{need}. {max(0, int(0.5 * room / (4 * d)))} rows would fit, or rows sharded over several GPUs (sharded=True)"
    )
