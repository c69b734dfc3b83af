"""Labelled images from a hub data set, parquet files, an image folder, an OpenOOD list or a built-in source.

Every kind gives the same :class:`ImageSource`: labels and names at once, images one at a time and only when asked
for, so that memory does not grow with their number.
"""

from __future__ import annotations

import csv
import difflib
import inspect
import json
import logging
import os
import unicodedata
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from .image_files import log_left_out
from .sources import OPENERS, ImageSource, renumber

log = logging.getLogger(__name__)

KINDS = tuple(OPENERS)
_FILTERS = ("classes", "limit", "exclude", "exif")  # for all kinds
_TEXTS = {"path", "name", "split", "config", "list", "root", "image", "label", "id", "exclude"}


def open_source(spec: Mapping | str | os.PathLike) -> ImageSource:
    """Open a source of labelled images.

    Parameters
    ----------
    spec : mapping, or the path of a folder
        A path is ``{"kind": "folder", "path": path}``. Else ``kind`` and its keys:

        - ``hub``: ``name`` and ``split`` (anything ``datasets.load_dataset`` takes), optional ``config``, ``image``,
          ``label``, ``id`` (columns)
        - ``parquet``: ``path`` (a file, a folder of files or a glob pattern), optional ``image``, ``label``, ``id``
          (columns)
        - ``folder``: ``path`` with one subfolder per class (sorted by name), images at any depth; those beside the
          subfolders have the label -1, and a subfolder without images is no class
        - ``imglist``: ``list`` (OpenOOD: ``relative/path label`` per line, label -1 = none) and ``root``, optional
          ``class_names``
        - ``builtin``: ``name``, one of ``capsae.data.builtin.NAMES``; optional ``seed``

        For all kinds, applied in this order: ``exclude`` (a file that names images to leave out, such as OOD images
        that show an ID object: a text file with one id a line, or a .csv with a column ``id``), ``classes`` (a list of
        class names; rows of other classes are dropped and labels count along this list) and ``limit`` (at most so many
        images, evenly spaced over the source, so that one sorted by class keeps all its classes). ``exif = false``
        leaves images as they are stored, whatever their EXIF orientation says.

        Columns that are not given are found: the image column by its type or the names ``image``, ``img``; the label
        column by the name ``label`` or as the only ``ClassLabel``. ``label = ""`` says that the source has none.

    Raises
    ------
    ValueError
        Unknown kind, key, class or column; empty source; labels that are no whole numbers or have no name; two classes
        of one name; an ``exclude`` file that names images that the source does not have.
    FileNotFoundError
        If the path, list, root or a listed file is not there.
    """
    if isinstance(spec, str | os.PathLike):
        spec = {"kind": "folder", "path": os.fspath(spec)}
    if not isinstance(spec, Mapping):
        raise ValueError(f"a source is {spec!r}, expected the path of a folder, or a mapping with the key 'kind'")
    spec = {key: value for key, value in spec.items() if value is not None}
    kind = spec.get("kind")
    if kind not in KINDS:
        raise ValueError(f"kind of source is {kind!r}, expected one of {', '.join(KINDS)}")
    options = inspect.signature(OPENERS[kind]).parameters
    unknown = sorted(set(spec) - {"kind", *_FILTERS, *options})
    if unknown:
        raise ValueError(f"unknown key {unknown[0]!r} in a {kind} source; it takes {', '.join((*options, *_FILTERS))}")
    missing = [key for key, option in options.items() if option.default is option.empty and key not in spec]
    if missing:
        raise ValueError(f"a {kind} source needs {missing[0]!r}; given: {', '.join(sorted(spec))}")
    for key in _TEXTS & set(spec):
        if not isinstance(spec[key], str | os.PathLike):
            raise ValueError(f"{key} of a {kind} source is {spec[key]!r}, expected text")
    if isinstance(spec.get("classes"), str):
        raise ValueError(f"classes is {spec['classes']!r}, expected a list of names")
    if not isinstance(spec.get("seed", 0), int) or spec.get("seed", 0) < 0:
        raise ValueError(f"seed is {spec['seed']!r}, expected a whole number from 0")
    limit = spec.get("limit")
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        raise ValueError(f"limit is {limit!r}, expected a whole number of images, at least 1")
    source = OPENERS[kind](**{key: value for key, value in spec.items() if key not in ("kind", *_FILTERS)})
    if len(source) == 0:
        raise ValueError(f"{source.name} holds no images")
    log_left_out(source.name, source.left_out)
    source = replace(source, exif=bool(spec.get("exif", True)))
    if source.class_names:
        renumber(source.labels, source.class_names, source.class_names, source.name)
    if spec.get("exclude"):
        source = _without(source, Path(spec["exclude"]))
    if spec.get("classes"):
        source = _of_classes(source, spec["classes"])
    if limit is not None and limit < len(source):
        source = source.take(np.linspace(0, len(source) - 1, limit).round().astype(np.int64))
    source = _each_id_once(source)
    object.__setattr__(source, "spec", json.loads(json.dumps(spec, default=str)))
    return source


