"""Images -> features: one pass of a frozen backbone over a source, sharded, resumable and flat in memory.

Decoding runs in threads ahead of the forward pass (Pillow releases the GIL); a finished shard is one safetensors
file, written atomically, and is never made again by a later run with the same source and backbone. Under torchrun the
ranks share the shards; they must see the same folder.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from .. import distributed
from ..data.images import PIXEL_STATISTICS, BadImage
from ..data.open import open_source
from ..data.sources import ImageSource
from ..device import available_cores, pick_device, pick_dtype
from .backbone import Backbone, BackboneSpec, load_backbone
from .extraction_report import bar_of, device_name, versions
from .featureset import FeatureSet, LinearHead, write_tensors
from .probe import fit_linear_probe

__all__ = [
    "BackboneSpec",
    "BadImagesError",
    "FeatureSet",
    "LinearHead",
    "extract",
    "fit_linear_probe",
    "load_backbone",
]

log = logging.getLogger(__name__)

EXTRACTOR = 1
"""Raised whenever the same pixels and weights would give other features: shards and packs of another number are not
resumed."""

__code_version__ = 1
"""Counts in place of this file's text (:mod:`capsae.pipeline.code`). The extractor counts by EXTRACTOR alone, in the
settings of
what it makes, so that a change of its threads or its progress bar does not cost a day of extraction."""

MAX_BAD = 0.01
_TASK = (
    16  # images per decoding task: few enough to spread a batch over the threads, enough that the queue costs nothing
)
_SECONDS = 60.0  # after which the rows of a shard so far are written: what a kill costs at most
_AHEAD = 3  # batches decoded ahead of the forward pass


class BadImagesError(ValueError):
    """More images are bad than a run may skip; ``bad`` lists them as ``{"id", "why"}``."""

    def __init__(self, source: str, bad: list[dict], total: int, max_bad: float):
        first = "; ".join(f"{each['id']!r}: {each['why']}" for each in bad[:3])
        super().__init__(
            f"{source}: at least {len(bad)} of {total} images are bad, "
            f"more than the {max_bad:.2%} that may be skipped. "
            f"The first: {first}. Repair or remove them, or raise max_bad"
        )
        self.bad = bad


@dataclass(frozen=True)
class _Batch:
    shard: int
    rows: np.ndarray  # (B,)
    pixels: torch.Tensor  # (B, size, size, 3) uint8
    statistics: np.ndarray  # (B, P) float32, of the images before they were resized
    tasks: list[Future]  # each gives [(position, BadImage)]


def extract(
    source,
    backbone,
    out_dir: str | os.PathLike,
    *,
    batch_size: int = 128,
    shard_size: int = 4096,
    device: str = "auto",
    dtype: str = "auto",
    workers: int | None = None,
    logits: bool = True,
    name: str | None = None,
    max_bad: float = MAX_BAD,
    progress: bool = True,
) -> FeatureSet:
    """Features of all images of a source.

    Parameters
    ----------
    source : ImageSource or mapping
        What :func:`capsae.data.open.open_source` gives or takes.
    backbone : str, mapping, BackboneSpec or Backbone
        What :func:`capsae.features.backbone.load_backbone` takes.
    out_dir : path
        Gets ``shard-00000.safetensors`` and so on. Run again after a kill: finished shards are kept, one that was begun
        goes on (its rows are written once a minute), shards of another source, backbone or setting are replaced.
    batch_size, shard_size : int
        Images per forward pass and per shard.
    device : str
        ``auto`` = CUDA if there is any.
    dtype : str
        Products in ``float32``, ``bfloat16`` or ``auto``: bfloat16 on CUDA, float32 on a CPU (even where a CPU has
        bfloat16 instructions: results should not depend on its generation).
    workers : int or None
        Decoding threads; None = the cores that this process may use, shared with the other ranks of this machine.
    logits : bool
        Keep the logits of the model's own head, if it has one.
    name : str or None
        Name of the set; None = the source's.
    max_bad : float
        Share of bad images that may be skipped.
    progress : bool
        Show a bar with images/s: rank 0's own share.

    Returns
    -------
    FeatureSet
        Rows in the order of the source, bad images left out; ``meta["bad_images"]`` lists them as ``{"id", "why"}``.
        Under torchrun each rank makes every so manyth shard, and all return the same whole set.

    Raises
    ------
    BadImagesError
        If more than ``max_bad`` of the images are bad; as soon as that is sure.
    FileNotFoundError
        Under torchrun, if the ranks do not see each other's shards.
    """
    source = source if isinstance(source, ImageSource) else open_source(source)
    if len(source) == 0:
        raise ValueError(f"{source.name} holds no images")
    for key, value in (("batch_size", batch_size), ("shard_size", shard_size)):
        if value < 1:
            raise ValueError(f"{key} is {value}, expected at least 1")
    workers = workers or max(1, available_cores() // distributed.local_world_size())
    torch.set_num_threads(min(torch.get_num_threads(), available_cores()))
    device = pick_device(device)
    dtype = pick_dtype(dtype, device)
    backbone = load_backbone(backbone).to(device)
    logits = bool(logits and backbone.n_logits)
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)

    key = _key(source, backbone, shard_size, dtype, logits)
    n_shards = -(-len(source) // shard_size)
    rank, n_ranks = distributed.rank(), distributed.world_size()
    # Rank 0 tidies up and says what is there before any rank writes: all must leave out the same shards.
    there = distributed.broadcast(_tidied(out_dir, n_shards, key) if rank == 0 else None)
    sizes = [min(shard_size, len(source) - i * shard_size) for i in range(n_shards)]
    done = [i for i, info in there.items() if info["n_rows"] == sizes[i]]
    begun = {i: info["n_rows"] for i, info in there.items() if i not in done}
    own = [i for i in range(n_shards) if i not in done][rank::n_ranks]
    bad: list[dict] = [each for i in sorted(there) for each in there[i]["bad_images"]]
    if done:
        log.info("%s: %d of %d shards are finished already", source.name, len(done), n_shards)

    started = time.perf_counter()
    with (
        bar_of(source, there, own, sizes, progress) as bar,
        ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool,
    ):
        shard, written = _Shard(None), started
        starts = [range(i * shard_size + begun.get(i, 0), i * shard_size + sizes[i], batch_size) for i in own]
        batches = _batches(source, backbone, dict(zip(own, starts, strict=True)), pool, device)
        try:
            for batch, found, cls, scores in _forward(batches, backbone, device, dtype, logits):
                if batch.shard != shard.number:
                    shard.write(out_dir, key)
                    shard, written = _Shard(batch.shard), time.perf_counter()
                    if batch.shard in begun:
                        shard.resume(out_dir, there[batch.shard])
                shard.add(source, batch, found, cls, scores)
                bad += [{"id": each.id, "why": each.why} for _, each in found]
                if len(bad) > max_bad * len(source):
                    raise BadImagesError(source.name, bad, len(source), max_bad)
                bar.update(len(batch.rows))
                if time.perf_counter() - written > _SECONDS:
                    shard.write(out_dir, key)
                    written = time.perf_counter()
            shard.write(out_dir, key)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    distributed.barrier()
    bad = [each for i in range(n_shards) for each in _needed(out_dir, i, key, sizes[i])["bad_images"]]
    if len(bad) > max_bad * len(source):
        raise BadImagesError(source.name, bad, len(source), max_bad)
    for each in bad if rank == 0 else ():
        log.warning("%s: skipped %s: %s", source.name, each["id"], each["why"])

    meta = {
        "backbone": backbone.describe(),
        "backbone_digest": backbone.digest,
        "source": source.spec,
        "source_digest": source.digest(),
        "bad_images": bad,
        "excluded": source.excluded,
        "left_out": len(source.left_out),
        "n_images": len(source),
        "device": device_name(device),
        "dtype": str(dtype).removeprefix("torch."),
        "seconds": round(time.perf_counter() - started, 3),
        "resumed_shards": len(done),
        "ranks": n_ranks,
        "extractor": EXTRACTOR,
        "versions": versions(),
    }
    features = _collect(out_dir, n_shards, source, name or source.name, distributed.broadcast(meta), logits)
    distributed.barrier()  # whoever removes the shards must not do so before all have read them
    return features


# --- the loop -------------------------------------------------------------------------------------


def _batches(source, backbone: Backbone, shards: dict[int, range], pool, device) -> Iterator[_Batch]:
    """Batches in order, decoding up to ``_AHEAD`` of them beyond the one that is handed out; ``shards`` gives each
    shard's rows as range(first, end, batch size)."""
    waiting: deque[_Batch] = deque()
    pinned = device.type == "cuda"
    for shard, starts in shards.items():
        for start in starts:
            rows = np.arange(start, min(starts.stop, start + starts.step))
            pixels = torch.zeros(len(rows), backbone.size, backbone.size, 3, dtype=torch.uint8, pin_memory=pinned)
            view, statistics = pixels.numpy(), np.zeros((len(rows), len(PIXEL_STATISTICS)), np.float32)
            parts = [slice(i, i + _TASK) for i in range(0, len(rows), _TASK)]
            tasks = [pool.submit(_decode, source, backbone, rows, view, statistics, part) for part in parts]
            waiting.append(_Batch(shard, rows, pixels, statistics, tasks))
            if len(waiting) > _AHEAD:
                yield waiting.popleft()
    while waiting:
        yield waiting.popleft()


