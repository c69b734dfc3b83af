"""Variants (see `variants`) that choose over a whole batch, and keep thresholds for when a row stands alone."""

from __future__ import annotations

from typing import ClassVar

import torch

from ..model import register
from .thresholds import Forward, Levelled, bar, descending, follow


@register("batch_topk")
class BatchTopK(Levelled):
    """The k B largest of the whole batch, so that rows may have more or fewer. At inference a row stands alone: one
    threshold, the running mean of the smallest value kept, saved with the model."""

    title = "BatchTopK"
    formula = r"a=z\,H(z-\theta_B),\ \theta_B\text{ the }kB\text{-th largest};\quad \bar\theta=\mathrm{EMA}(\theta_B)"
    source = "arXiv 2412.06410 [s]; a running mean that forgets its start [r]"
    defaults: ClassVar[dict] = {"threshold_ema": 0.999}

    def __init__(self, d, config):
        super().__init__(d, config)
        self.register_buffer("threshold", torch.zeros(1))
        self.last_bar = torch.zeros(1)

    def train_activate(self, x, done):
        z = self.preactivations(x)
        self.last_bar = bar(z, self.config.k)
        return z * (z >= self.last_bar) * (z > 0)

    def after_step(self, x, forward, done):
        self.threshold.lerp_(self.last_bar, 1 - follow(done, self.options["threshold_ema"]))


@register("matryoshka")
class Matryoshka(BatchTopK):
    """One BatchTopK code of which every prefix of the dictionary must reconstruct: general latents first.

    Four groups of 1/16, 2/16, 4/16 and 9/16 of the latents. Where planted features have no order, it recovers them less
    well than BatchTopK (tests).
    """

    title = "Matryoshka"
    formula = r"\sum_{m\in\mathcal M}\lVert x-b-\sum_{i\le m}a_iw_i\rVert^2"
    source = "arXiv 2503.17547 [s]"

    def forward_loss(self, x, done):
        a, latents = self.train_activate(x, done), self.config.latents
        residual, loss, start = x - self.pre_bias, 0.0, 0
        for end in sorted({max(1, round(latents * part)) for part in (1 / 16, 3 / 16, 7 / 16)} | {latents}):
            residual = residual - a[:, start:end] @ self.decoder[start:end]
            loss, start = loss + residual.square().sum(), end
        return Forward((a != 0).sum(0), residual, loss)


class _Zipf(BatchTopK):
    """What Mutual and Feature Choice share: latents that fire far less than Zipf's law says are revived [r].

    `underused`: latents whose running density is under `tau` of the Zipf value of its rank; they take the place of the
    dead in AuxK (the source's aux_zipf_loss; its formula was not found). Zipf's law here: the r-th of M latents has a
    density in proportion to 1 / (r + M shift), with the sum k.
    """

    defaults: ClassVar[dict] = BatchTopK.defaults | {"tau": 0.2, "shift": 0.05, "density_ema": 0.99}

    def __init__(self, d, config):
        super().__init__(d, config)
        self.register_buffer("density", torch.zeros(config.latents))

    def zipf(self) -> torch.Tensor:
        """Expected densities (M,), largest first."""
        latents = self.config.latents
        share = 1 / (torch.arange(latents, device=self.decoder.device) + 1 + latents * self.options["shift"])
        return self.config.k * share / share.sum()

    def underused(self) -> torch.Tensor:
        """Latents (n,) that AuxK works on."""
        order = self.density.argsort(descending=True, stable=True)
        low = self.density[order] < self.options["tau"] * self.zipf()
        return order[low].sort().values

    def after_step(self, x, forward, done):
        super().after_step(x, forward, done)
        self.density.lerp_(forward.fired / len(x), 1 - follow(done, self.options["density_ema"]))


@register("mutual_choice")
class MutualChoice(_Zipf):
    """The k B largest affinities of the batch, as BatchTopK has them, with aux_zipf_loss in place of AuxK."""

    title = "Mutual Choice"
    formula = r"a=z\,H(z-\theta_B),\quad +\alpha\lVert e-\hat e_U\rVert^2,\ U=\{i:\rho_i<\tau\,\mathrm{Zipf}(r_i)\}"
    source = "arXiv 2411.02124; aux_zipf_loss and inference [r]"


@register("feature_choice")
class FeatureChoice(_Zipf):
    """Latents choose rows: the i-th keeps its m_i strongest of the batch, m_i on Zipf's curve, sum m_i = k B.

    Which latent has which rank: by the running mean of its positive pre-activations [r]. At inference a threshold for
    each latent, the running mean of its m_i-th value [r], saved with the model.
    """

    title = "Feature Choice"
    formula = r"a_i=z_i\,H(z_i-\theta_i),\ \theta_i\text{ the }m_i\text{-th largest of the batch},\ \sum_i m_i=kB"
    source = "arXiv 2411.02124; ranks, curve and inference [r]"

    def __init__(self, d, config):
        super().__init__(d, config)
        self.threshold = torch.zeros(config.latents)
        self.register_buffer("drive", torch.zeros(config.latents))

    def train_activate(self, x, done):
        z = self.preactivations(x)
        drive = self.drive if done else z.detach().relu().mean(0)
        rank = drive.argsort(descending=True, stable=True).argsort()
        m = (self.zipf()[rank] * len(x)).clamp(1, len(x)).round().long()
        self.last_bar = descending(z, 0).gather(0, (m - 1)[None])[0].clamp_min(0)
        self.last_drive = z.detach().relu().mean(0)
        return z * (z >= self.last_bar) * (z > 0)

    def after_step(self, x, forward, done):
        super().after_step(x, forward, done)
        self.drive.lerp_(self.last_drive, 1 - follow(done, self.options["density_ema"]))
