"""Selection: the k largest positive pre-activations of each row.

torch.topk costs many times the encoder product on a CPU (benchmarks/sae_training.py), so there a numba kernel does
the work when numba is installed. Relatives of top-k (batch top-k, thresholds, ...) belong here too.
"""

from __future__ import annotations

import functools
import logging
import os
import platform
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

log = logging.getLogger(__name__)


@functools.cache
def compiled():
    """The module of numba kernels, or None where numba is missing or unable (or ``CAPSAE_NUMBA=0``)."""
    if os.environ.get("CAPSAE_NUMBA", "1") == "0":
        return None
    try:
        import llvmlite.binding

        from .kernels import cpu_kernels

        x86 = platform.machine().lower() in ("x86_64", "amd64")
        if x86 and not llvmlite.binding.get_host_cpu_features().get("fma"):
            raise RuntimeError("this CPU has no fused multiply-add")
    except (ImportError, RuntimeError) as error:  # RuntimeError: also where numba finds no folder for its cache
        log.warning(
            "no numba kernels (%s): selection and training on the CPU take several times longer, and their last bits "
            "depend on this machine",
            error,
        )
        return None
    return cpu_kernels


def topk(z: torch.Tensor, k: int, relu: str = "before") -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest of relu(z) per row, exact, largest first; of equal values on the CPU the lower index.

    Parameters
    ----------
    z : (N, M) float32 or bfloat16 tensor
    k : int
    relu : {"before", "after"}
        Either order gives the same values.

    Returns
    -------
    values (N, k) of z's dtype, >= 0; indices (N, k) int64, distinct within a row. A row with fewer than k positive
    entries has zeros at its end.
    """
    kernels = compiled()
    if z.device.type != "cpu" or kernels is None or z.requires_grad or z.dtype not in (torch.float32, torch.bfloat16):
        return topk_plain(z, k, relu)
    values = torch.empty(len(z), k)
    indices = torch.empty(len(z), k, dtype=torch.int32)
    kernels.topk_rows(*kernels.keys_and_bits(z), values.view(torch.int32).numpy(), indices.numpy())
    values, order = values.sort(dim=1, descending=True, stable=True)
    return values.to(z.dtype), indices.long().gather(1, order)


def encode(x, pre_bias, encoder, bias, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest of relu(W (x - b) + c) per row, as `topk` gives them, by the kernels: the same bits on every CPU.

    x (N, d), pre_bias (d,), encoder (M, d), bias (M,): float32 tensors on a CPU, without gradient.
    """
    kernels = compiled()
    centred = (x - pre_bias).contiguous().numpy()
    panels, bias = kernels.panels_of(encoder.detach().contiguous().numpy()), kernels.biases(bias.detach().numpy())
    values, indices = np.empty((len(x), k), np.float32), np.empty((len(x), k), np.int32)

    def rows(part: slice) -> None:
        kernels.encode_rows(centred[part], panels, bias, values[part], indices[part])

    parts, threads = [slice(s, s + kernels.ROWS) for s in range(0, len(x), kernels.ROWS)], torch.get_num_threads()
    if threads == 1 or len(parts) < 2:
        rows(slice(None))
    else:
        with ThreadPoolExecutor(min(threads, len(parts))) as pool:
            list(pool.map(rows, parts))
    ordered, order = torch.from_numpy(values).sort(dim=1, descending=True, stable=True)
    return ordered, torch.from_numpy(indices).long().gather(1, order)


def topk_plain(z: torch.Tensor, k: int, relu: str = "before") -> tuple[torch.Tensor, torch.Tensor]:
    """The same by torch.topk: any device, differentiable, the reference of the tests."""
    if relu == "before":
        return torch.topk(z.relu(), k, dim=1)
    values, indices = torch.topk(z, k, dim=1)
    return values.relu(), indices
