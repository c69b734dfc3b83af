"""The k largest of a row on a GPU, by a Triton kernel: exact, and of equal ones the lower column.

Import this lazily, like :mod:`capsae.sae.kernels.triton`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

SEGMENT = 16_384  # columns that one program of the selection holds in registers


@triton.jit
def _clean(source, column, width):
    """Keys whose order is relu's; -1 outside. A NaN's bits are over infinity's: it is chosen, and the loss shows it."""
    inside = column < width
    key = tl.load(source + column, mask=inside, other=0).to(tl.int32)
    return tl.where(inside, tl.minimum(tl.maximum(key, 0), 0x7FFFFFFE), -1)


@triton.jit
def _topk(
    keys, value_bits, indices, row_stride, width, n_columns,
    K: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """The k largest keys of a segment of a row: bisection over the bits of the k-th largest, then one walk."""
    row, segment = tl.program_id(0).to(tl.int64), tl.program_id(1)
    begin = segment * width
    source = keys + row * row_stride + begin
    width = tl.minimum(width, n_columns - begin)
    key = _clean(source, tl.arange(0, COLUMNS), width)
    high = tl.max(key, axis=0) + 1  # fewer than K keys reach high, at least K reach low
    low = high * 0
    while high - low > 1:
        middle = low + (high - low) // 2
        reached = tl.sum((key >= middle).to(tl.int32), axis=0)
        low = tl.where(reached >= K, middle, low)
        high = tl.where(reached < K, middle, tl.where(reached == K, middle + 1, high))  # exactly K: found
    ties_begin = tl.sum((key > low).to(tl.int32), axis=0)
    seen_above, seen_ties = low * 0, low * 0
    out = (row * tl.num_programs(1) + segment) * K
    for start in range(0, width, TILE):  # the row is in the nearest cache: registers would not hold the places too
        column = start + tl.arange(0, TILE)
        part = _clean(source, column, width)
        above, tied = part > low, part == low
        own = above.to(tl.int32) + (tied.to(tl.int32) << 16)  # one running sum for both counts
        until = tl.cumsum(own, 0)
        before = until - own
        place = tl.where(above, seen_above + (before & 0xFFFF), ties_begin + seen_ties + (before >> 16))
        chosen = (above | tied) & (place < K)
        tl.store(value_bits + out + place, part << SHIFT, mask=chosen)
        tl.store(indices + out + place, begin + column, mask=chosen)
        both = tl.max(until, axis=0)
        seen_above += both & 0xFFFF
        seen_ties += both >> 16


def topk(z: torch.Tensor, k: int, values: torch.Tensor, indices: torch.Tensor) -> None:
    """Write the k largest of relu(z) per row, unordered: exact, of equal ones the lower column.

    z (N, M) bfloat16 or float32, rows contiguous; values (N, k) float32, 0 where fewer than k are positive; indices
    (N, k) int32, distinct within a row.
    """
    n, m = z.shape
    segments = triton.cdiv(m, SEGMENT)
    width = triton.cdiv(m, segments)
    if k > m - width * (segments - 1):  # more than the last segment has: no dictionary in use is like that
        found = z.relu().sort(dim=1, descending=True, stable=True)
        values.copy_(found.values[:, :k])
        indices.copy_(found.indices[:, :k])
        return
    wide = z.dtype == torch.float32
    keys = z.view(torch.int32 if wide else torch.int16)
    if segments == 1:
        _select(keys, k, width, segments, values.view(torch.int32), indices, wide)
        return
    bits = torch.empty(n, segments * k, dtype=torch.int32, device=z.device)
    columns, places = torch.empty_like(bits), torch.empty_like(indices)
    _select(keys, k, width, segments, bits, columns, wide)
    _select(bits, k, segments * k, 1, values.view(torch.int32), places, True)  # the lower column still comes first
    torch.gather(columns, 1, places.long(), out=indices)


def _select(keys, k: int, width: int, segments: int, value_bits, indices, wide: bool) -> None:
    columns = max(16, triton.next_power_of_2(width))
    warps = min(16, max(1, columns // 1024))
    _topk[(len(keys), segments)](
        keys, value_bits, indices, keys.stride(0), width, keys.shape[1], K=k, COLUMNS=columns,
        TILE=min(columns, warps * 256), SHIFT=0 if wide else 16, num_warps=warps, num_stages=1,
    )  # fmt: skip
