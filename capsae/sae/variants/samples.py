"""Variants (see `variants`) in which each row keeps a number of latents of its own: k, as TopK does."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from ..dictionaries.pursuit import Left, kmeans, matching_pursuit, unroll
from ..model import register
from ..select import topk
from .thresholds import Forward, Variant, descending, keep


class _TopK(Variant):
    """The k largest of relu(z) at inference; training may choose otherwise."""

    def code(self, x):
        return topk(self.preactivations(x), self.config.k)

    def activate(self, x):
        z = self.preactivations(x).relu()
        return keep(z, topk(z.detach(), self.config.k)[1])


@register("hierarchical_topk")
class HierarchicalTopK(_TopK):
    """The first j of a row's latents, largest first, must reconstruct it for every j up to k: one SAE for all of them.

    To use a smaller k, cut the codes: ``SparseCodes(values[:, :j], indices[:, :j], M)``. Memory B k d in training.
    """

    title = "HierarchicalTopK"
    formula = r"\frac1k\sum_{j\le k}\lVert x-b-\sum_{l\le j}a_{(l)}w_{(l)}\rVert^2"
    source = "arXiv 2505.24473 [s]"

    def forward_loss(self, x, done):
        z = self.preactivations(x)
        indices = topk(z.detach(), self.config.k)[1]
        values = z.gather(1, indices).relu()
        parts = (values[:, :, None] * self.decoder[indices]).cumsum(1)
        left = (x - self.pre_bias)[:, None] - parts  # (B, k, d)
        fired = torch.zeros_like(self.encoder_bias).index_add_(0, indices.ravel(), (values > 0).ravel().to(x))
        return Forward(fired, left[:, -1], left.square().sum() / indices.shape[1])


@register("gsae")
class GSAE(_TopK):
    """Latents are chosen in training by what they do to the classifier, too: by z + beta z |W_dec grad|; values stay z.

    `grad` is that of the cross-entropy of a linear head on the normalised rows, for the class that it predicts: in
    closed form head^T (softmax - onehot), at root mean square 1 over the latents of a row. `train_sae` needs that head
    (`head=`, weight (C, d) and bias (C,), fitted on ``sae.normalize(x)``). Inference is TopK.
    """

    title = "g-SAE"
    formula = r"S=\mathrm{TopK}_k\bigl(z+\beta z\,|Wg|\bigr),\ g=V^\top(p-e_{\hat y}),\quad a=z_S"
    source = "arXiv 2411.10397 [s]; beta, class and unit root mean square [r]"
    defaults: ClassVar[dict] = {"beta": 1.0}
    needs_head: ClassVar[bool] = True

    def train_activate(self, x, done):
        z = self.preactivations(x).relu()
        with torch.no_grad():
            influence = (head_gradient(x, *self.head) @ self.decoder.T).abs()
            influence /= influence.square().mean(1, keepdim=True).sqrt().clamp_min(1e-30)
            chosen = topk(z * (1 + self.options["beta"] * influence), self.config.k)[1]
        return keep(z, chosen)


def head_gradient(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Gradient (B, d) of the cross-entropy of the predicted class in the rows x (B, d) of a linear head."""
    p = F.linear(x, weight, bias).softmax(1)
    return (p - F.one_hot(p.argmax(1), p.shape[1])) @ weight


@register("vsae")
class VSAE(_TopK):
    """An ablation: pre-activations are sampled in training. The authors' released runs did not sample (`sample` 0).

    sigma is learned, one for each latent, and starts at `sigma` sqrt(V) / sqrt(d) [r]; the prior is N(0, 1) in units of
    sqrt(V / d), the size of a pre-activation by chance [r].
    """

    title = "vSAE (an ablation)"
    formula = r"z=\mu+\epsilon\sigma,\quad +\beta\,\mathrm{KL}(N(\mu,\sigma^2)\,\Vert\,N(0,1))"
    source = "arXiv 2509.22994 [s]; sigma per latent and units [r]"
    defaults: ClassVar[dict] = {"beta": 1e-3, "sigma": 0.3, "sample": True}

    def __init__(self, d, config):
        super().__init__(d, config)
        self.log_sigma = nn.Parameter(torch.full((config.latents,), float(self.options["sigma"])).log())

    def forward_loss(self, x, done):
        unit = self.scale() / x.shape[1] ** 0.5
        mean = self.preactivations(x) / unit
        z = mean
        if self.options["sample"]:
            # Of the seed and the step's number alone: a resumed training draws the same.
            rng = torch.Generator(x.device).manual_seed(self.config.seed * 1_000_003 + done)
            z = mean + torch.randn(mean.shape, generator=rng, device=x.device) * self.log_sigma.exp()
        a = keep(z.relu(), topk(z.detach(), self.config.k)[1]) * unit
        residual = x - self.pre_bias - a @ self.decoder
        divergence = (mean.square() + (2 * self.log_sigma).exp() - 1 - 2 * self.log_sigma).sum() / 2
        loss = residual.square().sum() + self.options["beta"] * unit**2 * divergence
        return Forward((a != 0).sum(0), residual, loss)


