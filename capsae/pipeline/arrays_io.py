"""Arrays of your own: features, labels, logits and a head from any framework, read from one file and checked.

The layout is plain (:data:`LAYOUT`); the page ``book/evaluate.md`` has an example that writes such a file. What is made
of it is :func:`capsae.pipeline.arrays.evaluate_arrays`.
"""

from __future__ import annotations

import difflib
import itertools
import os
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..data.asarray import as_labels, as_numpy
from ..data.images import PIXEL_STATISTICS
from ..features.featureset import FeatureSet, LinearHead
from ..files import refuse_stub

LAYOUT = """\
train/features  (N, d)   train/labels (N,) from 0        what detectors and the SAE learn from
val/features, val/labels                                 optional; else a tenth of train is held out
test/features            test/labels                     ID test; labels are optional, -1 is none (no accuracy without)
near/<set>/features, far/<set>/features                  at least one; <set> is a name of yours
shifted/<set>/features, shifted/<set>/labels             optional: ID in other conditions, for the full spectrum
head/weight     (C, d)   head/bias (C,)                  optional: the linear head that reads the features
<any>/logits    (N, C)                                   optional, for all sets or none: else the head's, or a probe's
<any>/pixels    (N, 8)                                   optional: capsae.data.images.PIXEL_STATISTICS, for the controls
<any>/scores/<name>  (N,)                                optional: a score of your own on test and OOD sets, higher =
                                                         more OOD; it becomes a row of the table
A table (.csv, .parquet) has a column a feature, a column "set" (train, test, near/<set> ...) and "label"; logits/<c>
and scores/<name> as above. In a folder, train.csv, test.csv, far/<set>.csv say the set by their names."""

_KEY = re.compile(
    r"(?P<set>train|val|test|(?:near|far|shifted)/[A-Za-z0-9_.-]+)/"
    r"(?P<what>features|labels|logits|pixels|scores/[A-Za-z0-9_.+-]+)"
    r"|head/(?:weight|bias)"
)
_PICKLES = {".pt", ".pth", ".pkl", ".pickle", ".bin", ".ckpt", ".joblib"}


@dataclass(frozen=True)
class Arrays:
    """What :func:`load_arrays` read.

    Attributes
    ----------
    sets : dict of FeatureSet
        train, test, the OOD sets, and val and shifted/<set> where given. Labels are -1 where there are none.
    n_classes : int
    head : LinearHead or None
    scores : dict of name -> set -> (N,) float64
        Scores that were computed elsewhere.
    source : str
        File or folder.
    """

    sets: dict[str, FeatureSet]
    n_classes: int
    head: LinearHead | None = None
    scores: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    source: str = ""

    @property
    def ood_sets(self) -> list[str]:
        """Names of the OOD sets, near ones first."""
        names = [name for name in self.sets if name.startswith(("near/", "far/"))]
        return sorted(names, key=lambda name: not name.startswith("near/"))

    @property
    def shifted(self) -> list[str]:
        """Names of the covariate-shifted ID sets."""
        return [name for name in self.sets if name.startswith("shifted/")]


def load_arrays(path: str | os.PathLike) -> Arrays:
    """Read and check arrays from a ``.safetensors`` file, an ``.npz`` file or a folder of ``.npy`` files; or a table
    (``.csv``, ``.parquet``, or a folder of them), see :mod:`capsae.pipeline.arrays_tables`.

    Parameters
    ----------
    path : path
        Keys as in :data:`LAYOUT`; in a folder, ``train/features.npy`` and so on. Any floating type is read, bfloat16
        from safetensors too; nothing is ever unpickled.

    Raises
    ------
    FileNotFoundError
        Nothing at ``path``.
    ValueError
        Unknown, missing or empty arrays; shapes that do not fit together; labels out of range; a class without a
        training row; NaN or infinity (the row is named); a head that did not make the logits; a pickle; a damaged file.
    """
    from .arrays_tables import SUFFIXES, read_table, read_tables

    path = Path(path)
    if path.is_dir():
        tables = any(file.suffix in SUFFIXES for file in path.rglob("*"))
        raw = read_tables(path) if tables else _read_folder(path)
    elif not path.is_file():
        raise FileNotFoundError(f"no file or folder {str(path)!r} of arrays")
    elif path.suffix in _PICKLES:
        raise ValueError(
            f"{path} is a pickle, and loading a pickle runs the code in it; a .safetensors or .npz file would do"
        )
    elif path.suffix in SUFFIXES:
        raw = read_table(path)
    else:
        refuse_stub(path)
        raw = _read_npz(path) if path.suffix == ".npz" else _read_safetensors(path)
    return arrays_from(raw, str(path))


