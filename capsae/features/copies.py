"""The same image twice: in two roles of one experiment, or in one set, under whatever name."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from .featureset import FeatureSet

SHARE = 0.5  # of a set's rows: with more copies than that it is the other set
_CLOSE = 0.02  # of a feature's norm: what rounding and another batch may change
_ROWS = 65_536


def copies(a: FeatureSet, b: FeatureSet) -> tuple[np.ndarray, np.ndarray]:
    """Rows of ``a`` that are rows of ``b``, too, and the first such row of ``b`` for each; (n,) int64 both.

    An image is known by the exact statistics of its pixels and file, where both sets have them, else by its feature;
    the features must agree as well. With ``a`` for ``b``: the rows that were there before.
    """
    by = "cls" if a.pixels is None or b.pixels is None else "pixels"
    wanted, known = _keys(getattr(a, by)), _keys(getattr(b, by))
    order = np.argsort(known, kind="stable")
    at = np.minimum(np.searchsorted(known[order], wanted), len(known) - 1)
    rows = np.flatnonzero((known[order][at] == wanted) & ((order[at] != np.arange(len(a))) if a is b else True))
    same = order[at[rows]]
    if a.cls.shape[1] != b.cls.shape[1]:
        return rows, same
    apart = np.linalg.norm(a.cls[rows] - b.cls[same], axis=1)
    close = apart <= _CLOSE * np.linalg.norm(b.cls[same], axis=1)
    return rows[close], same[close]


def check_copies(name: str, sets: Mapping[str, FeatureSet], what: str) -> list[str]:
    """What to report about the copies between ``sets[name]`` and the other sets, and within it.

    Raises ValueError, which begins with ``what``, if more than half of a test or shifted set are training images, or of
    an OOD set ID images.
    """
    found = []
    for other in sets:
        later, earlier = sorted((name, other), key=_role, reverse=True)
        rows, same = copies(sets[later], sets[earlier])
        if not len(rows):
            continue
        first = f"the first is {str(sets[later].ids[rows[0]])!r}"
        if later == earlier:
            found.append(f"{later}: {len(rows)} of {len(sets[later])} images are there twice, {first}")
            continue
        first += f", {str(sets[earlier].ids[same[0]])!r} there"
        line = f"{later}: {len(rows)} of {len(sets[later])} images are images of {earlier}, {first}"
        tested = _role(later) == 2 and earlier == "train" or _role(later) == 3 > _role(earlier)
        if tested and len(rows) > SHARE * len(sets[later]):
            raise ValueError(f"{what}, {line}; give other images")
        found.append(line)
    return found


def _role(name: str) -> int:
    return {"train": 0, "val": 1}.get(name, 2 if name == "test" or name.startswith("shifted/") else 3)


def _keys(rows: np.ndarray) -> np.ndarray:
    """A number (N,) uint64 for each row's bits; equal rows have equal ones."""
    bits = np.ascontiguousarray(rows, np.float32).view(np.uint32)
    factors = np.random.default_rng(0).integers(0, 2**63, bits.shape[1], dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    parts = (bits[at : at + _ROWS].astype(np.uint64) for at in range(0, len(bits), _ROWS))
    return np.concatenate([(part * factors).sum(axis=1, dtype=np.uint64) for part in parts] or [np.zeros(0, np.uint64)])
