"""Embedded feature sets: the default experiments need no download, no weights and no image.

A pack is a folder with one ``<set>.safetensors`` per set (``/`` in the name of a set becomes ``__``) and
``pack.json``, which says how it was made. It holds features and eight numbers about each image (its file size,
sharpness, brightness and so on): no image can be looked at.
"""

from __future__ import annotations

import datetime
import json
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..data.images import PIXEL_STATISTICS
from ..data.open import open_source
from ..data.sources import ImageSource
from ..device import available_cores
from ..features.featureset import FeatureSet, read_tensors, restored, rounded, write_tensors
from ..files import file_record

PACKS = Path(__file__).parents[1] / "packs"
MAX_BYTES = 8_000_000
LICENCE = (
    "Features computed from images that belong to others; for non-commercial research only "
    "where they derive from ImageNet. No image is included."
)


def packs() -> list[str]:
    return sorted(path.parent.name for path in PACKS.glob("*/pack.json"))


def pack_sets(name: str | os.PathLike) -> list[str]:
    """Names of the sets of a pack (a name, or a folder that :func:`make_pack` wrote), in the order they were given."""
    return list(pack_info(name)["sets"])


def pack_info(name: str | os.PathLike) -> dict:
    """Provenance of a pack: the content of its ``pack.json``."""
    return json.loads((_folder(name) / "pack.json").read_text(encoding="utf-8"))


def load_pack(name: str | os.PathLike, set_name: str) -> FeatureSet:
    """One set of a pack; cls (N, d) float32, rounded to the pack's ``dtype["stored"]`` when it was made.

    A pack of the same images seen by another backbone names the first in ``images`` and holds features alone.

    Raises
    ------
    ValueError
        No such pack or set; the message lists those there are.
    """
    known = pack_sets(name)
    if set_name not in known:
        raise ValueError(f"pack {os.fspath(name)!r} has no set {set_name!r}; its sets are {', '.join(known)}")
    file, images = _file(_folder(name), set_name), pack_info(name).get("images")
    if images is None:
        return FeatureSet.load(file)
    tensors, info = read_tensors(file)
    return replace(load_pack(images, set_name), cls=restored(tensors), meta=info["meta"])


def make_pack(
    name: str,
    sources: Mapping[str, object],
    backbone,
    out: str | os.PathLike,
    *,
    work: str | os.PathLike | None = None,
    notes: str = "",
    max_bytes: int | None = MAX_BYTES,
    stored: str = "float16",
    images_of: str | None = None,
    **options,
) -> Path:
    """Extract sets into a pack; returns its folder.

    Parameters
    ----------
    sources : mapping
        ``{set name: ImageSource or what open_source takes}``.
    backbone : anything that ``load_backbone`` takes
    out : path
        Folder of the pack.
    work : path or None
        Folder of the shards (resumed after a kill); None = ``<out>/.work``, removed at the end.
    notes : str
        A sentence for ``pack.json`` about the images and their processing.
    max_bytes : int or None
        Refuse a pack that is larger.
    stored : str
        ``float16``; ``float32`` for small sets whose features should come back bit by bit; ``int8`` (256 steps a
        column) for large ones.
    images_of : str or None
        A pack of the same images: names, labels and pixel statistics stay there.
    options
        For :func:`capsae.features.extract.extract`; logits are left out unless asked for.
    """
    from ..data import images
    from ..data import open as data
    from ..data import sources as sources_code
    from ..features import backbone as backbone_code
    from ..features.backbone import load_backbone
    from ..features.extract import EXTRACTOR, extract
    from .code import digest as code_digest

    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    shards = Path(work) if work else out / ".work"
    backbone = load_backbone(backbone)
    options = {"dtype": "float32", "logits": False} | options
    sets: dict[str, dict] = {}
    versions: dict = {}
    for set_name, given in sources.items():
        source = _opened(given)
        features = extract(source, backbone, shards / set_name.replace("/", "__"), name=set_name, **options)
        versions = features.meta["versions"]
        bad = features.meta["bad_images"]
        # the pack is the same wherever and however often it is made: no path, no wall time in its files
        meta = {"pack": name, "backbone_digest": backbone.digest, "bad_images": bad}
        meta |= {"excluded": source.excluded} if source.excluded else {}
        features = replace(features, name=set_name, meta=meta)
        path = _save(features, _file(out, set_name), stored, images_of)
        sets[set_name] = {
            "file": path.name,
            **file_record(path),
            "n": len(features),
            "n_classes": len(features.class_names),
            "bad_images": len(bad),
            "source": {file.parent.name + "/" + file.name: file_record(file)["sha256"] for file in source.files},
        }
    total = _check_size(name, sets, max_bytes)
    info = {
        "name": name,
        "notes": notes,
        "licence": LICENCE,
        "backbone": backbone.describe(),
        "backbone_digest": backbone.digest,
        "dim": backbone.dim,
        "dtype": {"products": options["dtype"], "stored": stored},
        **({"images": images_of} if images_of else {}),
        "extractor": EXTRACTOR,
        "pixel_statistics": list(PIXEL_STATISTICS),
        "code": code_digest(backbone_code, data, images, sources_code),
        "versions": versions,
        "made": datetime.date.today().isoformat(),
        "bytes": total,
        "sets": sets,
    }
    _write_info(out, info)
    if work is None:
        shutil.rmtree(shards, ignore_errors=True)
    return out


