"""The training step for a CPU: torch multiplies, numba (`cpu_kernels`) does the rest, gradients stay in cache."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F

from .model import TopKSAE
from .select import compiled
from .steps import BETAS, EPS, Step

ROWS, LATENTS = 256, 64  # what a thread takes at a time: pre-activations that stay in its cache


class Workers:
    """The threads that all compiled steps of this process share; they end with the last step."""

    def __init__(self) -> None:
        self.steps, self.pool = 0, None

    def join(self) -> ThreadPoolExecutor:
        if self.steps == 0:
            self.outer_threads = torch.get_num_threads()
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            # Each thread multiplies its own block, so torch itself must not start further ones.
            torch.set_num_threads(1)
            self.pool = ThreadPoolExecutor(min(cores, self.outer_threads), "sae", torch.set_num_threads, (1,))
        self.steps += 1
        return self.pool

    def leave(self) -> None:
        self.steps -= 1
        if self.steps == 0:
            self.pool.shutdown()
            torch.set_num_threads(self.outer_threads)


WORKERS = Workers()


class CompiledStep(Step):
    """The same for a CPU: torch multiplies, numba does the rest, gradients stay in cache.

    Threads take fixed blocks of rows, then of latents; whatever is summed across blocks is summed in their order, so
    the numbers do not depend on how many threads there are.
    """

    def __init__(self, sae: TopKSAE, variance: float, window: int) -> None:
        super().__init__(sae, variance, window)
        self.kernels = compiled()
        self.pool = WORKERS.join()
        self.pairs = np.empty(0, np.int32), np.empty(0, np.float32), np.empty(0, np.float32)
        self.first = np.zeros(self.config.latents + 1, np.int64)

    @torch.no_grad()
    def __call__(self, x: torch.Tensor, lr: float) -> None:
        sae = self.sae
        centred = x - sae.pre_bias
        scale = 2 / (len(x) * self.variance)
        squared_error, values, indices, gradient, value_gradient = self.forward(sae, centred, scale)
        loss, dead = squared_error, self.no_dead()
        if len(self.dead) and self.config.aux_alpha:
            aux, dead = self.auxk_gradients(centred, gradient / -scale, scale / 2)
            loss += aux
        if self.pairs[0].size < values.size:
            self.pairs = tuple(np.empty(values.size, a.dtype) for a in self.pairs)
        self.kernels.sort_pairs(values, value_gradient, indices, self.first, *self.pairs)
        self.totals += torch.tensor([len(x), loss, squared_error, self.first[-1]], dtype=torch.float64)
        self.steps += 1
        self.update(centred, gradient, dead, lr)
        self.update_average()

    def forward(self, sae: TopKSAE, centred: torch.Tensor, scale: float):
        """Summed |x - x_hat|^2, the code (values, indices), and the gradients of x_hat and of the values."""
        n, k = len(centred), self.config.k
        half = torch.bfloat16 if self.products == "bf16" else torch.float32
        inputs, encoder, bias = (t.detach().to(half) for t in (centred, sae.encoder, sae.encoder_bias))
        decoder, rows = sae.decoder.detach().numpy(), centred.numpy()
        values, value_gradient = np.empty((n, k), np.float32), np.empty((n, k), np.float32)
        indices, gradient = np.empty((n, k), np.int32), torch.empty_like(centred)

        def block(begin: int) -> float:
            part = slice(begin, begin + ROWS)
            z = F.linear(inputs[part], encoder, bias)
            self.kernels.topk_rows(*self.kernels.keys_and_bits(z), values[part].view(np.int32), indices[part])
            outputs = gradient.numpy()[part], value_gradient[part]
            return self.kernels.decode_rows(
                rows[part], values[part], indices[part], decoder, np.float32(scale), *outputs
            )

        return sum(self.pool.map(block, range(0, n, ROWS))), values, indices, gradient, value_gradient

    def update(self, centred: torch.Tensor, gradient: torch.Tensor, dead: tuple, lr: float) -> None:
        """Gradients of the weights, projection, Adam and unit length, latent by latent; then the pre-bias."""
        rescale = (1 - BETAS[1] ** self.steps) ** -0.5
        adam = np.float32(lr / (1 - BETAS[0] ** self.steps)), np.float32(rescale), np.float32(EPS)
        pairs = self.first, *self.pairs, centred.numpy(), gradient.numpy()
        state = [a for name in ("encoder", "decoder", "encoder_bias") for a in self.arrays(name)]
        starts = range(0, self.config.latents, LATENTS)
        through_bias = np.zeros((len(starts), centred.shape[1]), np.float32)

        def block(b: int) -> None:
            begin, end = starts[b], min(starts[b] + LATENTS, self.config.latents)
            self.kernels.update_latents(begin, end, *pairs, *dead, *state, self.idle.numpy(), through_bias[b], *adam)

        list(self.pool.map(block, range(len(starts))))
        pre_bias_gradient = gradient.sum(0).numpy() - through_bias.sum(0)
        self.kernels.adam_row(*self.arrays("pre_bias"), pre_bias_gradient, *adam)

    def arrays(self, name: str) -> tuple[np.ndarray, ...]:
        """A parameter and its two moments, as numpy arrays on the same memory."""
        return tuple(t.detach().numpy() for t in (getattr(self.sae, name), *self.moments[name]))

    def auxk_gradients(self, centred, residual, weight: float) -> tuple[float, tuple]:
        """AuxK's share of the loss, and its gradients by dead latent, with the place of each latent among them."""
        sae = self.sae
        leaves = [p.detach()[self.dead].requires_grad_() for p in (sae.encoder, sae.encoder_bias, sae.decoder)]
        with torch.enable_grad():
            loss = self.auxk(centred, residual, *leaves)
            gradients = torch.autograd.grad(loss * weight, leaves)
        slots = np.full(self.config.latents, -1, np.int32)
        slots[self.dead.numpy()] = np.arange(len(self.dead))
        return loss.item(), (slots, *(g.numpy() for g in gradients))

    def no_dead(self) -> tuple:
        d = self.sae.pre_bias.shape[0]
        none = np.zeros((0, d), np.float32)
        return np.full(self.config.latents, -1, np.int32), none, np.zeros(0, np.float32), none

    @torch.no_grad()
    def squared_error(self, x: torch.Tensor) -> float:
        """Mean of |x - x_hat|^2 over normalised rows, of `result`."""
        sae = self.result()
        blocks = x.split(self.config.batch_size)
        return sum(self.forward(sae, block - sae.pre_bias, 1.0)[0] for block in blocks) / len(x)

    def close(self) -> None:
        WORKERS.leave()
