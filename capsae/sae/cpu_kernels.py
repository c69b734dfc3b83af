"""Compiled CPU kernels (numba): selection, decoding with the value gradient, and the update of each latent.

Import this lazily: it needs numba. Each kernel works on a range of rows or latents and frees the interpreter lock, so
`cpu_step.CompiledStep` runs them in as many threads as it likes; what is added up for a latent, and in which order,
does not depend on the number of threads. The GPU's kernels (Triton) are in `kernels.py`.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit

# Sums may be reordered, and x / 0 is infinity, not an exception: without both, no loop uses vector registers. NaN and
# infinity keep their meaning.
_compiled = njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz"})

BLOCK = 32  # columns that are looked at together when the chosen ones are collected


def keys_and_bits(z: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """z (n, M) as 16-bit keys, and as the integers that settle ties between equal keys.

    Positive floating-point numbers order as their bits do, and negative ones are negative integers: a bfloat16 tensor
    is its own key array, and the upper half of a float32 is its key.
    """
    if z.dtype == torch.bfloat16:
        keys = z.view(torch.int16).numpy()
        return keys, keys
    bits = z.contiguous().view(torch.int32)
    return (bits >> 16).to(torch.int16).numpy(), bits.numpy()


@_compiled
def _count(keys, least):
    """How many keys are at least `least`. The counters have 16 bits: 32 of them fill a register."""
    total = 0
    for start in range(0, len(keys), 16384):
        part = keys[start : start + 16384]  # a slice, whose indices the compiler knows to be in range
        some = np.int16(0)
        for j in range(len(part)):
            some = np.int16(some + np.int16(part[j] >= least))
        total += some
    return total


@_compiled
def _largest(keys):
    """The largest key, at least 0."""
    top = np.int16(0)
    for j in range(len(keys)):
        top = max(top, keys[j])
    return top


@_compiled
def _kth_key(keys, k):
    """The largest key that at least k keys reach, or 1 where fewer than k are positive: bisection over 15 bits."""
    low, high = 1, _largest(keys) + 1  # fewer than k keys reach high
    while high - low > 1:
        middle = (low + high) >> 1
        if _count(keys, np.int16(middle)) >= k:
            low = middle
        else:
            high = middle
    return np.int16(low)


@_compiled
def topk_rows(keys, bits, value_bits, indices):
    """Write the k largest positive entries of each row, unordered: exact, of equal ones the lower column.

    keys (n, M) int16 and bits (n, M) come from `keys_and_bits`; value_bits (n, k) int32 is the float32 result seen as
    integers; indices (n, k) int32. Where fewer than k entries are positive, value 0 goes to further, distinct columns.
    """
    n, k = indices.shape
    m = keys.shape[1]
    shift = 32 - 8 * bits.itemsize  # of an entry's bits, to its float32
    candidates = np.empty(m + 1, np.int32)
    for r in range(n):
        row = keys[r]
        least = _kth_key(row, k)
        reached = 0
        for start in range(0, m, BLOCK):
            block = row[start : start + BLOCK]
            if _largest(block) >= least:
                for j in range(len(block)):
                    candidates[reached] = start + j
                    reached += block[j] >= least
        found, ties = 0, 0
        for c in range(reached):
            j = candidates[c]
            if reached <= k or row[j] > least:
                value_bits[r, found] = np.int32(bits[r, j]) << shift
                indices[r, found] = j
                found += 1
            else:  # the k-th key: more of them than there are places left
                candidates[ties] = j
                ties += 1
        if found < k and ties > 0:
            for slot in range(found, k):
                best = 0
                while candidates[best] < 0:
                    best += 1
                if shift == 0:  # equal keys, but the numbers have 16 more bits
                    for c in range(best + 1, ties):
                        if candidates[c] >= 0 and bits[r, candidates[c]] > bits[r, candidates[best]]:
                            best = c
                value_bits[r, slot] = np.int32(bits[r, candidates[best]]) << shift
                indices[r, slot] = candidates[best]
                candidates[best] = -1
            found = k
        j = 0
        while found < k:  # fewer than k are positive
            if row[j] < least:
                value_bits[r, found] = 0
                indices[r, found] = j
                found += 1
            j += 1


@_compiled
def decode_rows(centred, values, indices, decoder, scale, gradient, value_gradient):
    """x_hat - x, its gradient, and the gradient of the values; returns the summed |x_hat - x|^2.

    centred (n, d) = x - b, so that x_hat - x = sum_i a_i w_i - centred. gradient (n, d) = scale (x_hat - x);
    value_gradient (n, k), 0 in unused slots.
    """
    n, k = indices.shape
    d = decoder.shape[1]
    total = 0.0
    for r in range(n):
        g = gradient[r]
        for j in range(d):
            g[j] = -centred[r, j]
        for s in range(0, k - k % 2, 2):
            a0, a1, w0, w1 = values[r, s], values[r, s + 1], decoder[indices[r, s]], decoder[indices[r, s + 1]]
            for j in range(d):
                g[j] += a0 * w0[j] + a1 * w1[j]
        if k % 2:
            a0, w0 = values[r, k - 1], decoder[indices[r, k - 1]]
            for j in range(d):
                g[j] += a0 * w0[j]
        squared = np.float32(0)
        for j in range(d):
            squared += g[j] * g[j]
            g[j] *= scale
        total += squared
        for s in range(k):
            w0 = decoder[indices[r, s]]
            dot = np.float32(0)
            for j in range(d):
                dot += g[j] * w0[j]
            value_gradient[r, s] = dot if values[r, s] > 0 else np.float32(0)
    return total


@_compiled
def sort_pairs(values, value_gradient, indices, first, pair_row, pair_value, pair_gradient):
    """Bring the active (row, latent) pairs into the order of the latents: first[i]:first[i + 1] are those of i.

    A counting sort: within a latent the rows ascend.
    """
    n, k = indices.shape
    first[:] = 0
    for r in range(n):
        for s in range(k):
            first[indices[r, s] + 1] += values[r, s] > 0
    for i in range(1, len(first)):
        first[i] += first[i - 1]
    place = first[:-1].copy()
    for r in range(n):
        for s in range(k):
            if values[r, s] > 0:
                i = indices[r, s]
                p = place[i]
                place[i] = p + 1
                pair_row[p] = r
                pair_value[p] = values[r, s]
                pair_gradient[p] = value_gradient[r, s]


@_compiled
def adam_row(p, m, v, g, lr, rescale, eps):
    """Adam for one row, in place: lr / (1 - beta1^t) and rescale = (1 - beta2^t)^-1/2 correct the moments' start."""
    for j in range(len(p)):
        mean = m[j] + np.float32(0.1) * (g[j] - m[j])
        square = v[j] + np.float32(0.001) * (g[j] * g[j] - v[j])
        m[j], v[j] = mean, square
        p[j] -= lr * mean / (np.sqrt(square) * rescale + eps)


