"""The training step for a CPU: torch multiplies, numba (`cpu_kernels`) does the rest, gradients stay in cache."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from .model import TopKSAE
from .select import compiled
from .steps import BETAS, EPS, Step

ROWS, LATENTS = 256, 64  # what a thread takes at a time: pre-activations that stay in its cache
AUXK_ROWS = 1024


class Workers:
    """The threads and the scratch memory that all compiled steps of this process share; they end with the last step."""

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
            self.buffers: dict[tuple, np.ndarray] = {}
        self.steps += 1
        return self

    def leave(self) -> None:
        self.steps -= 1
        if self.steps == 0:
            self.pool.shutdown()
            self.buffers.clear()
            torch.set_num_threads(self.outer_threads)

    def each(self, task: Callable[[int], None], n: int) -> None:
        """task(number) for the numbers below n, each thread taking the next one when it is free."""
        numbers = iter(range(n))

        def work() -> None:
            for number in numbers:
                task(number)

        others = [self.pool.submit(work) for _ in range(min(self.threads, n) - 1)]
        work()
        for other in others:
            other.result()

    def buffer(self, name: str, n: int, width: int, dtype: type) -> np.ndarray:
        """An (n, width) array for the time of a step, with anything in it."""
        key = name, width, dtype
        if key not in self.buffers or len(self.buffers[key]) < n:
            self.buffers[key] = np.empty((n, width), dtype)
        return self.buffers[key][:n]


WORKERS = Workers()


class CompiledStep(Step):
    """The same for a CPU: torch multiplies, numba does the rest, gradients stay in cache.

    With bfloat16 products, all rows that are gathered at random are read as bfloat16, too: of the decoder, the input
    and the gradient (`cpu_lanes` says how they are stored). Weights, moments and sums are float32; the update of a
    latent also writes the stored copy of its rows, so that nothing is converted in a step but the input.

    Threads take fixed blocks of rows, then of latents; whatever is summed across blocks is summed in their order, so
    the numbers do not depend on how many threads there are.
    """

    def __init__(self, sae: TopKSAE, variance: float, window: int) -> None:
        super().__init__(sae, variance, window)
        self.kernels = compiled()
        self.workers = WORKERS.join()
        self.dtype = torch.bfloat16 if self.products == "bf16" else torch.float32
        self.stored, self.stored_of = self.store(sae), _versions(sae)
        self.first = np.zeros(self.config.latents + 1, np.int64)
        self.batch: torch.Tensor | None = None

    @torch.no_grad()
    def __call__(self, x: torch.Tensor, lr: float) -> None:
        if self.stored_of != _versions(self.sae):  # somebody wrote to the weights between the steps
            self.stored = self.store(self.sae)
        scale = 2 / (len(x) * self.variance)
        squared_error, values, indices, gradient, bias_gradient = self.forward(self.sae, self.stored, x, scale)
        loss, dead = squared_error, self.no_dead()
        if len(self.dead) and self.config.aux_alpha:
            aux, dead = self.auxk_gradients(x, gradient, scale)
            loss += aux
        pairs = self.sort_pairs(values, indices)
        self.totals += torch.tensor([len(x), loss, squared_error, self.first[-1]], dtype=torch.float64)
        self.steps += 1
        self.update(pairs, gradient, bias_gradient, dead, lr)
        self.stored_of = _versions(self.sae)
        self.update_average()

    def take(self, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """A batch, gathered by all threads; good until the next one is."""
        if self.batch is None or len(self.batch) < len(rows):
            self.batch = x.new_empty(len(rows), x.shape[1])
        out = self.batch[: len(rows)]

        def block(b: int) -> None:
            part = slice(b * ROWS, (b + 1) * ROWS)
            torch.index_select(x, 0, rows[part], out=out[part])

        self.workers.each(block, -(-len(rows) // ROWS))
        return out

    def stored_form(self) -> tuple[int, type]:
        """Width and dtype of stored rows."""
        columns = self.kernels.padded(self.sae.pre_bias.shape[0])
        return (columns // 2, np.int32) if self.dtype == torch.bfloat16 else (columns, np.float32)

    def store(self, sae: TopKSAE) -> tuple[np.ndarray, np.ndarray]:
        """The encoder's and the decoder's rows in stored form."""
        width, dtype = self.stored_form()
        copies = np.empty((2, len(sae.encoder), width), dtype)
        for weights, copy in zip((sae.encoder, sae.decoder), copies, strict=True):
            self.kernels.pack_rows(weights.detach().numpy(), copy)
        return copies[0], copies[1]

    def forward(self, sae: TopKSAE, stored: tuple[np.ndarray, np.ndarray], x: torch.Tensor, scale: float):
        """Summed |x - x_hat|^2, the code (values, indices), and the gradient of x_hat (stored) with its sum (d,)."""
        n, k, kernels = len(x), self.config.k, self.kernels
        blocks = -(-n // ROWS)
        buffer = self.workers.buffer
        encoder, bias = torch.from_numpy(stored[0]).view(self.dtype), sae.encoder_bias.detach().to(self.dtype)
        rows, pre_bias = x.numpy(), sae.pre_bias.detach().numpy()
        values, indices = buffer("values", n, k, np.float32), buffer("indices", n, k, np.int32)
        centred, gradient = (buffer(name, n, *self.stored_form()) for name in ("centred", "gradient"))
        fired = buffer("fired", blocks, self.config.latents, np.int32)
        bias_gradient, squared_errors = np.zeros((blocks, x.shape[1]), np.float32), [0.0] * blocks
        inputs, weights = torch.from_numpy(centred).view(self.dtype), encoder.t()

        def block(b: int) -> None:
            part = slice(b * ROWS, (b + 1) * ROWS)
            kernels.centre_rows(rows[part], pre_bias, centred[part])
            own = buffer(f"z {threading.get_ident()}", ROWS, self.config.latents * self.dtype.itemsize, np.int8)
            z = torch.from_numpy(own).view(self.dtype)[: len(values[part])]
            torch.addmm(bias, inputs[part], weights, out=z)
            kernels.topk_rows(*kernels.keys_and_bits(z), values[part].view(np.int32), indices[part])
            code = values[part], indices[part], stored[1]
            squared_errors[b] = kernels.decode_rows(
                rows[part], pre_bias, *code, np.float32(scale), gradient[part], bias_gradient[b], fired[b]
            )

        self.workers.each(block, blocks)
        return sum(squared_errors), values, indices, gradient, bias_gradient.sum(0)

    def sort_pairs(self, values: np.ndarray, indices: np.ndarray) -> np.ndarray:
        """The active (row, value) pairs in the order of their latents; `first` says where each latent's begin."""
        pairs = self.workers.buffer("pairs", values.size, 2, np.int32)
        place = self.workers.buffer("fired", -(-len(values) // ROWS), self.config.latents, np.int32)
        self.kernels.first_pairs(place, self.first)

        def block(b: int) -> None:
            part = slice(b * ROWS, (b + 1) * ROWS)
            self.kernels.scatter_pairs(b * ROWS, values[part], indices[part], place[b], pairs)

        self.workers.each(block, len(place))
        return pairs

    def update(
        self, pairs: np.ndarray, gradient: np.ndarray, bias_gradient: np.ndarray, dead: tuple, lr: float
    ) -> None:
        """Gradients of the weights, projection, Adam and unit length, latent by latent; then the pre-bias."""
        rescale = (1 - BETAS[1] ** self.steps) ** -0.5
        adam = np.float32(lr / (1 - BETAS[0] ** self.steps)), np.float32(rescale), np.float32(EPS)
        centred = self.workers.buffer("centred", len(gradient), *self.stored_form())
        inputs = self.first, pairs, centred, gradient, *dead
        state = [a for name in ("encoder", "decoder", "encoder_bias") for a in self.arrays(name)]
        state += [*self.stored, self.idle.numpy()]
        starts = range(0, self.config.latents, LATENTS)
        through_bias = np.zeros((len(starts), len(bias_gradient)), np.float32)

        def block(b: int) -> None:
            begin, end = starts[b], min(starts[b] + LATENTS, self.config.latents)
            self.kernels.update_latents(begin, end, *inputs, *state, through_bias[b], *adam)

        self.workers.each(block, len(starts))
        self.kernels.adam_row(*self.arrays("pre_bias"), bias_gradient - through_bias.sum(0), *adam)

    def arrays(self, name: str) -> tuple[np.ndarray, ...]:
        """A parameter and its two moments, as numpy arrays on the same memory."""
        return tuple(t.detach().numpy() for t in (getattr(self.sae, name), *self.moments[name]))

    def auxk_gradients(self, x: torch.Tensor, gradient: np.ndarray, scale: float) -> tuple[float, tuple]:
        """AuxK's share of the loss, and its gradients by dead latent, with the place of each latent among them."""
        sae = self.sae
        weights = [p.detach()[self.dead] for p in (sae.encoder, sae.encoder_bias, sae.decoder)]
        starts = range(0, len(x), AUXK_ROWS)
        losses, gradients = [0.0] * len(starts), [()] * len(starts)

        def block(b: int) -> None:
            part = slice(starts[b], starts[b] + AUXK_ROWS)
            residual = torch.from_numpy(self.kernels.widened(gradient[part], x.shape[1])) / -scale
            leaves = [w.clone().requires_grad_() for w in weights]
            with torch.enable_grad():
                loss = self.auxk(x[part] - sae.pre_bias.detach(), residual, *leaves)
                gradients[b] = torch.autograd.grad(loss * (scale / 2), leaves)
            losses[b] = loss.item()

        self.workers.each(block, len(starts))
        slots = np.full(self.config.latents, -1, np.int32)
        slots[self.dead.numpy()] = np.arange(len(self.dead))
        return sum(losses), (slots, *(sum(g).numpy() for g in zip(*gradients, strict=True)))

    def no_dead(self) -> tuple:
        d = self.sae.pre_bias.shape[0]
        none = np.zeros((0, d), np.float32)
        return np.full(self.config.latents, -1, np.int32), none, np.zeros(0, np.float32), none

    @torch.no_grad()
    def squared_error(self, x: torch.Tensor) -> float:
        """Mean of |x - x_hat|^2 over normalised rows, of `result`."""
        sae = self.result()
        stored = self.store(sae)
        return sum(self.forward(sae, stored, block, 1.0)[0] for block in x.split(self.config.batch_size)) / len(x)

    def close(self) -> None:
        self.workers.leave()


def _versions(sae: TopKSAE) -> tuple[int, ...]:
    """Changes when torch writes to the weights; the kernels' writing it does not see."""
    return tuple(n for p in (sae.encoder, sae.decoder) for n in (p._version, p.data_ptr()))
