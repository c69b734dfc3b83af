"""Compiled CPU kernels (numba) of a training step: decoding, sorting by latent, and the update of each latent.

Import this lazily: it needs numba. Kernels work on blocks of ROWS rows or of LATENTS latents and free the interpreter,
so `cpu_step.CompiledStep` runs them in as many threads as it likes; what is added up, and in which order, depends
neither on the number of threads nor on the CPU. Rows that are gathered ("stored") come in one of the forms of
`cpu_vectors`; there are `padded(d)` columns of them. The GPU's kernels (Triton) are in `triton.py`.
"""

from __future__ import annotations

import numpy as np

from .cpu_products import add_columns, biases, dot, encode_rows, fill_panels, panels_of, row_moments, weigh_rows
from .cpu_topk import compile_kernel, keys_and_bits, topk_rows
from .cpu_vectors import WIDTH, add_product, high, load, low, padded, prefetch, put, splat, store, total, widened

# ruff: noqa: F401 (all kernels, in one module)

ROWS, LATENTS = 256, 64  # of a block: sums of blocks are added up in their order
AHEAD = 4  # pairs whose rows are asked for before they are needed: they lie at random places


@compile_kernel
def _pack_row(row, d, stored):
    """Write row (a buffer with zeros from d on) in stored form."""
    h = len(row) // 2
    for j in range(0, h, WIDTH):
        put(stored, j, h, load(row, j), load(row, h + j))