def _each_id_once(source: ImageSource) -> ImageSource:
    """Ids with their row where several rows have the same: a row is found by its id, and is what it says."""
    _, which, counts = np.unique(source.ids, return_inverse=True, return_counts=True)
    if (counts == 1).all():
        return source
    pairs = zip(source.ids, source.rows, counts[which] > 1, strict=True)
    numbered = [f"{id}#{row}" if several else id for id, row, several in pairs]
    return _each_id_once(replace(source, ids=np.array(numbered)))  # again: a name may look like a numbered one


def by_name(labelled, class_names, what: str):
    """An ID source or feature set, ``what``, with its labels counted along ``class_names``, the class list of train.

    Where either names no classes, labels are taken as they are. Raises ValueError for images of a class that train does
    not have and for a name that stands for two classes; classes of train without an image are logged.
    """
    lists = labelled.class_names, class_names
    own, wanted = ([unicodedata.normalize("NFC", name) for name in names] for names in lists)
    labels = labelled.labels
    if bool(own) != bool(wanted) and (labels >= 0).any():
        log.warning("%s: classes have names %s; labels are taken by number", what, "here alone" if own else "in train")
    if own and wanted:
        labels = renumber(labels, own, wanted, what)
        unknown = sorted({own[i] for i in labelled.labels[labels == -2]})
        if unknown:
            close = difflib.get_close_matches(unknown[0], wanted, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"train has {_few(wanted)}"
            raise ValueError(
                f"{what}: {int((labels == -2).sum())} of {len(labels)} images are of {len(unknown)} classes that train "
                f"does not have: {_few(unknown)}; {hint} The source's key 'classes' leaves others out"
            )
    missing = sorted(set(range(len(wanted))) - set(labels.tolist())) if (labels >= 0).any() else []
    if missing:
        names = _few([wanted[i] for i in missing])
        log.warning("%s: no image of %d of %d classes: %s", what, len(missing), len(wanted), names)
    if own == wanted or not (own and wanted):
        return labelled
    return replace(labelled, labels=labels, class_names=tuple(class_names))


def _few(names) -> str:
    return ", ".join(map(repr, names[:5])) + (", ..." if len(names) > 5 else "")


def _of_classes(source: ImageSource, classes) -> ImageSource:
    classes = tuple(classes)
    unknown = [name for name in classes if name not in source.class_names]
    if unknown:
        known = ", ".join(source.class_names[:8]) + (" ..." if len(source.class_names) > 8 else "")
        listed = f"its {len(source.class_names)} classes are {known or 'unnamed'}"
        raise ValueError(f"class {unknown[0]!r} is not in {source.name}; {listed}")
    labels = renumber(source.labels, source.class_names, classes, source.name)
    rows = np.flatnonzero(labels >= 0)
    if rows.size == 0:
        raise ValueError(f"{source.name} holds no image of the classes {', '.join(classes)}")
    return replace(source.take(rows), labels=labels[rows], class_names=classes)


def _without(source: ImageSource, path: Path) -> ImageSource:
    """Leave out the images that a file names, by id or by the id's last part."""
    named = _read_names(path)
    ids = source.ids.tolist()
    matched = [{id, id.rpartition("/")[2]} & named for id in ids]
    unknown = sorted(named - set().union(*matched))
    if unknown:
        found = f"{len(unknown)} of {len(named)} names are of no image of {source.name}, e.g. {unknown[0]!r}"
        raise ValueError(f"{path}: {found}; its ids look like {ids[0]!r}")
    keep = np.array([not each for each in matched])
    if not keep.any():
        raise ValueError(f"{path} excludes every image of {source.name}")
    return replace(source.take(keep), excluded=int((~keep).sum()))


def _read_names(path: Path) -> set[str]:
    if not path.is_file():
        raise FileNotFoundError(f"no file {str(path)!r} of images to exclude")
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix.lower() == ".csv":
        rows = csv.DictReader(text.splitlines())
        if "id" not in (rows.fieldnames or ()):
            raise ValueError(f"{path} has no column 'id'; its columns are {', '.join(rows.fieldnames or ()) or 'none'}")
        names = {(row["id"] or "").strip() for row in rows} - {""}
    else:
        lines = (line.strip() for line in text.splitlines())
        names = {line for line in lines if line and not line.startswith("#")}
    if not names:
        raise ValueError(f"{path} names no image to exclude")
    return names
