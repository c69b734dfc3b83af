"""A stranger's own images: predicted class, scores, and a flag at a threshold calibrated on ID validation rows."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from .. import detectors as _detectors
from ..caps import ClassActivationProfiles
from ..data.image_files import images_below, log_left_out
from ..data.images import IMAGE_SUFFIXES
from ..data.sources import ImageSource
from ..detectors import Observations
from ..device import pick_device
from ..features.featureset import FeatureSet, LinearHead
from ..files import replacing

DEFAULT_METHODS = ("epd", _detectors.OURS)
KEEP = 0.95  # share of ID validation rows that must not be flagged
MIN_VAL = 40  # with fewer rows the 95 % quantile is their largest or second largest
FILE, SCHEMA = "scorer.json", 1
BLOCK = {"cpu": 128, "cuda": 1024}  # images whose rows are written together


class Scores(NamedTuple):
    """What a :class:`Scorer` says of N images. One that cannot be read has score NaN, is flagged, and predicted ""."""

    scores: np.ndarray  # (N,) float64, higher = more OOD
    flags: np.ndarray  # (N,) bool, True = out of distribution
    predicted: np.ndarray  # (N,) str


class Scorer:
    """Backbone, head, SAE, detectors and thresholds: images in; scores, flags and predicted classes out.

    Made by :meth:`load` from a folder of ``capsae train --out``, or by :meth:`of` from a run.

    Attributes
    ----------
    detectors, thresholds : dict
        By name; a score above its threshold is flagged, and :meth:`__call__` follows the first.
    class_names : (C,) str
    n_val : int
        ID validation rows behind the thresholds.
    key : str
        Digest of what its scores follow from, but for the backbone.
    """

    def __init__(self, backbone, head, sae, detectors: Mapping, thresholds: Mapping, class_names, n_val: int, key: str):
        self.backbone, self.head, self.sae = backbone, head, sae
        self.detectors, self.thresholds = dict(detectors), dict(thresholds)
        self.class_names, self.n_val, self.key = np.asarray(class_names, dtype=str), n_val, key
        self.device, self.progress = "auto", False

    @classmethod
    def of(cls, run, methods: Sequence[str] = DEFAULT_METHODS, checkpoint: str | Path | None = None) -> Scorer:
        """Of a :class:`~capsae.pipeline.run.Run`, with the weights of ``checkpoint`` in place of the experiment's."""
        backbone = load_weights(run, checkpoint)  # first: without weights nothing else is of use
        found, thresholds = run.detectors(methods), {name: run.threshold(name, KEEP) for name in methods}
        key = run.digest("scores", methods)
        scorer = cls(backbone, run.head, run.sae, found, thresholds, class_names(run), len(run.features("val")), key)
        scorer.device, scorer.progress = run.device, run.progress
        return scorer

    @classmethod
    def load(
        cls,
        folder: str | Path,
        methods: Sequence[str] | None = None,
        checkpoint: str | Path | None = None,
        device: str = "auto",
    ) -> Scorer:
        """Read what ``capsae train --out FOLDER`` wrote: no training images, no experiment and no store are needed.

        ``methods`` are of those in the folder (default: all), and the flag follows the first; ``checkpoint`` holds the
        backbone's weights, in place of those that the folder holds or names.

        Raises
        ------
        FileNotFoundError, ValueError
            Not such a folder, a damaged file, no weights, or a method that the folder does not hold.
        """
        from ..sae import load

        folder = Path(folder)
        if not (folder / FILE).is_file():
            raise FileNotFoundError(f"{folder} holds no {FILE}; a folder that `capsae train --out` wrote would do")
        about = json.loads((folder / FILE).read_text(encoding="utf-8"))
        if about.get("schema") != SCHEMA:
            raise ValueError(f"{folder / FILE} has schema {about.get('schema')!r}; this version reads {SCHEMA}")
        known = about["methods"]
        chosen = list(methods or known)
        for name in chosen:
            if name not in known:
                raise ValueError(f"{folder} holds no threshold of {name!r}; it holds those of {', '.join(known)}")
        settings = dict(about["backbone"])
        if checkpoint is None and "checkpoint" in settings:
            settings["checkpoint"] = str(folder / settings["checkpoint"])
        backbone = weights_of(settings, checkpoint)
        caps = ClassActivationProfiles.load(folder / "caps.safetensors")
        found = {name: _detectors.create(name, **known[name]["options"]).on(caps) for name in chosen}
        head, sae = LinearHead.load(folder / "head.safetensors"), load(folder)
        key = hashlib.sha256(b"".join(_digest(path) for path in sorted(folder.glob("*.safetensors"))))
        key.update(json.dumps([known, chosen]).encode())
        thresholds = {name: known[name]["threshold"] for name in chosen}
        scorer = cls(backbone, head, sae, found, thresholds, about["class_names"], about["n_val"], key.hexdigest())
        scorer.device = device
        return scorer

    def __call__(self, images: Sequence) -> Scores:
        """Score images: paths, bytes of image files, PIL images, or uint8 arrays (H, W, 3)."""
        table, method = self.table(list(images)), next(iter(self.thresholds))
        bad = table[method].isna()
        scores = table[method].astype("Float64").to_numpy(dtype=np.float64, na_value=np.nan)
        flags = table["flag"].astype("boolean").fillna(True).to_numpy(dtype=bool)
        return Scores(scores, flags, table["predicted"].mask(bad, "").to_numpy(dtype=str))

    def table(self, images: Sequence) -> pd.DataFrame:
        """Return a row for each image, in the order given.

        Columns: path, predicted (class name), confidence (softmax of the head); for each method its score and
        ``<method>_threshold``, above which 5 % of the ID validation rows lie; flag (True = out of distribution by the
        first method); reason (why an image could not be read: its other cells are empty).
        """
        features = extract_images(images, self.backbone, self.device)
        found, why = self._rows(features), {each["id"]: each["why"] for each in features.meta["bad_images"]}
        return self._table(images, [found.get(_name(i, image)) for i, image in enumerate(images)], why)

    def blocks(self, images: Sequence[Path], kept: Path, parts: list[Path] | None = None) -> Iterator[pd.DataFrame]:
        """Yield :meth:`table` of image files in blocks. What a killed call made, the next one reads.

        The folder ``kept`` gets ``rows.jsonl``, a line for each image by name and SHA-256 of its file; ``parts``, if
        given, the blocks' files of features, which are then kept, too: :func:`join_features` puts them together.
        """
        rows_file = _kept(kept, self.key, self.backbone)
        size = BLOCK.get(pick_device(self.device).type, BLOCK["cpu"])
        done = _read_rows(rows_file)
        for start in range(0, len(images), size):
            block = list(images[start : start + size])
            keys = [f"{_digest(path).hex()} {path}" for path in block]
            todo = [i for i, key in enumerate(keys) if parts is not None or key not in done]
            found, bad = {}, []
            if todo:
                names = json.dumps([keys, [str(path) for path in block]])
                file = kept / f"features-{hashlib.sha256(names.encode()).hexdigest()[:20]}.safetensors"
                if file.is_file():
                    part = FeatureSet.load(file)
                else:
                    part = extract_images([block[i] for i in todo], self.backbone, self.device)
                if parts is not None:
                    parts.append(file if file.is_file() else part.save(file))
                found, bad = self._rows(part), part.meta["bad_images"]
            new = {keys[i]: found[str(block[i])] for i in todo if str(block[i]) in found}
            with open(rows_file, "a", encoding="utf-8") as file:
                file.writelines(json.dumps([key, row]) + "\n" for key, row in new.items() if key not in done)
            done |= new
            yield self._table(block, [done.get(key) for key in keys], {each["id"]: each["why"] for each in bad})

    def _rows(self, features: FeatureSet) -> dict[str, dict[str, Any]]:
        """What the table says of each readable image, by name."""
        if not len(features):
            return {}
        seen = Observations(features.cls, head=self.head, sae=self.sae, pixels=features.pixels)
        logits = seen.logits.astype(np.float64)
        columns = {"predicted": self.class_names[seen.predicted]}
        columns["confidence"] = 1 / np.exp(logits - logits.max(axis=1, keepdims=True)).sum(axis=1)
        columns |= {name: detector.score(seen) for name, detector in self.detectors.items()}
        values = zip(*(column.tolist() for column in columns.values()), strict=True)
        rows = [dict(zip(columns, row, strict=True)) for row in values]
        return dict(zip(features.ids.tolist(), rows, strict=True))

    def _table(self, images: Sequence, rows: list[dict | None], why: dict[str, str]) -> pd.DataFrame:
        names = [_name(i, image) for i, image in enumerate(images)]

        def column(key: str, dtype: str) -> pd.Series:
            return pd.Series([pd.NA if row is None else row[key] for row in rows], dtype=dtype)

        # object: pandas' own strings hold no file name that is not UTF-8
        table = pd.DataFrame({"path": pd.Series(names, dtype=object), "predicted": column("predicted", "object")})
        table["confidence"] = column("confidence", "Float64")
        for name, threshold in self.thresholds.items():
            table[name] = column(name, "Float64")
            table[f"{name}_threshold"] = threshold
        first, threshold = next(iter(self.thresholds.items()))
        table["flag"] = (table[first] > threshold).astype("boolean")
        table["reason"] = pd.Series([why.get(name, "") for name in names], dtype=object)
        return table


