"""Features of a set of images, the linear head on them, and how both are kept on disk (safetensors, never pickle)."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..data.asarray import as_labels, as_numpy, as_real
from ..files import replacing

SCHEMA = 1


def write_tensors(path: str | os.PathLike, tensors: dict[str, np.ndarray], info: dict) -> Path:
    """Write one safetensors file atomically: a killed run leaves the old file or the new one."""
    from safetensors.numpy import save_file

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # one metadata key: safetensors does not keep the order of several, and equal content should be equal bytes
    contiguous = {key: as_numpy(value) for key, value in tensors.items()}
    with replacing(path) as temporary:
        save_file(contiguous, temporary, metadata={"capsae": json.dumps(info, sort_keys=True)})
    return path


def read_tensors(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict]:
    """Tensors and info of a file that :func:`write_tensors` wrote; ValueError if it is another kind of file."""
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {os.fspath(path)!r}")
    try:
        with safe_open(path, framework="numpy") as file:
            info = (file.metadata() or {}).get("capsae")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ValueError(f"{os.fspath(path)!r} is not a whole safetensors file: {error}") from None
    if info is None:
        raise ValueError(f"{os.fspath(path)!r} is a safetensors file, but not one of ours (no 'capsae' metadata)")
    return tensors, json.loads(info)


def _json(strings) -> bytes:
    text = json.dumps([str(s) for s in strings], ensure_ascii=False)
    return text.encode("utf-8", "surrogatepass")  # a file's name may be no UTF-8


def pack_strings(strings) -> np.ndarray:
    """Strings as one uint8 tensor (UTF-8 JSON, zlib), so that a million names do not swell the safetensors header."""
    return np.frombuffer(zlib.compress(_json(strings), 9), dtype=np.uint8)


def unpack_strings(tensor: np.ndarray) -> list[str]:
    """Inverse of :func:`pack_strings`."""
    text = tensor.tobytes()
    text = text if text.startswith(b"[") else zlib.decompress(text)  # files of before December 2026 are not compressed
    return json.loads(text.decode("utf-8", "surrogatepass"))


def rounded(cls: np.ndarray, dtype: str) -> dict[str, np.ndarray]:
    """Features (N, d) as they are kept on disk: ``cls`` of ``dtype``, for int8 with ``scale`` (d,), a column's largest
    value over 127."""
    if dtype == "int8":
        scale = np.maximum(np.abs(cls).max(axis=0, initial=0) / np.float32(127), np.float32(1e-30))
        return {"cls": np.rint(cls / scale).astype(np.int8), "scale": scale}
    if dtype not in ("float16", "float32"):
        raise ValueError(f"dtype is {dtype!r}, expected 'int8', 'float16' or 'float32'")
    with np.errstate(over="ignore"):
        out = cls.astype(dtype)
    if dtype == "float16" and np.isinf(out).any() and np.isfinite(cls).all():
        raise ValueError(f"values reach {np.abs(cls).max():.3g}, float16 ends at 65504: use dtype 'float32'")
    return {"cls": out}


def restored(tensors: dict[str, np.ndarray]) -> np.ndarray:
    """Return the features (N, d) float32 of :func:`rounded`."""
    cls = tensors["cls"].astype(np.float32)
    return cls * tensors["scale"] if "scale" in tensors else cls


def as_float32(array) -> np.ndarray | None:
    """Any framework's array in C order and float32; None stays None."""
    return None if array is None else as_real(array, "an array of features or logits", np.float32)


