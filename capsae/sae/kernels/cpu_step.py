"""The training step for a CPU: numba (`cpu_kernels`) does all in one fixed order, or torch multiplies in bf16."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from ..model import TopKSAE
from ..select import compiled
from ..steps import BETAS, EPS, Step


class Workers:
    """The threads that all compiled steps of this process share; they end with the last step."""

    def __init__(self) -> None:
        self.steps = 0

    def join(self) -> Workers:
        if self.steps == 0:
            self.outer_threads = torch.get_num_threads()
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            self.threads = min(cores, self.outer_threads)
            # Each thread multiplies its own block, so torch itself must not start further ones. The caller's is one.
            torch.set_num_threads(1)
            self.pool = ThreadPoolExecutor(max(1, self.threads - 1), "sae", torch.set_num_threads, (1,))
        self.steps += 1
        return self

    def leave(self) -> None:
        self.steps -= 1
        if self.steps == 0:
            self.pool.shutdown()
            torch.set_num_threads(self.outer_threads)

    def each(self, task: Callable[[int, int], None], n: int, alone: bool = False) -> None:
        """task(begin, end) until all numbers below n are done: each thread takes the next one when it is free.

        `alone` is for a task that is one of several at work: all numbers in one call, by this thread.
        """
        if alone or self.threads == 1 or n < 2:
            task(0, n)
            return
        numbers = iter(range(n))

        def work() -> None:
            for number in numbers:
                task(number, number + 1)

        others = [self.pool.submit(work) for _ in range(min(self.threads, n) - 1)]
        work()
        for other in others:
            other.result()


WORKERS = Workers()


class CompiledStep(Step):
    """The same for a CPU: numba does all of it, gradients stay in cache.

    With portable products, every sum has one order, so weights are the same bits on every CPU with fused multiply-add.
    With bfloat16, torch multiplies, and all rows that are gathered at random are read as bfloat16, too: of the decoder,
    the input and the gradient (`cpu_vectors` says in which form). The pre-activations are then rounded to bfloat16
    themselves, so that ties at the k-th place are common. Weights, moments and sums are float32; the update of a latent
    also writes the stored copy of its rows, so that nothing is converted in a step but the input.

    Threads take fixed blocks of rows, then of latents; whatever is summed across blocks is summed in their order, so
    the numbers do not depend on how many threads there are.
    """

    def __init__(self, sae: TopKSAE, variance: float, window: int) -> None:
        super().__init__(sae, variance, window)
        if self.products == "float32":
            self.products = "portable"  # there is one float32 here
        self.portable = self.products == "portable"
        self.kernels = compiled()
        self.workers, self.buffers, self.alone = WORKERS.join(), {}, False
        self.stored, self.stored_of = self.store(sae), _versions(sae)
        self.batch: torch.Tensor | None = None

    @classmethod
    def together(cls, steps: list[Step]) -> Callable[[list[torch.Tensor], list[float]], None]:
        """Several SAEs: each thread takes the next step and makes it alone, with the bits that it has by itself."""
        if len(steps) < 2:
            return super().together(steps)
        for step in steps:
            step.alone = True

        def take(batches: list[torch.Tensor], lrs: list[float]) -> None:
            def some(begin: int, end: int) -> None:
                for i in range(begin, end):
                    steps[i](batches[i], lrs[i])

            WORKERS.each(some, len(steps))

        return take

    @torch.no_grad()
    def __call__(self, x: torch.Tensor, lr: float) -> None:
        if self.stored_of != _versions(self.sae):  # somebody wrote to the weights between the steps
            self.stored = self.store(self.sae)
        scale = 2 / (len(x) * self.variance)
        squared_error, code, gradient, bias_gradient = self.forward(self.sae, self.stored, x, scale)
        pairs = self.sort_pairs("", self.config.latents, *code)
        aux, dead = self.auxk_pairs(gradient, scale, squared_error)
        counts = [len(x), squared_error + aux, squared_error, pairs[0][-1]]
        self.totals += torch.tensor(counts, dtype=torch.float64)
        self.steps += 1
        self.update(pairs, gradient, bias_gradient, dead, lr)
        self.stored_of = _versions(self.sae)
        self.update_average()

    def take(self, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """A batch, gathered by all threads; good until the next one is."""
        if self.batch is None or len(self.batch) < len(rows):
            self.batch = x.new_empty(len(rows), x.shape[1])
        out = self.batch[: len(rows)]

        def blocks(begin: int, end: int) -> None:
            part = self.rows_of(begin, end)
            torch.index_select(x, 0, rows[part], out=out[part])

        self.workers.each(blocks, -(-len(rows) // self.kernels.ROWS))
        return out

    def rows_of(self, begin: int, end: int) -> slice:
        return slice(begin * self.kernels.ROWS, end * self.kernels.ROWS)

    def buffer(self, name: str, n: int, width: int, dtype: type) -> np.ndarray:
        """An (n, width) array for the time of a step, with anything in it."""
        key = name, width, dtype
        if key not in self.buffers or len(self.buffers[key]) < n:
            self.buffers[key] = np.empty((n, width), dtype)
        return self.buffers[key][:n]

    def stored_form(self) -> tuple[int, type]:
        """Width and dtype of stored rows."""
        columns = self.kernels.padded(self.sae.pre_bias.shape[0])
        return (columns, np.float32) if self.portable else (columns // 2, np.int32)

    def store(self, sae: TopKSAE) -> tuple[np.ndarray, np.ndarray]:
        """The encoder as it is multiplied (panels, or rows), and the decoder's rows in stored form."""
        encoder, decoder = (w.detach().numpy() for w in (sae.encoder, sae.decoder))
        rows = np.empty((len(decoder), self.stored_form()[0]), self.stored_form()[1])
        self.kernels.pack_rows(decoder, rows)
        if self.portable:
            return self.kernels.panels_of(encoder), rows
        own = np.empty_like(rows)
        self.kernels.pack_rows(encoder, own)
        return own, rows

    def forward(self, sae: TopKSAE, stored: tuple[np.ndarray, np.ndarray], x: torch.Tensor, scale: float):
        """Summed |x - x_hat|^2, the code (values, indices, fired), and the gradient of x_hat (stored), its sum (d,)."""
        n, k, kernels, buffer = len(x), self.config.k, self.kernels, self.buffer
        blocks = -(-n // kernels.ROWS)
        rows, pre_bias = x.numpy(), sae.pre_bias.detach().numpy()
        values, indices = buffer("values", n, k, np.float32), buffer("indices", n, k, np.int32)
        centred, gradient = (buffer(name, n, *self.stored_form()) for name in ("centred", "gradient"))
        fired = buffer("fired", blocks, self.config.latents, np.int32)
        bias_gradient, error = np.zeros((blocks, x.shape[1]), np.float32), np.zeros(blocks)
        outputs = values, indices, centred, gradient, bias_gradient, fired, error
        if self.portable:
            bias = self.kernels.biases(sae.encoder_bias.detach().numpy())
            given = rows, pre_bias, stored[0], bias, stored[1], np.float32(scale)
            self.workers.each(lambda begin, end: kernels.forward_rows(begin, end, *given, *outputs), blocks, self.alone)
        else:
            self.forward_half(sae, stored, rows, pre_bias, np.float32(scale), *outputs)
        return math.fsum(error), (values, indices, fired), gradient, self.sum_of(bias_gradient)

    def forward_half(
        self, sae, stored, rows, pre_bias, scale, values, indices, centred, gradient, bias_gradient, fired, error
    ) -> None:
        """The same with torch's bfloat16 products."""
        kernels = self.kernels
        bias, weights = sae.encoder_bias.detach().bfloat16(), torch.from_numpy(stored[0]).view(torch.bfloat16).t()
        inputs = torch.from_numpy(centred).view(torch.bfloat16)

        def some(begin: int, end: int) -> None:
            own = self.buffer(f"z {threading.get_ident()}", kernels.ROWS, self.config.latents, np.int16)
            for b in range(begin, end):
                part = self.rows_of(b, b + 1)
                kernels.centre_rows(rows[part], pre_bias, centred[part])
                z = torch.from_numpy(own).view(torch.bfloat16)[: len(values[part])]
                torch.addmm(bias, inputs[part], weights, out=z)
                kernels.topk_rows(*kernels.keys_and_bits(z), values[part].view(np.int32), indices[part])
                code = values[part], indices[part], stored[1]
                sums = bias_gradient[b], fired[b]
                error[b] = kernels.decode_rows(rows[part], pre_bias, *code, scale, gradient[part], *sums)

        self.workers.each(some, len(error), self.alone)

    def sum_of(self, blocks: np.ndarray) -> np.ndarray:
        """The rows of (blocks, d) float32, added in their order."""
        total = np.zeros(blocks.shape[1], np.float32)
        self.kernels.add_columns(blocks, total)
        return total

    def sort_pairs(self, name: str, latents: int, values: np.ndarray, indices: np.ndarray, fired: np.ndarray):
        """Where each latent's pairs begin, and the active (row, value) pairs in the order of the latents."""
        first, pairs = np.zeros(latents + 1, np.int64), self.buffer(f"{name}pairs", values.size, 2, np.int32)
        self.kernels.first_pairs(fired, first)

        def some(begin: int, end: int) -> None:
            for b in range(begin, end):
                part = self.rows_of(b, b + 1)
                self.kernels.scatter_pairs(part.start, values[part], indices[part], fired[b], pairs)

        self.workers.each(some, len(fired), self.alone)
        return first, pairs

    def auxk_pairs(self, gradient: np.ndarray, scale: float, squared_error: float) -> tuple[float, tuple]:
        """AuxK's share of the loss; for `update`, each latent's place among the dead, and their pairs and gradient.

        It is a code of the residual in a dictionary of the dead, of the first rows of the batch: the same kernels.
        """
        slots, dead = np.full(self.config.latents, -1, np.int32), self.dead.numpy()
        rows = self.aux_rows(len(gradient))
        if not len(dead) or not self.config.aux_alpha:
            return 0.0, (slots, np.zeros(1, np.int64), np.zeros((0, 2), np.int32), gradient)
        slots[dead] = np.arange(len(dead))
        sae, d, kernels, buffer = self.sae, self.sae.pre_bias.shape[0], self.kernels, self.buffer
        k, blocks = min(self.config.aux_k or max(1, d // 2), len(dead)), -(-rows // self.kernels.ROWS)
        revived = self.idle.numpy()[dead] < self.window  # fired since they were found
        bias = kernels.biases(np.where(revived, -np.inf, sae.encoder_bias.detach().numpy()[dead]))
        panels, decoder = kernels.panels_of(sae.encoder.detach().numpy()[dead]), self.stored[1][dead]
        values, indices = buffer("aux values", rows, k, np.float32), buffer("aux indices", rows, k, np.int32)
        centred, own = buffer("centred", rows, *self.stored_form()), buffer("aux", rows, *self.stored_form())
        fired, error = buffer("aux fired", blocks, len(dead), np.int32), np.zeros(blocks)
        share = self.aux_share(len(gradient), squared_error)
        none, unused = np.zeros(d, np.float32), np.zeros((blocks, d), np.float32)

        def some(begin: int, end: int) -> None:
            for b in range(begin, end):
                part = slice(b * kernels.ROWS, min((b + 1) * kernels.ROWS, rows))
                residual = kernels.widened(gradient[part], d) * np.float32(-1 / scale)
                x = centred[part] if self.portable else kernels.widened(centred[part], d).copy()
                kernels.encode_rows(x, panels, bias, values[part], indices[part])
                code = values[part], indices[part], decoder, np.float32(share * scale)
                error[b] = kernels.decode_rows(residual, none, *code, own[part], unused[b], fired[b])

        self.workers.each(some, blocks, self.alone)
        return share * math.fsum(error), (slots, *self.sort_pairs("aux ", len(dead), values, indices, fired), own)

    def update(self, pairs: tuple, gradient: np.ndarray, bias_gradient: np.ndarray, dead: tuple, lr: float) -> None:
        """Gradients of the weights, projection, Adam and unit length, latent by latent; then the pre-bias."""
        rescale = 1 / math.sqrt(1 - power(BETAS[1], self.steps))
        adam = np.float32(lr / (1 - power(BETAS[0], self.steps))), np.float32(rescale), np.float32(EPS)
        inputs = *pairs, self.buffer("centred", len(gradient), *self.stored_form()), gradient, *dead
        state = [a for name in ("encoder", "decoder", "encoder_bias") for a in self.arrays(name)]
        state += [*self.stored, self.idle.numpy()]
        blocks = -(-self.config.latents // self.kernels.LATENTS)
        through_bias = np.zeros((blocks, len(bias_gradient)), np.float32)
        update = self.kernels.update_latents
        some = lambda begin, end: update(begin, end, *inputs, *state, through_bias, *adam)  # noqa: E731
        self.workers.each(some, blocks, self.alone)
        self.kernels.adam_row(*self.arrays("pre_bias"), bias_gradient - self.sum_of(through_bias), *adam)

    def arrays(self, name: str) -> tuple[np.ndarray, ...]:
        """A parameter and its two moments, as numpy arrays on the same memory."""
        return tuple(t.detach().numpy() for t in (getattr(self.sae, name), *self.moments[name]))

    @torch.no_grad()
    def update_average(self) -> None:
        if self.average is not None:
            share = np.float32(1 - self.average_decay())
            for name, mean in self.average.named_parameters():
                own = mean.numpy(), getattr(self.sae, name).detach().numpy()
                mean, rows = (a.reshape(-1, a.shape[-1]) for a in own)
                self.kernels.average_rows(mean, rows, share, name == "decoder")

    @torch.no_grad()
    def squared_error(self, x: torch.Tensor) -> float:
        """Mean of |x - x_hat|^2 over normalised rows, of `result`."""
        sae = self.result()
        stored = self.store(sae)
        return sum(self.forward(sae, stored, block, 1.0)[0] for block in x.split(self.config.batch_size)) / len(x)

    def close(self) -> None:
        self.workers.leave()


def power(base: float, n: int) -> float:
    """base^n by multiplications alone: the C library's pow may differ in the last bit from machine to machine."""
    result = 1.0
    while n:
        result = result * base if n & 1 else result
        base, n = base * base, n >> 1
    return result


def _versions(sae: TopKSAE) -> tuple[int, ...]:
    """Changes when torch writes to the weights; the kernels' writing it does not see."""
    return tuple(n for p in (sae.encoder, sae.decoder) for n in (p._version, p.data_ptr()))