def _opened(given):
    return given if isinstance(given, ImageSource) else open_source(given)


def _save(features: FeatureSet, path: Path, stored: str, images_of: str | None) -> Path:
    if images_of is None:
        return features.save(path, dtype=stored)
    there = load_pack(images_of, features.name)
    for key in ("ids", "labels", "class_names"):
        if list(getattr(there, key)) != list(getattr(features, key)):
            raise ValueError(f"{features.name}: its {key} are not those of pack {images_of!r}")
    return write_tensors(path, rounded(features.cls, stored), {"meta": features.meta})


def add_pixels(name: str | os.PathLike, sources: Mapping[str, object], out: str | os.PathLike) -> Path:
    """Measure the images of a pack and write it again with their statistics; its features stay as they are, bit for
    bit, so that no backbone is needed. ``out`` may be the folder of the old one.

    Raises
    ------
    ValueError
        A set without a source; images whose names or labels are not the pack's, row by row; a bad image.
    """
    info, out = pack_info(name), Path(out)
    if "images" in info:
        raise ValueError(f"pack {os.fspath(name)!r}: pixel statistics are those of pack {info['images']!r}")
    missing = [each for each in info["sets"] if each not in sources]
    if missing:
        raise ValueError(f"pack {os.fspath(name)!r}: no images are given for its set {missing[0]!r}")
    measured: dict[str, FeatureSet] = {}
    with ThreadPoolExecutor(available_cores()) as pool:
        for set_name in info["sets"]:
            features = load_pack(name, set_name)
            source = _matched(_opened(sources[set_name]), features, f"pack {os.fspath(name)!r}, {set_name}")
            pixels = np.stack([one for _, one in pool.map(source.measured, range(len(source)))])
            measured[set_name] = replace(features, pixels=pixels)
    out.mkdir(parents=True, exist_ok=True)
    for set_name, features in measured.items():
        path = features.save(_file(out, set_name), dtype=info["dtype"]["stored"])
        info["sets"][set_name] |= file_record(path)
    info["bytes"] = _check_size(name, info["sets"], MAX_BYTES)
    info["pixel_statistics"] = list(PIXEL_STATISTICS)
    _write_info(out, info)
    return out


def _matched(source, features: FeatureSet, what: str):
    """The rows of a source that a pack holds; it leaves out bad images, whose names are in its meta."""
    bad = {each["id"] for each in features.meta.get("bad_images", ())}
    source = source.take(np.array([str(id) not in bad for id in source.ids]))
    for key in ("ids", "labels"):
        theirs, ours = getattr(source, key), getattr(features, key)
        if len(theirs) != len(ours):
            raise ValueError(f"{what}: {len(theirs)} images are given, the pack holds {len(ours)}")
        differ = theirs != ours
        if differ.any():
            row = int(differ.argmax())
            raise ValueError(f"{what}: row {row} has {key} {ours[row]!r} in the pack, {theirs[row]!r} in the images")
    return source


def _check_size(name, sets: dict, max_bytes: int | None) -> int:
    total = sum(each["bytes"] for each in sets.values())
    if max_bytes is not None and total > max_bytes:
        raise ValueError(
            f"pack {os.fspath(name)!r} has {total} bytes, more than {max_bytes}: "
            "pack fewer images or a narrower backbone"
        )
    return total


def _write_info(folder: Path, info: dict) -> None:
    (folder / "pack.json").write_text(json.dumps(info, indent=1) + "\n", encoding="utf-8")


def _folder(name: str | os.PathLike) -> Path:
    for folder in (PACKS / name, Path(name)):
        if (folder / "pack.json").is_file():
            return folder
    raise ValueError(
        f"no pack {os.fspath(name)!r}; embedded are {', '.join(packs()) or 'none'}, or give the folder of your own"
    )


def _file(folder: Path, set_name: str) -> Path:
    return folder / f"{set_name.replace('/', '__')}.safetensors"