@_compiled
def update_latents(
    begin, end, first, pair_row, pair_value, pair_gradient, centred, gradient,
    dead_slot, dead_encoder, dead_bias, dead_decoder,
    encoder, encoder_m, encoder_v, decoder, decoder_m, decoder_v, bias, bias_m, bias_v,
    idle, through_bias, lr, rescale, eps,
):  # fmt: skip
    """Everything that happens to latents begin..end in a step: both rows' gradients, projection, Adam, unit length.

    The gradients stay in two rows of cache. dead_slot[i] >= 0 names the row of AuxK's gradients for latent i.
    through_bias (d,) gets sum_i dL/dc_i W_i, what reaches the pre-bias by way of the encoder.
    """
    d = encoder.shape[1]
    ge = np.empty(d, np.float32)
    gd = np.empty(d, np.float32)
    gb1 = np.empty(1, np.float32)
    for i in range(begin, end):
        p, stop = first[i], first[i + 1]
        idle[i] = 0 if stop > p else idle[i] + 1
        ge[:] = 0
        gd[:] = 0
        gb = np.float32(0)
        while p + 2 <= stop:  # two rows a turn: half the traffic of ge and gd
            a0, a1, b0, b1 = pair_value[p], pair_value[p + 1], pair_gradient[p], pair_gradient[p + 1]
            x0, x1 = centred[pair_row[p]], centred[pair_row[p + 1]]
            g0, g1 = gradient[pair_row[p]], gradient[pair_row[p + 1]]
            for j in range(d):
                gd[j] += a0 * g0[j] + a1 * g1[j]
                ge[j] += b0 * x0[j] + b1 * x1[j]
            gb += b0 + b1
            p += 2
        if p < stop:
            a0, b0, x0, g0 = pair_value[p], pair_gradient[p], centred[pair_row[p]], gradient[pair_row[p]]
            for j in range(d):
                gd[j] += a0 * g0[j]
                ge[j] += b0 * x0[j]
            gb += b0
        we, wd = encoder[i], decoder[i]
        for j in range(d):
            through_bias[j] += gb * we[j]
        slot = dead_slot[i]
        if slot >= 0:
            gb += dead_bias[slot]
            for j in range(d):
                ge[j] += dead_encoder[slot, j]
                gd[j] += dead_decoder[slot, j]
        along = np.float32(0)
        for j in range(d):
            along += gd[j] * wd[j]
        for j in range(d):
            gd[j] -= along * wd[j]
        gb1[0] = gb
        adam_row(bias[i : i + 1], bias_m[i : i + 1], bias_v[i : i + 1], gb1, lr, rescale, eps)
        adam_row(we, encoder_m[i], encoder_v[i], ge, lr, rescale, eps)
        adam_row(wd, decoder_m[i], decoder_v[i], gd, lr, rescale, eps)
        squared = np.float32(0)
        for j in range(d):
            squared += wd[j] * wd[j]
        length = np.float32(1) / max(np.sqrt(squared), np.float32(1e-12))
        for j in range(d):
            wd[j] *= length
