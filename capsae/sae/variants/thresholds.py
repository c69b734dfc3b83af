"""The sparse autoencoders of the literature beside Top-k: each is a selection rule, loss terms and an initialisation.

    sae, history = train_sae(x, SAEConfig(latents=1920, k=32, variant="jumprelu", options={"weight": 3.0}))

z = W_enc (x - b) + c of normalised rows x; codes a; x_hat = sum_i a_i w_i + b with unit rows w_i, as for `TopKSAE`. One
loop trains all (`train`); a variant's step is `step.VariantStep`, in which the loss is summed over the batch
and later divided by its rows and by the variance V of all rows. Weights of added terms are such that V does not matter:
terms of |a| are multiplied by sqrt(V), terms without unit by V.

Sources: [s] as in the source, [r] our reconstruction. Where the source leaves L0 to a coefficient, `k` is the target:
the coefficient is moved until the batches' mean L0 is k [r], so that variants can be compared at equal L0.

Variants with signed codes (AbsTopK) split the signs, as `dictionaries` does: 2 M latents, values >= 0.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..config import SAEConfig
from ..model import REGISTRY, TopKSAE, model, register
from ..select import topk

SAMPLE = 4096  # rows whose pre-activations thresholds start from
__all__ = ["REGISTRY", "model", "register"]  # with what is defined here


class Forward(NamedTuple):
    """What a variant's training step needs: rows fired per latent (M,), x - x_hat (B, d), the summed loss."""

    fired: torch.Tensor
    residual: torch.Tensor
    loss: torch.Tensor


def info(name: str) -> dict:
    """Metadata of a variant: title, formula, source, defaults, description."""
    cls = REGISTRY[name]
    if cls is TopKSAE:
        return {
            "title": "TopK",
            "formula": r"a=\mathrm{TopK}_k(\mathrm{relu}(z))",
            "source": "arXiv 2406.04093 [s]",
            "defaults": {},
            "description": TopKSAE.__doc__,
        }
    return {key: getattr(cls, key) for key in ("title", "formula", "source", "defaults")} | {"description": cls.__doc__}


