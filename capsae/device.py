"""Where the arithmetic is done: device, number format, cores, memory, versions."""

from __future__ import annotations

import contextlib
import os
import platform
import sys
from functools import cache
from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def available_cores() -> int:
    """Cores that this process may use (a container's or a scheduler's share, not the machine's)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def pick_device(device: str | torch.device = "auto") -> torch.device:
    """``auto`` = CUDA if there is any, else CPU."""
    import torch

    if str(device) == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """``auto`` = bfloat16 on CUDA, float32 on a CPU."""
    import torch

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "bf16": torch.bfloat16}
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    if dtype not in known:
        raise ValueError(f"dtype is {dtype!r}, expected 'auto', 'float32' or 'bfloat16'")
    return known[dtype]


@cache
def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that numbers depend on."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def machine() -> dict[str, Any]:
    """Return what hardware this is: names and counts."""
    return {"system": platform.system(), "machine": platform.machine(), "cpus": os.cpu_count()}


def peak_rss_mb() -> float | None:
    """Return the largest memory this process has held so far, in MB; None where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1e6 if sys.platform == "darwin" else 1e3), 1)  # bytes on macOS, KiB elsewhere


_PACKAGES = ("capsae", "torch", "timm", "numpy", "scipy", "scikit-learn", "pandas", "safetensors")