def arrays_from(raw: Mapping[str, np.ndarray], source: str = "arrays") -> Arrays:
    """Check arrays that are in memory already, by key; errors as :func:`load_arrays`."""
    _check_keys(raw, source)
    sets, scores = {}, {}
    for name in dict.fromkeys(key.rpartition("/features")[0] for key in raw if key.endswith("/features")):
        sets[name] = _one_set(raw, name, source)
        for key in (key for key in raw if key.startswith(f"{name}/scores/")):
            values = _numbers(raw[key], key, source, 1, len(sets[name]))
            scores.setdefault(key.rpartition("/")[2], {})[name] = values.astype(np.float64)
    for name, one in sets.items():
        if one.cls.shape[1] != sets["train"].cls.shape[1]:
            dims = one.cls.shape[1], sets["train"].cls.shape[1]
            raise ValueError(f"{source}: {name}/features has {dims[0]} columns, train/features {dims[1]}")
    _check_same_sets(sets, source)
    head = _head(raw, sets["train"].cls.shape[1], source)
    n_classes = _n_classes(sets, head, source)
    _check_labels(sets, n_classes, source)
    if head is not None and sets["train"].logits is not None:
        _check_head(head, sets["train"], source)
    arrays = Arrays(sets, n_classes, head, scores, source)
    for name, of in scores.items():
        missing = [s for s in ("test", *arrays.ood_sets, *arrays.shifted) if s not in of]
        if missing:
            raise ValueError(f"{source}: {missing[0]}/scores/{name} is missing; give it for every set, or for none")
    return arrays


# --- files


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:  # numpy knows no bfloat16
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from None
    return {key: as_numpy(tensor) for key, tensor in tensors.items()}


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {key: _member(file, key, path) for key in file.files}
    except (zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"{path} is not a whole .npz file: {error}") from None
    except (ValueError, OSError, AttributeError) as error:  # AttributeError: a single .npy under this name
        raise error if str(path) in str(error) else ValueError(f"{path} is not a whole .npz file: {error}") from None


def _member(file, key: str, path: Path) -> np.ndarray:
    try:
        return file[key]
    except ValueError as error:
        raise _unreadable(f"{path}: {key}", error) from None


