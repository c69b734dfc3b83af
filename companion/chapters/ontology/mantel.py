"""Do two distances between classes agree? Mantel's test, its partial form, and the distances that the book compares.

    r = corr(A_ij, B_ij) over the pairs i < j;   p = (1 + permutations with r* >= r) / (1 + n)

The pairs of C classes are not independent, so that p comes from permuting the classes of one matrix, and intervals from
leaving out one class at a time (jackknife): both treat the class as the unit. One-sided: agreement is positive.

Source: Mantel, Cancer Research 1967; the partial form Smouse, Long, Sokal, Systematic Zoology 1986, whose test can
reject too often where both distances share spatial structure (Guillot, Rousset, Methods Ecol. Evol. 2013).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np
import pandas as pd

METHODS = ("pearson", "spearman")


class Pairs:
    """The pairs of a distance matrix (C, C) as a vector, or their mid-ranks; centred and of length 1.

    Raises ValueError if the matrix is not square, symmetric and finite, or has fewer than 4 classes.
    """

    def __init__(self, matrix, method: str = "pearson"):
        if method not in METHODS:
            raise ValueError(f"method is {method!r}; one of {', '.join(METHODS)} would do")
        self.matrix, self.method = np.asarray(matrix, np.float64), method
        if self.matrix.ndim != 2 or self.matrix.shape[0] != self.matrix.shape[1] or len(self.matrix) < 4:
            raise ValueError(f"a matrix has shape {self.matrix.shape}; distances (C, C) of 4 classes or more would do")
        if not np.isfinite(self.matrix).all() or not np.allclose(self.matrix, self.matrix.T, atol=1e-8):
            raise ValueError("a matrix is not symmetric, or not finite: the distance of each pair both ways would do")

    @cached_property
    def whole(self) -> np.ndarray:
        """(C (C - 1) / 2,)"""
        return _unit(self.matrix, self.method)

    @cached_property
    def without(self) -> list[np.ndarray]:
        """The same without each class in turn."""
        rows = (np.delete(np.arange(len(self.matrix)), c) for c in range(len(self.matrix)))
        return [_unit(self.matrix[np.ix_(kept, kept)], self.method) for kept in rows]

    def permuted(self, n: int, seed: int = 0) -> np.ndarray:
        """(n, C (C - 1) / 2): the classes permuted."""
        upper, rng = np.triu_indices(len(self.matrix), 1), np.random.default_rng(seed)
        square = np.zeros(self.matrix.shape)
        square[upper] = self.whole
        square += square.T
        orders = (rng.permutation(len(square)) for _ in range(n))
        return np.array([square[np.ix_(order, order)][upper] for order in orders])


def _unit(matrix: np.ndarray, method: str) -> np.ndarray:
    values = matrix[np.triu_indices(len(matrix), 1)]
    if method == "spearman":
        from scipy.stats import rankdata

        values = rankdata(values)
    values = values - values.mean()
    length = np.linalg.norm(values)
    return values / length if length > 1e-12 * len(values) else np.full(len(values), np.nan)


def correlations(a: np.ndarray, b: np.ndarray, given: Sequence[np.ndarray] = ()) -> np.ndarray:
    """Correlation of unit vectors a (..., n) with b (n,); with ``given``, of what these do not explain of either."""
    r = a @ b
    if not len(given):
        return r
    basis = np.linalg.qr(np.stack(given, axis=1))[0]
    of_a, of_b = a @ basis, b @ basis
    left = np.maximum((1 - (of_a**2).sum(axis=-1)) * (1 - of_b @ of_b), 1e-30)
    return (r - of_a @ of_b) / np.sqrt(left)


def mantel(a: Pairs, b: Pairs, given: Sequence[Pairs] = (), n: int = 999, seed: int = 0, draws=None) -> dict:
    """Mantel's test of a against b, or with ``given`` (whose linear part leaves both first) the partial test.

    The classes of a are permuted n times; ``draws`` is ``a.permuted(n, seed)`` where several tests share it. Returns r;
    lo, hi (95 %, jackknife over classes, cut off at -1 and 1); p (one-sided, never below 1 / (1 + n)).
    """
    sizes = {len(one.matrix) for one in (a, b, *given)}
    if len(sizes) > 1 or len({one.method for one in (a, b, *given)}) > 1:
        raise ValueError(f"distances are of {sorted(sizes)} classes, or by different methods; one of each would do")
    fixed = [one.whole for one in given]
    value = float(correlations(a.whole, b.whole, fixed))
    draws = a.permuted(n, seed) if draws is None else draws
    beyond = (correlations(draws, b.whole, fixed) >= value - 1e-12).sum()
    parts = zip(a.without, b.without, *(one.without for one in given), strict=True)
    reach = _reach([float(correlations(x, y, rest)) for x, y, *rest in parts])
    lo, hi = max(value - reach, -1.0), min(value + reach, 1.0)
    return {"r": value, "lo": lo, "hi": hi, "p": float((1 + beyond) / (1 + len(draws)))}


def gain(a: Pairs, b: Pairs, other: Pairs, given: Sequence[Pairs] = ()) -> dict[str, float]:
    """How much better b agrees with a than another distance does, with ``given`` by partial r.

    Returns value, lo, hi (95 %, jackknife over classes).
    """

    def more(x, y, z, *rest):
        return float(correlations(x, y, rest) - correlations(x, z, rest))

    value = more(a.whole, b.whole, other.whole, *(one.whole for one in given))
    parts = zip(a.without, b.without, other.without, *(one.without for one in given), strict=True)
    reach = _reach([more(*part) for part in parts])
    return {"value": value, "lo": value - reach, "hi": value + reach}


def _reach(left_out: Sequence[float]) -> float:
    """Half the width of a 95 % interval from the values without each class (jackknife)."""
    values = np.asarray(left_out)
    return float(1.96 * np.sqrt((len(values) - 1) / len(values) * ((values - values.mean()) ** 2).sum()))


# --- distances between classes


def cosine_distance(rows) -> np.ndarray:
    """1 - cosine (C, C) of rows (C, d); a row of length 0 is at distance 1 of all others."""
    rows = np.asarray(rows, np.float64)
    unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-300)
    found = np.clip(1 - unit @ unit.T, 0, 2)
    np.fill_diagonal(found, 0)
    return (found + found.T) / 2


def hellinger_distance(rows) -> np.ndarray:
    """Hellinger's distance (C, C) in [0, 1] of rows (C, d) >= 0, each divided by its sum."""
    rows = np.asarray(rows, np.float64)
    root = np.sqrt(rows / np.maximum(rows.sum(axis=1, keepdims=True), 1e-300))
    found = np.sqrt(np.clip(1 - root @ root.T, 0, 1))
    np.fill_diagonal(found, 0)
    return (found + found.T) / 2