def save_scorer(run, folder: Path, methods: Sequence[str] = DEFAULT_METHODS) -> None:
    """Write what :meth:`Scorer.load` needs beside SAE, head and profiles: backbone, class names, thresholds.

    The backbone's weights are copied where they are a file; where they are timm's, their name stands for them.
    """
    settings = run.inputs.backbone_settings()
    if settings.get("checkpoint"):
        source = Path(settings["checkpoint"])
        settings["checkpoint"] = f"backbone{source.suffix}"
        shutil.copyfile(source, folder / settings["checkpoint"])
    options = {name: detector.options for name, detector in run.detectors(methods).items()}
    about = {
        "schema": SCHEMA,
        "backbone": settings,
        "class_names": class_names(run).tolist(),
        "n_val": len(run.features("val")),
        "methods": {name: {"options": options[name], "threshold": run.threshold(name, KEEP)} for name in methods},
    }
    (folder / FILE).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def join_features(files: Sequence[Path], path: str | Path) -> None:
    """Put the blocks' features of :meth:`Scorer.blocks` into one FeatureSet file; theirs go."""
    parts = [FeatureSet.load(file) for file in files]
    meta = parts[0].meta | {"bad_images": [bad for part in parts for bad in part.meta["bad_images"]]}
    cls, ids = np.concatenate([part.cls for part in parts]), np.concatenate([part.ids for part in parts])
    pixels = None if parts[0].pixels is None else np.concatenate([part.pixels for part in parts])
    FeatureSet(cls, np.full(len(cls), -1), ids, name="images", meta=meta, pixels=pixels).save(path)
    for file in files:
        file.unlink(missing_ok=True)