class Variant(TopKSAE):
    """Base: a variant defines `activate` (inference) and, where training differs, `train_activate` and `penalty`."""

    title: ClassVar[str]
    formula: ClassVar[str]
    source: ClassVar[str]
    defaults: ClassVar[dict] = {}
    needs_head: ClassVar[bool] = False  # a linear head on normalised rows, given to train_sae
    auxk: ClassVar[bool] = True  # dead latents reconstruct the residual, as TopK's do
    block = 512  # rows of the dense code at a time

    def __init__(self, d: int, config: SAEConfig) -> None:
        super().__init__(d, config)
        self.options = self.defaults | config.options
        self.variance, self.n_steps = 1.0, 1

    @torch.no_grad()
    def begin(self, rows: torch.Tensor, variance: float, n_steps: int, head=None) -> None:
        """Before the first step: initialise from (a sample of) normalised rows (n, d)."""
        self.variance, self.n_steps = variance, n_steps
        if (head is not None) != self.needs_head:
            raise ValueError(
                f"variant {self.config.variant!r} {'needs' if self.needs_head else 'takes no'} head; with 'gsae', "
                "head=fit_linear_probe(sae.normalize(x), labels, n_classes) would do"
            )
        if head is not None:
            self.head = tuple(torch.as_tensor(t).to(rows) for t in (head.weight, head.bias))

    def activate(self, x: torch.Tensor) -> torch.Tensor:
        """Codes (B, M) >= 0, dense, of normalised rows (B, d), as at inference."""
        raise TypeError(f"{type(self).__name__} defines no activate")

    def train_activate(self, x: torch.Tensor, done: int) -> torch.Tensor:
        """The same in training, differentiable, after `done` steps."""
        return self.activate(x)

    def penalty(self, x: torch.Tensor, a: torch.Tensor, done: int) -> torch.Tensor | float:
        """What is added to the squared error, summed over the batch."""
        return 0.0

    def forward_loss(self, x: torch.Tensor, done: int) -> Forward:
        """The batch's loss; `done` steps were made before."""
        a = self.train_activate(x, done)
        residual = x - self.pre_bias - a @ self.rows()
        return Forward((a != 0).sum(0), residual, residual.square().sum() + self.penalty(x, a, done))

    def rows(self) -> torch.Tensor:
        """Decoder rows (M, d) as the loss sees them."""
        return self.decoder

    def after_step(self, x: torch.Tensor, forward: Forward, done: int) -> None:
        """After the optimiser's step: thresholds, coefficients, constraints."""

    def code(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Values (N, K) >= 0, largest first, and indices, K the largest number of active latents in these rows."""
        a = self.activate(x)
        return topk(a, max(1, int((a > 0).sum(1).max())))

    def scale(self) -> float:
        """sqrt(V): the unit of codes."""
        return self.variance**0.5


class Levelled(Variant):
    """A variant whose latents fire over thresholds, so that L0 is k on average at best: `margin` says by how much.

    Rows that were not trained on have other margins than those that were. Therefore `calibrate` moves all thresholds
    by one number, `shift`, so that the mean L0 of held-out rows is k [r]: in `train_sae`, after each epoch, where
    `held_out` is given; without, shift is 0, and L0 on unseen rows may be off by a fifth where rows are few. Training
    itself never sees it.
    """

    def __init__(self, d, config):
        super().__init__(d, config)
        self.register_buffer("shift", torch.zeros(1))

    def level(self) -> torch.Tensor:
        """Thresholds, (M,) or (1,)."""
        return self.threshold

    def margin(self, x: torch.Tensor) -> torch.Tensor:
        """By how much each latent is over its threshold (B, M); -infinity where no threshold would let it fire."""
        z = self.preactivations(x)
        return positive(z, z - self.level())

    def activate(self, x):
        return self.preactivations(x) * (self.margin(x) > self.shift)

    @torch.no_grad()
    def calibrate(self, rows: torch.Tensor) -> None:
        """Set `shift` by (at most SAMPLE of) normalised rows (n, d)."""
        margin = self.margin(rows[:: -(-len(rows) // SAMPLE)])
        fewer = margin.numel() - min(self.config.k * len(margin), margin.numel() - 1)
        self.shift.fill_(margin.flatten().kthvalue(fewer).values.clamp_min(torch.finfo(margin.dtype).min))


def positive(z: torch.Tensor, margin: torch.Tensor) -> torch.Tensor:
    """`margin` where z is positive, else -infinity."""
    return margin.masked_fill(z <= 0, -torch.inf)


def keep(z: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """z (B, M) where `indices` (B, k) point, 0 elsewhere."""
    return torch.zeros_like(z).scatter(1, indices, z.gather(1, indices))


def follow(done: int, decay: float) -> float:
    """Weight of the past in a running mean after `done` steps: less of it early, so that the start is forgotten."""
    return min(decay, (1 + done) / (10 + done))


def descending(z: torch.Tensor, dim: int) -> torch.Tensor:
    """z sorted along a dimension, largest first, without gradient. On a CPU numpy sorts over ten times faster."""
    z = z.detach()
    return torch.from_numpy(np.sort(z.numpy(), dim)).flip(dim) if z.device.type == "cpu" else z.sort(dim, True).values


def bar(z: torch.Tensor, k: int) -> torch.Tensor:
    """The k B-th largest of z (B, M), a scalar; not under 0."""
    flat = z.detach().flatten()
    wanted = min(k * len(z), flat.numel())
    return flat.kthvalue(flat.numel() - wanted + 1).values.clamp_min(0)


class _Controlled(Levelled):
    """A price on activity, `l1` if that is not 0; else moved until L0 is k. Biases start where L0 is k, both [r]."""

    defaults: ClassVar[dict] = {"l1": 0.0, "l1_start": 0.1, "l1_rate": 0.03, "l1_warmup": 0.05}

    def __init__(self, d, config):
        super().__init__(d, config)
        self.register_buffer("l1", torch.tensor([float(self.options["l1"] or self.options["l1_start"])]))

    @torch.no_grad()
    def begin(self, rows, variance, n_steps, head=None):
        super().begin(rows, variance, n_steps, head)
        bias = self.gate_bias if hasattr(self, "gate_bias") else self.encoder_bias
        bias.sub_(bar(self.preactivations(rows[:SAMPLE]), self.config.k))

    def weight(self, done: int) -> torch.Tensor:
        warm = self.options["l1_warmup"] * self.n_steps
        return self.l1[0] * self.scale() * min(1.0, (done + 1) / (warm + 1))

    def after_step(self, x, forward, done):
        if not self.options["l1"]:
            excess = (forward.fired.sum() / len(x) / self.config.k).clamp_min(1e-3).log().clamp(-1, 1)
            self.l1 *= (self.options["l1_rate"] * excess).exp()


@register("relu")
class ReLU(_Controlled):
    """The first sparse autoencoder: all that is positive, and a price on its sum."""

    title = "ReLU / L1"
    formula = r"a=\mathrm{relu}(z),\quad +\lambda\sum_i a_i\lVert w_i\rVert"
    source = "Bricken et al. 2023, with the decoder's norm of April 2024 [s]; start, lambda moved to L0 = k [r]"

    def margin(self, x):
        return self.preactivations(x)

    def activate(self, x):
        return (self.preactivations(x) - self.shift).relu()

    def train_activate(self, x, done):
        return self.preactivations(x).relu()

    def penalty(self, x, a, done):
        return self.weight(done) * a.sum()  # rows are unit


@register("gated")
class Gated(_Controlled):
    """What fires is decided apart from how strongly, so that the price on the gate does not shrink the values."""

    title = "Gated"
    formula = (
        r"a=H(g)\,\mathrm{relu}(e^{r}\tilde z+c),\ g=\tilde z+b_g,\quad "
        r"+\lambda\sum\mathrm{relu}(g)+\lVert x-\hat x_{\mathrm{frozen}}(\mathrm{relu}(g))\rVert^2"
    )
    source = "arXiv 2404.16014 [s]; lambda moved to L0 = k [r]"

    def __init__(self, d, config):
        super().__init__(d, config)
        self.gate_bias = nn.Parameter(torch.zeros(config.latents))
        self.log_gain = nn.Parameter(torch.zeros(config.latents))

    def parts(self, x):
        """Values before the gate and the gate, both (B, M)."""
        product = F.linear(x - self.pre_bias, self.encoder)
        return (product * self.log_gain.exp() + self.encoder_bias).relu(), product + self.gate_bias

    def margin(self, x):
        return positive(*self.parts(x))

    def activate(self, x):
        value, gate = self.parts(x)
        return value * (gate > self.shift)

    def train_activate(self, x, done):
        value, gate = self.parts(x)
        return value * (gate > 0)

    def penalty(self, x, a, done):
        gate = F.linear(x - self.pre_bias, self.encoder, self.gate_bias).relu()
        frozen = x - self.pre_bias.detach() - gate @ self.decoder.detach()
        return self.weight(done) * gate.sum() + frozen.square().sum()


class Jump(torch.autograd.Function):
    """z H(z - theta), or H(z - theta) with `count`; the gradient in theta is that of a rectangle of width `bandwidth`
    (arXiv 2407.14435, eq. 11 and 12; the count has none in z)."""

    @staticmethod
    def forward(ctx, z, theta, bandwidth, count):
        ctx.save_for_backward(z, theta)
        ctx.bandwidth, ctx.count = bandwidth, count
        return (z > theta).to(z) if count else z * (z > theta)

    @staticmethod
    def backward(ctx, g):
        z, theta = ctx.saved_tensors
        near = ((z - theta).abs() < ctx.bandwidth / 2) / ctx.bandwidth
        if ctx.count:
            return None, -(near * g).sum(0), None, None
        return g * (z > theta), -(theta * near * g).sum(0), None, None


@register("jumprelu")
class JumpReLU(Levelled):
    """A threshold of its own for each latent, learned through a rectangle; L0 is pulled to k.

    Bandwidth is in units of sqrt(V), as the source scales its input to mean square 1. The source's 1e-3 is meant for
    10^5 steps of large batches; ours [r] is wider. Thresholds start where L0 is k on a sample of rows [r].
    """

    title = "JumpReLU"
    formula = r"a=z\,H(z-\theta),\quad +\lambda V(L_0/k-1)^2"
    source = "arXiv 2407.14435 [s]; start and bandwidth [r]"
    defaults: ClassVar[dict] = {"bandwidth": 0.02, "weight": 3.0}

    def __init__(self, d, config):
        super().__init__(d, config)
        self.log_threshold = nn.Parameter(torch.zeros(config.latents))

    @torch.no_grad()
    def begin(self, rows, variance, n_steps, head=None):
        super().begin(rows, variance, n_steps, head)
        rows = rows[:SAMPLE]
        self.log_threshold.fill_(bar(self.preactivations(rows), self.config.k).clamp_min(1e-3 * self.scale()).log())

    def level(self):
        return self.log_threshold.exp()

    def jump(self, x, count: bool) -> torch.Tensor:
        return Jump.apply(self.preactivations(x), self.level(), self.options["bandwidth"] * self.scale(), count)

    def train_activate(self, x, done):
        return self.jump(x, count=False)

    def penalty(self, x, a, done):
        l0 = self.jump(x, count=True).sum() / len(x)
        return self.options["weight"] * self.variance * len(x) * (l0 / self.config.k - 1).square()


@register("gba")
class GBA(Levelled):
    """No price on sparsity: groups of latents with target frequencies, and thresholds moved until they are met.

    Ten groups of equal size, targets geometric from .1 to 1e-3, then scaled so that their sum is k [r]. A latent that
    fires too often has its threshold raised by `rate` of its largest pre-activation, one that never does has it
    lowered [s]; in between, the move is in proportion to how far it is off [r]. The start is the threshold that gives
    the target on a sample of rows [r].

    Features that are all equally frequent contradict unequal targets: a planted dictionary of such is found with one
    group, and less well with ten (tests).
    """

    title = "GBA"
    formula = r"a_i=z_i\,H(z_i-\theta_i),\quad \theta_i\mathrel{+}=\eta\,\max z_i\,\mathrm{clip}(\rho_i/f_i-1,-1,1)"
    source = "arXiv 2506.14002 [s, from notes]; scaled targets and the proportional move [r]"
    defaults: ClassVar[dict] = {"rate": 0.01, "density_ema": 0.9, "groups": 10}

    def __init__(self, d, config):
        super().__init__(d, config)
        for name in ("threshold", "density", "peak"):
            self.register_buffer(name, torch.zeros(config.latents))

    def targets(self) -> torch.Tensor:
        """Frequencies (M,) with the sum k, each at most 1/2."""
        latents, groups = self.config.latents, self.options["groups"]
        group = torch.arange(latents, device=self.decoder.device) * groups // latents
        f = 0.1 * (1e-2 ** (group / max(1, groups - 1)))
        for _ in range(20):
            f = (f * self.config.k / f.sum()).clamp_max(0.5)
        return f

    @torch.no_grad()
    def begin(self, rows, variance, n_steps, head=None):
        super().begin(rows, variance, n_steps, head)
        rows = rows[:SAMPLE]
        ordered = descending(self.preactivations(rows), 0)
        place = (self.targets() * len(rows)).long().clamp(0, len(rows) - 1)
        self.threshold.copy_(ordered.gather(0, place[None])[0].clamp_min(0))
        self.peak.copy_(ordered[0].clamp_min(0))
        self.density.copy_(self.targets())

    def train_activate(self, x, done):
        z = self.preactivations(x)
        return z * (z > self.threshold)

    def after_step(self, x, forward, done):
        self.density.lerp_(forward.fired / len(x), 1 - self.options["density_ema"])
        self.peak.lerp_(self.preactivations(x).amax(0).clamp_min(0), 1 - self.options["density_ema"])
        off = (self.density / self.targets() - 1).clamp(-1, 1)
        self.threshold.add_(self.options["rate"] * self.peak * off).clamp_min_(0)