@compile_kernel
def pack_rows(rows, stored):
    """rows (n, d) float32 in stored form."""
    n, d = rows.shape
    buffer = np.zeros(-(-d // (2 * WIDTH)) * 2 * WIDTH, np.float32)
    for r in range(n):
        buffer[:d] = rows[r]
        _pack_row(buffer, d, stored[r])


@compile_kernel
def centre_rows(x, bias, stored):
    """x - b of rows x (n, d), in stored form."""
    n, d = x.shape
    buffer = np.zeros(-(-d // (2 * WIDTH)) * 2 * WIDTH, np.float32)
    for r in range(n):
        for j in range(d):
            buffer[j] = x[r, j] - bias[j]
        _pack_row(buffer, d, stored[r])


@compile_kernel
def _add_rows(to, a0, a1, a2, a3, row0, row1, row2, row3):
    """to += sum of four stored rows times their numbers."""
    h = len(to) // 2
    s0, s1, s2, s3 = splat(a0), splat(a1), splat(a2), splat(a3)
    for j in range(0, h, WIDTH):
        lower, upper = load(to, j), load(to, h + j)
        lower, upper = add_product(lower, s0, low(row0, j, h)), add_product(upper, s0, high(row0, j, h))
        lower, upper = add_product(lower, s1, low(row1, j, h)), add_product(upper, s1, high(row1, j, h))
        lower, upper = add_product(lower, s2, low(row2, j, h)), add_product(upper, s2, high(row2, j, h))
        lower, upper = add_product(lower, s3, low(row3, j, h)), add_product(upper, s3, high(row3, j, h))
        store(to, j, lower)
        store(to, h + j, upper)


@compile_kernel
def _add_rows_and_dot(to, with_row, a0, a1, a2, a3, row0, row1, row2, row3):
    """The same, and the scalar product of each row with `with_row`: each row is read once for both."""
    h = len(to) // 2
    s0, s1, s2, s3 = splat(a0), splat(a1), splat(a2), splat(a3)
    d0 = splat(np.float32(0))
    d1, d2, d3 = d0, d0, d0
    for j in range(0, h, WIDTH):
        lower, upper, w_lower, w_upper = load(to, j), load(to, h + j), load(with_row, j), load(with_row, h + j)
        g_lower, g_upper = low(row0, j, h), high(row0, j, h)
        d0 = add_product(add_product(d0, g_lower, w_lower), g_upper, w_upper)
        lower, upper = add_product(lower, s0, g_lower), add_product(upper, s0, g_upper)
        g_lower, g_upper = low(row1, j, h), high(row1, j, h)
        d1 = add_product(add_product(d1, g_lower, w_lower), g_upper, w_upper)
        lower, upper = add_product(lower, s1, g_lower), add_product(upper, s1, g_upper)
        g_lower, g_upper = low(row2, j, h), high(row2, j, h)
        d2 = add_product(add_product(d2, g_lower, w_lower), g_upper, w_upper)
        lower, upper = add_product(lower, s2, g_lower), add_product(upper, s2, g_upper)
        g_lower, g_upper = low(row3, j, h), high(row3, j, h)
        d3 = add_product(add_product(d3, g_lower, w_lower), g_upper, w_upper)
        lower, upper = add_product(lower, s3, g_lower), add_product(upper, s3, g_upper)
        store(to, j, lower)
        store(to, h + j, upper)
    return total(d0), total(d1), total(d2), total(d3)


@compile_kernel
def decode_rows(x, bias, values, indices, decoder, scale, gradient, bias_gradient, fired):
    """The gradient of x_hat for some rows; returns the summed |x_hat - x|^2.

    x (n, d) float32; values and indices (n, k); decoder (M, .) stored; gradient (n, .), stored, is set to
    scale (x_hat - x), and its sum is added to bias_gradient (d,). fired (M,) is set to how often each latent did.
    """
    n, k = indices.shape
    d = x.shape[1]
    flat = indices.ravel()
    residual = np.zeros(-(-d // (2 * WIDTH)) * 2 * WIDTH, np.float32)
    squared_error, zero = 0.0, np.float32(0)
    fired[:] = 0
    for r in range(n):
        for j in range(d):
            residual[j] = bias[j] - x[r, j]
        whole = k - k % 4
        for s in range(0, whole, 4):
            a0, a1, a2, a3 = values[r, s], values[r, s + 1], values[r, s + 2], values[r, s + 3]
            if a0 == 0 and a1 == 0 and a2 == 0 and a3 == 0:
                continue
            i0, i1, i2, i3 = indices[r, s], indices[r, s + 1], indices[r, s + 2], indices[r, s + 3]
            p = r * k + s + AHEAD
            for q in range(p, min(p + 4, n * k)):
                for j in range(0, decoder.shape[1], WIDTH):
                    prefetch(decoder[flat[q]], j)
            _add_rows(residual, a0, a1, a2, a3, decoder[i0], decoder[i1], decoder[i2], decoder[i3])
        for s in range(whole, k):
            row = decoder[indices[r, s]]
            _add_rows(residual, values[r, s], zero, zero, zero, row, row, row, row)
        for s in range(k):
            fired[indices[r, s]] += values[r, s] > 0
        squared_error += dot(residual, residual)
        for j in range(d):
            residual[j] *= scale
            bias_gradient[j] += residual[j]
        _pack_row(residual, d, gradient[r])
    return squared_error


@compile_kernel
def forward_rows(
    begin, end, x, pre_bias, panels, bias, decoder, scale,
    values, indices, centred, gradient, bias_gradient, fired, error,
):  # fmt: skip
    """Code, decode and the gradient of x_hat for the blocks begin..end of rows; error (blocks,): squared."""
    for b in range(begin, end):
        part = slice(b * ROWS, (b + 1) * ROWS)
        centre_rows(x[part], pre_bias, centred[part])
        encode_rows(centred[part], panels, bias, values[part], indices[part])
        error[b] = decode_rows(
            x[part], pre_bias, values[part], indices[part], decoder, scale, gradient[part], bias_gradient[b], fired[b]
        )


@compile_kernel
def weighted_rows(values, indices, rows, out):
    """out (n, d) = sum_i values_i rows_i, in the order of the slots."""
    n, k = indices.shape
    for r in range(n):
        own = out[r]
        own[:] = 0
        for s in range(k):
            value, row = values[r, s], rows[indices[r, s]]
            if value != 0:
                for j in range(len(own)):
                    own[j] += value * row[j]


@compile_kernel
def first_pairs(fired, first):
    """Where the pairs of each latent begin: first[i]:first[i + 1] are those of i, block after block of rows.

    fired (blocks, M) counts what each block of rows has; it is set to where the block's own begin.
    """
    blocks, m = fired.shape
    counts = np.zeros(m, np.int32)
    for b in range(blocks):
        for i in range(m):
            count = fired[b, i]
            fired[b, i] = counts[i]
            counts[i] += count
    first[0] = 0
    for i in range(m):
        first[i + 1] = first[i] + counts[i]
    for b in range(blocks):
        for i in range(m):
            fired[b, i] += first[i]


@compile_kernel
def scatter_pairs(begin, values, indices, place, pairs):
    """Bring a block's active (row, value) pairs to their latents' places; `begin` is the number of its first row.

    values, indices (n, k) of the block; place (M,) from `first_pairs`; pairs (., 2) int32: the row, the value's bits.
    Within a latent the rows ascend.
    """
    n, k = indices.shape
    bits = values.view(np.int32)
    for r in range(n):
        for s in range(k):
            if bits[r, s] > 0:
                i = indices[r, s]
                p = place[i]
                place[i] = p + 1
                pairs[p, 0] = begin + r
                pairs[p, 1] = bits[r, s]


@compile_kernel
def adam_row(p, m, v, g, lr, rescale, eps):
    """Adam for one row, in place: lr / (1 - beta1^t) and rescale = (1 - beta2^t)^-1/2 correct the moments' start."""
    for j in range(len(p)):
        mean = m[j] + np.float32(0.1) * (g[j] - m[j])
        square = v[j] + np.float32(0.001) * (g[j] * g[j] - v[j])
        m[j], v[j] = mean, square
        p[j] -= lr * mean / (np.sqrt(square) * rescale + eps)


@compile_kernel
def average_rows(mean, rows, share, unit):
    """mean (n, d) += share (rows - mean); with `unit`, back to unit length."""
    n, d = mean.shape
    row = np.zeros(-(-d // WIDTH) * WIDTH, np.float32)
    for r in range(n):
        for j in range(d):
            mean[r, j] += share * (rows[r, j] - mean[r, j])
        if unit:
            row[:d] = mean[r]
            length = np.float32(1) / max(np.sqrt(dot(row, row)), np.float32(1e-12))
            for j in range(d):
                mean[r, j] *= length


@compile_kernel
def _add_gradients(begin, end, last, pairs, centred, gradient, decoder_row, ge, gd):
    """Add what the pairs begin..end give to the gradients of one latent's rows; returns that of its bias.

    Pairs up to `last` belong to the next latents: their rows are asked for ahead.
    """
    numbers, gb, zero = pairs.view(np.float32), np.float32(0), np.float32(0)
    p = begin
    while p < end:
        some = min(end - p, 4)  # four at a time; fewer are filled up with a weight of 0
        for q in range(p + AHEAD, min(p + AHEAD + 4, last)):
            ahead = pairs[q, 0]
            for j in range(0, gradient.shape[1], WIDTH):
                prefetch(gradient[ahead], j)
                prefetch(centred[ahead], j)
        p1, p2, p3 = p + min(1, some - 1), p + min(2, some - 1), p + min(3, some - 1)
        r0, r1, r2, r3 = pairs[p, 0], pairs[p1, 0], pairs[p2, 0], pairs[p3, 0]
        a0 = numbers[p, 1]
        a1 = numbers[p1, 1] if some > 1 else zero
        a2 = numbers[p2, 1] if some > 2 else zero
        a3 = numbers[p3, 1] if some > 3 else zero
        b0, b1, b2, b3 = _add_rows_and_dot(
            gd, decoder_row, a0, a1, a2, a3, gradient[r0], gradient[r1], gradient[r2], gradient[r3]
        )
        b1, b2, b3 = b1 if some > 1 else zero, b2 if some > 2 else zero, b3 if some > 3 else zero
        _add_rows(ge, b0, b1, b2, b3, centred[r0], centred[r1], centred[r2], centred[r3])
        gb += (b0 + b1) + (b2 + b3)
        p += some
    return gb


@compile_kernel
def update_latents(
    first_block, last_block, first, pairs, centred, gradient, dead_slot, aux_first, aux_pairs, aux_gradient,
    encoder, encoder_m, encoder_v, decoder, decoder_m, decoder_v, bias, bias_m, bias_v,
    stored_encoder, stored_decoder, idle, through_bias, lr, rescale, eps,
):  # fmt: skip
    """Everything that happens to the latents of some blocks: both rows' gradients, projection, Adam, unit length.

    centred = x - b and gradient = dL/dx_hat are (n, .) stored; the value gradient of a pair is gradient . w_i. The
    gradients stay in two rows of cache. dead_slot[i] >= 0 is the place of latent i among those of AuxK, whose pairs and
    gradient are added. The new weights go to stored_decoder, and to stored_encoder: rows, or panels (3-d).
    through_bias[block] (d,) gets sum_i dL/dc_i W_i, what reaches the pre-bias by way of the encoder.
    """
    m, d = encoder.shape
    width = -(-d // (2 * WIDTH)) * 2 * WIDTH
    ge, gd, row = np.zeros(width, np.float32), np.zeros(width, np.float32), np.zeros(width, np.float32)
    gb1 = np.empty(1, np.float32)
    for block in range(first_block, last_block):
        begin, end, through = block * LATENTS, min((block + 1) * LATENTS, m), through_bias[block]
        through[:] = 0
        for i in range(begin, end):
            idle[i] = 0 if first[i + 1] > first[i] else idle[i] + 1
            ge[:] = 0
            gd[:] = 0
            row[:d] = decoder[i]
            gb = _add_gradients(first[i], first[i + 1], first[end], pairs, centred, gradient, row, ge, gd)
            we, wd = encoder[i], decoder[i]
            for j in range(d):
                through[j] += gb * we[j]
            if dead_slot[i] >= 0:  # AuxK, which does not reach the pre-bias
                p, stop = aux_first[dead_slot[i]], aux_first[dead_slot[i] + 1]
                gb += _add_gradients(p, stop, stop, aux_pairs, centred, aux_gradient, row, ge, gd)
            along = dot(gd, row)
            for j in range(d):
                gd[j] -= along * wd[j]
            gb1[0] = gb
            adam_row(bias[i : i + 1], bias_m[i : i + 1], bias_v[i : i + 1], gb1, lr, rescale, eps)
            adam_row(we, encoder_m[i], encoder_v[i], ge, lr, rescale, eps)
            adam_row(wd, decoder_m[i], decoder_v[i], gd, lr, rescale, eps)
            row[:d] = wd
            length = np.float32(1) / max(np.sqrt(dot(row, row)), np.float32(1e-12))
            for j in range(d):
                wd[j] *= length
            row[:d] = wd
            _pack_row(row, d, stored_decoder[i])
            if stored_encoder.ndim == 2:
                row[:d] = we
                _pack_row(row, d, stored_encoder[i])
        if stored_encoder.ndim == 3:
            fill_panels(begin, end, encoder, stored_encoder)