def cap_distances(caps, core_fraction: float = 0.05) -> dict[str, np.ndarray]:
    """Distances (C, C) between class activation profiles: cosine, Hellinger, and 1 - Jaccard index of the cores."""
    return {
        "cosine": cosine_distance(caps.mean),
        "Hellinger": hellinger_distance(caps.mean),
        "core Jaccard": 1 - caps.jaccard(core_fraction),
    }


def mean_distances(features, labels, n_classes: int) -> dict[str, np.ndarray]:
    """Distances (C, C) between the classes' mean features (N, d): cosine about the mean of the classes, Euclidean, and
    Mahalanobis by the pooled covariance within classes.
    """
    features, labels = np.asarray(features, np.float64), np.asarray(labels)
    means = np.stack([features[labels == c].mean(axis=0) for c in range(n_classes)])
    left = features - means[labels]
    covariance = left.T @ left / max(len(left) - n_classes, 1)
    values, vectors = np.linalg.eigh(covariance)
    kept = values > 1e-8 * values.max()
    white = means @ vectors[:, kept] / np.sqrt(values[kept])
    apart = {
        name: np.sqrt(((x[:, None] - x[None]) ** 2).sum(axis=2))
        for name, x in (("Euclidean", means), ("Mahalanobis", white))
    }
    return {"cosine": cosine_distance(means - means.mean(axis=0))} | apart