def find_images(paths: Iterable[str | Path]) -> list[Path]:
    """Return image files: those named, and those at any depth in folders named, sorted; each once.

    Raises
    ------
    FileNotFoundError
        For a path that is not there; for folders without any image.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside, left_out = images_below(path)
            log_left_out(str(path), left_out)
            if not inside:
                raise FileNotFoundError(f"folder {str(path)!r} holds no images ({' '.join(sorted(IMAGE_SUFFIXES))})")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise FileNotFoundError(f"no image or folder {str(path)!r}")
    return list(dict.fromkeys(found))


def extract_images(images: Sequence, backbone, device: str = "auto", progress: bool = False, **options) -> FeatureSet:
    """Features of images (paths, bytes, PIL images, arrays) that belong to no data set; no class, no logits.

    ``options``: further ones of :func:`capsae.features.extract.extract`.
    """
    from ..features.extract import extract

    ids = np.array([_name(i, image) for i, image in enumerate(images)], dtype=str)
    nothing = np.full(len(ids), -1)
    source = ImageSource("images", nothing, ids, (), lambda row: _readable(images[row]), np.arange(len(ids)))
    options |= {"device": device, "progress": progress, "logits": False, "max_bad": 1.0}
    with tempfile.TemporaryDirectory(prefix="capsae-") as work:
        return extract(source, backbone, work, **options)


def observe(
    run, images: Sequence[Path], checkpoint: str | Path | None = None
) -> tuple[Observations | None, dict, list]:
    """Extract the features of image files with a run's backbone.

    Returns
    -------
    observations of the readable images (None if there is none), ``{file: row}``, ``[{"id", "why"}]`` of the others
    """
    progress = run.progress and len(images) > 64
    backbone = load_weights(run, checkpoint)
    features = extract_images(images, backbone, run.device, progress, **run.inputs.extraction)
    rows = {name: row for row, name in enumerate(features.ids.tolist())}
    if not len(features):
        return None, rows, features.meta["bad_images"]
    observations = Observations(features.cls, head=run.head, sae=run.sae, pixels=features.pixels)
    return observations, rows, features.meta["bad_images"]


def load_weights(run, checkpoint: str | Path | None = None):
    """Return the run's backbone with its weights; errors are those of :func:`capsae.features.backbone.load_weights`."""
    _check_there(checkpoint)
    return weights_of(run.inputs.backbone_settings(checkpoint))