@register("mp")
class MatchingPursuit(Variant):
    """Latents one after the other, each from what the last ones left over.

    Encoder and decoder are one, without a bias; at most k steps, fewer where nothing positive over `tolerance` |x| is
    left. A latent may come up again, so that a row may have fewer than k. The choice is made without gradient through
    the Gram matrix, z -= (w_i.r) G_i; the gradient then goes through the residuals of the chosen, in closed form
    (`pursuit.Left`).

    The source finds hierarchical features that others miss. We did not see that on planted trees of two levels, each in
    a subspace of its own: with the planted dictionary a pursuit selects the active path where thresholds of the same
    atoms do not; but trained (900 to 3600 steps) it recovers the path less well than TopK for siblings of cosine .5
    (tests), and for cosines of 0 to .9 neither is ahead for every seed in all designs. At .9 neither recovers it well.
    """

    title = "MP-SAE"
    formula = r"i=\arg\max\mathrm{relu}(Wr),\ a_i\mathrel{+}=w_i^\top r,\ r\leftarrow r-(w_i^\top r)w_i"
    source = "arXiv 2506.03093 [s]; selection by the Gram matrix [r]"
    defaults: ClassVar[dict] = {"tolerance": 1e-6}
    auxk = False

    @torch.no_grad()
    def choose(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Indices (B, k) in the order of choice, and which of them were chosen before the end."""
        found, indices = matching_pursuit(x, self.decoder, self.config.k, self.options["tolerance"])
        return indices, found > 0

    def activate(self, x):
        x = x - self.pre_bias
        indices, active = self.choose(x)
        values = unroll(x, self.decoder, indices, active)[0]
        # Two choices of one latent may cancel to a rounding below 0.
        return x.new_zeros(len(x), self.config.latents).scatter_add(1, indices, values).clamp_min(0)

    def forward_loss(self, x, done):
        x = x - self.pre_bias
        indices, active = self.choose(x)
        loss, _, left = Left.apply(x, self.decoder, indices, active)
        fired = torch.zeros_like(self.encoder_bias).index_add_(0, indices.ravel(), active.ravel().to(x))
        return Forward(fired, left, loss)

    def after_step(self, x, forward, done):
        self.encoder.copy_(self.decoder)  # tied: whoever reads the encoder reads the truth


@register("abs_topk")
class AbsTopK(Variant):
    """The k largest by absolute value, with their signs: one latent for a direction and its opposite.

    Codes are split: latent i where a_i > 0, M + i where a_i < 0, 2 M latents in all, so that values stay >= 0 and EPD
    tells the two ends apart (our choice). No row uses both. AuxK revives a latent that fires with neither sign, by its
    positive end. Reviving each silent end by itself helps nothing (imagenet20, 8 epochs, rate .032, three seeds): .592
    of the half-latents dead in place of .549, held-out FVU .169 with either.
    """

    title = "AbsTopK"
    formula = r"a=\mathrm{TopK}_k(|z|)\,\mathrm{sign}(z)"
    source = "arXiv 2510.00404 [s]; split signs in profiles: ours"

    @property
    def n_latents(self):
        return 2 * self.config.latents

    def weighted_rows(self, values, indices):
        below = indices >= self.config.latents
        return super().weighted_rows(torch.where(below, -values, values), indices % self.config.latents)

    def activate(self, x):
        """Signed (B, M)."""
        z = self.preactivations(x)
        return keep(z, topk(z.detach().abs(), self.config.k)[1])

    def code(self, x):
        z = self.preactivations(x)
        values, indices = topk(z.abs(), self.config.k)
        return values, indices + self.config.latents * (z.gather(1, indices) < 0)

    def forward_loss(self, x, done):
        a = self.activate(x)
        residual = x - self.pre_bias - a @ self.decoder
        return Forward((a != 0).sum(0), residual, residual.square().sum())


@register("vl_sae")
class VLSAE(_TopK):
    """Latents fire by distance on the unit sphere, whatever the length of the row: with images alone, a cosine encoder.

    A learned gain brings h, at most 2, to the length of the rows [r]. The encoder's bias is not used; no AuxK.
    """

    title = "VL-SAE (image only)"
    formula = (
        r"h_i=2-\Bigl\lVert\frac{x-b}{\lVert x-b\rVert}-\frac{v_i}{\lVert v_i\rVert}\Bigr\rVert,\quad "
        r"a=e^{g}\,\mathrm{TopK}_k(h)"
    )
    source = "arXiv 2510.21323 [s]; gain and centring [r]"
    auxk = False

    def __init__(self, d, config):
        super().__init__(d, config)
        self.log_gain = nn.Parameter(torch.zeros(1))

    @torch.no_grad()
    def begin(self, rows, variance, n_steps, head=None):
        super().begin(rows, variance, n_steps, head)
        self.log_gain.fill_(self.scale() / self.config.k).log_()

    def preactivations(self, x):
        cosine = F.linear(F.normalize(x - self.pre_bias, dim=1), F.normalize(self.encoder, dim=1))
        return (2 - (2 - 2 * cosine).clamp_min(1e-12).sqrt()) * self.log_gain.exp()


@register("archetypal")
class Archetypal(_TopK):
    """The dictionary lies in the convex hull of the data, or near it: D = (A C + Lambda) e^s.

    C are `centroids` k-means centroids of (centred) rows, A is row-stochastic, the rows of Lambda have at most the
    length `delta`. Selection and values are TopK's. Rows of D are not unit: `decoder` holds them at unit length, and
    codes carry their length, so that x_hat is the same. A starts at one centroid a latent [r].
    """

    title = "Archetypal (RA-SAE)"
    formula = r"D=(AC+\Lambda)e^{s},\ A\ge0,\ A\mathbf 1=\mathbf 1,\ \lVert\Lambda_i\rVert\le\delta,\quad \hat x=aD+b"
    source = "arXiv 2502.12892 [s]; start [r]"
    defaults: ClassVar[dict] = {"centroids": 512, "delta": 1.0, "start": 0.9}

    def __init__(self, d, config):
        super().__init__(d, config)
        m, n = config.latents, int(self.options["centroids"])
        self.mixture = nn.Parameter(torch.full((m, n), 1 / n))
        self.relaxation = nn.Parameter(torch.zeros(m, d))
        self.log_scale = nn.Parameter(torch.zeros(1))
        self.register_buffer("points", torch.zeros(n, d))
        self.register_buffer("lengths", torch.ones(m))

    @torch.no_grad()
    def begin(self, rows, variance, n_steps, head=None):
        super().begin(rows, variance, n_steps, head)
        m, n = self.mixture.shape
        if n > len(rows):
            raise ValueError(f"option 'centroids' is {n}, but there are {len(rows)} rows to take them from")
        self.points.copy_(kmeans(rows - self.pre_bias, n, seed=self.config.seed))
        rng = torch.Generator().manual_seed(self.config.seed)
        near = torch.cat([torch.randperm(n, generator=rng) for _ in range(-(-m // n))])[:m].to(rows.device)
        self.mixture.fill_((1 - self.options["start"]) / n)
        self.mixture[torch.arange(m, device=rows.device), near] += self.options["start"]
        self.log_scale.fill_(1 / self.scale()).log_()  # rows of about unit length
        self._settle()
        self.encoder.copy_(self.decoder)

    def rows(self):
        return (self.mixture @ self.points + self.relaxation) * self.log_scale.exp()

    def _settle(self) -> None:
        rows = self.rows()
        self.lengths.copy_(rows.norm(dim=1))
        self.decoder.copy_(F.normalize(rows, dim=1))

    def after_step(self, x, forward, done):
        mixture = self.mixture.clamp_min(0)
        self.mixture.copy_(mixture / mixture.sum(1, keepdim=True).clamp_min(1e-12))
        longest = self.relaxation.norm(dim=1, keepdim=True) / self.options["delta"]
        self.relaxation.div_(longest.clamp_min(1))
        self._settle()

    def code(self, x):
        values, indices = super().code(x)
        values, order = (values * self.lengths[indices]).sort(dim=1, descending=True, stable=True)
        return values, indices.gather(1, order)


@register("top_afa")
class TopAFA(Variant):
    """No k: as many latents as bring the length of the code nearest to that of the row, which the last term teaches.

    `k` of the settings is not used. The coefficient was not found in the source. Dense codes can have the right length,
    too: where sparse ones are planted, ours finds codes that reconstruct well with many times as many latents, and not
    the planted dictionary (tests).
    """

    title = "Top-AFA"
    formula = (
        r"k(x)=\arg\min_j\bigl|\sqrt{\textstyle\sum_{l\le j}s_{(l)}^2}-\lVert x-b\rVert\bigr|,\quad "
        r"+\beta(\lVert a\rVert-\lVert x-b\rVert)^2"
    )
    source = "arXiv 2503.24277 [s]; coefficient [r]"
    defaults: ClassVar[dict] = {"coefficient": 1 / 32}

    def activate(self, x):
        z = self.preactivations(x).relu()
        values = descending(z, 1)
        length = (x - self.pre_bias).detach().norm(dim=1, keepdim=True)
        best = (values.square().cumsum(1).sqrt() - length).abs().argmin(1, keepdim=True)
        return z * (z >= values.gather(1, best))

    def penalty(self, x, a, done):
        short = a.square().sum(1).clamp_min(1e-12).sqrt() - (x - self.pre_bias).norm(dim=1)
        return self.options["coefficient"] * short.square().sum()