def split_distance(members) -> np.ndarray:
    """(C, C): 1 for a pair of which one class is a member (C,) and the other is not, else 0."""
    members = np.asarray(members, bool)
    return (members[:, None] != members[None]) * 1.0


def agreement(path, distances: Mapping[tuple[str, str], np.ndarray], given: str, split, n: int = 999, seed: int = 0):
    """Mantel's tests of a path distance (C, C) against several, (of, distance) -> (C, C).

    The partial tests "beyond" hold fixed all distances of ``given`` together and ``split``, which knows no more than
    one division of the classes (:func:`split_distance`). Columns: of, distance, method, classes, permutations, r, lo,
    hi, p; split_r: the split's own r; within...: the partial test given the split; beyond...: given the split and what
    else is held fixed (NaN for the latter); over, gain, gain_lo, gain_hi: how much larger the partial r given the split
    is than that of the best of the fixed ones.
    """
    rows = []
    for method in METHODS:
        tree, of = Pairs(path, method), {key: Pairs(matrix, method) for key, matrix in distances.items()}
        halves, draws = Pairs(split, method), tree.permuted(n, seed)
        fixed = {key: pairs for key, pairs in of.items() if key[0] == given}
        best = max(fixed, key=lambda key: correlations(tree.whole, fixed[key].whole, [halves.whole]))
        for key, pairs in of.items():
            row = {"of": key[0], "distance": key[1], "method": method, "classes": len(path), "permutations": n}
            row |= mantel(tree, pairs, draws=draws) | {"split_r": float(tree.whole @ halves.whole)}
            row |= _named("within", mantel(tree, pairs, [halves], draws=draws))
            if key not in fixed:
                row |= _named("beyond", mantel(tree, pairs, [halves, *fixed.values()], draws=draws))
                more = gain(tree, pairs, fixed[best], [halves])
                row |= {"over": best[1], "gain": more["value"], "gain_lo": more["lo"], "gain_hi": more["hi"]}
            rows.append(row)
    return pd.DataFrame(rows)


def _named(name: str, found: Mapping) -> dict:
    return {name: found["r"], **{f"{name}_{key}": found[key] for key in ("lo", "hi", "p")}}


def inside(path, distances: Mapping[tuple[str, str], np.ndarray], families: Mapping[str, np.ndarray], method, n=999):
    """Mantel's tests among the classes of one family at a time, families name -> (C,) bool.

    Columns: family, classes, of, distance, method, permutations, r, lo, hi, p.
    """
    rows = []
    for family, members in families.items():
        part = np.ix_(members, members)
        tree = Pairs(np.asarray(path)[part], method)
        draws = tree.permuted(n)
        for (of, distance), matrix in distances.items():
            row = {"family": family, "classes": int(members.sum()), "of": of, "distance": distance, "method": method}
            rows.append(row | {"permutations": n} | mantel(tree, Pairs(matrix[part], method), draws=draws))
    return pd.DataFrame(rows)


def gains(path, distances: Mapping[tuple[str, str], np.ndarray], of: str, other: str) -> pd.DataFrame:
    """How much better a dictionary's distances agree with the path than the same ones of another.

    Columns: distance, method, value, lo, hi.
    """
    rows = []
    for method in METHODS:
        tree = Pairs(path, method)
        for one, distance in distances:
            if one == of and (other, distance) in distances:
                pair = (Pairs(distances[name, distance], method) for name in (of, other))
                rows.append({"distance": distance, "method": method} | gain(tree, *pair))
    return pd.DataFrame(rows)