@dataclass(frozen=True)
class FeatureSet:
    """Features of N images.

    Attributes
    ----------
    cls : (N, d) float32
        The vector that the backbone's head reads (CLS token after the final norm, or the pooled token).
    labels : (N,) int64
        The source's own labels; -1 where it has none.
    ids : (N,) str
        Names of the images in their source.
    logits : (N, C) float32 or None
        Output of a head, the backbone's own or a probe.
    name, class_names : str, tuple of str
        Of the set, e.g. ``"near/imagenet980"``, and of its labels (empty if unknown).
    meta : dict
        Where the features come from: backbone, digest of the weights, source, bad images, device, wall time.
    pixels : (N, P) float32 or None
        :data:`capsae.data.images.PIXEL_STATISTICS` of the images; None where they were not measured.
    """

    cls: np.ndarray
    labels: np.ndarray
    ids: np.ndarray
    logits: np.ndarray | None = None
    name: str = ""
    class_names: tuple[str, ...] = ()
    meta: dict = field(default_factory=dict)
    pixels: np.ndarray | None = None

    def __post_init__(self):
        arrays: dict[str, Any] = {key: as_float32(getattr(self, key)) for key in ("cls", "logits", "pixels")}
        cls = arrays["cls"]
        if cls.ndim != 2:
            raise ValueError(f"cls has shape {cls.shape}, expected (N, d)")
        arrays |= {"labels": as_labels(self.labels), "ids": np.asarray(self.ids, dtype=str)}
        arrays["class_names"] = tuple(self.class_names)
        for key in ("labels", "ids", "logits", "pixels"):
            if arrays[key] is not None and len(arrays[key]) != len(cls):
                raise ValueError(f"{key} has {len(arrays[key])} rows, cls {len(cls)}")
        for key, value in arrays.items():
            object.__setattr__(self, key, value)

    def __len__(self) -> int:
        return len(self.cls)

    def take(self, rows) -> FeatureSet:
        """The rows of a boolean mask (N,) or of indices, in their order."""
        rows = np.asarray(rows)
        if rows.dtype == bool and rows.shape != (len(self),):
            raise ValueError(f"mask has shape {rows.shape}, expected ({len(self)},)")
        if rows.size == 0:
            rows = rows.astype(np.int64)
        arrays = {key: getattr(self, key) for key in ("cls", "labels", "ids", "logits", "pixels")}
        return replace(self, **{key: value[rows] for key, value in arrays.items() if value is not None})

    def digest(self) -> str:
        """SHA-256 of the content (arrays and names, not ``meta``: a wall time is no content), in hex."""
        sha = hashlib.sha256(json.dumps([SCHEMA, self.name, list(self.class_names)]).encode())
        for key in ("cls", "labels", "logits", "pixels"):
            value = getattr(self, key)
            if value is not None:
                sha.update(f"{key}{value.shape}".encode())
                sha.update(np.ascontiguousarray(value).data)
        sha.update(_json(self.ids))
        return sha.hexdigest()

    def save(self, path: str | os.PathLike, dtype: str = "float32") -> Path:
        """Write one ``.safetensors`` file; ``float16`` halves the features, ``int8`` (256 steps a column) quarters
        them."""
        labels = self.labels.astype(
            np.result_type(*map(np.min_scalar_type, (self.labels.min(initial=0), self.labels.max(initial=0))))
        )
        tensors = {**rounded(self.cls, dtype), "labels": labels, "ids": pack_strings(self.ids)}
        if self.logits is not None:
            tensors["logits"] = rounded(self.logits, "float32" if dtype == "float32" else "float16")["cls"]
        if self.pixels is not None:
            tensors["pixels"] = self.pixels  # float32 always: a file may have more bytes than float16 can count
        info = {"schema": SCHEMA, "name": self.name, "class_names": list(self.class_names), "meta": self.meta}
        return write_tensors(path, tensors, info)

    @classmethod
    def load(cls, path: str | os.PathLike) -> FeatureSet:
        """Read what :meth:`save` wrote."""
        tensors, info = read_tensors(path)
        if info.get("schema") != SCHEMA or "cls" not in tensors:
            found = info.get("schema")
            raise ValueError(f"{os.fspath(path)!r} holds no FeatureSet of schema {SCHEMA} (found {found!r})")
        given: dict[str, Any] = {"cls": restored(tensors), "ids": unpack_strings(tensors["ids"])}
        given |= {key: tensors.get(key) for key in ("labels", "logits", "pixels")}
        return cls(**given, name=info["name"], class_names=info["class_names"], meta=info["meta"])


@dataclass(frozen=True)
class LinearHead:
    """Linear classifier on features: ``logits = cls @ weight.T + bias``, weight (C, d) and bias (C,) float32."""

    weight: np.ndarray
    bias: np.ndarray

    def __post_init__(self):
        for key in ("weight", "bias"):
            object.__setattr__(self, key, as_float32(getattr(self, key)))

    def logits(self, cls: np.ndarray) -> np.ndarray:
        """Logits (N, C) float32 of features (N, d)."""
        cls = as_real(cls, "cls", np.float32)
        if cls.ndim != 2 or cls.shape[1] != self.weight.shape[1]:
            raise ValueError(f"cls has shape {cls.shape}, this head expects (N, {self.weight.shape[1]})")
        return cls @ self.weight.T + self.bias

    def save(self, path: str | os.PathLike) -> Path:
        """Write one ``.safetensors`` file."""
        return write_tensors(path, {"weight": self.weight, "bias": self.bias}, {"schema": SCHEMA})

    @classmethod
    def load(cls, path: str | os.PathLike) -> LinearHead:
        """Read what :meth:`save` wrote."""
        tensors, _ = read_tensors(path)
        return cls(weight=tensors["weight"], bias=tensors["bias"])