def _read_folder(path: Path) -> dict[str, np.ndarray]:
    files = sorted(path.rglob("*.npy"))
    if not files:
        raise ValueError(f"folder {str(path)!r} holds no .npy file; train/features.npy and so on would do")
    found = {}
    for file in files:
        refuse_stub(file)
        try:
            found[file.relative_to(path).with_suffix("").as_posix()] = np.load(file, allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise _unreadable(str(file), error) from None
    return found


def _unreadable(what: str, error: Exception) -> ValueError:
    if "allow_pickle" in str(error):
        return ValueError(f"{what} is a pickled object array, and loading it would run code; save plain numbers")
    return ValueError(f"{what} cannot be read: {error}")


# --- checks


def _check_keys(raw: Mapping, source: str) -> None:
    for key in raw:
        if not _KEY.fullmatch(key):
            close = difflib.get_close_matches(key, ("train/features", "test/features", "head/weight", "head/bias"), 1)
            hint = f"; did you mean {close[0]!r}?" if close else "."
            raise ValueError(f"{source}: unknown array {key!r}{hint} The layout is:\n{LAYOUT}")
        owner = key.rpartition("/scores/")[0] or key.rpartition("/")[0]
        if owner != "head" and f"{owner}/features" not in raw:
            raise ValueError(f"{source}: {key!r} is there, but {owner}/features is not")
    for key in ("train/features", "train/labels", "test/features"):
        if key not in raw:
            raise ValueError(f"{source}: {key!r} is missing. The layout is:\n{LAYOUT}")
    if not any(key.startswith(("near/", "far/")) for key in raw):
        raise ValueError(f"{source}: no OOD set; give near/<set>/features or far/<set>/features")
    for key in raw:
        owner = key.removesuffix("/features")
        if owner == "val" or (owner.startswith("shifted/") and owner != key):
            if f"{owner}/labels" not in raw:
                raise ValueError(f"{source}: {owner}/labels is missing: {owner} is ID, its classes are known")
    if "head/bias" in raw and "head/weight" not in raw:
        raise ValueError(f"{source}: head/bias is there, but head/weight is not")


def _one_set(raw: Mapping, name: str, source: str) -> FeatureSet:
    cls = _numbers(raw[f"{name}/features"], f"{name}/features", source, 2)
    given = {
        key: _numbers(raw[f"{name}/{key}"], f"{name}/{key}", source, 2, len(cls))
        for key in ("logits", "pixels")
        if f"{name}/{key}" in raw
    }
    if "pixels" in given and given["pixels"].shape[1] != len(PIXEL_STATISTICS):
        columns = given["pixels"].shape[1]
        wanted = f"{len(PIXEL_STATISTICS)}: {', '.join(PIXEL_STATISTICS)}"
        raise ValueError(f"{source}: {name}/pixels has {columns} columns, expected {wanted}")
    labels = raw.get(f"{name}/labels")
    if labels is None or name.startswith(("near/", "far/")):  # an OOD set's classes are none of ours
        labels = np.full(len(cls), -1)
    else:
        labels = as_numpy(labels)
        if labels.shape != (len(cls),):
            raise ValueError(f"{source}: {name}/labels has shape {labels.shape}, expected ({len(cls)},)")
        if labels.dtype.kind not in "iu":
            raise ValueError(f"{source}: {name}/labels holds {labels.dtype}, expected whole numbers from 0")
        labels = as_labels(labels, f"{source}: {name}/labels")
    return FeatureSet(cls, labels, np.arange(len(cls)).astype(str), name=name, **given)


def _numbers(array, key: str, source: str, ndim: int, rows: int | None = None) -> np.ndarray:
    """A finite float32 array of the right shape (float64 is narrowed), or an error that says where it is not."""
    array = as_numpy(array)
    shape = {1: "(N,)", 2: "(N, columns)"}[ndim]
    if array.ndim != ndim:
        raise ValueError(f"{source}: {key} has shape {array.shape}, expected {shape}")
    if array.dtype.kind not in "fiu":
        raise ValueError(f"{source}: {key} holds {array.dtype}, expected floating point numbers")
    if 0 in array.shape:
        raise ValueError(f"{source}: {key} is empty, its shape is {array.shape}")
    if rows is not None and len(array) != rows:
        raise ValueError(f"{source}: {key} has {len(array)} rows, the features {rows}")
    with np.errstate(over="ignore"):
        array = array.astype(np.float32) if ndim == 2 else array.astype(np.float64)
    good = np.isfinite(array) if ndim == 1 else np.isfinite(array).all(axis=1)
    if not good.all():
        row = int((~good).argmax())
        raise ValueError(f"{source}: {key} holds NaN or infinity in {int((~good).sum())} rows, the first is row {row}")
    return array


def _check_same_sets(sets: Mapping[str, FeatureSet], source: str) -> None:
    with_logits = [name for name, one in sets.items() if one.logits is not None]
    if with_logits and len(with_logits) < len(sets):
        missing = next(name for name in sets if name not in with_logits)
        raise ValueError(f"{source}: {with_logits[0]}/logits is there, {missing}/logits is not: give all or none")
    widths = {name: sets[name].logits.shape[1] for name in with_logits}
    if len(set(widths.values())) > 1:
        raise ValueError(f"{source}: logits have different numbers of classes: {widths}")


def _head(raw: Mapping, d: int, source: str) -> LinearHead | None:
    if "head/weight" not in raw:
        return None
    weight = _numbers(raw["head/weight"], "head/weight", source, 2)
    if weight.shape[1] != d:
        hint = "; it is the other way round, give its transpose" if weight.shape[0] == d else ""
        raise ValueError(f"{source}: head/weight has shape {weight.shape}, expected (classes, {d}){hint}")
    bias = np.zeros(len(weight), np.float32)
    if "head/bias" in raw:
        bias = _numbers(raw["head/bias"], "head/bias", source, 1).astype(np.float32)
        if bias.shape != (len(weight),):
            raise ValueError(f"{source}: head/bias has {len(bias)} values, head/weight {len(weight)} rows")
    return LinearHead(weight, bias)


def _n_classes(sets: Mapping[str, FeatureSet], head: LinearHead | None, source: str) -> int:
    logits = sets["train"].logits
    if head is not None and logits is not None and logits.shape[1] != len(head.weight):
        raise ValueError(f"{source}: logits have {logits.shape[1]} classes, head/weight has {len(head.weight)}")
    if head is not None:
        return len(head.weight)
    return int(sets["train"].labels.max()) + 1 if logits is None else logits.shape[1]


def _check_labels(sets: Mapping[str, FeatureSet], n_classes: int, source: str) -> None:
    if n_classes < 2:
        raise ValueError(f"{source}: {n_classes} class; detectors need at least 2")
    for name in sets:
        labels = sets[name].labels
        if name.startswith(("near/", "far/")):
            continue
        outside = (labels < (0 if name == "train" else -1)) | (labels >= n_classes)  # -1 is none
        if outside.any():
            row = int(outside.argmax())
            hint = "; classes count from 0" if labels[row] == n_classes and labels.min() == 1 else ""
            found = f"{name}/labels is {labels[row]} in row {row}"
            raise ValueError(f"{source}: {found}, expected 0..{n_classes - 1}{hint}")
    present = set(sets["train"].labels.tolist())
    n_empty = n_classes - len(present)  # no array of n_classes: a label may be an id of ten digits
    if n_empty:
        empty = itertools.islice((c for c in range(n_classes) if c not in present), 5)
        named = ", ".join(map(str, empty)) + (", ..." if n_empty > 5 else "")
        raise ValueError(
            f"{source}: {n_empty} of {n_classes} classes have no row in train/labels: {named}; "
            "number the classes from 0 without gaps, and cut head and logits to them"
        )


def _check_head(head: LinearHead, train: FeatureSet, source: str) -> None:
    rows = np.linspace(0, len(train) - 1, min(256, len(train))).round().astype(int)
    ours, theirs = head.logits(train.cls[rows]), train.logits[rows]
    differs = np.abs(ours - theirs).max(axis=1) > 0.1 * theirs.std() + 1e-3  # logits in bfloat16 differ by less
    if differs.any():
        at = int(differs.argmax())
        raise ValueError(
            f"{source}: head/weight @ features + head/bias is not train/logits: in row {rows[at]} they differ by "
            f"{np.abs(ours[at] - theirs[at]).max():.3g}; give the head that reads these features (after the final "
            "norm), or leave the logits or the head out"
        )
