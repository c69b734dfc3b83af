"""What an extraction tells: its bar, its device, the versions it ran with."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch

from .. import distributed
from ..data.sources import ImageSource


def bar_of(source: ImageSource, there: dict[int, dict], own: list[int], sizes: list[int], progress: bool):
    """A bar with images/s; under torchrun, of this rank's own share."""
    from tqdm.auto import tqdm

    name, total, initial = source.name, len(source), sum(info["n_rows"] for info in there.values())
    label = Path(name).parent.name + "/" + Path(name).name if os.sep in name else name
    if distributed.world_size() > 1:
        total, initial = sum(sizes[i] for i in own), sum(there[i]["n_rows"] for i in own if i in there)
        label += f", rank {distributed.rank()} of {distributed.world_size()}"
        progress = progress and distributed.rank() == 0
    return tqdm(
        total=total,
        initial=initial,
        desc=f"features {label}",
        unit="images",
        disable=not progress,
        mininterval=0.5,
        smoothing=0.05,
    )


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's threads."""
    return torch.cuda.getdevice_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"


def versions() -> dict:
    """Versions of what turns an image into features."""
    import PIL
    import timm

    return {"torch": torch.__version__, "timm": timm.__version__, "pillow": PIL.__version__, "numpy": np.__version__}