def _decode(source: ImageSource, backbone: Backbone, rows, out, statistics, part: slice) -> list[tuple[int, BadImage]]:
    bad = []
    for i, row in enumerate(rows[part], start=part.start):
        try:
            image, statistics[i] = source.measured(int(row))
        except BadImage as error:
            bad.append((i, error))
            continue
        try:
            out[i] = backbone.prepare(image)
        except ValueError as error:  # a side that would be less than a pixel
            bad.append((i, BadImage(str(source.ids[int(row)]), f"{image.width} x {image.height} pixels: {error}")))
    return bad


def _forward(batches: Iterator[_Batch], backbone: Backbone, device, dtype, logits: bool):
    """Yield (batch, bad, cls, logits); from an accelerator one batch late, so that it computes the next while this one
    is fetched."""
    previous = None
    for batch in batches:
        found = [each for task in batch.tasks for each in task.result()]
        with torch.inference_mode(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            out = backbone.forward(batch.pixels.to(device, non_blocking=True), logits)
        if previous is not None:
            yield _fetch(*previous)
        previous = (batch, found, out)
        if device.type == "cpu":
            yield _fetch(*previous)
            previous = None
    if previous is not None:
        yield _fetch(*previous)


def _fetch(batch, found, out):
    cls, scores = out
    return batch, found, cls.float().cpu().numpy(), None if scores is None else scores.float().cpu().numpy()


# --- shards ---------------------------------------------------------------------------------------


class _Shard:
    """Rows of one shard until it is full."""

    def __init__(self, number: int | None):
        self.number, self.n_rows, self.bad = number, 0, []
        self.rows: list[np.ndarray] = []
        self.cls: list[np.ndarray] = []
        self.logits: list[np.ndarray] = []
        self.pixels: list[np.ndarray] = []

    def resume(self, out_dir: Path, info: dict) -> None:
        """Take what a killed run has written of this shard."""
        self.n_rows, self.bad = info["n_rows"], list(info["bad_images"])
        for key in ("rows", "cls", "pixels", *(("logits",) if info["logits"] else ())):
            getattr(self, key).append(_read(out_dir, self.number, key))

    def add(self, source, batch: _Batch, found, cls, logits) -> None:
        good = np.ones(len(batch.rows), dtype=bool)
        good[[position for position, _ in found]] = False
        self.rows.append(batch.rows[good])
        self.cls.append(cls[good])
        self.pixels.append(batch.statistics[good])
        if logits is not None:
            self.logits.append(logits[good])
        self.bad += [{"id": each.id, "why": each.why} for _, each in found]
        self.n_rows += len(batch.rows)

    def write(self, out_dir: Path, key: str) -> None:
        if self.number is None:
            return
        tensors = {key: np.concatenate(getattr(self, key)) for key in ("rows", "cls", "pixels")}
        if self.logits:
            tensors["logits"] = np.concatenate(self.logits)
        info = {"key": key, "n_rows": self.n_rows, "bad_images": self.bad, "logits": bool(self.logits)}
        write_tensors(_shard_path(out_dir, self.number), tensors, info)


def _shard_path(out_dir: Path, number: int) -> Path:
    return out_dir / f"shard-{number:05d}.safetensors"


def _key(source: ImageSource, backbone: Backbone, shard_size: int, dtype, logits: bool) -> str:
    parts = [EXTRACTOR, "timm", source.digest(), backbone.digest, shard_size, str(dtype), logits, PIXEL_STATISTICS]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _found(out_dir: Path, number: int, key: str) -> dict | None:
    """Info of a shard that this very run would make, else None. A rename puts only whole files there; the header
    alone is read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(_shard_path(out_dir, number), framework="numpy") as file:
            info = json.loads((file.metadata() or {}).get("capsae", "{}"))
    except (FileNotFoundError, SafetensorError):
        return None
    return info if info.get("key") == key else None


def _needed(out_dir: Path, number: int, key: str, n_rows: int = 0) -> dict:
    """Info of a shard that must be there, whole."""
    info = _found(out_dir, number, key)
    if info is None or info["n_rows"] < n_rows:
        raise FileNotFoundError(
            f"{_shard_path(out_dir, number)} is not there, or not whole; a folder that all ranks share would do"
        )
    return info


def _tidied(out_dir: Path, n_shards: int, key: str) -> dict[int, dict]:
    """Remove what a killed run or a longer source left behind; the infos of the other shards, by number."""
    for path in [*out_dir.glob("shard-*.safetensors.*.tmp"), *out_dir.glob("shard-*.safetensors")]:
        if path.suffix == ".tmp" or int(path.name[6:11]) >= n_shards:
            path.unlink(missing_ok=True)
    return {i: info for i in range(n_shards) if (info := _found(out_dir, i, key)) is not None}


def _collect(out_dir: Path, n_shards: int, source: ImageSource, name: str, meta: dict, logits: bool) -> FeatureSet:
    rows = np.concatenate([_read(out_dir, i, "rows") for i in range(n_shards)])

    def whole(key):  # shard by shard into one array: nothing is held twice
        out, start = None, 0
        for i in range(n_shards):
            part = _read(out_dir, i, key)
            out = np.empty((len(rows), *part.shape[1:]), dtype=part.dtype) if out is None else out
            out[start : start + len(part)] = part
            start += len(part)
        return out

    return FeatureSet(
        cls=whole("cls"),
        labels=source.labels[rows],
        ids=source.ids[rows],
        logits=whole("logits") if logits else None,
        name=name,
        class_names=source.class_names,
        meta=meta,
        pixels=whole("pixels"),
    )


def _read(out_dir: Path, number: int, key: str) -> np.ndarray:
    from safetensors import safe_open

    with safe_open(_shard_path(out_dir, number), framework="numpy") as file:
        return file.get_tensor(key)
