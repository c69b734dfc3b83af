"""Matching pursuit on a CPU (numba): the choice through the Gram matrix, the values and gradients through residuals.

Import this lazily: it needs numba. Rows are independent of each other, so all kernels take a block of them and free the
interpreter lock. The Gram matrix has a multiple of 32 columns.
"""

from __future__ import annotations

import numpy as np

from .cpu_products import dot
from .cpu_topk import compile_kernel
from .cpu_vectors import WIDTH, add_product, load, prefetch, splat, store, where_larger

TOGETHER = 4  # rows in turn: while one is worked on, the next ones' part of the Gram matrix is on its way


@compile_kernel
def _update(row, factor, own, tops, places):
    """row += factor * own, and where its largest number is now: one pass. Of equal ones the first."""
    h = len(row) // 2
    f = splat(factor)
    top0 = splat(np.float32(-np.inf))
    top1 = top0
    place0 = splat(np.float32(0))
    place1 = place0
    for j in range(0, h, WIDTH):
        a = add_product(load(row, j), f, load(own, j))
        b = add_product(load(row, h + j), f, load(own, h + j))
        store(row, j, a)
        store(row, h + j, b)
        now = splat(np.float32(j))
        place0, place1 = where_larger(a, top0, now, place0), where_larger(b, top1, now, place1)
        top0, top1 = where_larger(a, top0, a, top0), where_larger(b, top1, b, top1)
    store(tops, 0, top0)
    store(tops, WIDTH, top1)
    store(places, 0, place0)
    store(places, WIDTH, place1)
    largest = tops[0]
    for place in range(1, 2 * WIDTH):
        largest = max(largest, tops[place])
    best = 2 * h
    for place in range(2 * WIDTH):
        if tops[place] == largest:
            half = 0 if place < WIDTH else h - WIDTH
            best = min(best, int(places[place]) + half + place)
    return best


@compile_kernel
def choose_rows(z, gram, least, indices, values):
    """The steps of some rows: indices and values (n, k) in order of choice, what they hold stays after the end.

    z (n, 2 h) float32, the products at the start, is overwritten; gram (2 h, 2 h); a row ends
    where none is over least[r].
    """
    n, k = indices.shape
    tops, places = np.empty(2 * WIDTH, np.float32), np.empty(2 * WIDTH, np.float32)
    best = np.zeros(TOGETHER, np.int64)
    for start in range(0, n, TOGETHER):
        some = min(TOGETHER, n - start)
        for q in range(some):
            best[q] = _update(z[start + q], np.float32(0), gram[0], tops, places)
        for j in range(k):
            for q in range(some):
                r = start + q
                if best[q] < 0:
                    continue
                i = best[q]
                value = z[r, i]
                if not value > least[r]:
                    best[q] = -1
                    continue
                indices[r, j], values[r, j] = i, value
                if j + 1 < k:
                    best[q] = _update(z[r], -value, gram[i], tops, places)
                    for c in range(0, gram.shape[1], WIDTH):
                        prefetch(gram[best[q]], c)


@compile_kernel
def _add(to, factor, row):
    f = splat(factor)
    for j in range(0, len(to), WIDTH):
        store(to, j, add_product(load(to, j), f, load(row, j)))


@compile_kernel
def unroll_rows(x, atoms, indices, active, values):
    """x becomes what is left: for each active j, values = w.x, x -= values w. x (n, .), atoms (M, .) padded to 16."""
    n, k = indices.shape
    for r in range(n):
        row = x[r]
        for j in range(k):
            if active[r, j]:
                own = atoms[indices[r, j]]
                values[r, j] = dot(row, own)
                _add(row, -values[r, j], own)


@compile_kernel
def gradient_rows(left, atoms, indices, active, values, to_atoms, to_x):
    """The gradient of the summed |left|^2 with respect to atoms and x; see `pursuit.Left` for the formula.

    left (n, .) is what `unroll_rows` left, and becomes x again; to_atoms (M, .) is added to, to_x (n, .) is set.
    """
    n, k = indices.shape
    for r in range(n):
        row, g = left[r], to_x[r]
        for c in range(len(row)):
            g[c] = 2 * row[c]
        for j in range(k - 1, -1, -1):
            if active[r, j]:
                i = indices[r, j]
                own, to = atoms[i], to_atoms[i]
                a, b = values[r, j], dot(g, own)
                _add(row, a, own)
                fa, fb = splat(-a), splat(-b)
                for c in range(0, len(row), WIDTH):
                    of_g = load(g, c)
                    store(to, c, add_product(add_product(load(to, c), fa, of_g), fb, load(row, c)))
                    store(g, c, add_product(of_g, fb, load(own, c)))
