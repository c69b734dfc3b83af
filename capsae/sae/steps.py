"""One training step in plain PyTorch: the reference of the fast ones in `kernels`, and any device's.

All do the same with a batch x (B, d) of normalised rows:

    loss = (|x - x_hat|^2 + alpha AuxK) / (B variance)
    its gradient; the decoder's gradient off each row; Adam; decoder rows back to unit length
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable

import torch
import torch.nn.functional as F

from .. import distributed
from .model import TopKSAE
from .select import topk, topk_plain

log = logging.getLogger(__name__)
BETAS, EPS = (0.9, 0.999), 6.25e-10


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
    """What all kinds share: the counters, the dead, the average of the weights.

    `totals` and `idle` are up to date on the device after each step; `sharded`: see `PlainStep`.
    """

    sharded = False
    portable = False  # the same bits on every CPU
    proven = True  # without `selfcheck.proven`

    def __init__(self, sae: TopKSAE, variance: float, window: int) -> None:
        self.sae, self.config, self.variance, self.window = sae, sae.config, variance, window
        device = sae.pre_bias.device
        self.products = choose_products(self.config.products, device)
        self.average = copy.deepcopy(sae) if self.config.ema else None
        self.steps = 0
        self.idle = torch.zeros(self.config.latents, dtype=torch.int32, device=device)  # steps since it last fired
        self.find_dead()
        self.totals = torch.zeros(4, dtype=torch.float64, device=device)  # rows, loss, squared error, active
        # Adam's, by parameter; changed in place only, so that state() and load_state() serve every kind of step.
        self.moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in sae.named_parameters()}

    def state(self) -> dict[str, torch.Tensor]:
        """All that the next step depends on, by name: the tensors themselves, not copies."""
        tensors = {f"sae.{name}": value for name, value in self.sae.state_dict().items()}
        if self.average is not None:
            tensors |= {f"average.{name}": value for name, value in self.average.state_dict().items()}
        for name, (first, second) in self.moments.items():
            tensors |= {f"first_moment.{name}": first, f"second_moment.{name}": second}
        counted = {"idle": self.idle, "dead": self.dead, "totals": self.totals, "steps": torch.tensor(self.steps)}
        return tensors | counted

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from what `state` gave. Tensors are overwritten in place: steps may hold on to their memory."""
        self.steps, self.dead = int(state["steps"]), state["dead"].to(self.idle.device)
        with torch.no_grad():
            for name, tensor in self.state().items():
                if name not in ("steps", "dead"):
                    tensor.copy_(state[name])

    def take(self, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """A batch: rows of x by their numbers."""
        return x[rows]

    @classmethod
    def together(cls, steps: list[Step]) -> Callable[[list[torch.Tensor], list[float]], None]:
        """One call for a step of each: f(batches, learning rates). A kind that gains by it does more than this."""

        def take(batches: list[torch.Tensor], lrs: list[float]) -> None:
            for step, x, lr in zip(steps, batches, lrs, strict=True):
                step(x, lr)

        return take

    def auxk(self, centred, residual, encoder, bias, decoder) -> torch.Tensor:
        """AuxK's share of the summed loss, from the rows of the dead. One that fired since is out: z = -infinity."""
        revived = self.idle[self.dead] < self.window
        k, n = self.config.aux_k or max(1, centred.shape[1] // 2), self.aux_rows(len(centred))
        loss = auxk_loss(centred[:n], residual[:n], encoder, bias.masked_fill(revived, -torch.inf), decoder, k)
        return self.aux_share(len(centred), residual.detach().square().sum()) * loss

    def aux_share(self, n: int, squared_error):
        """By what AuxK's summed loss is multiplied beside the summed |x - x_hat|^2 of a batch of n rows."""
        share = self.config.aux_alpha * n / self.aux_rows(n)
        return share if self.config.aux_scale == "input" else share * n * self.variance / squared_error

    def aux_rows(self, n: int) -> int:
        """How many of a batch's n rows AuxK looks at: at least 1, also of none."""
        return max(1, round(self.config.aux_rows * n))

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

    def fvu(self) -> float:
        """Of what was counted so far: waits for the device."""
        rows, _, squared_error, _ = self.totals.tolist()
        return squared_error / rows / self.variance

    def find_dead(self) -> None:
        """Latents that AuxK works on until the next call, (n_dead,)."""
        self.dead = (self.idle >= self.window).nonzero().ravel()

    def average_decay(self) -> float:
        """Of the average of the weights, at this step."""
        return min(self.config.ema, (1 + self.steps) / (10 + self.steps))

    @torch.no_grad()
    def update_average(self) -> None:
        """Early steps count less, so that the start is soon forgotten; decoder rows stay unit."""
        if self.average is None:
            return
        for mean, parameter in zip(self.average.parameters(), self.sae.parameters(), strict=True):
            mean.lerp_(parameter, 1 - self.average_decay())
        self.average.decoder.copy_(F.normalize(self.average.decoder, dim=1))

    def calibrate(self, rows: torch.Tensor) -> None:
        """Adapt what is returned to held-out rows (n, d), normalised, after each epoch: thresholds, of variants."""

    def result(self) -> TopKSAE:
        """The SAE as it would be returned now: its weights, or their average."""
        return self.average or self.sae

    def notes(self) -> dict:
        """What the history's attrs say of this kind of step alone."""
        return {}

    def close(self) -> None:
        """Give back what is held."""


class PlainStep(Step):
    """A step in plain PyTorch: autograd, torch.topk, embedding_bag, Adam. Any device, no wait for it.

    With `sharded`, x is this rank's part of the batch, maybe of no row at all: gradients and counts are summed over the
    ranks, so that all make the same step, which is that of one process with the whole batch.
    """

    def __init__(self, sae: TopKSAE, variance: float, window: int) -> None:
        super().__init__(sae, variance, window)
        self.products = "float32" if self.products == "portable" else self.products
        self.adam = torch.optim.Adam(sae.parameters(), lr=0.0, betas=BETAS, eps=EPS, fused=True)
        for name, p in sae.named_parameters():
            first, second = self.moments[name]
            self.adam.state[p] = {"step": torch.zeros((), device=p.device), "exp_avg": first, "exp_avg_sq": second}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        super().load_state(state)
        for p in self.sae.parameters():
            self.adam.state[p]["step"].fill_(self.steps)

    def __call__(self, x: torch.Tensor, lr: float) -> None:
        sae = self.sae
        values, indices = self.encode(sae, x)
        residual = x - sae.weighted_rows(values, indices) - sae.pre_bias
        squared_error = loss = residual.square().sum()
        if len(self.dead) and self.config.aux_alpha:
            rows = (sae.encoder[self.dead], sae.encoder_bias[self.dead], sae.decoder[self.dead])
            loss = loss + self.auxk(x - sae.pre_bias, residual, *rows)
        self.adam.zero_grad()
        (loss / self.variance).backward()
        with torch.no_grad():
            rows = torch.full_like(loss, len(x))
            counts = torch.stack([rows, loss.detach(), squared_error.detach(), (values > 0).sum()])
            self.share(counts, fired := self.fired(values > 0, indices))
            self.totals += counts
            self.idle.add_(1).masked_fill_(fired > 0, 0)
            for p in sae.parameters():
                p.grad /= counts[0]
            gradient = sae.decoder.grad
            gradient -= (gradient * sae.decoder).sum(1, keepdim=True) * sae.decoder  # that part changes the length only
            self.adam.param_groups[0]["lr"] = lr
            self.adam.step()
            sae.decoder.copy_(F.normalize(sae.decoder, dim=1))  # after the step: the last one ends on unit rows too
        self.steps += 1
        self.update_average()

    def encode(self, sae: TopKSAE, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The batch's code, differentiable. The (B, M) pre-activations have the products' precision: bf16 rounds them,
        so that ties at the k-th place are common, and a row's support may differ from that at inference."""
        if self.products != "bf16":
            z = sae.preactivations(x)
        else:
            half = torch.bfloat16
            z = F.linear((x - sae.pre_bias).to(half), sae.encoder.to(half), sae.encoder_bias.to(half))
        values, indices = topk_plain(z, self.config.k, self.config.relu)
        return values.to(x.dtype), indices

    def fired(self, active: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """How often each latent fired in the batch, (M,)."""
        none = torch.zeros_like(self.sae.encoder_bias)
        return none.index_add_(0, indices.ravel(), active.ravel().to(none))

    def share(self, *tensors: torch.Tensor) -> None:
        """Sum tensors and gradients over the ranks, in place and in one message."""
        if self.sharded:
            tensors = *tensors, *(p.grad for p in self.sae.parameters())
            total = distributed.all_reduce(torch.cat([t.ravel() for t in tensors]))
            for tensor, part in zip(tensors, total.split([t.numel() for t in tensors]), strict=True):
                tensor.copy_(part.view_as(tensor))

    @torch.no_grad()
    def squared_error(self, x: torch.Tensor) -> float:
        """Mean of |x - x_hat|^2 over normalised rows, of `result`."""
        sae, total = self.result(), torch.zeros((), dtype=torch.float64, device=x.device)
        for block in x.split(self.config.batch_size):
            total += (block - sae.weighted_rows(*self.encode(sae, block)) - sae.pre_bias).square().sum()
        return total.item() / len(x)


def choose_products(wish: str, device: torch.device) -> str:
    """ "auto" is portable on a CPU, and on a GPU bf16 where it multiplies that faster than float32."""
    if wish == "portable" and device.type != "cpu":
        log.warning("products='portable' is for CPUs: on %s it is float32, and weights depend on the device", device)
        return "float32"
    if wish != "auto":
        return wish
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return "portable" if device.type == "cpu" else "float32"
