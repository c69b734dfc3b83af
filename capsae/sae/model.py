"""TopKSAE and SparseCodes: a sparse code keeps its (N, k) shape from end to end, nothing here builds N x M.

    z = W_enc (x - b) + c;   code = the k largest of relu(z);   x_hat = sum_i code_i w_i + b,   |w_i| = 1

x is the input after the SAE's own normalisation.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..data.asarray import as_numpy
from . import io, measures
from .config import SAEConfig
from .select import compiled, encode, topk

__all__ = ["SAEConfig", "SparseCoder", "SparseCodes", "TopKSAE", "check_rows", "model", "register"]
REGISTRY: dict[str, type[TopKSAE]] = {}  # kinds of SAE, by `SAEConfig.variant`


def register(name: str):
    """Class decorator: make a kind of SAE available as ``SAEConfig(variant=name)``."""

    def add(cls: type[TopKSAE]) -> type[TopKSAE]:
        REGISTRY[name] = cls
        return cls

    return add


def model(config: SAEConfig) -> type[TopKSAE]:
    """The class of a config's variant; ValueError for an unknown one, or for an option that it does not have."""
    if config.variant not in REGISTRY:
        raise ValueError(f"variant is {config.variant!r}; one of {', '.join(REGISTRY)} would do")
    cls = REGISTRY[config.variant]
    known = getattr(cls, "defaults", {})
    for key, value in config.options.items():
        if key not in known:
            raise ValueError(f"variant {config.variant!r} has no option {key!r}; it has {', '.join(known) or 'none'}")
        # An experiment may say 1 for true, and numbers only where numbers are meant.
        if not isinstance(value, int | float) or (isinstance(value, bool) and not isinstance(known[key], bool)):
            raise TypeError(f"option {key!r} of {config.variant!r} is {value!r}; such as {known[key]!r} would do")
    return cls


@dataclass(frozen=True)
class SparseCodes:
    """The codes of N samples: which k of the M latents fire, and how strongly.

    Arrays are numpy or torch, as the input of `TopKSAE.encode` was. ``codes[rows]`` takes a slice, a mask or indices.
    """

    values: Any  # (N, k) float32, >= 0, largest first; unused slots hold 0
    indices: Any  # (N, k) int32, distinct within a row (but for unused slots)
    n_latents: int  # M

    def __post_init__(self) -> None:
        if self.values.ndim != 2 or self.values.shape != self.indices.shape:
            shapes = f"values are {tuple(self.values.shape)}, indices {tuple(self.indices.shape)}"
            raise ValueError(f"{shapes}; both must be (N, k)")

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows) -> SparseCodes:
        rows = slice(rows, rows + 1 or None) if isinstance(rows, int | np.integer) else rows
        return SparseCodes(self.values[rows], self.indices[rows], self.n_latents)

    @property
    def k(self) -> int:
        return self.values.shape[1]

    def dense(self) -> np.ndarray | torch.Tensor:
        """(N, M) float32: for small N, to look at or to test."""
        if isinstance(self.values, torch.Tensor):
            zeros = self.values.new_zeros(len(self), self.n_latents)
            return zeros.scatter_add_(1, self.indices.long(), self.values)
        out = np.zeros((len(self), self.n_latents), self.values.dtype)
        np.add.at(out, (np.arange(len(self))[:, None], self.indices), self.values)
        return out

    def csr(self):
        """(N, M) float64 as a scipy sparse array, without the unused slots."""
        from scipy.sparse import csr_array

        codes = self.numpy()
        fired = codes.values != 0
        starts = np.concatenate([[0], np.cumsum(fired.sum(1))])
        cells = codes.values[fired].astype(np.float64), codes.indices[fired], starts
        return csr_array(cells, shape=(len(self), self.n_latents))

    def numpy(self) -> SparseCodes:
        """The same with numpy arrays."""
        if isinstance(self.values, np.ndarray):
            return self
        return SparseCodes(self.values.detach().cpu().numpy(), self.indices.cpu().numpy(), self.n_latents)

    def to(self, device: str | torch.device) -> SparseCodes:
        """The same with torch tensors on a device."""
        values, indices = torch.as_tensor(self.values), torch.as_tensor(self.indices)
        return SparseCodes(values.to(device), indices.to(device), self.n_latents)


