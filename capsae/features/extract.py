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
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm

from .. import distributed
from ..data.images import PIXEL_STATISTICS, BadImage
from ..data.open import open_source
from ..data.sources import ImageSource
from ..device import available_cores, pick_device, pick_dtype
from .backbone import Backbone, load_backbone
from .featureset import FeatureSet, read_tensors, write_tensors

log = logging.getLogger(__name__)

EXTRACTOR = 1
"""Raised whenever the same pixels and weights would give other features: shards and packs of another number are not
resumed."""

__code_version__ = 1
"""Counts in place of this file's text (:mod:`capsae.pipeline.code`). The extractor counts by EXTRACTOR alone, in the
settings of what it makes, so that a change of its threads or its progress bar does not cost a day of extraction."""

MAX_BAD = 0.01
_TASK = 16  # images per decoding task: few enough to spread a batch over the threads, enough that the queue is cheap
_SECONDS = 60.0  # after which the rows of a shard so far are written: what a kill costs at most
_AHEAD = 3  # batches decoded ahead of the forward pass


class BadImagesError(ValueError):
    """More images are bad than a run may skip; ``bad`` lists them as ``{"id", "why"}``."""

    def __init__(self, source: str, bad: list[dict], total: int, max_bad: float):
        first = "; ".join(f"{each['id']!r}: {each['why']}" for each in bad[:3])
        found = f"at least {len(bad)} of {total} images are bad, more than the {max_bad:.2%} that may be skipped"
        super().__init__(f"{source}: {found}. The first: {first}. Repair or remove them, or raise max_bad")
        self.bad = bad


@dataclass(frozen=True)
class _Batch:
    shard: _Shard
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
    source : ImageSource, or what :func:`capsae.data.open.open_source` takes
    backbone : what :func:`capsae.features.backbone.load_backbone` takes
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
        Of the set; None = the source's.
    max_bad : float
        Share of bad images that may be skipped.
    progress : bool
        Show a bar with images/s.

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
    sizes = [min(shard_size, len(source) - at) for at in range(0, len(source), shard_size)]
    rank, n_ranks = distributed.rank(), distributed.world_size()
    # Rank 0 tidies up and finds what is there before any rank writes: all must leave out the same shards.
    there = distributed.broadcast(_tidied(out_dir, len(sizes), key) if rank == 0 else None)
    done = [i for i, info in there.items() if info["n_rows"] == sizes[i]]
    own = [i for i in range(len(sizes)) if i not in done][rank::n_ranks]
    bad: list[dict] = [each for info in there.values() for each in info["bad_images"]]
    if done:
        log.info("%s: %d of %d shards are finished already", source.name, len(done), len(sizes))

    started = written = time.perf_counter()
    shards = [_Shard(out_dir, i, key, range(i * shard_size, i * shard_size + sizes[i]), there.get(i)) for i in own]
    with _bar(source, shards, len(source), there, progress) as bar, ThreadPoolExecutor(workers, "decode") as pool:
        try:
            batches = _batches(source, backbone, shards, batch_size, pool, device)
            for batch, found, arrays in _forward(batches, backbone, device, dtype, logits):
                found = [(position, {"id": each.id, "why": each.why}) for position, each in found]
                batch.shard.add(batch.rows, found, arrays | {"pixels": batch.statistics})
                bad += [each for _, each in found]
                if len(bad) > max_bad * len(source):
                    raise BadImagesError(source.name, bad, len(source), max_bad)
                bar.update(len(batch.rows))
                whole = batch.shard.n_rows == len(batch.shard.range)
                if whole or time.perf_counter() - written > _SECONDS:
                    batch.shard.write()
                    written = time.perf_counter()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    distributed.barrier()
    bad = [each for i, size in enumerate(sizes) for each in _needed(out_dir, i, key, size)["bad_images"]]
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
        "device": _device_name(device),
        "dtype": str(dtype).removeprefix("torch."),
        "seconds": round(time.perf_counter() - started, 3),
        "resumed_shards": len(done),
        "ranks": n_ranks,
        "extractor": EXTRACTOR,
        "versions": {each: metadata.version(each) for each in ("torch", "timm", "pillow", "numpy")},
    }
    features = _collect(out_dir, len(sizes), source, name or source.name, distributed.broadcast(meta), logits)
    distributed.barrier()  # whoever removes the shards must not do so before all have read them
    return features


