"""The arithmetic of one batch on the GPU: products by torch, everything else by `triton.py`, into memory that is kept.

Decoding and the gradients of the weights exist twice, as gathers of the k active rows and as dense products with the
(B, M) code: gathers do M / k times less, products run 50 to 100 times faster. `gpu_step` chooses.
"""

from __future__ import annotations

import torch
import triton

from . import gpu_topk
from . import triton as K

ROW_BLOCKS = 128  # blocks of rows whose pairs are counted side by side
SLOTS = 8  # rows that a gather has in flight
WIDEST = 16 * 2**20  # entries of one dense gradient block: what stays in the GPU's cache


class Batch:
    """The memory of a step for up to n rows, reused by every batch, of d columns, m latents, k slots.

    Pre-activations exist for `chunk` rows at a time; `half` is the dtype that products and gathers read; with `dense`,
    the code's terms are products rather than gathers; one program adds up `heavy` pairs of a latent at most.
    """

    def __init__(self, n, d, m, k, chunk, half, dense, device, heavy=K.HEAVY):
        self.n, self.d, self.m, self.k, self.chunk, self.dense, self.heavy = n, d, m, k, min(chunk, n), dense, heavy
        self.columns = max(16, triton.next_power_of_2(d))
        self.warps = min(16, max(1, self.columns // 256))
        self.slots = max(16, triton.next_power_of_2(k))

        def new(*shape, dtype=torch.float32, make=torch.empty):
            return make(shape, dtype=dtype, device=device)

        integer = torch.int32
        self.centred, self.residual = new(n, d, dtype=half), new(n, d, dtype=half)
        self.values, self.value_gradient, self.indices = new(n, k), new(n, k), new(n, k, dtype=integer)
        self.row_error, self.row_active = new(n), new(n, dtype=integer)
        self.z = new(self.chunk, m, dtype=half)
        self.through = new(triton.cdiv(m, K.PER_PROGRAM), d)
        self.first, self.part_first = new(m + 1, dtype=integer, make=torch.zeros), new(m + 1, dtype=integer)
        self.part_first.zero_()
        nothing = new(1)
        self.sums = self.parts = self.pairs = (nothing, nothing, nothing)
        if dense:
            self.code, self.code_gradient = (
                new(n, m, dtype=half, make=torch.zeros) for _ in range(2)
            )  # between uses 0
            self.latents = min(m, max(K.PER_PROGRAM, WIDEST // d // K.PER_PROGRAM * K.PER_PROGRAM))
            self.sums = new(self.latents, d), new(self.latents, d), new(m)
        else:
            self.rows = max(8, triton.cdiv(n, ROW_BLOCKS))
            self.counts = new(triton.cdiv(n, self.rows), m, dtype=integer)
            self.ranks, self.n_pairs, self.n_parts = (new(*s, dtype=integer) for s in ((n, k), (m,), (m,)))
            self.pairs = new(n * k, dtype=integer), new(n * k), new(n * k)
            # A latent fires at most n times, and each heavy one has at most twice its pairs / heavy parts.
            self.most_parts = min(2 * n * k // heavy, m * triton.cdiv(n, heavy)) + 1 if n > heavy else 0
            self.parts = new(self.most_parts + 1, d), new(self.most_parts + 1, d), new(self.most_parts + 1)

    # -- forward --------------------------------------------------------------------------------------------------

    def select(self, n: int, encoder, bias) -> None:
        """The code of the first n rows of `centred`, a chunk of pre-activations at a time."""
        for part in parts(n, self.chunk):
            z = self.z[: part.stop - part.start]
            torch.addmm(bias, self.centred[part], encoder.t(), out=z)
            gpu_topk.topk(z, self.k, self.values[part], self.indices[part])

    def decode(self, n: int, decoder, fired, scale: float, gradient: bool = True) -> None:
        """residual = x_hat - x, its square by row, the values' gradient, which latents fired."""
        if self.dense:
            return self.decode_dense(n, decoder, fired, scale, gradient)
        K._decode[(n,)](
            self.centred, decoder, self.values, self.indices, self.residual, self.value_gradient,
            self.row_error, self.row_active, fired, scale, D=self.d, K=self.k, COLUMNS=self.columns, SLOTS=SLOTS,
            GRADIENT=gradient, num_warps=self.warps, num_stages=1,
        )  # fmt: skip

    def decode_dense(self, n: int, decoder, fired, scale: float, gradient: bool) -> None:
        scatter(self.values[:n], self.indices[:n], self.code)
        torch.addmm(self.centred[:n], self.code[:n], decoder, beta=-1, out=self.residual[:n])
        for part in parts(n, self.chunk):
            z = self.z[: part.stop - part.start]
            if gradient:
                torch.mm(self.residual[part], decoder.t(), out=z)
            self.collect(part, z, fired, scale, gradient)
        if not gradient:
            scatter(self.values[:n], self.indices[:n], self.code, clear=True)

    def collect(self, part: slice, product, fired, scale: float, gradient: bool) -> None:
        K._collect[(part.stop - part.start,)](
            product, self.residual[part], self.values[part], self.indices[part], self.value_gradient[part],
            self.row_error[part], self.row_active[part], fired, scale, self.m, D=self.d, K=self.k,
            COLUMNS=self.columns, SLOTS=self.slots, GRADIENT=gradient, num_warps=4, num_stages=1,
        )  # fmt: skip

    # -- backward -------------------------------------------------------------------------------------------------

    def sort_pairs(self, n: int) -> None:
        """The active (row, latent) pairs in the order of the latents, rows ascending: a counting sort."""
        m, blocks, warps = self.m, triton.cdiv(n, self.rows), min(8, max(1, self.slots // 32))
        self.counts.zero_()
        K._rank[(blocks,)](
            self.values, self.indices, self.counts, self.ranks, n, m, ROWS=self.rows, K=self.k, SLOTS=self.slots,
            num_warps=warps, num_stages=1,
        )  # fmt: skip
        K._offsets[(triton.cdiv(m, 32),)](
            self.counts, self.n_pairs, self.n_parts, blocks, m, SHARE=self.heavy, BLOCK=32, DEEP=32,
            num_warps=4, num_stages=1,
        )  # fmt: skip
        torch.cumsum(self.n_pairs, 0, dtype=torch.int32, out=self.first[1:])
        torch.cumsum(self.n_parts, 0, dtype=torch.int32, out=self.part_first[1:])
        K._place[(n,)](
            self.values, self.value_gradient, self.indices, self.ranks, self.counts, self.first, *self.pairs, m,
            ROWS=self.rows, K=self.k, SLOTS=self.slots, num_warps=warps, num_stages=1,
        )  # fmt: skip
        if self.most_parts:
            K._share[(self.most_parts,)](
                self.first, self.part_first, *self.pairs, self.centred, self.residual, *self.parts, m,
                D=self.d, COLUMNS=self.columns, PAIRS=SLOTS, SHARE=self.heavy, num_warps=self.warps, num_stages=1,
            )  # fmt: skip

    def update(self, n: int, weights: tuple, dead: tuple | None, scale: float, rates) -> None:
        """Gradients, projection, Adam, unit length of all latents, and what reaches the pre-bias through them."""
        if not self.dense:
            self.sort_pairs(n)
            return self._update(0, self.m, weights, dead, scale, rates)
        code, code_gradient = self.code[:n], self.code_gradient[:n]
        scatter(self.value_gradient[:n], self.indices[:n], self.code_gradient)
        torch.sum(code_gradient, 0, dtype=torch.float32, out=self.sums[2])
        for part in parts(self.m, self.latents):
            width = part.stop - part.start
            product(code_gradient[:, part].t(), self.centred[:n], self.sums[0][:width])
            product(code[:, part].t(), self.residual[:n], self.sums[1][:width])
            self._update(part.start, part.stop, weights, dead, scale, rates)
        scatter(self.values[:n], self.indices[:n], self.code, clear=True)
        scatter(self.value_gradient[:n], self.indices[:n], self.code_gradient, clear=True)

    def _update(self, begin: int, end: int, weights: tuple, dead: tuple | None, scale, rates) -> None:
        # Without a copy of lower precision, or without dead latents, the kernel never looks at what stands in.
        dead_slots = dead or (self.first, self.through, self.through, self.through)
        K._update[(triton.cdiv(end - begin, K.PER_PROGRAM),)](
            self.first, self.part_first, *self.pairs, self.centred, self.residual, *self.parts, *self.sums,
            *dead_slots, *weights, self.through, rates, begin, end, scale,
            D=self.d, COLUMNS=self.columns, PAIRS=SLOTS, LATENTS=K.PER_PROGRAM, DENSE=self.dense,
            DEAD=dead is not None, HALF=self.centred.dtype != torch.float32, num_warps=self.warps, num_stages=1,
        )  # fmt: skip

    def update_pre_bias(self, n: int, arrays: tuple, scale: float, rates) -> None:
        of_output, through = self.residual[:n].sum(0, dtype=torch.float32), self.through.sum(0)
        K._update_pre_bias[(triton.cdiv(self.d, 128),)](
            *arrays, of_output, through, rates, scale, self.d, BLOCK=128, num_warps=4
        )

    def count(self, n: int, aux, totals) -> None:
        K._count[(1,)](self.row_error, self.row_active, aux, totals, n, BLOCK=1024, num_warps=4, num_stages=1)


class Dead:
    """AuxK of up to `capacity` dead latents: their rows, their gradients, and the dense code of a chunk of rows."""

    def __init__(self, capacity: int, k: int, d: int, m: int, chunk: int, half, device):
        self.capacity, self.k, self.d, self.chunk = capacity, min(k, capacity), d, chunk

        def new(*shape, dtype=torch.float32, make=torch.empty):
            return make(shape, dtype=dtype, device=device)

        self.slot = new(m, dtype=torch.int32)
        self.list, self.listed = new(capacity, dtype=torch.int64), new(capacity, dtype=torch.bool)
        self.encoder, self.decoder, self.bias = new(capacity, d), new(capacity, d), new(capacity)
        self.code, self.z = new(chunk, capacity, dtype=half, make=torch.zeros), new(chunk, capacity, dtype=half)
        self.error = new(chunk, d, dtype=half)
        self.values, self.gradient = new(chunk, self.k), new(chunk, self.k)
        self.indices, self.active = new(chunk, self.k, dtype=torch.int32), new(chunk, dtype=torch.int32)
        self.row_error, self.fired = new(chunk), new(capacity, dtype=torch.int32)
        self.columns, self.slots = max(16, triton.next_power_of_2(d)), max(16, triton.next_power_of_2(self.k))

    def fill(self, dead: torch.Tensor) -> None:
        """Take a new list of dead latents (n_dead <= capacity); the places left over never fire."""
        self.slot.fill_(-1)
        self.slot[dead] = torch.arange(len(dead), dtype=torch.int32, device=dead.device)
        self.list.zero_()
        self.list[: len(dead)] = dead
        self.listed.copy_(torch.arange(self.capacity, device=dead.device) < len(dead))

    def gradients(self, centred, residual, encoder, decoder, bias, asleep, weight: float, aux) -> tuple:
        """AuxK over these rows: adds its loss (unscaled) to `aux`; slot and gradients of the dead, for the update.

        weight is 2 alpha / (B variance). A dead latent that fired since is out: its bias is -infinity, as is that of
        the places left over.
        """
        encoder, decoder = encoder[self.list], decoder[self.list]
        bias = bias[self.list].masked_fill(~(self.listed & asleep[self.list]), -torch.inf)
        for total in (self.encoder, self.decoder, self.bias, aux):
            total.zero_()
        for part in parts(len(centred), self.chunk):
            n = part.stop - part.start
            z, code, error, values, indices = (
                t[:n] for t in (self.z, self.code, self.error, self.values, self.indices)
            )
            torch.addmm(bias, centred[part], encoder.t(), out=z)
            gpu_topk.topk(z, self.k, values, indices)
            scatter(values, indices, code)
            torch.addmm(residual[part], code, decoder, out=error)  # e_hat - e, as residual = x_hat - x = -e
            self.decoder += product(code.t(), error)
            torch.mm(error, decoder.t(), out=z)
            K._collect[(n,)](
                z, error, values, indices, self.gradient, self.row_error, self.active, self.fired, weight,
                self.capacity, D=self.d, K=self.k, COLUMNS=self.columns, SLOTS=self.slots, GRADIENT=True,
                num_warps=4, num_stages=1,
            )  # fmt: skip
            scatter(self.gradient[:n], indices, code)  # over the values, in the same places
            self.encoder += product(code.t(), centred[part])
            self.bias += code.sum(0, dtype=torch.float32)
            scatter(values, indices, code, clear=True)
            aux += self.row_error[:n].sum()
        self.decoder *= weight
        return self.slot, self.encoder, self.decoder, self.bias


def parts(n: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def scatter(values, indices, dense, clear: bool = False) -> None:
    """values (n, k) into rows of `dense` at indices (n, k), or zeros there."""
    k = values.shape[1]
    slots = max(16, triton.next_power_of_2(k))
    K._scatter[(len(values),)](
        values, indices, dense, dense.shape[1], K=k, SLOTS=slots, CLEAR=clear,
        num_warps=min(8, max(1, slots // 32)), num_stages=1,
    )  # fmt: skip


def product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """a @ b, float32 whatever the factors are."""
    if a.dtype == torch.float32:
        return torch.mm(a, b, out=out)
    if a.device.type == "cuda":
        try:
            return torch.mm(a, b, out_dtype=torch.float32, **({} if out is None else {"out": out}))
        except TypeError:  # torch before 2.8: one rounding to bfloat16
            result = torch.mm(a, b).float()
    else:
        result = torch.mm(a.float(), b.float())
    return result if out is None else out.copy_(result)
