"""One training step, twice: in plain PyTorch (the reference, and the GPU's), and compiled for the CPU.

Both do the same. For a batch x (B, d) of normalised rows:

    loss = |x - x_hat|^2 / (B variance) + alpha AuxK;  gradient;  decoder gradient off each row;  Adam;  unit rows

A third step (Triton on a GPU) goes beside them, with the same five methods, and into `train._step_kind`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .model import TopKSAE
from .select import topk, topk_plain

BETAS, EPS = (0.9, 0.999), 6.25e-10
PARAMETERS = ("encoder", "encoder_bias", "decoder", "pre_bias")


def auxk_loss(
    centred: torch.Tensor,
    residual: torch.Tensor,
    encoder: torch.Tensor,
    encoder_bias: torch.Tensor,
    decoder: torch.Tensor,
    k: int,
) -> torch.Tensor:
    """|e - e_hat|^2 summed over the batch: dead latents reconstruct the residual e, without the bias.

    Only the dead latents' rows come in, encoder and decoder (n_dead, d): that is what makes AuxK cost nothing when
    nothing is dead, and keeps the living out of it. centred = x - b and residual = x - x_hat, (B, d), are constants.
    """
    z = F.linear(centred.detach(), encoder, encoder_bias)
    code = z.relu()
    if k < code.shape[1]:
        chosen = topk(z.detach(), k)[1]
        code = torch.zeros_like(code).scatter(1, chosen, code.gather(1, chosen))
    return (residual.detach() - code @ decoder).square().sum()


class PlainStep:
    """A step in plain PyTorch: autograd, torch.topk, embedding_bag, Adam. Any device."""

    def __init__(self, sae: TopKSAE, variance: float, window: int) -> None:
        self.sae, self.config, self.variance, self.window = sae, sae.config, variance, window
        device = sae.pre_bias.device
        self.products = choose_products(self.config.products, device)
        self.adam = torch.optim.Adam(sae.parameters(), lr=0.0, betas=BETAS, eps=EPS, fused=device.type == "cuda")
        self.ema = _Average(sae, self.config.ema) if self.config.ema else None
        self.idle = torch.zeros(self.config.latents, dtype=torch.int32, device=device)  # steps since it last fired
        self.dead = self.idle.nonzero().ravel()  # dead when the epoch began; they leave AuxK when they fire
        self.totals = torch.zeros(4, dtype=torch.float64, device=device)  # rows, loss, squared error, active

    def __call__(self, x: torch.Tensor, lr: float) -> None:
        """One step on normalised rows x (B, d). Waits for nothing."""
        sae, cfg = self.sae, self.config
        values, indices = self.encode(x)
        error = x - sae.weighted_rows(values, indices) - sae.pre_bias
        squared_error = error.square().sum()
        loss = squared_error / self.variance
        if len(self.dead) and cfg.aux_alpha:
            loss = loss + cfg.aux_alpha * self.auxk(x, error) / self.variance
        self.adam.zero_grad()
        (loss / len(x)).backward()
        with torch.no_grad():
            self.count(values, indices, loss, squared_error)
            rows, gradient = sae.decoder, sae.decoder.grad
            gradient -= (gradient * rows).sum(1, keepdim=True) * rows  # a step along the row would change its length
            self.adam.param_groups[0]["lr"] = lr
            self.adam.step()
            sae.decoder.copy_(F.normalize(rows, dim=1))  # after the step, so that the last one too ends on unit rows
            if self.ema:
                self.ema.update()

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The batch's code, differentiable; the (B, M) pre-activations have the products' precision."""
        sae = self.sae
        if self.products == "float32":
            z = sae.preactivations(x)
        else:
            half = torch.bfloat16
            z = F.linear((x - sae.pre_bias).to(half), sae.encoder.to(half), sae.encoder_bias.to(half))
        values, indices = topk_plain(z, self.config.k, self.config.relu)
        return values.float(), indices

    def auxk(self, x: torch.Tensor, error: torch.Tensor) -> torch.Tensor:
        sae = self.sae
        still = torch.where(self.idle[self.dead] >= self.window, 0.0, -torch.inf)  # revived ones never fire here
        k = self.config.aux_k or max(1, x.shape[1] // 2)
        bias = sae.encoder_bias[self.dead] + still
        return auxk_loss(x - sae.pre_bias, error, sae.encoder[self.dead], bias, sae.decoder[self.dead], k)

    def count(self, values, indices, loss, squared_error) -> None:
        active = values > 0
        self.idle += 1
        fired = torch.zeros_like(self.idle).index_add_(0, indices.ravel(), active.ravel().to(torch.int32))
        self.idle.masked_fill_(fired > 0, 0)
        rows = torch.tensor(len(values), device=loss.device)
        self.totals += torch.stack([rows, loss.detach(), squared_error.detach(), active.sum()]).double()

    def read(self) -> dict[str, float]:
        """What was counted since the last call: the one place that waits for the device. Renews the dead set."""
        rows, loss, squared_error, active = self.totals.tolist()
        self.totals.zero_()
        self.dead = (self.idle >= self.window).nonzero().ravel()
        return {
            "loss": loss / rows,
            "fvu": squared_error / (rows * self.variance),
            "l0": active / rows,
            "dead_fraction": len(self.dead) / self.config.latents,
        }

    @torch.no_grad()
    def squared_error(self, x: torch.Tensor, size: int = 4096) -> float:
        """Mean of |x - x_hat|^2 over normalised rows, with the weights that `weights` gives."""
        mine = {name: p.data for name, p in self.sae.named_parameters()}
        self.use(self.weights())
        total = torch.zeros((), dtype=torch.float64, device=x.device)
        for block in x.split(size):
            total += (block - self.sae.weighted_rows(*self.encode(block)) - self.sae.pre_bias).square().sum()
        self.use(mine)
        return total.item() / len(x)

    def use(self, weights: dict[str, torch.Tensor]) -> None:
        for name, parameter in self.sae.named_parameters():
            parameter.data = weights[name]

    def weights(self) -> dict[str, torch.Tensor]:
        """The parameters, or their running average."""
        return self.ema.weights() if self.ema else {name: p.data for name, p in self.sae.named_parameters()}

    def close(self) -> None:
        """Nothing is held."""


class _Average:
    """Running average of the weights; early steps count less, so that the start is soon forgotten."""

    def __init__(self, sae: TopKSAE, decay: float) -> None:
        self.sae, self.decay, self.steps = sae, decay, 0
        self.mean = {name: p.detach().clone() for name, p in sae.named_parameters()}

    def update(self) -> None:
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        for name, parameter in self.sae.named_parameters():
            self.mean[name].lerp_(parameter.detach(), 1 - decay)

    def weights(self) -> dict[str, torch.Tensor]:
        return self.mean | {"decoder": F.normalize(self.mean["decoder"], dim=1)}


class CompiledStep(PlainStep):
    """placeholder"""


def choose_products(wish: str, device: torch.device) -> str:
    """bf16 where the hardware multiplies it faster than float32. By capability: a measurement could differ per run."""
    if wish != "auto":
        return wish
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    able = [getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
    return "bf16" if device.type == "cpu" and any(test() for test in able if test) else "float32"
