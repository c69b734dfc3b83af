"""A stranger's own images: predicted class, scores, and a flag at a threshold calibrated on ID validation rows."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from . import detectors as _detectors
from .data import IMAGE_SUFFIXES, ImageSource
from .detectors import Observations
from .image_files import images_below, tell

DEFAULT_METHODS = ("epd", _detectors.OURS)
KEEP = 0.95  # share of ID validation rows that must not be flagged


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
            tell(str(path), left_out)
            if not inside:
                raise FileNotFoundError(f"folder {str(path)!r} holds no images ({' '.join(sorted(IMAGE_SUFFIXES))})")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise FileNotFoundError(f"no image or folder {str(path)!r}")
    return list(dict.fromkeys(found))


def observe(
    run, images: Sequence[Path], checkpoint: str | Path | None = None
) -> tuple[Observations | None, dict, list]:
    """Extract the features of image files.

    Parameters
    ----------
    run : capsae.pipeline.Run
    images : files
    checkpoint : path, optional
        Weights of the run's backbone, in place of those the profile names.

    Returns
    -------
    observations of the readable images (None if there is none), ``{file: row}``, ``[{"id", "why"}]`` of the others
    """
    from .features import extract

    ids = np.array([str(path) for path in images], dtype=str)
    nothing = np.full(len(ids), -1)
    source = ImageSource("images", nothing, ids, (), lambda row: images[row], np.arange(len(ids)))
    backbone = load_weights(run, checkpoint)
    options = {"device": run.device, "progress": run.progress and len(ids) > 64, "logits": False, "max_bad": 1.0}
    options |= run.inputs.extraction
    with tempfile.TemporaryDirectory(prefix="capsae-") as work:
        features = extract(source, backbone, work, **options)
    rows = {name: row for row, name in enumerate(features.ids.tolist())}
    if not len(features):
        return None, rows, features.meta["bad_images"]
    observations = Observations(features.cls, head=run.head, sae=run.sae, pixels=features.pixels)
    return observations, rows, features.meta["bad_images"]


def load_weights(run, checkpoint: str | Path | None = None):
    """Return the run's backbone with its weights; FileNotFoundError that says what would do if they cannot be had."""
    from .backbone import load_backbone

    if checkpoint is not None and not Path(checkpoint).is_file():
        raise FileNotFoundError(f"--checkpoint {str(checkpoint)!r}: no such file")
    settings = run.inputs.backbone_settings(checkpoint)
    model = settings["model"]
    if not settings.get("checkpoint") and not settings.get("pretrained"):
        raise FileNotFoundError(f"backbone {model!r} has no weights: give --checkpoint FILE or set backbone.pretrained")
    try:
        return load_backbone(settings)
    except OSError as error:
        if settings.get("checkpoint"):
            raise
        why = str(error).strip().split(". ")[0] or type(error).__name__
        raise FileNotFoundError(
            f"the weights of {model!r} are neither on this machine nor to be downloaded: give --checkpoint FILE, "
            f"or run once with a connection ({why})"
        ) from None


def score_images(
    run, images: Sequence[Path], checkpoint: str | Path | None = None, methods: Sequence[str] = DEFAULT_METHODS
) -> pd.DataFrame:
    """Score image files.

    Parameters
    ----------
    run, images, checkpoint : as for :func:`observe`
    methods : detector names
        ``flag`` follows the first.

    Returns
    -------
    DataFrame
        One row an image, in the order given: path, predicted (class name), confidence (softmax of the head); for each
        method its score and ``<method>_threshold``, above which 5 % of the ID validation rows lie; flag (True = out of
        distribution); reason (why an image could not be read: its other cells are empty).
    """
    observations, rows, bad = observe(run, images, checkpoint)  # first: without weights nothing else is of use
    thresholds = {name: run.threshold(name, KEEP) for name in methods}
    why = {each["id"]: each["why"] for each in bad}
    table = pd.DataFrame({"path": [str(path) for path in images]})
    row_of = np.array([rows.get(path, -1) for path in table["path"]])
    good = row_of >= 0

    def spread(values, dtype) -> pd.Series:
        column = pd.Series(pd.NA, index=table.index, dtype=dtype)
        if good.any():
            column[good] = np.asarray(values)[row_of[good]]
        return column

    predicted, confidence, scores = [], [], {name: [] for name in methods}
    if observations is not None:
        logits = observations.logits.astype(np.float64)
        confidence = 1 / np.exp(logits - logits.max(axis=1, keepdims=True)).sum(axis=1)
        predicted = class_names(run)[observations.predicted]
        scores = {name: detector.score(observations) for name, detector in run.detectors(methods).items()}
    table["predicted"] = spread(predicted, "string")
    table["confidence"] = spread(confidence, "Float64")
    for name in methods:
        table[name] = spread(scores[name], "Float64")
        table[f"{name}_threshold"] = thresholds[name]
    table["flag"] = (table[methods[0]] > thresholds[methods[0]]).astype("boolean")
    table["reason"] = [why.get(path, "") for path in table["path"]]
    return table


def class_names(run) -> np.ndarray:
    """Return the names (C,) of a run's classes, numbers where it has none."""
    names = run.features("train").class_names
    return np.array(names or [f"class {c}" for c in range(run.profile.n_classes)])
