"""What every out-of-distribution detector shares: its two methods, its metadata, its presets and the registry."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from .observations import Observations


@dataclass
class Detector:
    """Base of all detectors: ``fit`` on training observations, ``score`` others; higher = more out of distribution.

    Options are dataclass fields; their defaults are the preset "ours". A subclass states its metadata as class
    variables and defines ``_score`` (or overrides ``score``). A class that OpenOOD v1.5 has, too, lists in
    ``presets["openood"]`` what OpenOOD sets otherwise.
    """

    title: ClassVar[str]
    group: ClassVar[str] = "baseline"  # or "paper", "ours", "control"
    formula: ClassVar[str]  # TeX; z feature, l logits, p softmax, mu_c class mean
    source: ClassVar[str]  # a key of book/references.bib, or plain text
    needs: ClassVar[tuple[str, ...]]  # of "logits", "features", "labels", "head", "codes", "pixels"
    fitted_on: ClassVar[str] = "train"  # "validation": on ID validation rows where given, else on training rows
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    higher_is: ClassVar[str] = "more OOD"

    def fit(self, obs: Observations, validation: Observations | None = None) -> Detector:
        """Learn from training observations; returns self. Detectors without parameters have nothing to do.

        ``validation`` are ID rows that trained nothing; detectors with ``fitted_on`` "validation" take what they fit
        from them, and from ``obs`` where there are none.
        """
        return self

    def score(self, obs: Observations) -> np.ndarray:
        """Scores (N,) float64, computed block by block."""
        return np.concatenate([self._score(block) for block in obs.blocks()]).astype(np.float64, copy=False)

    def _score(self, obs: Observations) -> np.ndarray:
        raise TypeError(f"{type(self).__name__} defines no score")

    @property
    def options(self) -> dict:
        """The options in force, for tables and provenance."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.init}

    def __getattr__(self, name: str):
        # Only what is missing comes here; what fit sets has a leading underscore.
        hint = ": call fit before score" if name.startswith("_") and not name.startswith("__") else ""
        raise AttributeError(f"{type(self).__name__} has no {name!r}{hint}")


class Control(Detector):
    """Base of scores of our own that tell what in another does the work."""

    group: ClassVar[str] = "control"
    source: ClassVar[str] = "our control"


_REGISTRY: dict[str, type[Detector]] = {}


def register(name: str):
    """Class decorator: make a detector available as ``create(name)``."""

    def add(cls: type[Detector]) -> type[Detector]:
        if name in _REGISTRY:
            raise ValueError(f"a detector named {name!r} is registered already")
        _REGISTRY[name] = cls
        return cls

    return add


def create(name: str, preset: str | None = None, **options) -> Detector:
    """A new detector by its registered name.

    Parameters
    ----------
    name : str
        One of :func:`available`.
    preset : str, optional
        "ours" (default), or "openood": the defaults of OpenOOD v1.5, for the scores it has.
    **options
        Go before the preset's.

    Raises
    ------
    ValueError
        For a name that is not registered (the known ones are listed) or a preset the detector does not have.
    TypeError
        For an option the detector does not have.
    """
    cls = _lookup(name)
    known = list(inspect.signature(cls).parameters)
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise TypeError(f"detector {name!r} has no option {unknown[0]!r}; it has {', '.join(known) or 'none'}")
    presets = {"ours": {}, **cls.presets}
    if preset is not None and preset not in presets:
        raise ValueError(f"detector {name!r} has no preset {preset!r}; it has {', '.join(presets)}")
    return cls(**{**presets[preset or "ours"], **options})


def available() -> list[str]:
    """Names of all registered detectors, in the order of registration."""
    return list(_REGISTRY)


def info(name: str) -> dict:
    """Metadata of a detector: name, title, group, formula, source, needs, fitted_on, defaults, presets, description.

    ``presets`` holds all options of each preset; ``defaults`` are those of "ours".
    """
    cls = _lookup(name)
    defaults = cls().options
    keys = ("title", "group", "formula", "source", "needs", "fitted_on")
    return {
        "name": name,
        **{key: getattr(cls, key) for key in keys},
        "defaults": defaults,
        "presets": {"ours": defaults, **{preset: {**defaults, **cls.presets[preset]} for preset in cls.presets}},
        "description": inspect.getdoc(cls),
    }


def score_all(detectors: Mapping[str, Detector], obs: Observations) -> dict[str, np.ndarray]:
    """Scores (N,) of several fitted detectors in one pass over blocks of rows, whose costly parts they share."""
    parts: dict[str, list[np.ndarray]] = {name: [] for name in detectors}
    for block in obs.blocks():
        for name, detector in detectors.items():
            parts[name].append(detector.score(block))
    return {name: np.concatenate(part) for name, part in parts.items()}


def _lookup(name: str) -> type[Detector]:
    if name not in _REGISTRY:
        close = difflib.get_close_matches(str(name).lower().replace("-", "_"), _REGISTRY, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"no detector is named {name!r}; {hint}there are {', '.join(_REGISTRY)}")
    return _REGISTRY[name]
