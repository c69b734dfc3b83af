"""One training step, twice: in plain PyTorch (the reference, and the GPU's), and compiled for the CPU.

Both do the same with a batch x (B, d) of normalised rows:

    loss = (|x - x_hat|^2 + alpha AuxK) / (B variance)
    its gradient; the decoder's gradient off each row; Adam; decoder rows back to unit length

A third step (Triton on a GPU) goes beside them, into a file of its own, and is chosen in `train._step_kind`.
"""

from __future__ import annotations

import copy
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F

from .model import TopKSAE
from .select import compiled, topk, topk_plain

BETAS, EPS = (0.9, 0.999), 6.25e-10
ROWS, LATENTS = 256, 64  # what a thread of the compiled step takes at a time: pre-activations that stay in its cache


def auxk_loss(centred, residual, encoder, bias, decoder, k: int) -> torch.Tensor:
    """|e - e_hat|^2 summed over the batch: dead latents reconstruct the residual e, without the pre-bias.

    Only the dead latents' rows come in, encoder and decoder (n_dead, d), bias (n_dead,): that is what makes AuxK cost
    nothing when nothing is dead, and keeps the living out of it. centred = x - b and residual = x - x_hat, both
    (B, d), are constants.
    """
    z = F.linear(centred.detach(), encoder, bias)
    code = z.relu()
    if k < code.shape[1]:
        chosen = topk(z.detach(), k)[1]
        code = torch.zeros_like(code).scatter(1, chosen, code.gather(1, chosen))
    return (residual.detach() - code @ decoder).square().sum()