class SparseCoder(nn.Module):
    """Input normalisation, encoding by blocks, linear decoding: what SAEs and other dictionaries have in common.

    A kind of its own defines `code`, and has ``config.normalize`` and the tensors decoder (M, d), pre_bias (d,), mean
    (d,) and std (d,). On a CPU with numba, sums over a row have one order: results do not depend on the CPU.
    """

    block = 512  # rows that a CPU encodes at a time
    config: Any
    decoder: torch.Tensor
    pre_bias: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor

    def code(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Values (N, k) >= 0, largest first, and indices (N, k) of normalised rows x (N, d)."""
        raise TypeError(f"{type(self).__name__} defines no code")

    @property
    def n_latents(self) -> int:
        """M of its codes: rows of the decoder."""
        return len(self.decoder)

    def weighted_rows(self, values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """sum_i code_i w_i, (N, d), without the bias."""
        if (kernels := _fixed_order(values, self.decoder)) is not None:
            if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < len(self.decoder):
                raise IndexError(f"codes have latents outside of 0 ... {len(self.decoder) - 1}")
            out = torch.empty(len(values), self.decoder.shape[1])
            given = values.contiguous(), indices.to(torch.int32).contiguous(), self.decoder.detach().contiguous(), out
            kernels.weighted_rows(*(t.numpy() for t in given))
            return out
        return F.embedding_bag(indices, self.decoder, per_sample_weights=values, mode="sum")

    @torch.no_grad()
    def encode(self, x: np.ndarray | torch.Tensor, batch_size: int | None = None) -> SparseCodes:
        """Codes of raw features x (N, d), `batch_size` rows at a time; numpy in, numpy out, torch in, torch out."""
        rows = check_rows(x, d=self.pre_bias.shape[0])
        device = self.pre_bias.device
        values = torch.zeros(len(rows), 0, device=device)
        indices = torch.zeros(len(rows), 0, dtype=torch.int32, device=device)
        size = batch_size or (self.block if device.type == "cpu" else 8192)
        for start in range(0, len(rows), size):
            v, i = self.code(self._normalized(rows[start : start + size])[0])
            if (missing := v.shape[1] - values.shape[1]) > 0:  # the first block; later where k differs from row to row
                values, indices = F.pad(values, (0, missing)), F.pad(indices, (0, missing))
            values[start : start + size, : v.shape[1]], indices[start : start + size, : v.shape[1]] = v, i
        return _like(SparseCodes(values, indices, self.n_latents), x)

    @torch.no_grad()
    def decode(self, codes: SparseCodes) -> np.ndarray | torch.Tensor:
        """x_hat (N, d) in the *normalised* space: compare it with ``normalize(x)``.

        A code does not know the mean and the length of its sample; `reconstruct` undoes the normalisation.
        """
        if codes.n_latents != self.n_latents:
            raise ValueError(f"codes have {codes.n_latents} latents, this SAE {self.n_latents}")
        own = codes.to(self.pre_bias.device)
        return _like(self.weighted_rows(own.values, own.indices.long()) + self.pre_bias, codes.values)

    @torch.no_grad()
    def normalize(self, x: np.ndarray | torch.Tensor) -> np.ndarray | torch.Tensor:
        """x (N, d) as the encoder sees it. Rows without variance become 0, never NaN."""
        return _like(self._normalized(check_rows(x, d=self.pre_bias.shape[0]))[0], x)

    @torch.no_grad()
    def reconstruct(self, x: np.ndarray | torch.Tensor) -> np.ndarray | torch.Tensor:
        """x_hat (N, d) in the input's own space: decoded, and the normalisation undone."""
        rows, shift, scale = self._normalized(check_rows(x, d=self.pre_bias.shape[0]))
        x_hat = torch.cat([self.weighted_rows(*self.code(block)) for block in rows.split(4096)]) + self.pre_bias
        return _like(x_hat * scale + shift, x)

    @torch.no_grad()
    def fvu(self, x: np.ndarray | torch.Tensor) -> float:
        """Fraction of variance unexplained, ``sum |x - x_hat|^2 / sum |x - mean|^2``, float64, on normalised inputs."""
        return measures.fvu(self, check_rows(x, d=self.pre_bias.shape[0]))

    def _normalized(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(x - shift) / scale, shift and scale, on the SAE's device, float32."""
        x = x.to(self.pre_bias)
        shift, scale = torch.zeros_like(x[:, :1]), torch.ones_like(x[:, :1])
        by_row = self.config.normalize in ("sample", "l2")
        if by_row and (kernels := _fixed_order(x)) is not None:
            rows = x.detach().contiguous().numpy()
            kernels.row_moments(rows, self.config.normalize == "sample", shift[:, 0].numpy(), scale[:, 0].numpy())
        elif self.config.normalize == "sample":
            shift, scale = x.mean(1, keepdim=True), x.std(1, keepdim=True, correction=0)
        elif self.config.normalize == "l2":
            scale = x.norm(dim=1, keepdim=True)
        elif self.config.normalize == "dataset":
            shift, scale = self.mean, self.std
        # A constant row differs from its rounded mean by rounding alone: that is not to be blown up to unit std.
        noise = 1e-6 * x.abs().amax(1, keepdim=True) if self.config.normalize == "sample" else 0
        flat = scale <= noise
        return ((x - shift) / scale.masked_fill(flat, 1)).masked_fill(flat, 0), shift, scale.masked_fill(flat, 1)


def _fixed_order(*tensors: torch.Tensor):
    """The numba kernels, where they can take the place of torch: float32 on a CPU, and no gradient is wanted."""
    fit = all(t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors)
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    return compiled() if fit and not wanted else None


@register("topk")
class TopKSAE(SparseCoder):
    """Top-k sparse autoencoder with unit decoder rows (Gao et al. 2406.04093, as arXiv 2604.26409 uses it).

    On a CPU with numba, codes are the same bits on every machine: `select.encode`.

    Parameters
    ----------
    d : int
        Width of the input.
    config : SAEConfig

    Attributes
    ----------
    encoder (M, d), encoder_bias (M,), decoder (M, d) with unit rows, pre_bias (d,) : parameters, float32
    mean (d,), std (d,) : of the training rows, used by ``normalize="dataset"`` alone
    """

    block = 4096

    def __init__(self, d: int, config: SAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = nn.Parameter(torch.zeros(config.latents, d))
        self.encoder_bias = nn.Parameter(torch.zeros(config.latents))
        self.decoder = nn.Parameter(torch.zeros(config.latents, d))
        self.pre_bias = nn.Parameter(torch.zeros(d))
        self.register_buffer("mean", torch.zeros(d))
        self.register_buffer("std", torch.ones(d))

    @classmethod
    def untrained(cls, d: int, config: SAEConfig) -> TopKSAE:
        """Random unit rows, encoder = decoder^T (or random as well): where training starts, and a control."""
        sae, rng = cls(d, config), np.random.PCG64(config.seed)
        with torch.no_grad():
            sae.decoder.copy_(directions(config.latents, d, rng))
            sae.encoder.copy_(directions(config.latents, d, rng) if config.init == "random" else sae.decoder)
        return sae

    def preactivations(self, x: torch.Tensor) -> torch.Tensor:
        """z (N, M) of normalised x (N, d)."""
        return F.linear(x - self.pre_bias, self.encoder, self.encoder_bias)

    def code(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The k largest of relu(z), (N, k), and their indices, of normalised rows x (N, d)."""
        if type(self).preactivations is TopKSAE.preactivations and _fixed_order(x, *self.parameters()) is not None:
            return encode(x, self.pre_bias, self.encoder, self.encoder_bias, self.config.k)
        return topk(self.preactivations(x), self.config.k, self.config.relu)

    def save(self, folder: str | Path) -> Path:
        """Write `sae.safetensors` and `cfg.json` into a folder, atomically."""
        return io.save(folder, self.state_dict(), self.config, kind=self.config.variant)

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "cpu") -> TopKSAE:
        """Read a folder written by `save`, or a top-k SAE of SAELens, sparsify or dictionary_learning (`exchange`).

        The settings' variant decides on the class. Pickles, unknown schemas and foreign SAEs that are no top-k SAE are
        refused (ValueError).
        """
        for reader in io.FOREIGN:
            if (foreign := reader(folder, device)) is not None:
                return foreign
        state, config = io.load(folder)
        sae = model(config)(state["pre_bias"].shape[0] if "pre_bias" in state else 0, config)
        try:
            sae.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(f"{folder}: weights and settings do not fit together: {error}") from error
        return sae.to(device)


def directions(n: int, d: int, rng: np.random.PCG64) -> torch.Tensor:
    """Random unit rows (n, d): of sums of four uniform numbers, so nearly normal.

    From the bits of PCG64, whose stream numpy guarantees, in integers: no library's logarithm or sum has a part in it,
    so the rows are the same on every machine.
    """
    rows = np.empty((n, d), np.float32)
    for start in range(0, n, 4096):
        raw = rng.random_raw((min(n - start, 4096), d)).view(np.uint16)
        sums = raw.reshape(-1, d, 4).sum(2, dtype=np.int64) - 2 * 0xFFFF
        rows[start : start + 4096] = sums / np.sqrt(np.maximum((sums * sums).sum(1, keepdims=True), 1))
    return torch.from_numpy(rows)


def check_rows(x: np.ndarray | torch.Tensor, d: int | None = None, at_least: int = 1, name: str = "x") -> torch.Tensor:
    """x as a tensor (N, d), or an error that names what is wrong with it."""
    if not isinstance(x, np.ndarray | torch.Tensor):
        raise TypeError(f"{name} is a {type(x).__name__}; a numpy array or torch tensor (N, d) would do")
    if not (x.is_floating_point() if isinstance(x, torch.Tensor) else np.issubdtype(x.dtype, np.floating)):
        raise TypeError(f"{name} has dtype {x.dtype}; floating point would do")
    with warnings.catch_warnings(action="ignore"):  # read-only arrays are welcome: nothing is written to them
        rows = torch.as_tensor(as_numpy(x, read_only=True) if isinstance(x, np.ndarray) else x).detach()
    if rows.ndim != 2:
        raise ValueError(f"{name} has shape {tuple(rows.shape)}; (N, d) would do")
    if len(rows) < at_least:
        raise ValueError(f"{name} has {len(rows)} rows; at least {at_least} would do")
    if d is not None and rows.shape[1] != d:
        raise ValueError(f"{name} has {rows.shape[1]} columns, the SAE {d}")
    # By blocks, and as float32: what is checked is what will be used, and no second copy of all rows is made.
    finite = torch.cat([block.float().isfinite().all(1) for block in rows.split(65_536)])
    if not finite.all():
        bad = (~finite).nonzero().ravel().tolist()
        raise ValueError(f"{name} has NaN or infinity in {len(bad)} of {len(rows)} rows, first in row {bad[0]}")
    return rows


def _like(result, given):
    """The result in the kind (and on the device) of what was given."""
    if isinstance(given, np.ndarray):
        return result.numpy() if isinstance(result, SparseCodes) else result.cpu().numpy()
    return result.to(given.device)
