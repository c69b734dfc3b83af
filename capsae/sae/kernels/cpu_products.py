"""Products and sums in one fixed order (numba), the same bits on every CPU with fused multiply-add.

z = x W^T + c: each element is one chain of fused multiply-adds that starts from c, columns ascending. W lies in
"panels" of 32 latents, side by side for each column, so that a vector register works on 16 (or 8, or 4) chains at once:
its width changes nothing. Codes are selected while the pre-activations of some rows are in cache. Import this lazily.
"""

from __future__ import annotations

import numpy as np

from .cpu_topk import compile_kernel, topk_rows
from .cpu_vectors import WIDTH, add_product, load, splat, store, store_upper, total

PANEL = 2 * WIDTH
COLUMNS = 192  # of a panel at a time: they stay in the nearest cache
TILE = 32  # rows whose pre-activations exist at a time


@compile_kernel
def fill_panels(begin, end, rows, panels):
    """Copy rows begin..end of (M, d) to panels (ceil(M / 32), d, 32); `begin` is a multiple of 32."""
    d = rows.shape[1]
    for start in range(begin, end, PANEL):
        panel, some = panels[start // PANEL], min(PANEL, end - start)
        for j in range(some):
            row = rows[start + j]
            for c in range(d):
                panel[c, j] = row[c]


@compile_kernel
def products(x, panels, bias, z, keys):
    """z (n, 32 p) = x W^T + c of rows x (n, >= d), and the upper halves of its bits as keys (int16).

    n is a multiple of 4: fill x up. bias (32 p,); that of places without a latent is -infinity.
    """
    d, n = panels.shape[1], len(x)
    for p in range(len(panels)):
        w, c = panels[p].ravel(), PANEL * p
        for k0 in range(0, d, COLUMNS):
            k1 = min(k0 + COLUMNS, d)
            for r in range(0, n, 4):
                x0, x1, x2, x3 = x[r], x[r + 1], x[r + 2], x[r + 3]
                z0, z1, z2, z3 = z[r], z[r + 1], z[r + 2], z[r + 3]
                if k0 == 0:
                    a0, b0 = load(bias, c), load(bias, c + WIDTH)
                    a1, b1, a2, b2, a3, b3 = a0, b0, a0, b0, a0, b0
                else:
                    a0, b0, a1, b1 = load(z0, c), load(z0, c + WIDTH), load(z1, c), load(z1, c + WIDTH)
                    a2, b2, a3, b3 = load(z2, c), load(z2, c + WIDTH), load(z3, c), load(z3, c + WIDTH)
                for k in range(k0, k1):
                    u, v = load(w, PANEL * k), load(w, PANEL * k + WIDTH)
                    s = splat(x0[k])
                    a0, b0 = add_product(a0, s, u), add_product(b0, s, v)
                    s = splat(x1[k])
                    a1, b1 = add_product(a1, s, u), add_product(b1, s, v)
                    s = splat(x2[k])
                    a2, b2 = add_product(a2, s, u), add_product(b2, s, v)
                    s = splat(x3[k])
                    a3, b3 = add_product(a3, s, u), add_product(b3, s, v)
                store(z0, c, a0)
                store(z0, c + WIDTH, b0)
                store(z1, c, a1)
                store(z1, c + WIDTH, b1)
                store(z2, c, a2)
                store(z2, c + WIDTH, b2)
                store(z3, c, a3)
                store(z3, c + WIDTH, b3)
                if k1 == d:
                    store_upper(keys[r], c, a0)
                    store_upper(keys[r], c + WIDTH, b0)
                    store_upper(keys[r + 1], c, a1)
                    store_upper(keys[r + 1], c + WIDTH, b1)
                    store_upper(keys[r + 2], c, a2)
                    store_upper(keys[r + 2], c + WIDTH, b2)
                    store_upper(keys[r + 3], c, a3)
                    store_upper(keys[r + 3], c + WIDTH, b3)


@compile_kernel
def encode_rows(x, panels, bias, values, indices):
    """The k largest positive pre-activations of centred rows x (n, >= d), as `topk_rows` writes them."""
    n, m = len(x), len(bias)
    z, keys = np.empty((TILE, m), np.float32), np.empty((TILE, m), np.int16)
    bits, value_bits, rest = z.view(np.int32), values.view(np.int32), np.zeros((4, x.shape[1]), np.float32)
    for start in range(0, n, TILE):
        stop = min(start + TILE, n)
        whole = start + (stop - start) // 4 * 4
        products(x[start:whole], panels, bias, z[: whole - start], keys[: whole - start])
        if whole < stop:
            rest[: stop - whole] = x[whole:stop]
            at = whole - start
            products(rest, panels, bias, z[at : at + 4], keys[at : at + 4])
        some = stop - start
        topk_rows(keys[:some], bits[:some], value_bits[start:stop], indices[start:stop])


@compile_kernel
def dot(a, b):
    """Scalar product of rows whose length is a multiple of 16."""
    s = splat(np.float32(0))
    for j in range(0, len(a), WIDTH):
        s = add_product(s, load(a, j), load(b, j))
    return total(s)


@compile_kernel
def add_columns(x, sums):
    """sums (d,) += the rows of x (n, d), one after the other."""
    for r in range(len(x)):
        row = x[r]
        for c in range(len(sums)):
            sums[c] += row[c]


@compile_kernel
def row_moments(x, about_mean, shift, scale):
    """Mean and std of each row of x (n, d); without `about_mean`, 0 and its length. Sums in float64, in order."""
    n, d = x.shape
    for r in range(n):
        mean, squares = 0.0, 0.0
        if about_mean:
            for c in range(d):
                mean += x[r, c]
            mean /= d
        for c in range(d):
            off = x[r, c] - mean
            squares += off * off
        shift[r] = mean
        scale[r] = np.sqrt(squares / d if about_mean else squares)


@compile_kernel
def weigh_rows(x, point, sums):
    """For Weiszfeld's iteration: sums (d,) = the rows of x (n, d) over their distances; returns sum 1 / those."""
    d, weights = x.shape[1], 0.0
    off = np.zeros(-(-d // WIDTH) * WIDTH, np.float32)
    sums[:] = 0
    for r in range(len(x)):
        row = x[r]
        for c in range(d):
            off[c] = row[c] - point[c]
        weight = 1 / max(np.sqrt(np.float64(dot(off, off))), 1e-8)
        weights += weight
        for c in range(d):
            sums[c] += weight * row[c]
    return weights


def panels_of(rows: np.ndarray) -> np.ndarray:
    """Rows (n, d) as `products` multiplies them; places without one are 0."""
    panels = np.zeros((-(-len(rows) // PANEL), rows.shape[1], PANEL), np.float32)
    fill_panels(0, len(rows), rows, panels)
    return panels


def biases(bias: np.ndarray) -> np.ndarray:
    """The biases (n,) of the places in panels: -infinity where there is no row, which is never selected."""
    padded = np.full(-(-len(bias) // PANEL) * PANEL, -np.inf, np.float32)
    padded[: len(bias)] = bias
    return padded