class Step:
    """What both kinds share: the counters, the dead, the average of the weights."""

    def __init__(self, sae: TopKSAE, variance: float, window: int) -> None:
        self.sae, self.config, self.variance, self.window = sae, sae.config, variance, window
        device = sae.pre_bias.device
        self.products = choose_products(self.config.products, device)
        self.average = copy.deepcopy(sae) if self.config.ema else None
        self.steps = 0
        self.idle = torch.zeros(self.config.latents, dtype=torch.int32, device=device)  # steps since it last fired
        self.find_dead()
        self.totals = torch.zeros(4, dtype=torch.float64, device=device)  # rows, loss, squared error, active

    def auxk(self, centred, residual, encoder, bias, decoder) -> torch.Tensor:
        """AuxK's share of the summed loss, from the rows of the dead. One that fired since is out: z = -infinity."""
        revived = self.idle[self.dead] < self.window
        k = self.config.aux_k or max(1, centred.shape[1] // 2)
        loss = auxk_loss(centred, residual, encoder, bias.masked_fill(revived, -torch.inf), decoder, k)
        return self.config.aux_alpha * loss

    def read(self) -> dict[str, float]:
        """What was counted since the last call, and a new dead set: the one place that waits for the device."""
        rows, loss, squared_error, active = self.totals.tolist()
        self.totals.zero_()
        self.find_dead()
        return {
            "loss": loss / rows / self.variance,
            "fvu": squared_error / rows / self.variance,
            "l0": active / rows,
            "dead_fraction": len(self.dead) / self.config.latents,
        }

    def find_dead(self) -> None:
        """Latents that AuxK works on until the next call, (n_dead,)."""
        self.dead = (self.idle >= self.window).nonzero().ravel()

    @torch.no_grad()
    def update_average(self) -> None:
        """Early steps count less, so that the start is soon forgotten; decoder rows stay unit."""
        if self.average is None:
            return
        decay = min(self.config.ema, (1 + self.steps) / (10 + self.steps))
        for mean, parameter in zip(self.average.parameters(), self.sae.parameters(), strict=True):
            mean.lerp_(parameter, 1 - decay)
        self.average.decoder.copy_(F.normalize(self.average.decoder, dim=1))

    def result(self) -> TopKSAE:
        """The SAE as it would be returned now: its weights, or their average."""
        return self.average or self.sae

    def close(self) -> None:
        """Give back what is held."""


class PlainStep(Step):
    """A step in plain PyTorch: autograd, torch.topk, embedding_bag, Adam. Any device, no wait for it."""

    def __init__(self, sae: TopKSAE, variance: float, window: int) -> None:
        super().__init__(sae, variance, window)
        self.adam = torch.optim.Adam(sae.parameters(), lr=0.0, betas=BETAS, eps=EPS, fused=True)

    def __call__(self, x: torch.Tensor, lr: float) -> None:
        sae = self.sae
        values, indices = self.encode(sae, x)
        residual = x - sae.weighted_rows(values, indices) - sae.pre_bias
        squared_error = loss = residual.square().sum()
        if len(self.dead) and self.config.aux_alpha:
            rows = (sae.encoder[self.dead], sae.encoder_bias[self.dead], sae.decoder[self.dead])
            loss = loss + self.auxk(x - sae.pre_bias, residual, *rows)
        self.adam.zero_grad()
        (loss / (len(x) * self.variance)).backward()
        with torch.no_grad():
            self.count(values > 0, indices, loss, squared_error)
            gradient = sae.decoder.grad
            gradient -= (gradient * sae.decoder).sum(1, keepdim=True) * sae.decoder  # that part changes the length only
            self.adam.param_groups[0]["lr"] = lr
            self.adam.step()
            sae.decoder.copy_(F.normalize(sae.decoder, dim=1))  # after the step: the last one ends on unit rows too
        self.steps += 1
        self.update_average()

    def encode(self, sae: TopKSAE, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The batch's code, differentiable. The (B, M) pre-activations have the products' precision."""
        if self.products == "float32":
            z = sae.preactivations(x)
        else:
            half = torch.bfloat16
            z = F.linear((x - sae.pre_bias).to(half), sae.encoder.to(half), sae.encoder_bias.to(half))
        values, indices = topk_plain(z, self.config.k, self.config.relu)
        return values.float(), indices

    def count(self, active, indices, loss, squared_error) -> None:
        fired = torch.zeros_like(self.idle).index_add_(0, indices.ravel(), active.ravel().to(torch.int32))
        self.idle.add_(1).masked_fill_(fired > 0, 0)
        rows = torch.full_like(loss, len(active))
        self.totals += torch.stack([rows, loss.detach(), squared_error.detach(), active.sum()])

    @torch.no_grad()
    def squared_error(self, x: torch.Tensor) -> float:
        """Mean of |x - x_hat|^2 over normalised rows, of `result`."""
        sae, total = self.result(), torch.zeros((), dtype=torch.float64, device=x.device)
        for block in x.split(self.config.batch_size):
            total += (block - sae.weighted_rows(*self.encode(sae, block)) - sae.pre_bias).square().sum()
        return total.item() / len(x)


class CompiledStep(Step):
    """The same for a CPU: torch multiplies, numba does the rest, gradients stay in cache.

    Threads take fixed blocks of rows, then of latents; whatever is summed across blocks is summed in their order, so
    the numbers do not depend on how many threads there are.
    """

    def __init__(self, sae: TopKSAE, variance: float, window: int) -> None:
        super().__init__(sae, variance, window)
        self.kernels = compiled()
        self.outer_threads = torch.get_num_threads()
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        # Each thread multiplies its own block, so torch itself must not start further ones.
        torch.set_num_threads(1)
        self.pool = ThreadPoolExecutor(min(cores, self.outer_threads), "sae", torch.set_num_threads, (1,))
        self.moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in sae.named_parameters()}
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
        self.pool.shutdown()
        torch.set_num_threads(self.outer_threads)


def choose_products(wish: str, device: torch.device) -> str:
    """bf16 where the hardware multiplies it faster than float32. By capability: a measurement could differ per run."""
    if wish != "auto":
        return wish
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    able = [getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
    return "bf16" if device.type == "cpu" and any(test() for test in able if test) else "float32"
