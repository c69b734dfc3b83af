"""Dictionaries that no gradient has trained, behind the same fit, encode, decode, save and load as `TopKSAE`.

    sae = dictionaries.create("itda", latents=1920, k=32).fit(train.cls);  codes = sae.encode(test.cls)

    u = normalize(x);   u_hat = sum_i code_i w_i + b,   |w_i| = 1

Codes are >= 0 always, as `SparseCodes` promises. A method whose coefficients have signs (``signed``) keeps them split:
with M atoms its codes have 2M latents, latent i is the positive part of atom i and latent M + i the negative one, and
the decoder holds each atom and its opposite. So decoding loses nothing, and EPD and whatever else reads codes meets two
latents with opposite meanings, at most one of them active in a row.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F

from .. import io
from ..config import SAEConfig
from ..model import SparseCoder, check_rows, directions
from ..select import topk
from .pursuit import kmeans, matching_pursuit, nearest, nonnegative_fit, omp

SAMPLE = 32_768  # rows that k-means, Semi-NMF and the gain are fitted on at most


@dataclass(frozen=True)
class DictionaryConfig:
    """The settings of a dictionary: atoms, atoms per row, normalisation as in `SAEConfig`, the method's own options."""

    latents: int
    k: int
    normalize: str = "sample"
    seed: int = 0
    options: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        SAEConfig(self.latents, self.k, normalize=self.normalize, seed=self.seed)  # which checks them


