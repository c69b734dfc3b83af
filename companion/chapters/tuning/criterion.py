"""Choosing a detector's options without the test sets.

:func:`tune` compares a whole grid by a criterion that gets ID training and validation rows and nothing else; test sets
are loaded after all options are chosen. The book's main configuration is what the experiment names, not what is chosen
here: the notebook on tuning shows what the choice would have changed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from capsae import metrics as _metrics
from capsae.detectors import Detector, Observations, available, create, info
from capsae.metrics import HIGHER_IS_BETTER, METRICS, fpr95_id_pos, fpr95_ood_pos

# The options that are tuned, and their values. Detectors that are not named here have none, or none worth a choice.
_PERCENTILES = {"percentile": (50.0, 65.0, 80.0, 85.0, 90.0, 95.0, 99.0)}
_DIMENSIONS = {"dim": (16, 32, 64, 96, 128, 256, 512)}
GRIDS: dict[str, dict[str, tuple]] = {
    "epd": {"core_fraction": (0.05, 0.1, 0.12, 0.15, 0.2, 0.3, 1.0)},
    "cosine": {"core_fraction": (0.05, 0.1, 0.15, 0.3, 1.0)},
    "rpd": {"temperature": (1.0, 2.0, 4.0), "epsilon": (0.01, 0.03, 0.1)},
    "energy": {"temperature": (0.5, 1.0, 2.0, 5.0)},
    "gen": {"gamma": (0.05, 0.1, 0.25, 0.5), "top": (5, 10, 100)},
    "knn": {"k": (1, 5, 10, 20, 50, 100, 200)},
    "vim": _DIMENSIONS,
    "residual": _DIMENSIONS,
    "neco": _DIMENSIONS,
    "react": _PERCENTILES,
    "ash_b": _PERCENTILES,
    "ash_p": _PERCENTILES,
    "ash_s": _PERCENTILES,
    "scale": _PERCENTILES,
    "dice": _PERCENTILES,
    "nnguide": {"k": (1, 5, 10, 50, 100)},
    "nci": {"alpha": (0.0, 1e-4, 1e-3, 1e-2)},
}

# make (a new detector with the options in question), ID train, ID validation -> a number, lower is better
Criterion = Callable[[Callable[[], Detector], Observations, Observations], float]


def grids() -> dict[str, dict[str, tuple]]:
    """:data:`GRIDS` cut to the detectors there are."""
    return {name: grid for name, grid in GRIDS.items() if name in available()}


@dataclass(frozen=True)
class Fold:
    """Classes dealt out: ``train`` and ``known`` hold those that stay, ``unknown`` those that play OOD."""

    train: Observations
    known: Observations
    unknown: Observations
    kept: np.ndarray  # the classes that stay: class i of the fold is class kept[i]
    rows: np.ndarray  # of ``unknown`` among the training samples

    def with_sae(self, sae) -> Fold:
        """The same samples and head under another SAE."""
        parts = (
            Observations(of.cls, labels=of.labels, head=of.head, sae=sae)
            for of in (self.train, self.known, self.unknown)
        )
        return Fold(*parts, self.kept, self.rows)


class HeldOutClasses:
    """Criterion: the mean of both FPR95 where some training classes play OOD. No OOD image takes part.

    The classes are dealt into folds. Head and SAE are fitted without a fold's classes, whose training rows are then
    separated from the validation rows of the others: near OOD of the same camera and processing. Three things make it a
    stand-in: the backbone may have been trained with the held-out classes; the validation rows of a fold also choose
    the epoch of its SAE; and what a detector would fit on validation rows it fits on training rows here.

    Parameters
    ----------
    sae : SAEConfig, optional
        Recipe of the SAEs of each fold; None: detectors that need codes are refused.
    folds : int
    unknown : int
        At most so many rows of held-out classes a fold.
    seed : int
        Deals the classes.
    saes : int
        SAEs a fold, each from a seed of its own: the criterion of a detector that needs codes is the mean over them.
    """

    def __init__(self, sae=None, folds: int = 4, unknown: int = 1000, seed: int = 0, saes: int = 5):
        self.sae, self.n_folds, self.unknown, self.seed, self.saes = sae, folds, unknown, seed, saes
        self._of: tuple | None = None
        self._folds: dict[int, list[Fold]] = {}

    def __call__(self, make: Callable[[], Detector], train: Observations, validation: Observations) -> float:
        values = []
        draws = self.saes if self.sae is not None and "codes" in make().needs else 1
        for fold in (fold for draw in range(draws) for fold in self.folds(train, validation, draw)):
            detector = make().fit(fold.train)
            known, unknown = detector.score(fold.known), detector.score(fold.unknown)
            values += [fpr95_ood_pos(known, unknown), fpr95_id_pos(known, unknown)]
        return float(np.mean(values))

    def folds(self, train: Observations, validation: Observations, draw: int = 0) -> list[Fold]:
        """The folds of these samples under the SAEs of one draw; made once, since each trains a head and an SAE."""
        if self._of is None or self._of[0] is not train or self._of[1] is not validation:
            self._of, self._folds = (train, validation), {}
            self._folds[0] = [self._fold(train, validation, number) for number in range(self.n_folds)]
        if draw not in self._folds:
            again = enumerate(self._folds[0])
            self._folds[draw] = [
                fold.with_sae(self._sae(fold.train.cls, fold.known.cls, draw * self.n_folds + n)) for n, fold in again
            ]
        return self._folds[draw]

    def _sae(self, x: np.ndarray, held_out: np.ndarray, seed: int):
        from capsae.sae import train_sae

        return train_sae(x, replace(self.sae, seed=seed), held_out=held_out, keep="best", progress=False)[0]

    def _fold(self, train: Observations, validation: Observations, number: int) -> Fold:
        from capsae.features.probe import fit_linear_probe

        n_classes = int(train.labels.max()) + 1
        if n_classes < 2 * self.n_folds:
            raise ValueError(f"{n_classes} classes cannot be dealt into {self.n_folds} folds of two: use fewer folds")
        held = np.random.default_rng(self.seed).permutation(n_classes)[number :: self.n_folds]
        kept = np.setdiff1d(np.arange(n_classes), held)
        renumber = np.searchsorted(kept, np.arange(n_classes))
        seen, known = ~np.isin(train.labels, held), ~np.isin(validation.labels, held)
        rows = np.random.default_rng([self.seed, number]).permutation(np.flatnonzero(~seen))[: self.unknown]
        x, labels = train.cls[seen], renumber[train.labels[seen]]
        given = {"head": fit_linear_probe(x, labels, len(kept))}
        if self.sae is not None:
            given["sae"] = self._sae(x, validation.cls[known], number)
        return Fold(
            Observations(x, labels=labels, **given),
            Observations(validation.cls[known], labels=renumber[validation.labels[known]], **given),
            Observations(train.cls[rows], **given),
            kept,
            rows,
        )


@dataclass(frozen=True)
class Tuned:
    """What :func:`tune` found: the options that the experiment names, those chosen, and the whole grid.

    ``table`` has a row a setting: method, setting (text), criterion (NaN where refused), default, chosen (bool),
    refused ("" or why the detector refuses the setting).
    """

    name: str
    default: dict[str, Any]
    chosen: dict[str, Any]
    table: pd.DataFrame


def tune(
    name: str,
    grid: Mapping[str, Sequence],
    train: Observations,
    validation: Observations,
    criterion: Criterion | None = None,
    default: Mapping[str, Any] | None = None,
) -> Tuned:
    """Choose a detector's options by a criterion on labelled ID samples alone (default: held-out classes, no SAE).

    All combinations of ``grid`` {option: values} are tried, and ``default`` (the detector's own) with them, which is
    kept where nothing is strictly better. ValueError for samples without labels, as OOD samples have none here.
    """
    for what, obs in (("train", train), ("validation", validation)):
        if obs.labels is None:
            raise ValueError(f"{what} has no labels: tuning takes ID rows, and nothing else")
    default = info(name)["defaults"] | dict(default or {})
    unknown = sorted(set(grid) - set(default))
    if unknown:
        raise ValueError(f"detector {name!r} has no option {unknown[0]!r}; it has {', '.join(default) or 'none'}")
    criterion, rows = criterion or HeldOutClasses(), []
    for options in _settings(grid, default):
        value, refused = np.nan, ""
        try:
            create(name, **options)
            value = float(criterion(lambda options=options: create(name, **options), train, validation))
        except ValueError as error:  # e.g. ViM's dim >= d
            if options == default:
                raise
            refused = str(error)
        rows.append({"options": options, "criterion": value, "default": options == default, "refused": refused})
    best = min(rows, key=lambda row: (np.isnan(row["criterion"]), row["criterion"], not row["default"]))
    table = pd.DataFrame(rows).assign(
        method=name,
        setting=[setting_text(row["options"], grid) for row in rows],
        chosen=[row is best for row in rows],
    )
    columns = ["method", "setting", "criterion", "default", "chosen", "refused"]
    return Tuned(name, dict(default), dict(best["options"]), table[columns])


def setting_text(options: Mapping[str, Any], grid: Mapping[str, Sequence]) -> str:
    """``core_fraction=0.15``: the options that the grid varies."""
    return ", ".join(
        f"{key}={options[key]:g}" if isinstance(options[key], float) else f"{key}={options[key]}" for key in grid
    )


def _settings(grid: Mapping[str, Sequence], default: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All combinations of the grid, over the default's other options; the default itself first if it is not among."""
    combinations = [default | dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    return combinations if default in combinations else [dict(default), *combinations]


def leave_one_set_out(
    name: str,
    grid: Mapping[str, Sequence],
    train: Observations,
    id_test: Observations,
    ood: Mapping[str, Observations],
    validation: Observations | None = None,
    default: Mapping[str, Any] | None = None,
    metric: str = "fpr95_ood_pos",
) -> pd.DataFrame:
    """For each OOD set: the options that are best on the mean of the *other* sets, and how they do on this one.

    The ID test rows take part in the choice as in the result. ``peeking`` is the best of the grid on the set itself:
    what a table gains that is tuned on its own test set.

    Returns
    -------
    DataFrame
        Columns method, set, setting (chosen without this set), value, default, peeking (the metric, shares).
    """
    if len(ood) < 2:
        raise ValueError(f"{len(ood)} OOD set: leaving one out takes two or more")
    if metric not in METRICS:
        raise ValueError(f"metric {metric!r} is not known; use one of {', '.join(METRICS)}")
    default = info(name)["defaults"] | dict(default or {})
    sign, texts, values = -1 if HIGHER_IS_BETTER[metric] else 1, [], []
    for options in _settings(grid, default):
        try:
            detector = create(name, **options).fit(train, *([] if validation is None else [validation]))
        except ValueError:
            if options == default:
                raise
            continue
        known = detector.score(id_test)
        texts.append((setting_text(options, grid), options == default))
        values.append([sign * getattr(_metrics, metric)(known, detector.score(obs)) for obs in ood.values()])
    values = np.array(values)  # (settings, sets), lower is better
    at_default = next(i for i, (_, own) in enumerate(texts) if own)
    rows = []
    for column, where in enumerate(ood):
        others = np.delete(values, column, axis=1).mean(axis=1)
        best = at_default if others[at_default] <= others.min() else int(others.argmin())
        cells = sign * values[[best, at_default, int(values[:, column].argmin())], column]
        rows.append((name, where, texts[best][0], *cells))
    return pd.DataFrame(rows, columns=["method", "set", "setting", "value", "default", "peeking"])


def pairs(changed: Sequence[str], beside: Sequence[str]) -> list[tuple[str, str]]:
    """Comparisons of the page: each tuned detector with its default, and the scores ``beside`` with each tuned one."""
    against = [(score, f"{name} tuned") for score in beside for name in changed if name not in beside]
    return [(f"{name} tuned", name) for name in changed] + against


def left_out(run, train, id_test, sets, validation) -> pd.DataFrame:
    """:func:`leave_one_set_out` of every grid; empty where there is one set alone."""
    if len(sets) < 2:
        return pd.DataFrame()
    options = [(name, grid, run.detector_options(name)) for name, grid in grids().items()]
    found = [leave_one_set_out(name, grid, train, id_test, sets, validation, own) for name, grid, own in options]
    return pd.concat(found, ignore_index=True)
