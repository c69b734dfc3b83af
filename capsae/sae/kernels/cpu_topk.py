"""Exact top-k of rows on a CPU (numba): reads the pre-activations twice, however long the search takes.

The maxima of k to 4 k groups of a row give a lower bound that at least k entries reach. The few entries that reach it
are collected, and a bisection over their bits finds the exact k-th. Import this lazily: it needs numba.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit

from .cpu_vectors import KEYS, lowest_bit, reached

# x / 0 is infinity, not an exception: without that, no loop uses vector registers. No fast-math: the compiler may
# neither reorder sums nor merge operations, so every CPU gets the same bits.
compile_kernel = njit(nogil=True, cache=True, error_model="numpy")

TOP = 32767  # no key is larger


def keys_and_bits(z: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """z (n, M) as 16-bit keys, and as the integers that settle ties between equal keys.

    Positive floating-point numbers order as their bits do, and negative ones are negative integers: a bfloat16 tensor
    is its own key array, and the upper half of a float32 is its key.
    """
    if z.dtype == torch.bfloat16:
        keys = z.contiguous().view(torch.int16).numpy()
        return keys, keys
    bits = z.contiguous().view(torch.int32)
    return (bits >> 16).to(torch.int16).numpy(), bits.numpy()


@compile_kernel
def _count(keys, least):
    """How many keys are at least `least`. The counters have 16 bits: 32 of them fill a register."""
    count = 0
    for start in range(0, len(keys), 16384):
        part = keys[start : start + 16384]  # a slice, whose indices the compiler knows to be in range
        some = np.int16(0)
        for j in range(len(part)):
            some = np.int16(some + np.int16(part[j] >= least))
        count += some
    return count


@compile_kernel
def _kth_key(keys, k, guess):
    """The largest key that at least k keys reach, or 1 where fewer than k are positive; faster from a good guess."""
    step = 8
    if _count(keys, np.int16(guess)) >= k:
        low, high = guess, min(guess + step, TOP)
        while high < TOP and _count(keys, np.int16(high)) >= k:
            step *= 2
            low, high = high, min(high + step, TOP)
    else:
        low, high = max(guess - step, 1), guess
        while low > 1 and _count(keys, np.int16(low)) < k:
            step *= 2
            low, high = max(low - step, 1), low
    while high - low > 1:  # at least k reach low, or it is 1; fewer reach high
        middle = (low + high) >> 1
        if _count(keys, np.int16(middle)) >= k:
            low = middle
        else:
            high = middle
    return low


@compile_kernel
def _group_maxima(row, tops):
    """The largest key of each group: columns that are the same modulo the number of groups."""
    width, m = len(tops), len(row)
    for j in range(width):
        tops[j] = row[j]
    for start in range(width, m, width):
        part = row[start : start + width]
        for j in range(len(part)):
            tops[j] = max(tops[j], part[j])


@compile_kernel
def _collect(row, least, columns, keys):
    """Columns and keys of all entries that reach `least`, in order; returns how many."""
    m, found = len(row), 0
    whole = m - m % KEYS
    for start in range(0, whole, KEYS):
        mask = reached(row, start, least)
        while mask:
            j = start + lowest_bit(mask)
            columns[found] = j
            keys[found] = row[j]
            found += 1
            mask &= mask - np.uint32(1)
    for j in range(whole, m):
        if row[j] >= least:
            columns[found] = j
            keys[found] = row[j]
            found += 1
    return found


@compile_kernel
def topk_rows(keys, bits, value_bits, indices):
    """Write the k largest positive entries of each row, unordered: exact, of equal ones the lower column.

    keys (n, M) int16 and bits (n, M) come from `keys_and_bits`; value_bits (n, k) int32 is the float32 result seen as
    integers; indices (n, k) int32. Where fewer than k entries are positive, value 0 goes to further, distinct columns.
    """
    n, k = indices.shape
    m = keys.shape[1]
    shift = 32 - 8 * bits.itemsize  # of an entry's bits, to its float32
    tops = np.empty(min(m, -(-4 * k // KEYS) * KEYS), np.int16)
    columns, some = np.empty(m + 1, np.int32), np.empty(m + 1, np.int16)
    bound, guess = 1, 1  # those of one row are good guesses for the next
    for r in range(n):
        row = keys[r]
        _group_maxima(row, tops)
        bound = _kth_key(tops, k, bound)
        count = _collect(row, np.int16(bound), columns, some)
        guess = _kth_key(some[:count], k, max(guess, bound)) if count > k else bound
        least = np.int16(guess)
        found, ties = 0, 0
        for c in range(count):
            j = columns[c]
            if count <= k or some[c] > least:
                value_bits[r, found] = np.int32(bits[r, j]) << shift
                indices[r, found] = j
                found += 1
            elif some[c] == least:  # the k-th key: more of them than there are places left, perhaps
                columns[ties] = j
                ties += 1
        if found < k and ties > 0:
            for slot in range(found, k):
                best = 0
                while columns[best] < 0:
                    best += 1
                if shift == 0:  # equal keys, but the numbers have 16 more bits
                    for c in range(best + 1, ties):
                        if columns[c] >= 0 and bits[r, columns[c]] > bits[r, columns[best]]:
                            best = c
                value_bits[r, slot] = np.int32(bits[r, columns[best]]) << shift
                indices[r, slot] = columns[best]
                columns[best] = -1
            found = k
        j = 0
        while found < k:  # fewer than k are positive
            if row[j] < 1:
                value_bits[r, found] = 0
                indices[r, found] = j
                found += 1
            j += 1