class Dictionary(SparseCoder):
    """Base of all: `fit` learns atoms from raw rows; the rest is `SparseCoder`'s.

    Attributes (after `fit`)
    ------------------------
    decoder : (M, d), or (2M, d) where the method is signed; unit rows
    pre_bias : (d,) mean of the normalised training rows
    mean, std : (d,) of the raw ones, used by ``normalize="dataset"`` alone
    """

    title: ClassVar[str]
    formula: ClassVar[str]
    source: ClassVar[str]  # [s] as in the source, [r] a reconstruction
    signed: ClassVar[bool] = False
    defaults: ClassVar[dict] = {}

    def __init__(self, config: DictionaryConfig) -> None:
        super().__init__()
        unknown = sorted(set(config.options) - set(self.defaults))
        if unknown:
            known = ", ".join(self.defaults) or "none"
            raise TypeError(f"{type(self).__name__} has no option {unknown[0]!r}; it has {known}")
        self.config = config
        self.options = self.defaults | config.options

    @torch.no_grad()
    def fit(self, x: np.ndarray | torch.Tensor, device: str | torch.device = "cpu") -> Dictionary:
        """Learn from raw rows x (N, d); returns self. ValueError where N or d does not allow it."""
        rows = check_rows(x, at_least=2).to(device).float()
        mean, std = rows.double().mean(0), rows.double().std(0, correction=0)
        std = std.masked_fill(std <= 1e-6 * rows.abs().amax(0), 1)  # a constant column stays finite
        self._keep(pre_bias=torch.zeros_like(rows[0]), mean=mean.float(), std=std.float())
        u = self._normalized(rows)[0]
        self._keep(pre_bias=u.double().mean(0).float())
        self._learn(u - self.pre_bias)
        return self

    def _learn(self, u: torch.Tensor) -> None:
        """Set `decoder` and what else `code` needs, from normalised and centred rows u (N, d)."""
        raise TypeError(f"{type(self).__name__} does not learn")

    def _keep(self, **tensors: torch.Tensor) -> None:
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor.contiguous())  # as it will be when loaded: the same products to the bit

    def _sample(self, u: torch.Tensor) -> torch.Tensor:
        if len(u) <= SAMPLE:
            return u
        return u[self._order(len(u))[:SAMPLE].to(u.device)]

    def _order(self, n: int) -> torch.Tensor:
        return torch.randperm(n, generator=torch.Generator().manual_seed(self.config.seed))

    @property
    def atoms(self) -> torch.Tensor:
        """The unit atoms (M, d), without the opposites of a signed method."""
        return self.decoder[: len(self.decoder) // 2] if self.signed else self.decoder

    def save(self, folder: str | Path) -> Path:
        """Write `sae.safetensors` and `cfg.json` (its "kind" is the method), atomically."""
        kind = next(name for name, known in METHODS.items() if known is type(self))
        return io.save(folder, self.state_dict(), self.config, kind=kind)


def _opposites(atoms: torch.Tensor) -> torch.Tensor:
    return torch.cat([atoms, -atoms])


def _split(values: torch.Tensor, indices: torch.Tensor, n_atoms: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Signed coefficients as codes >= 0 over 2M latents, largest first."""
    return _sorted(values.abs(), indices + n_atoms * (values < 0))


def _sorted(values: torch.Tensor, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    values, order = values.sort(dim=1, descending=True, stable=True)
    return values, indices.gather(1, order)


class ITDA(Dictionary):
    """Inference-time decomposition of activations: each atom is a training row, codes by orthogonal matching pursuit.

    Batch by batch, the rows whose error is over `tau` become atoms, the worst first, at most the share `admit` of a
    batch; one that nearly repeats an atom (|cos| > `duplicate`) is left out. While it is built, the error is that of
    plain matching pursuit, which takes a fraction of the time [r]. Several passes [r], until there are `latents` atoms,
    or a pass adds none: there may be fewer. Signed.

    Attributes
    ----------
    rows : (M,) int64
        The training row that each atom is: its Jaccard index between dictionaries compares backbones
        (`measures.jaccard`), if both saw the same images in the same order.
    """

    title = "ITDA"
    formula = r"w_i = u_{n_i}/\lVert u_{n_i}\rVert,\quad a = \mathrm{OMP}_k(u)"
    source = "arXiv 2505.17769 [s]; centring, relative error and several passes [r]"
    signed = True
    defaults: ClassVar[dict] = {"tau": 0.05, "duplicate": 0.98, "admit": 0.01, "batch_size": 4096, "passes": 50}

    def _learn(self, u):
        o = self.options
        order = self._order(len(u)).to(u.device)
        atoms, rows = u.new_zeros(0, u.shape[1]), []
        for _ in range(o["passes"]):
            before = len(rows)
            for batch in order.split(o["batch_size"]):
                errors = self._error(u[batch], atoms)
                most = min(max(1, round(o["admit"] * len(batch))), self.config.latents - len(rows))
                for place in errors.argsort(descending=True, stable=True)[:most].tolist():
                    unit = F.normalize(u[batch[place]], dim=0)
                    if errors[place] <= o["tau"]:
                        break
                    if not len(atoms) or (atoms @ unit).abs().max() <= o["duplicate"]:
                        atoms, rows = torch.cat([atoms, unit[None]]), [*rows, int(batch[place])]
            if len(rows) in (before, self.config.latents):
                break
        if not rows:
            raise ValueError(f"no row has an error over tau = {o['tau']}: equal rows, or a smaller tau would do")
        self._keep(decoder=_opposites(atoms), rows=torch.tensor(rows))

    def _error(self, u: torch.Tensor, atoms: torch.Tensor) -> torch.Tensor:
        """What k steps of signed matching pursuit leave, |r|^2 / |u|^2 (N,); 0 for a row that is the mean itself."""
        left = whole = u.square().sum(1)
        if len(atoms):
            found = matching_pursuit(u, _opposites(atoms), self.config.k, 0.0)[0]
            left = whole - found.square().sum(1)
        return left.clamp_min(0) / whole.clamp_min(1e-30)

    def code(self, x):
        values, indices, _ = omp(x - self.pre_bias, self.atoms, self.config.k)
        return _split(values, indices, len(self.atoms))


class SemiNMF(Dictionary):
    """Semi-non-negative matrix factorisation: U ~ Z W with Z >= 0 and atoms of any sign.

    Multiplicative updates of Z and ridge least squares for W, in turn: neither can raise the objective
    |U - Z W|^2 + ridge |W|^2, kept in `objective`. New rows: the same updates of Z with W fixed, the k largest
    (measured at unit atoms), and a non-negative fit on these. Meant for latents <= d: a step costs N M (M + d), and
    with more atoms than columns the factorisation is not determined. Z (N, M) is dense while fitting, so at most
    32,768 rows are used. Codes >= 0.
    """

    title = "Semi-NMF"
    formula = (
        r"Z\leftarrow Z\sqrt{\frac{[UW^\top]_+ + Z[WW^\top]_-}{[UW^\top]_- + Z[WW^\top]_+}},\quad "
        r"W=(Z^\top Z+\lambda I)^{-1}Z^\top U"
    )
    source = "Ding, Li, Jordan 2008; for activations arXiv 2506.10920 [s]; top k of a new row [r]"
    defaults: ClassVar[dict] = {"steps": 200, "ridge": 1e-3, "encode_steps": 50}

    def _learn(self, u):
        u, m, o = self._sample(u), self.config.latents, self.options
        centroids = kmeans(u, m, seed=self.config.seed)
        z = F.one_hot(nearest(u, centroids)[1][:, 0], m).to(u) + 0.2  # Ding's start
        objective = []
        for _ in range(o["steps"]):
            gram = (z.T @ z).double() + o["ridge"] * torch.eye(m, device=u.device)
            atoms = torch.linalg.solve(gram, (z.T @ u).double()).to(u)
            objective.append((u - z @ atoms).square().sum() + o["ridge"] * atoms.square().sum())
            z = _multiplicative(z, u, atoms)
        self._keep(decoder=F.normalize(atoms, dim=1), objective=torch.stack(objective))

    def code(self, x):
        u = x - self.pre_bias
        z = (u @ self.decoder.T).clamp_min(0) + 0.01 * u.norm(dim=1, keepdim=True)
        for _ in range(self.options["encode_steps"]):
            z = _multiplicative(z, u, self.decoder)
        indices = topk(z, self.config.k)[1]
        return _sorted(nonnegative_fit(u, self.decoder, indices), indices)


def _multiplicative(z: torch.Tensor, u: torch.Tensor, atoms: torch.Tensor) -> torch.Tensor:
    """Ding's update of Z (N, M) > 0: |U - Z W|^2 does not grow."""
    target, gram = u @ atoms.T, atoms @ atoms.T
    up = target.clamp_min(0) + z @ (-gram).clamp_min(0)
    down = (-target).clamp_min(0) + z @ gram.clamp_min(0)
    return z * (up / down.clamp_min(1e-12)).sqrt()


class KMeans(Dictionary):
    """Centroids of Lloyd's algorithm. Codes >= 0.

    k = 1 is vector quantisation: one latent a row, u_hat is the nearest centroid. With more, the k nearest centroids
    are the support and a non-negative fit on their directions gives the values, so that L0 and FVU can be set beside an
    SAE's (our choice: the source has k = 1).
    """

    title = "k-means"
    formula = (
        r"S_k(u) = \text{the } k \text{ nearest } c_i,\quad a = \arg\min_{a\ge 0,\,\mathrm{supp}\subseteq S_k}"
        r"\lVert u - aW\rVert"
    )
    source = "Lloyd 1982 [s]; k > 1 [r]"
    defaults: ClassVar[dict] = {"steps": 30}

    def _learn(self, u):
        centroids = kmeans(self._sample(u), self.config.latents, self.options["steps"], self.config.seed)
        self._keep(decoder=F.normalize(centroids, dim=1), lengths=centroids.norm(dim=1))

    def code(self, x):
        u = x - self.pre_bias
        indices = nearest(u, self.decoder * self.lengths[:, None], self.config.k)[1]
        if self.config.k == 1:
            return self.lengths[indices], indices
        return _sorted(nonnegative_fit(u, self.decoder, indices), indices)


class PCA(Dictionary):
    """The first M principal components, the k largest coefficients by absolute value. Signed."""

    title = "PCA"
    formula = r"a = \mathrm{AbsTopK}_k(Wu)"
    source = "Pearson 1901 [s]; top k of its coefficients: our control"
    signed = True

    def _learn(self, u):
        if self.config.latents > u.shape[1]:
            raise ValueError(f"latents is {self.config.latents}; PCA of {u.shape[1]} columns has at most so many")
        covariance = u.double().T @ u.double()
        components = torch.linalg.eigh(covariance)[1].T.flip(0)[: self.config.latents]
        largest = components.gather(1, components.abs().argmax(1, keepdim=True))
        self._keep(decoder=_opposites((components * largest.sign()).float()))  # the sign of an eigenvector is chance

    def code(self, x):
        z = F.linear(x - self.pre_bias, self.atoms)
        indices = topk(z.abs(), self.config.k)[1]
        return _split(z.gather(1, indices), indices, len(self.atoms))


class RandomDictionary(Dictionary):
    """Random unit atoms, never trained, and top-k of their relu'd products: what any dictionary of this size gives.

    One number is fitted: the gain, which brings the k products to the length that reconstructs best. Codes >= 0.
    """

    title = "Random dictionary"
    formula = r"a = \gamma\,\mathrm{TopK}_k(\mathrm{relu}(Wu)),\quad w_i\sim U(S^{d-1})"
    source = "our control"

    def _learn(self, u):
        atoms = directions(self.config.latents, u.shape[1], np.random.PCG64(self.config.seed)).to(u.device)
        self._keep(decoder=atoms, gain=torch.ones(1, device=u.device))
        over = under = torch.zeros((), dtype=torch.float64, device=u.device)
        for block in self._sample(u).split(512):
            values, indices = self.code(block + self.pre_bias)
            guess = self.weighted_rows(values, indices)
            over, under = over + (guess * block).sum(), under + guess.square().sum()
        self.gain = (over / under.clamp_min(1e-30)).clamp_min(1e-6).float()[None]

    def code(self, x):
        values, indices = topk(F.linear(x - self.pre_bias, self.decoder), self.config.k)
        return values * self.gain, indices


class DenseReLU(Dictionary):
    """The positive parts of the normalised features themselves, k of d: no dictionary at all. Codes >= 0.

    What is negative is lost, so about half of the variance is not explained, by construction.
    """

    title = "Dense ReLU of the CLS"
    formula = r"a = \mathrm{TopK}_k(\mathrm{relu}(u)),\quad W = I"
    source = "our control"

    def _learn(self, u):
        d = u.shape[1]
        if self.config.latents != d:
            raise ValueError(f"latents is {self.config.latents}; the features have {d} columns, and that would do")
        self._keep(decoder=torch.eye(d, device=u.device), pre_bias=torch.zeros_like(self.pre_bias))

    def code(self, x):
        return topk(x, self.config.k)


METHODS: dict[str, type[Dictionary]] = {
    "itda": ITDA,
    "semi_nmf": SemiNMF,
    "kmeans": KMeans,
    "pca": PCA,
    "random": RandomDictionary,
    "dense_relu": DenseReLU,
}


def create(method: str, latents: int, k: int, normalize: str = "sample", seed: int = 0, **options) -> Dictionary:
    """A dictionary to `fit`. ValueError for an unknown method, TypeError for an option that it does not have."""
    if method not in METHODS:
        raise ValueError(f"no dictionary is named {method!r}; there are {', '.join(METHODS)}")
    return METHODS[method](DictionaryConfig(latents, k, normalize, seed, options))


def load(folder: str | Path, device: str | torch.device = "cpu") -> Dictionary:
    """Read what `Dictionary.save` wrote; the same codes bit for bit. Errors as `TopKSAE.load` has them."""
    state, cfg = io.read(folder)
    settings = cfg["config"]
    wanted = {"latents", "k", "normalize", "seed", "options"}
    if cfg.get("kind") not in METHODS or set(settings) != wanted:
        found = f"a {cfg.get('kind')!r} with {sorted(settings)}"
        raise ValueError(f"{folder} holds {found}, not a dictionary of this version")
    model = METHODS[cfg["kind"]](DictionaryConfig(**settings))
    model._keep(**state)
    return model.to(device)
