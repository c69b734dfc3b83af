"""Triton kernels of the GPU's training step: decoding with the value gradient, the update by latent.

Import this lazily: it needs triton (3.6 or 3.7; with TRITON_INTERPRET=1 the kernels run on CPU tensors, for tests).
Each writes into tensors that are given and never waits for the device, so a whole step can be captured in a CUDA graph.
Sums run in a fixed order: the numbers do not depend on scheduling. The one atomic operation counts distinct addresses
between barriers, which makes its order fixed too.

B rows, M latents, d columns, k slots a row. "Pairs" are the active (row, latent) slots, in the order of the latents.
"""

from __future__ import annotations

import triton
import triton.language as tl

HEAVY = 512  # pairs of one latent that one program adds up; a latent with more is shared out
PER_PROGRAM = 4  # latents that one program of the update takes in turn


@triton.jit
def _decode(
    centred, decoder, values, indices, residual, value_gradient, row_error, row_active, fired, scale,
    D: tl.constexpr, K: tl.constexpr, COLUMNS: tl.constexpr, SLOTS: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """x_hat - x of one row, its square, and what reaches each value through it."""
    row = tl.program_id(0).to(tl.int64)
    column, slot = tl.arange(0, COLUMNS), tl.arange(0, SLOTS)
    inside = column < D
    left = -tl.load(centred + row * D + column, mask=inside, other=0.0).to(tl.float32)
    for start in range(0, K, SLOTS):
        used = start + slot < K
        value = tl.load(values + row * K + start + slot, mask=used, other=0.0)
        index = tl.load(indices + row * K + start + slot, mask=used, other=0).to(tl.int64)
        mask = (value > 0)[:, None] & inside[None, :]
        rows = tl.load(decoder + index[:, None] * D + column[None, :], mask=mask, other=0.0).to(tl.float32)
        left += tl.sum(value[:, None] * rows, axis=0)
    tl.store(residual + row * D + column, left.to(residual.dtype.element_ty), mask=inside)
    tl.store(row_error + row, tl.sum(left * left, axis=0))
    if GRADIENT:
        active = tl.zeros((SLOTS,), tl.int32)
        for start in range(0, K, SLOTS):
            used = start + slot < K
            value = tl.load(values + row * K + start + slot, mask=used, other=0.0)
            index = tl.load(indices + row * K + start + slot, mask=used, other=0).to(tl.int64)
            mask = (value > 0)[:, None] & inside[None, :]
            rows = tl.load(decoder + index[:, None] * D + column[None, :], mask=mask, other=0.0).to(tl.float32)
            dot = tl.sum(left[None, :] * rows, axis=1) * scale
            tl.store(value_gradient + row * K + start + slot, tl.where(value > 0, dot, 0.0), mask=used)
            tl.store(fired + index, tl.full((SLOTS,), 1, tl.int32), mask=used & (value > 0))
            active += (used & (value > 0)).to(tl.int32)
        tl.store(row_active + row, tl.sum(active, axis=0))


@triton.jit
def _scatter(values, indices, dense, n_columns, K: tl.constexpr, SLOTS: tl.constexpr, CLEAR: tl.constexpr):
    """A row's values into its row of a dense matrix, or zeros where they were."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, SLOTS)
    used = slot < K
    index = tl.load(indices + row * K + slot, mask=used, other=0)
    if CLEAR:
        value = tl.zeros((SLOTS,), tl.float32)
    else:
        value = tl.load(values + row * K + slot, mask=used, other=0.0)
    tl.store(dense + row * n_columns + index, value.to(dense.dtype.element_ty), mask=used)


@triton.jit
def _collect(
    product, residual, values, indices, value_gradient, row_error, row_active, fired, scale, n_columns,
    D: tl.constexpr, K: tl.constexpr, COLUMNS: tl.constexpr, SLOTS: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """What `_decode` gives besides the residual, from the dense product residual x decoder^T."""
    row = tl.program_id(0).to(tl.int64)
    column, slot = tl.arange(0, COLUMNS), tl.arange(0, SLOTS)
    left = tl.load(residual + row * D + column, mask=column < D, other=0.0).to(tl.float32)
    tl.store(row_error + row, tl.sum(left * left, axis=0))
    if GRADIENT:
        used = slot < K
        value = tl.load(values + row * K + slot, mask=used, other=0.0)
        index = tl.load(indices + row * K + slot, mask=used, other=0)
        active = used & (value > 0)
        dot = tl.load(product + row * n_columns + index, mask=active, other=0.0).to(tl.float32)
        tl.store(value_gradient + row * K + slot, tl.where(active, dot * scale, 0.0), mask=used)
        tl.store(fired + index, tl.full((SLOTS,), 1, tl.int32), mask=active)
        tl.store(row_active + row, tl.sum(active.to(tl.int32), axis=0))


@triton.jit
def _rank(values, indices, counts, ranks, n_rows, n_latents, ROWS: tl.constexpr, K: tl.constexpr, SLOTS: tl.constexpr):
    """For a block of rows: how often each latent fires, and how many rows above in the block fire it too."""
    block = tl.program_id(0)
    slot = tl.arange(0, SLOTS)
    for r in range(0, ROWS):
        row = (block * ROWS + r).to(tl.int64)
        used = (slot < K) & (row < n_rows)
        value = tl.load(values + row * K + slot, mask=used, other=0.0)
        index = tl.load(indices + row * K + slot, mask=used, other=0)
        # Latents of a row are distinct, and rows take turns: no two of these meet, so their order is fixed.
        place = counts + block.to(tl.int64) * n_latents + index
        one = tl.full((SLOTS,), 1, tl.int32)
        rank = tl.atomic_add(place, one, mask=used & (value > 0), sem="relaxed")
        tl.store(ranks + row * K + slot, rank, mask=used & (value > 0))
        tl.debug_barrier()


@triton.jit
def _offsets(
    counts, totals, parts, n_blocks, n_latents, SHARE: tl.constexpr, BLOCK: tl.constexpr, DEEP: tl.constexpr
):  # fmt: skip
    """Counts by block of rows become the number in the blocks above; their sum; the parts a heavy latent has."""
    latent = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = latent < n_latents
    total = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, n_blocks, DEEP):  # many loads in flight: one after the other, each would wait for memory
        block = (start + tl.arange(0, DEEP)).to(tl.int64)
        mask = (block < n_blocks)[:, None] & inside[None, :]
        place = counts + block[:, None] * n_latents + latent[None, :]
        here = tl.load(place, mask=mask, other=0)
        tl.store(place, total[None, :] + tl.cumsum(here, 0) - here, mask=mask)
        total += tl.sum(here, axis=0)
    tl.store(totals + latent, total, mask=inside)
    tl.store(parts + latent, tl.where(total > SHARE, (total + SHARE - 1) // SHARE, 0), mask=inside)


@triton.jit
def _place(
    values, value_gradient, indices, ranks, counts, first, pair_row, pair_value, pair_gradient, n_latents,
    ROWS: tl.constexpr, K: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """A row's active slots to their places among the pairs."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, SLOTS)
    used = slot < K
    value = tl.load(values + row * K + slot, mask=used, other=0.0)
    index = tl.load(indices + row * K + slot, mask=used, other=0)
    active = used & (value > 0)
    rank = tl.load(ranks + row * K + slot, mask=active, other=0)
    above = tl.load(counts + (row // ROWS) * n_latents + index, mask=active, other=0)
    place = tl.load(first + index, mask=active, other=0) + above + rank
    tl.store(pair_row + place, tl.zeros((SLOTS,), tl.int32) + row.to(tl.int32), mask=active)
    tl.store(pair_value + place, value, mask=active)
    gradient = tl.load(value_gradient + row * K + slot, mask=active, other=0.0)
    tl.store(pair_gradient + place, gradient, mask=active)


@triton.jit
def _add_pairs(
    begin, stop, pair_row, pair_value, pair_gradient, centred, residual,
    D: tl.constexpr, COLUMNS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """sum_p g_p x_row(p), sum_p a_p e_row(p) (both (d,)) and the g_p slot by slot, over pairs begin..stop."""
    column, pair = tl.arange(0, COLUMNS), tl.arange(0, PAIRS)
    inside = column < D
    of_encoder, of_decoder = tl.zeros((COLUMNS,), tl.float32), tl.zeros((COLUMNS,), tl.float32)
    of_bias = tl.zeros((PAIRS,), tl.float32)
    for start in range(begin, stop, PAIRS):
        used = start + pair < stop
        row = tl.load(pair_row + start + pair, mask=used, other=0).to(tl.int64)
        value = tl.load(pair_value + start + pair, mask=used, other=0.0)
        gradient = tl.load(pair_gradient + start + pair, mask=used, other=0.0)
        mask = used[:, None] & inside[None, :]
        place = row[:, None] * D + column[None, :]
        of_encoder += tl.sum(gradient[:, None] * tl.load(centred + place, mask=mask, other=0.0).to(tl.float32), axis=0)
        of_decoder += tl.sum(value[:, None] * tl.load(residual + place, mask=mask, other=0.0).to(tl.float32), axis=0)
        of_bias += gradient
    return of_encoder, of_decoder, of_bias


@triton.jit
def _share(
    first, part_first, pair_row, pair_value, pair_gradient, centred, residual, part_encoder, part_decoder, part_bias,
    n_latents, D: tl.constexpr, COLUMNS: tl.constexpr, PAIRS: tl.constexpr, SHARE: tl.constexpr,
):  # fmt: skip
    """One part of a heavy latent's pairs, so that a latent that always fires does not keep the others waiting."""
    part = tl.program_id(0)
    if part < tl.load(part_first + n_latents):
        low, high = part * 0, part * 0 + n_latents  # part_first[low] <= part < part_first[high]
        while high - low > 1:
            middle = (low + high) // 2
            reached = tl.load(part_first + middle) <= part
            low = tl.where(reached, middle, low)
            high = tl.where(reached, high, middle)
        begin = tl.load(first + low) + (part - tl.load(part_first + low)) * SHARE
        stop = tl.minimum(begin + SHARE, tl.load(first + low + 1))
        of_encoder, of_decoder, of_bias = _add_pairs(
            begin, stop, pair_row, pair_value, pair_gradient, centred, residual, D, COLUMNS, PAIRS
        )
        column = tl.arange(0, COLUMNS)
        out = part.to(tl.int64) * D + column
        tl.store(part_encoder + out, of_encoder, mask=column < D)
        tl.store(part_decoder + out, of_decoder, mask=column < D)
        tl.store(part_bias + part, tl.sum(of_bias, axis=0))


@triton.jit
def _adam(p, m, v, g, lr, rescale):
    """Adam with betas (.9, .999) and eps 6.25e-10: `steps.BETAS`, `steps.EPS`, which a test compares."""
    m += 0.1 * (g - m)
    v += 0.001 * (g * g - v)
    return p - lr * m / (tl.sqrt(v) * rescale + 6.25e-10), m, v


@triton.jit
def _update(
    first, part_first, pair_row, pair_value, pair_gradient, centred, residual, part_encoder, part_decoder, part_bias,
    sum_encoder, sum_decoder, sum_bias,
    dead_slot, dead_encoder, dead_decoder, dead_bias,
    encoder, encoder_m, encoder_v, decoder, decoder_m, decoder_v, bias, bias_m, bias_v,
    encoder_half, decoder_half, bias_half, idle, fired, through, rates,
    begin_latent, end_latent, scale,
    D: tl.constexpr, COLUMNS: tl.constexpr, PAIRS: tl.constexpr, LATENTS: tl.constexpr,
    DENSE: tl.constexpr, DEAD: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Everything that happens to a few latents in a step; both gradients live in registers and are never stored."""
    column = tl.arange(0, COLUMNS)
    lr, rescale = tl.load(rates), tl.load(rates + 1)
    through_bias = tl.zeros((COLUMNS,), tl.float32)
    for turn in range(0, LATENTS):
        latent = (begin_latent + tl.program_id(0) * LATENTS + turn).to(tl.int64)
        valid = latent < end_latent
        inside = (column < D) & valid
        here = latent * D + column
        if DENSE:
            row = (latent - begin_latent) * D + column
            of_encoder = tl.load(sum_encoder + row, mask=inside, other=0.0).to(tl.float32)
            of_decoder = tl.load(sum_decoder + row, mask=inside, other=0.0).to(tl.float32)
            of_bias = tl.load(sum_bias + latent, mask=valid, other=0.0).to(tl.float32)
        else:
            part = tl.load(part_first + latent, mask=valid, other=0)
            last = tl.load(part_first + latent + 1, mask=valid, other=0)
            begin = tl.load(first + latent, mask=valid, other=0)
            stop = tl.load(first + latent + 1, mask=valid, other=0)
            stop = tl.where(last > part, begin, stop)  # `_share` has added up a heavy one
            of_encoder, of_decoder, biases = _add_pairs(
                begin, stop, pair_row, pair_value, pair_gradient, centred, residual, D, COLUMNS, PAIRS
            )
            of_bias = tl.sum(biases, axis=0)
            shared = part.to(tl.int64) * D + column
            for p in range(part, last):
                of_encoder += tl.load(part_encoder + shared, mask=inside, other=0.0)
                of_decoder += tl.load(part_decoder + shared, mask=inside, other=0.0)
                of_bias += tl.load(part_bias + p)
                shared += D
        of_decoder *= scale
        we = tl.load(encoder + here, mask=inside, other=0.0)
        wd = tl.load(decoder + here, mask=inside, other=0.0)
        through_bias += of_bias * we
        if DEAD:
            slot = tl.load(dead_slot + latent, mask=valid, other=-1).to(tl.int64)
            place = slot * D + column
            of_encoder += tl.load(dead_encoder + place, mask=inside & (slot >= 0), other=0.0)
            of_decoder += tl.load(dead_decoder + place, mask=inside & (slot >= 0), other=0.0)
            of_bias += tl.load(dead_bias + slot, mask=slot >= 0, other=0.0)
        of_decoder -= tl.sum(of_decoder * wd, axis=0) * wd  # that part would change the length only

        m = tl.load(encoder_m + here, mask=inside, other=0.0)
        v = tl.load(encoder_v + here, mask=inside, other=0.0)
        we, m, v = _adam(we, m, v, of_encoder, lr, rescale)
        tl.store(encoder + here, we, mask=inside)
        tl.store(encoder_m + here, m, mask=inside)
        tl.store(encoder_v + here, v, mask=inside)

        m = tl.load(decoder_m + here, mask=inside, other=0.0)
        v = tl.load(decoder_v + here, mask=inside, other=0.0)
        wd, m, v = _adam(wd, m, v, of_decoder, lr, rescale)
        wd = tl.where(inside, wd, 0.0)
        wd = wd / tl.maximum(tl.sqrt(tl.sum(wd * wd, axis=0)), 1e-12)
        tl.store(decoder + here, wd, mask=inside)
        tl.store(decoder_m + here, m, mask=inside)
        tl.store(decoder_v + here, v, mask=inside)

        c = tl.load(bias + latent, mask=valid, other=0.0)
        m1 = tl.load(bias_m + latent, mask=valid, other=0.0)
        v1 = tl.load(bias_v + latent, mask=valid, other=0.0)
        c, m1, v1 = _adam(c, m1, v1, of_bias, lr, rescale)
        tl.store(bias + latent, c, mask=valid)
        tl.store(bias_m + latent, m1, mask=valid)
        tl.store(bias_v + latent, v1, mask=valid)
        if HALF:  # for the next step's products
            tl.store(encoder_half + here, we.to(encoder_half.dtype.element_ty), mask=inside)
            tl.store(decoder_half + here, wd.to(decoder_half.dtype.element_ty), mask=inside)
            tl.store(bias_half + latent, c.to(bias_half.dtype.element_ty), mask=valid)

        fires = tl.load(fired + latent, mask=valid, other=0)
        since = tl.load(idle + latent, mask=valid, other=0)
        tl.store(idle + latent, tl.where(fires > 0, 0, since + 1), mask=valid)
        tl.store(fired + latent, fires * 0, mask=valid)
    program = begin_latent // LATENTS + tl.program_id(0)
    tl.store(through + program.to(tl.int64) * D + column, through_bias, mask=column < D)


@triton.jit
def _update_pre_bias(pre_bias, m, v, of_output, through, rates, scale, n_columns, BLOCK: tl.constexpr):
    """x_hat contains the pre-bias, and the encoder takes it off again."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < n_columns
    of_both = scale * tl.load(of_output + column, mask=inside, other=0.0)
    of_both -= tl.load(through + column, mask=inside, other=0.0)
    b = tl.load(pre_bias + column, mask=inside, other=0.0)
    first = tl.load(m + column, mask=inside, other=0.0)
    second = tl.load(v + column, mask=inside, other=0.0)
    b, first, second = _adam(b, first, second, of_both, tl.load(rates), tl.load(rates + 1))
    tl.store(pre_bias + column, b, mask=inside)
    tl.store(m + column, first, mask=inside)
    tl.store(v + column, second, mask=inside)


@triton.jit
def _count(row_error, row_active, aux, totals, n_rows, BLOCK: tl.constexpr):
    """Add a batch to the totals: rows, loss, squared error, active slots. float64, one order."""
    row = tl.arange(0, BLOCK)
    error, active = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
    for start in range(0, n_rows, BLOCK):
        used = start + row < n_rows
        error += tl.load(row_error + start + row, mask=used, other=0.0).to(tl.float64)
        active += tl.load(row_active + start + row, mask=used, other=0).to(tl.float64)
    squared = tl.sum(error, axis=0)
    tl.store(totals, tl.load(totals) + n_rows)
    tl.store(totals + 1, tl.load(totals + 1) + squared + tl.load(aux).to(tl.float64))
    tl.store(totals + 2, tl.load(totals + 2) + squared)
    tl.store(totals + 3, tl.load(totals + 3) + tl.sum(active, axis=0))
