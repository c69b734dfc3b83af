"""What every out-of-distribution detector shares: its input, its two methods, its metadata and the registry."""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np

from ..caps import as_numpy, check_labels


class Observations:
    """What a detector may ask of N samples; costly parts are computed once, when first asked for.

    Parameters
    ----------
    cls : (N, d) array
        Features, the input of the classification head. NaN and infinity are refused.
    logits : (N, C) array, optional
        Default: ``head`` applied to ``cls``.
    labels : (N,) int array, optional
        True classes; needed by ``fit`` of most detectors, never by ``score``.
    head : object with ``weight`` (C, d) and ``bias`` (C,), optional
        Linear classification head.
    sae : TopKSAE, optional
        Makes ``codes`` from ``cls``.
    codes : SparseCodes, optional
    predicted : (N,) int array, optional
        Default: argmax of the logits.
    pixels : (N, P) array, optional
        Statistics of the images themselves (:data:`capsae.images.PIXEL_STATISTICS`), for the controls that read them.

    Raises
    ------
    ValueError
        Where numbers of rows differ, or an array holds a value that is not finite (the row is named).
    """

    def __init__(self, cls, logits=None, labels=None, head=None, sae=None, codes=None, predicted=None, pixels=None):
        self.cls = _finite("cls", as_numpy(cls), 2)
        self.head, self.sae = head, sae
        self.labels = None if labels is None else as_numpy(labels)
        if head is not None and as_numpy(head.weight).shape[1] != self.cls.shape[1]:
            raise ValueError(
                f"head.weight has {as_numpy(head.weight).shape[1]} columns, cls {self.cls.shape[1]}: "
                "give the head that reads these features"
            )
        self.pixels = None if pixels is None else _finite("pixels", as_numpy(pixels), 2)
        rows = {"logits": logits, "codes": codes, "predicted": predicted, "labels": labels, "pixels": pixels}
        for name, given in rows.items():
            if given is not None and len(given) != len(self.cls):
                raise ValueError(f"{name} has {len(given)} rows, cls {len(self.cls)}")
        if logits is not None:
            self.logits = _finite("logits", as_numpy(logits), 2)
        if codes is not None:
            self.codes = codes.numpy()
        if predicted is not None:
            self.predicted = as_numpy(predicted).astype(np.int64)

    def __len__(self) -> int:
        return len(self.cls)

    @cached_property
    def logits(self) -> np.ndarray:
        """(N, C)"""
        if self.head is None:
            raise ValueError("these observations have neither logits nor a head: give one to Observations(...)")
        return self.cls @ as_numpy(self.head.weight).T + as_numpy(self.head.bias)

    @cached_property
    def predicted(self) -> np.ndarray:
        """(N,) int64"""
        return self.logits.argmax(axis=1)

    @cached_property
    def codes(self):
        """SparseCodes of N rows, in numpy arrays."""
        if self.sae is None:
            raise ValueError("these observations have neither codes nor a sae: give one to Observations(...)")
        return self.sae.encode(self.cls).numpy()

    def require_labels(self, n_classes: int) -> np.ndarray:
        """Labels (N,) int64 in 0..n_classes-1, or a ValueError that says what is wrong."""
        if self.labels is None:
            raise ValueError("fit needs the true classes: give labels to Observations(...)")
        return check_labels(self.labels, len(self), n_classes)

    def require_head(self) -> tuple[np.ndarray, np.ndarray]:
        """``(weight (C, d), bias (C,))`` in float64, or a ValueError."""
        if self.head is None:
            raise ValueError("this detector needs the classification head: give head to Observations(...)")
        return as_numpy(self.head.weight).astype(np.float64), as_numpy(self.head.bias).astype(np.float64)

    def take(self, rows) -> Observations:
        """The rows given by indices or by a mask; what was computed already is not computed again."""
        part = {
            name: self.__dict__[name][rows]
            for name in ("logits", "codes", "predicted", "labels", "pixels")
            if self.__dict__.get(name) is not None
        }
        return Observations(self.cls[rows], head=self.head, sae=self.sae, **part)


def _finite(name: str, array: np.ndarray, ndim: int) -> np.ndarray:
    if array.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimensions, found shape {array.shape}")
    bad = ~np.isfinite(array).all(axis=tuple(range(1, ndim)))
    if bad.any():
        raise ValueError(f"{name} holds NaN or infinity in {bad.sum()} rows, the first is row {int(bad.argmax())}")
    return array


@dataclass
class Detector:
    """Base of all detectors: ``fit`` on training observations, ``score`` others; higher = more out of distribution.

    Options are dataclass fields. A subclass states its metadata as class variables.
    """

    title: ClassVar[str]
    group: ClassVar[str]  # "paper", "ours", "control" or "baseline"
    formula: ClassVar[str]  # TeX; z feature, l logits, p softmax, mu_c class mean
    source: ClassVar[str]
    needs: ClassVar[tuple[str, ...]]  # of "logits", "features", "labels", "head", "codes", "pixels"
    higher_is: ClassVar[str] = "more OOD"

    def fit(self, obs: Observations) -> Detector:
        """Learn from training observations; returns self. Detectors without parameters have nothing to do."""
        return self

    def score(self, obs: Observations) -> np.ndarray:
        """Scores (N,) float64."""
        raise TypeError(f"{type(self).__name__} defines no score")

    @property
    def options(self) -> dict:
        """The options in force, for tables and provenance."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.init}


_REGISTRY: dict[str, type[Detector]] = {}


def register(name: str):
    """Class decorator: make a detector available as ``create(name)``."""

    def add(cls: type[Detector]) -> type[Detector]:
        if name in _REGISTRY:
            raise ValueError(f"a detector named {name!r} is registered already")
        _REGISTRY[name] = cls
        return cls

    return add


def create(name: str, **options) -> Detector:
    """A new detector by its registered name.

    Raises
    ------
    ValueError
        For a name that is not registered (the known ones are listed).
    TypeError
        For an option the detector does not have.
    """
    cls = _lookup(name)
    known = [field.name for field in dataclasses.fields(cls) if field.init]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise TypeError(f"detector {name!r} has no option {unknown[0]!r}; it has {', '.join(known) or 'none'}")
    return cls(**options)


def available() -> list[str]:
    """Names of all registered detectors, in the order of registration."""
    return list(_REGISTRY)


def info(name: str) -> dict:
    """Metadata of a detector: name, title, group, formula, source, needs, defaults, description."""
    cls = _lookup(name)
    defaults = {
        f.name: f.default if f.default is not dataclasses.MISSING else f.default_factory()
        for f in dataclasses.fields(cls)
        if f.init
    }
    keys = ("title", "group", "formula", "source", "needs")
    return {
        "name": name,
        **{key: getattr(cls, key) for key in keys},
        "defaults": defaults,
        "description": inspect.getdoc(cls),
    }


def _lookup(name: str) -> type[Detector]:
    if name not in _REGISTRY:
        raise ValueError(f"no detector is named {name!r}; there are {', '.join(_REGISTRY)}")
    return _REGISTRY[name]
