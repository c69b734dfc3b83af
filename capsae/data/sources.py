"""The kinds of sources: a hub data set, parquet files, an image folder, an OpenOOD list, a built-in set.

Each opener gives the same :class:`ImageSource`. Filters that work on all of them are in :mod:`capsae.data.open`.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import threading
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from .asarray import as_labels
from .image_files import LeftOut, content_digests, images_below, is_hidden
from .images import IMAGE_SUFFIXES, decode_image, measure_image


@dataclass(frozen=True)
class ImageSource:
    """N labelled images, read one at a time.

    Attributes
    ----------
    labels : (N,) int64
        The source's own labels, -1 where it has none; with ``classes`` their positions in that list.
    ids : (N,) str
        File names, or the values of the id column, or ``<file>#<row>``; ``<value>#<row>`` where a value is not the
        only one of its kind. Each is there once.
    class_names : tuple of str
        ``class_names[label]``; empty if the source names none.
    read : callable
        ``read(row)`` gives encoded bytes, a path or a PIL image of a row of the whole source.
    rows : (N,) int64
        Rows of the whole source that this one keeps.
    """

    name: str
    labels: np.ndarray
    ids: np.ndarray
    class_names: tuple[str, ...]
    read: Callable[[int], bytes | str | Path | Image.Image] = field(repr=False)
    rows: np.ndarray = field(repr=False)
    fingerprint: str = field(default="", repr=False)  # of the stored images
    files: tuple[Path, ...] = field(default=(), repr=False)  # to hash for full provenance (parquet and lists only)
    spec: dict = field(default_factory=dict, repr=False)  # what open_source was given
    excluded: int = 0  # images that ``exclude`` left out
    left_out: LeftOut = field(default=(), repr=False)  # files of a folder that are no images
    exif: bool = True  # turn images as their EXIF orientation says

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, i: int) -> Image.Image:
        """Image ``i`` as 8-bit RGB, or :class:`BadImage` if it cannot be used. Safe to call from threads."""
        return decode_image(self.read(int(self.rows[i])), str(self.ids[i]), self.exif)

    def measured(self, i: int) -> tuple[Image.Image, np.ndarray]:
        """Image ``i`` as :meth:`image` gives it, and its (P,) float32 :data:`capsae.data.images.PIXEL_STATISTICS`."""
        return measure_image(self.read(int(self.rows[i])), str(self.ids[i]), self.exif)

    def digest(self) -> str:
        """SHA-256 of names, labels and fingerprint, in hex: the same on every machine that holds the same files."""
        seen = self.fingerprint if self.exif else f"{self.fingerprint}, as stored"
        head = json.dumps([seen, list(self.class_names), self.ids.tolist()])
        return hashlib.sha256(head.encode() + np.ascontiguousarray(self.labels).tobytes()).hexdigest()

    def take(self, rows) -> ImageSource:
        """The rows of indices or of a boolean mask (N,)."""
        rows = np.asarray(rows)
        rows = rows if rows.size else rows.astype(np.int64)
        return replace(self, labels=self.labels[rows], ids=self.ids[rows], rows=self.rows[rows])


# --- columns --------------------------------------------------------------------------------------


def _pick_columns(where: str, columns: list[str], features: dict, image: str | None, label: str | None, id: str | None):
    """Names of the image, label and id column; features: {column: {"_type": ...}} as the hub writes it, or empty."""

    def choice(key, named, kind):
        found = [name for name in named if name in columns] or [
            name for name in columns if features.get(name, {}).get("_type") == kind
        ]
        if not found or (key == "label" and len(found) > 1):
            none = ", or '' for none" if key == "label" else ""
            listed = ", ".join(columns)
            raise ValueError(f"{where} has no {key} column {key!r}; its columns are {listed}; name it by {key!r}{none}")
        return found[0]

    for key, name in (("image", image), ("label", label), ("id", id)):
        if name and name not in columns:
            raise ValueError(f"{where} has no {key} column {name!r}; its columns are {', '.join(columns)}")
    image = choice("image", ("image", "img"), "Image") if not image else image
    label = choice("label", ("label",), "ClassLabel") if label is None else label
    if id is None:
        id = next((name for name in ("source", "file_name", "filename") if name in columns), None)
    return image, label or None, id


# --- kinds ----------------------------------------------------------------------------------------


class _RowGroups:
    """Image column of parquet files, a row group at a time; two stay in memory because threads overlap at a border."""

    def __init__(self, files: list[Path], column: str):
        import pyarrow.parquet as pq

        metas = [pq.ParquetFile(path).metadata for path in files]
        self.sizes = [meta.num_rows for meta in metas]
        groups = [(path, i) for path, meta in zip(files, metas, strict=True) for i in range(meta.num_row_groups)]
        rows = [meta.row_group(i).num_rows for meta in metas for i in range(meta.num_row_groups)]
        self.starts, self.lock = np.cumsum([0, *rows]), threading.Lock()

        @lru_cache(maxsize=2)
        def images(group: int):
            path, i = groups[group]
            # pre_buffer off: it would hold the raw bytes of the row group a second time
            with pq.ParquetFile(path, memory_map=True, pre_buffer=False) as file:
                return file.read_row_group(i, columns=[column]).column(0)

        self.images = images

    def __call__(self, row: int) -> bytes:
        group = int(np.searchsorted(self.starts, row, side="right")) - 1
        with self.lock:  # or threads would decode one group side by side
            images = self.images(group)
        value = images[row - int(self.starts[group])].as_py()
        value = value.get("bytes") if isinstance(value, dict) else value
        return value or b""


def _open_parquet(path, image=None, label=None, id=None) -> ImageSource:
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = _parquet_files(path)
    try:
        schema = pq.read_schema(files[0])
        where = str(files[0]) if len(files) == 1 else str(path)
        image, label, id = _pick_columns(where, schema.names, _hub_features(schema), image, label, id)
        kind = schema.field(image).type
        encoded = kind.field("bytes").type if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind
        if not (pa.types.is_binary(encoded) or pa.types.is_large_binary(encoded)):
            wanted = "encoded bytes or a struct with 'bytes'"
            raise ValueError(f"image column {image!r} of {where} holds {kind}, expected {wanted}")
        tables = [pq.read_table(file, columns=[name for name in dict.fromkeys((label, id)) if name]) for file in files]
        read = _RowGroups(files, image)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is not readable as parquet: {error}") from None
    count = int(read.starts[-1])
    labels, names = np.full(count, -1, dtype=np.int64), ()
    if label and count:
        # Each file counts along names of its own.
        own = [_hub_features(pq.read_schema(file)).get(label, {}).get("names", ()) for file in files]
        names = tuple(dict.fromkeys(name for each in own for name in each))
        parts = []
        for file, table, listed in zip(files, tables, own, strict=True):
            what = f"label column {label!r} of {file}"
            part = as_labels(table[label].to_pylist(), what)
            if names and not listed:
                raise ValueError(f"{what}: its classes have no names, those of other files have; give all or none")
            if tuple(listed) != names:
                part = renumber(part, listed, names, what)
            parts.append(part)
        labels = np.concatenate(parts)
    if id:
        ids = np.array([str(v) for table in tables for v in table[id].to_pylist()], dtype=str)
    else:
        named = [f"{file.name}#{row}" for file, size in zip(files, read.sizes, strict=True) for row in range(size)]
        ids = np.array(named, dtype=str)
    return ImageSource(str(path), labels, ids, names, read, np.arange(count), _fingerprint(files), tuple(files))


def _hub_features(schema) -> dict:
    written = (schema.metadata or {}).get(b"huggingface", b"{}")
    try:
        return (json.loads(written).get("info") or {}).get("features") or {}
    except (ValueError, AttributeError):
        raise ValueError(f"the parquet file's metadata 'huggingface' is no description: {written[:40]!r}") from None


def renumber(labels: np.ndarray, own, wanted, what: str) -> np.ndarray:
    """Labels (N,) that count along the names ``own``, counted along ``wanted``; -2 for a name that is not there.

    Raises
    ------
    ValueError
        For a name that is in a list twice, or a label without a name.
    """
    for names in (own, wanted):
        seen: dict[str, int] = {}
        for i, name in enumerate(names):
            if (first := seen.setdefault(name, i)) < i:
                raise ValueError(f"{what}: classes {first} and {i} are both {name!r}; give each its own name")
    if len(labels) and labels.max() >= len(own):
        raise ValueError(f"{what}: label {labels.max()} has no name, there are {len(own)}")
    position = {name: i for i, name in enumerate(wanted)}
    return np.array([*(position.get(name, -2) for name in own), -1])[labels]


def _parquet_files(path) -> list[Path]:
    text = os.fspath(path)
    if os.path.isdir(text):
        files = sorted(Path(text).glob("*.parquet"))
        if not files:
            raise ValueError(f"folder {text!r} holds no .parquet file")
    else:  # brackets may be part of a name
        files = [Path(text)] if os.path.isfile(text) else sorted(map(Path, glob.glob(text, recursive=True)))
        if not files:
            what = "file matches" if glob.has_magic(text) else "file or folder"
            raise FileNotFoundError(f"no parquet {what} {text!r}")
    return files


def _open_folder(path) -> ImageSource:
    root = Path(path)
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {str(root)!r}")
    found, left_out = images_below(root)
    if not found:
        kinds = " ".join(sorted(IMAGE_SUFFIXES))
        raise ValueError(f"folder {str(root)!r} holds no images (looked for {kinds}, at any depth)")
    below = [file.relative_to(root) for file in found]
    folders = [each.parts[0] if len(each.parts) > 1 else None for each in below]  # None: beside the class folders
    known = {folder: unicodedata.normalize("NFC", folder) for folder in folders if folder}
    classes = sorted(set(known.values()))
    empty = [e.name for e in root.iterdir() if e.is_dir() and not is_hidden(e.name) and e.name not in known]
    left_out += tuple((name, "folder without an image") for name in sorted(empty))
    labels = [-1 if folder is None else classes.index(known[folder]) for folder in folders]
    return replace(_from_files(str(path), root, list(map(str, below)), labels, tuple(classes)), left_out=left_out)


def _open_imglist(list, root, class_names=()) -> ImageSource:  # noqa: A002 (the key of the experiment)
    path, root = Path(list), Path(root)
    if not path.is_file():
        raise FileNotFoundError(f"no image list {str(path)!r}")
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {str(root)!r} (the root of image list {str(path)!r})")
    names, labels = [], []
    for number, line in enumerate(path.read_text("utf-8-sig", "surrogateescape").splitlines(), start=1):
        if not line.strip():
            continue
        name, _, label = line.rstrip().rpartition(" ")  # the name itself may hold blanks
        if not name or not re.fullmatch("-1|[0-9]{1,9}", label):
            wanted = "'relative/path label' with a label of at least -1"
            raise ValueError(f"{path}:{number}: expected {wanted}, found {line!r}")
        labels.append(int(label))
        names.append(name.strip())
    if not names:
        raise ValueError(f"image list {str(path)!r} names no image")
    outside = [name for name in names if ".." in Path(name).parts or Path(name).is_absolute()]
    if outside:
        raise ValueError(f"{path} names {outside[0]!r}, which leaves its root {str(root)!r}; a path below it would do")
    absent = [name for name in names if not (root / name).is_file()]
    if absent:
        found = f"{len(absent)} of the {len(names)} files of {str(path)!r} are not under {str(root)!r}"
        raise FileNotFoundError(f"{found}; the first is {absent[0]!r}")
    return _from_files(str(path), root, names, labels, tuple(class_names), (path,))


def _from_files(name, root: Path, names, labels, class_names, files=()) -> ImageSource:
    content, rows = _fingerprint([root / each for each in names]), np.arange(len(names))
    labels, ids = np.array(labels, dtype=np.int64), np.array(names, dtype=str)
    return ImageSource(name, labels, ids, class_names, lambda row: root / names[row], rows, content, files)


def _fingerprint(files) -> str:
    return hashlib.sha256(json.dumps(content_digests(files)).encode()).hexdigest()


def _open_hub(name, split, config=None, image=None, label=None, id=None) -> ImageSource:
    try:
        import datasets
    except ImportError:
        raise ImportError("a hub source needs the package 'datasets' (pip install datasets)") from None
    table = datasets.load_dataset(name, config, split=split)
    hub = {key: {"_type": type(value).__name__} for key, value in table.features.items()}
    image, label, id = _pick_columns(f"data set {name!r}", table.column_names, hub, image, label, id)
    count = len(table)
    labels = np.full(count, -1, dtype=np.int64)
    if label:
        column = table.select_columns([label]).with_format("arrow")[:][label]
        labels = as_labels(column.to_pylist(), f"label column {label!r} of {name!r}")
    ids = [str(v) for v in table.select_columns([id])[:][id]] if id else [f"{split}#{row}" for row in range(count)]
    names = tuple(getattr(table.features[label], "names", ())) if label else ()
    images = table.select_columns([image]).cast_column(image, datasets.Image(decode=False))  # by our own rules

    def read(row):
        value = images[row][image] or {}
        return value.get("bytes") or value.get("path") or b""

    # datasets' own fingerprint depends on its cache. What identifies the images is the revision of a remote set, which
    # is the name of the folder it is kept in, and the content of a local one.
    files, local = [each["filename"] for each in table.cache_files], os.path.exists(name)
    content = content_digests(files) if local else sorted({Path(file).parent.name for file in files})
    size = getattr(table.info, "dataset_size", None)
    fingerprint = json.dumps(["local" if local else str(name), config, split, size, count, content])
    return ImageSource(f"{name}:{split}", labels, np.array(ids, dtype=str), names, read, np.arange(count), fingerprint)


def _open_builtin(name, seed=0) -> ImageSource:
    from . import builtin

    images, labels, ids, class_names = builtin.load(name, seed=seed)
    # fonts and photographs may change with the packages that carry them
    content, rows = hashlib.sha256(images.tobytes()).hexdigest(), np.arange(len(images))
    read = lambda row: Image.fromarray(images[row])  # noqa: E731
    return ImageSource(f"builtin {name}", labels, ids, class_names, read, rows, content)


OPENERS = {
    "hub": _open_hub,
    "parquet": _open_parquet,
    "folder": _open_folder,
    "imglist": _open_imglist,
    "builtin": _open_builtin,
}