def weights_of(settings: Mapping[str, Any], checkpoint: str | Path | None = None):
    """Return a backbone with its weights, those of ``checkpoint`` if it is given."""
    from ..features import backbone

    _check_there(checkpoint)
    return backbone.load_weights(dict(settings) | ({} if checkpoint is None else {"checkpoint": str(checkpoint)}))


def doubts(table: pd.DataFrame, methods: Sequence[str], n_val: int) -> list[str]:
    """What makes a flag worth little: few rows behind the threshold, or scores that all tie with it."""
    found = []
    if n_val < MIN_VAL:
        found.append(f"the threshold rests on {n_val} ID validation rows: give it {MIN_VAL} or more")
    for name in methods:
        scores = table[name].dropna()
        if len(scores) and (scores == table.loc[scores.index, f"{name}_threshold"]).mean() > 0.5:
            found.append(
                f"most scores of {name} equal its threshold, so it flags nothing: more images or fewer latents may help"
            )
    return found


def class_names(run) -> np.ndarray:
    """Return the names (C,) of a run's classes, numbers where it has none."""
    names = run.features("train").class_names
    return np.array(names or [f"class {c}" for c in range(run.experiment.n_classes)])


def _check_there(checkpoint: str | Path | None) -> None:
    if checkpoint is not None and not Path(checkpoint).is_file():
        raise FileNotFoundError(f"--checkpoint {str(checkpoint)!r}: no such file")


def _name(i: int, image) -> str:
    return str(image) if isinstance(image, str | Path) else f"image {i}"


def _readable(image):
    if isinstance(image, np.ndarray):
        from PIL import Image

        return Image.fromarray(image)
    return image


def _digest(path: Path) -> bytes:
    """SHA-256 of a file; of nothing where it cannot be read, which the extraction will name."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError:
        return hashlib.sha256().digest()


def _kept(folder: Path, key: str, backbone) -> Path:
    """The file of rows in ``folder``; rows that another model or other settings made go."""
    folder.mkdir(parents=True, exist_ok=True)
    key_file, rows = folder / "key", folder / "rows.jsonl"
    key = f"{key} {getattr(backbone, 'digest', '')}"
    if not key_file.is_file() or key_file.read_text(encoding="utf-8") != key:
        for left in (rows, *folder.glob("features-*.safetensors")):
            left.unlink(missing_ok=True)
        with replacing(key_file) as temporary:
            temporary.write_text(key, encoding="utf-8")
    return rows


def _read_rows(path: Path) -> dict[str, dict]:
    """Rows by digest and name of the image; a line that a kill cut off counts for nothing."""
    if not path.is_file():
        return {}
    found, text = {}, path.read_text(encoding="utf-8")
    for line in text.splitlines():
        try:
            key, row = json.loads(line)
        except ValueError:
            continue
        found[key] = row
    if text and not text.endswith("\n"):
        with open(path, "a", encoding="utf-8") as file:
            file.write("\n")
    return found