def _bar(source: ImageSource, shards: list[_Shard], total: int, there: dict[int, dict], progress: bool):
    """A bar with images/s; under torchrun, of this rank's own share."""
    label, initial = source.name, sum(info["n_rows"] for info in there.values())
    if os.sep in label:
        label = os.sep.join(Path(label).parts[-2:])
    if distributed.world_size() > 1:
        total, initial = sum(len(each.range) for each in shards), sum(each.n_rows for each in shards)
        label += f", rank {distributed.rank()} of {distributed.world_size()}"
        progress = progress and distributed.rank() == 0
    given = {"unit": "images", "mininterval": 0.5, "smoothing": 0.05}
    return tqdm(total=total, initial=initial, desc=f"features {label}", disable=not progress, **given)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"


# --- the loop -------------------------------------------------------------------------------------


def _batches(source, backbone: Backbone, shards: list[_Shard], size: int, pool, device) -> Iterator[_Batch]:
    """Batches in order, decoding up to ``_AHEAD`` of them beyond the one that is handed out."""
    waiting: deque[_Batch] = deque()
    pinned = device.type == "cuda"
    for shard in shards:
        missing = np.array(shard.range)[shard.n_rows :]
        for start in range(0, len(missing), size):
            rows = missing[start : start + size]
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
    """Yield (batch, bad, {"cls", "logits"}); from an accelerator one batch late, so that it computes the next while
    this one is fetched."""
    waiting: deque = deque()
    for batch in batches:
        found = [each for task in batch.tasks for each in task.result()]
        with torch.inference_mode(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            cls, scores = backbone.forward(batch.pixels.to(device, non_blocking=True), logits)
        waiting.append((batch, found, {"cls": cls} if scores is None else {"cls": cls, "logits": scores}))
        if device.type == "cpu" or len(waiting) > 1:
            yield _fetched(*waiting.popleft())
    while waiting:
        yield _fetched(*waiting.popleft())


def _fetched(batch, found, out):
    return batch, found, {key: value.float().cpu().numpy() for key, value in out.items()}


# --- shards ---------------------------------------------------------------------------------------


class _Shard:
    """Rows ``range`` of the source, as far as they are made; those that a killed run has written are taken over."""

    def __init__(self, out_dir: Path, number: int, key: str, rows: range, info: dict | None):
        self.path, self.key, self.range = _shard_path(out_dir, number), key, rows
        self.parts, self.n_rows, self.bad = [], 0, []
        if info is not None:
            self.parts.append(read_tensors(self.path)[0])
            self.n_rows, self.bad = info["n_rows"], list(info["bad_images"])

    def add(self, rows: np.ndarray, bad: list[tuple[int, dict]], arrays: dict[str, np.ndarray]) -> None:
        good = np.ones(len(rows), dtype=bool)
        good[[position for position, _ in bad]] = False
        self.parts.append({key: value[good] for key, value in (arrays | {"rows": rows}).items()})
        self.bad += [each for _, each in bad]
        self.n_rows += len(rows)

    def write(self) -> None:
        self.parts = [{key: np.concatenate([part[key] for part in self.parts]) for key in self.parts[0]}]
        info = {"key": self.key, "n_rows": self.n_rows, "bad_images": self.bad, "logits": "logits" in self.parts[0]}
        write_tensors(self.path, self.parts[0], info)
        if self.n_rows == len(self.range):
            self.parts = []


def _shard_path(out_dir: Path, number: int) -> Path:
    return out_dir / f"shard-{number:05d}.safetensors"


def _key(source: ImageSource, backbone: Backbone, shard_size: int, dtype, logits: bool) -> str:
    parts = [EXTRACTOR, "timm", source.digest(), backbone.digest, shard_size, str(dtype), logits, PIXEL_STATISTICS]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _found(out_dir: Path, number: int, key: str) -> dict | None:
    """Info of a shard that this very run would make, else None. A rename puts only whole files there; the header
    alone is read."""
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
        path = _shard_path(out_dir, number)
        raise FileNotFoundError(f"{path} is not there, or not whole; a folder that all ranks share would do")
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

    scores, names = whole("logits") if logits else None, source.class_names
    return FeatureSet(whole("cls"), source.labels[rows], source.ids[rows], scores, name, names, meta, whole("pixels"))


def _read(out_dir: Path, number: int, key: str) -> np.ndarray:
    with safe_open(_shard_path(out_dir, number), framework="numpy") as file:
        return file.get_tensor(key)
