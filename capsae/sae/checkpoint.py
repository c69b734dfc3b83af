"""Where a killed training goes on: one safetensors file that holds all that the next step depends on.

The file is replaced whole (temporary name, fsync, rename), so a crash leaves the last one. Its metadata say of what
data and settings it is: it is refused for others. A damaged one is named in a warning, and training starts anew.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from pathlib import Path
from typing import Any

import torch

from .. import distributed
from ..features.featureset import read_tensors, write_tensors
from .rows import CHUNK, Rows

log = logging.getLogger(__name__)
SCHEMA = 2


class Checkpoint:
    """The file of one training, or none (`path` None): then nothing is read or written.

    At least `seconds` pass between two writings; `identity` (JSON values) is what the training is of: a file with
    another one is refused. Of several ranks, which all have the same state, the first writes and reads.
    """

    def __init__(self, path: Path | None, seconds: float, identity: dict[str, Any]) -> None:
        self.path, self.seconds, self.identity = path, seconds, identity
        self.written = time.monotonic()

    @property
    def due(self) -> bool:
        here = self.path is not None and distributed.rank() == 0
        return here and time.monotonic() - self.written >= self.seconds

    def save(self, tensors: dict[str, torch.Tensor], progress: dict[str, Any]) -> None:
        """Replace the file by this state."""
        arrays = {name: tensor.detach().cpu().numpy() for name, tensor in tensors.items()}
        info = {"schema": SCHEMA, "identity": self.identity, "progress": progress, "content": _digest(arrays)}
        write_tensors(self.path, arrays, info)
        self.written = time.monotonic()  # from the end: a slow disk does not take all the time

    def load(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """The state to go on from; None if there is none. ValueError, with what differs, for another training's."""
        if self.path is None:
            return None
        found = None
        if distributed.rank() == 0:
            try:
                found = self._read()
            except ValueError as error:
                found = error
        found = distributed.broadcast(found)
        if isinstance(found, ValueError):
            raise found
        return found

    def _read(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        for left in self.path.parent.glob(f"{self.path.name}.*.tmp"):
            left.unlink(missing_ok=True)  # of a run killed while it wrote
        if not self.path.is_file():
            return None
        try:
            arrays, info = read_tensors(self.path)
            if info["schema"] != SCHEMA or info["content"] != _digest(arrays):
                raise ValueError("its content or its schema is another")
        except (ValueError, KeyError) as error:
            log.warning("checkpoint %s is damaged or of another version (%s): training starts anew", self.path, error)
            return None
        wanted, found = json.loads(json.dumps(self.identity)), info["identity"]
        if differs := _differences(wanted, found):
            raise ValueError(
                f"checkpoint {self.path} is of another training: {'; '.join(differs)}. Go on with what it was made "
                "from, give another checkpoint, or delete it"
            )
        return {name: torch.from_numpy(array) for name, array in arrays.items()}, info["progress"]


def path_of(checkpoint: str | Path | None, part: int) -> Path | None:
    """File of one part of a call: in a folder ``training.safetensors``, ``training-1.safetensors`` ...; or as named."""
    if checkpoint is None:
        return None
    path = Path(checkpoint)
    path = path if path.suffix == ".safetensors" else path / "training.safetensors"
    return path.with_stem(f"{path.stem}-{part}") if part else path


@torch.no_grad()
def fingerprint(rows: Rows) -> str:
    """A digest of all rows in their order, the same on every device and for any number of ranks.

    Integers wrap around, so this sum of products is exact and may be taken in any order; a changed, missing or
    exchanged row changes it. No cryptography: it is to notice accidents.
    """
    device = rows.own.device
    total = torch.zeros(rows.own.shape[1], dtype=torch.int64, device=device)
    for begin in range(0, len(rows.own), CHUNK):
        block = rows.own[begin : begin + CHUNK].contiguous().view(torch.int32).to(torch.int64)
        place = torch.arange(begin, begin + len(block), device=device) + rows.first
        total += (block * ((place + 1) * 0x1E3779B97F4A7C15 | 1)[:, None]).sum(0)
    if rows.sharded:
        distributed.all_reduce(total)
    return hashlib.sha256(f"{rows.total} {total.tolist()}".encode()).hexdigest()[:20]


def _digest(arrays: dict) -> str:
    sha = hashlib.sha256()
    for name in sorted(arrays):
        sha.update(f"{name}{arrays[name].dtype}{arrays[name].size}".encode())
        sha.update(arrays[name].tobytes())
    return sha.hexdigest()


def _differences(wanted: Any, found: Any, name: str = "") -> list[str]:
    """Every value that differs between two JSON objects, as text."""
    if isinstance(wanted, list) and isinstance(found, list) and len(wanted) == len(found):
        wanted, found = ({f"[{i}]": v for i, v in enumerate(values)} for values in (wanted, found))
    if isinstance(wanted, dict) and isinstance(found, dict):
        keys = list(wanted | found)
        return [d for k in keys for d in _differences(wanted.get(k), found.get(k), f"{name}.{k}".lstrip("."))]
    return [] if wanted == found else [f"{name} was {found!r}, is {wanted!r}"]
