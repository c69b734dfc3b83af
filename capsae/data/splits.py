"""Class-stratified choices of rows, and the check that every class has some."""

from __future__ import annotations

import numpy as np


def stratified_mask(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Choose ``fraction`` of each class's rows at random, at least one: mask (N,) bool.

    The choice of a smaller fraction lies within that of a larger one: a sweep over the amount of data only adds rows.
    """
    labels = np.asarray(labels)
    mask = np.zeros(len(labels), bool)
    rng = np.random.default_rng(seed)
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        mask[rows[: max(1, round(fraction * len(rows)))]] = True
    return mask


def holdout_mask(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Choose the samples to hold out of train, by class: mask (N,) bool. Every class keeps at least one in train.

    Raises ValueError if none can be held out, because every class has a single one.
    """
    labels = np.asarray(labels)
    mask = stratified_mask(labels, fraction, seed)
    for label in np.unique(labels):
        rows = labels == label
        if mask[rows].all():
            mask[np.flatnonzero(rows)[-1]] = False
    if not mask.any():
        found = f"no sample can be held out of {len(labels)}: every class has only one"
        raise ValueError(f"{found}; add training images or a val source")
    return mask


def check_classes(labels: np.ndarray, n_classes: int, what: str, every: bool = True, names=()) -> None:
    """Raise ValueError unless all labels lie in 0..n_classes-1 and, with ``every``, each class has a row."""
    labels = np.asarray(labels)
    outside = labels[(labels < 0) | (labels >= n_classes)]
    if len(outside):
        raise ValueError(
            f"{what}: {len(outside)} of {len(labels)} labels lie outside 0..{n_classes - 1}, e.g. {outside[0]};"
            " set n_classes, or choose the classes with the source's key 'classes'"
        )
    counts = np.bincount(labels, minlength=n_classes)
    empty = np.flatnonzero(counts == 0)
    if every and len(empty):
        named = ", ".join(map(str, empty[:5])) + (", ..." if len(empty) > 5 else "")
        called = ": " + ", ".join(repr(names[c]) for c in empty[:5]) if len(names) == n_classes else ""
        raise ValueError(
            f"{what}: class {named} (of {n_classes}) has no training sample{called}; add some, or lower n_classes"
        )
