"""The search for the unit that separates a synset's classes best: by class, by class unseen, by image."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.sparse import csc_array

FOLDS = 5
LEAST = 4  # classes under a synset that is judged by classes unseen
BINS = 32  # thresholds a unit in the search over images
_TIE = 1e-9


def f1(found: np.ndarray, true: np.ndarray, axis: int = 0) -> np.ndarray:
    """F1 of sets along an axis: 2 |both| / (|found| + |true|); 0 where both are empty."""
    total = found.sum(axis=axis) + true.sum(axis=axis)
    return 2 * (found & true).sum(axis=axis) / np.maximum(total, 1)


@dataclass(frozen=True)
class Choice:
    """For each of S synsets a unit, the threshold that it must exceed, and the F1 where they were chosen."""

    unit: np.ndarray
    threshold: np.ndarray
    f1: np.ndarray

    def classes(self, profiles: np.ndarray) -> np.ndarray:
        """(C, S) bool: the classes whose profile (C, U) exceeds it."""
        return profiles[:, self.unit] > self.threshold


class Search:
    """The search for the best unit and threshold on profiles (C, U); call it with members (C, S) bool.

    A threshold lies half way between two neighbouring values of a unit, so that it cuts off at least one class and not
    all. Among equal F1 the widest gap wins: it is the least likely to be noise.
    """

    def __init__(self, profiles: np.ndarray):
        self.order = np.ascontiguousarray(np.argsort(-profiles.T, axis=1, kind="stable"))
        self.values = np.take_along_axis(profiles.T, self.order, axis=1)
        gap = self.values[:, :-1] - self.values[:, 1:]
        widest = gap.max()
        self.bonus = np.where(gap > 1e-9 * widest, _TIE * gap / max(widest, 1e-300), -1.0)
        if not widest > 0:
            raise ValueError(f"none of the {profiles.shape[1]} units tells any two classes apart: do they fire at all?")

    def __call__(self, members: np.ndarray) -> Choice:
        from .kernels import best_prefixes

        best, place = best_prefixes(self.order, self.bonus, np.ascontiguousarray(members, np.float64))
        unit = best.argmax(axis=0)
        at = place[unit, np.arange(members.shape[1])]
        threshold = (self.values[unit, at] + self.values[unit, at + 1]) / 2
        found = best[unit, np.arange(members.shape[1])] - self.bonus[unit, at]
        return Choice(unit, threshold, found)


def unseen_f1(train, test, members, place, permutations: int = 0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """F1 (S,) on classes that the choice of unit and threshold has not seen, and the same by permuted classes (n, S).

    Of profiles (C, U) and members (C, S). ``place`` (C,) is each class's place in an order that keeps relatives
    together (:func:`tree_order`): dealt out from it into FOLDS folds, a synset's classes are spread over them.
    All folds are judged together. NaN for a synset of fewer than LEAST classes.
    """
    large, rng = members.sum(axis=0) >= LEAST, np.random.default_rng(seed)
    folds = [place % FOLDS == fold for fold in range(FOLDS)] if large.any() else []
    searches = [Search(train[~held]) for held in folds]
    found = np.full((1 + permutations, members.shape[1]), np.nan)
    for i, row in enumerate(found):
        true = members[:, large] if not i else members[rng.permutation(len(members))][:, large]
        called = np.zeros_like(true)
        for held, search in zip(folds, searches, strict=True):
            called[held] = search(true[~held]).classes(test[held])
        row[large] = f1(called, true)
    return found[0], found[1:]


def permuted_f1(train: np.ndarray, test: np.ndarray, members: np.ndarray, n: int, seed: int = 0) -> np.ndarray:
    """F1 (n, S) of the whole search with the classes of the tree permuted: what the best of all units finds by chance.

    The shape of the tree, and what the units have in common, stay as they are.
    """
    search, rng = Search(train), np.random.default_rng(seed)
    found = np.empty((n, members.shape[1]))
    for row in found:
        shuffled = members[rng.permutation(len(members))]
        row[:] = f1(search(shuffled).classes(test), shuffled)
    return found


def image_choice(units: csc_array, labels, members: np.ndarray) -> Choice:
    """The unit and threshold whose rows are best the rows of a synset's classes, on training rows.

    Candidates are BINS quantiles of each unit's active rows, half way to the next row below.
    """
    labels, (n_classes, n_synsets) = np.asarray(labels), members.shape
    n_units = units.shape[1]
    counts = np.zeros((n_units, BINS, n_classes), np.float32)
    thresholds = np.full((n_units, BINS), np.inf)
    for u in range(n_units):
        part = slice(units.indptr[u], units.indptr[u + 1])
        values = units.data[part]
        if len(values):
            order = np.argsort(-values)
            bins = np.arange(len(values)) * BINS // len(values)
            cells = bins * n_classes + labels[units.indices[part][order]]
            counts[u] = np.bincount(cells, minlength=BINS * n_classes).reshape(BINS, n_classes)
            falling = np.append(values[order], 0)
            thresholds[u, bins] = (falling[:-1] + falling[1:]) / 2  # that of the last of a bin stays
    counts = counts.cumsum(axis=1).reshape(-1, n_classes)
    thresholds = np.minimum.accumulate(thresholds, axis=1).ravel()
    in_class = np.bincount(labels, minlength=n_classes)
    wanted = (in_class[:, None] * members).sum(axis=0)
    found = 2 * (counts @ members.astype(np.float32)) / (counts.sum(axis=1)[:, None] + wanted)
    best = found.argmax(axis=0)
    return Choice(best // BINS, thresholds[best], found[best, np.arange(n_synsets)].astype(np.float64))
