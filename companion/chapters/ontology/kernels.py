"""Compiled loop of the ontology analysis (numba): every unit, every threshold and every synset in one walk.

Import lazily, it needs numba; the tests hold it against the plain definition.
"""

from __future__ import annotations

import numpy as np
from numba import njit


@njit(nogil=True, cache=True, error_model="numpy")
def best_prefixes(order, bonus, members):
    """The best F1 of "the first j classes of a unit's order are the members", and that j less 1.

    Parameters
    ----------
    order : (U, C) int64, each unit's classes, most active first
    bonus : (U, C - 1) float64, added to the F1 of a prefix, to settle ties; below 0: the prefix is no candidate
    members : (C, S) float64 of 0 and 1

    Returns
    -------
    (U, S) float64, best F1 + bonus (-1 where a unit has no candidate); (U, S) int64, its place
    """
    n_units, n_classes = order.shape
    n_synsets = members.shape[1]
    sizes = members.sum(0)
    best, place = np.full((n_units, n_synsets), -1.0), np.zeros((n_units, n_synsets), np.int64)
    hits, found = np.empty(n_synsets), np.empty(n_synsets)
    for u in range(n_units):
        hits[:] = 0.0
        for j in range(n_classes - 1):
            row = members[order[u, j]]
            extra, length = bonus[u, j], j + 1.0
            for s in range(n_synsets):
                hits[s] += row[s]
            if extra < 0:
                continue
            for s in range(n_synsets):
                found[s] = 2 * hits[s] / (length + sizes[s]) + extra
            for s in range(n_synsets):
                if found[s] > best[u, s]:
                    best[u, s] = found[s]
                    place[u, s] = j
    return best, place
