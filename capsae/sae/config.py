"""The settings of one sparse autoencoder and of its training."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields

_OPTIONS = {
    "normalize": ("sample", "l2", "dataset", "none"),
    "relu": ("before", "after"),
    "pre_bias": ("geometric_median", "mean", "zero"),
    "init": ("transpose", "fitted", "random"),
    "products": ("auto", "portable", "bf16", "float32"),
    "aux_scale": ("input", "residual"),
}


@dataclass(frozen=True)
class SAEConfig:
    """What a Top-k SAE is and how it is trained (arXiv 2604.26409; open points after Gao et al. 2406.04093).

    Parameters
    ----------
    latents : int
        M, the number of dictionary rows (the paper: 10 d).
    k : int
        Latents kept per sample.
    epochs, batch_size : int
        `batch_size` is an upper bound: the N rows are split into ceil(N / batch_size) batches of equal size (to one
        row), so that no small rest gets a full step; a `batch_size` over N is one batch of N.
    lr : float or None
        Adam's peak learning rate. None is the recipe of large runs, ``2e-4 / sqrt(latents / 2**14)``. That is meant
        for 10^5 steps: with a few hundred or thousand, it leaves the SAE untrained, and 10 to 50 times as much is
        right (`benchmarks/sae_recipe_grid.py`).
    normalize : {"sample", "l2", "dataset", "none"}
        The input's normalisation, kept with the weights: zero mean and unit std of each row; unit length of each
        row; zero mean and unit std of each column over the training rows; nothing. The paper says "normalized".
    relu : {"before", "after"}
        ``topk(relu(z))`` or ``relu(topk(z))``. The paper leaves it open; both give the same code and gradient,
        because relu keeps the order of what is positive (a test shows it).
    aux_alpha : float
        Weight of AuxK, in which dead latents alone reconstruct the residual. 0 turns it off.
    aux_k : int or None
        Dead latents used per sample; None is d // 2.
    aux_rows : float
        Fraction of each batch's rows that AuxK looks at, the paper's 1 or less; its loss is scaled up to the batch. The
        order of the rows is random, so the first ones are a random choice, another one in each step.
    aux_scale : {"input", "residual"}
        What AuxK's loss is divided by: the variance of the input, as the loss is, or the mean square of the batch's
        residual, as Gao et al. do, which makes it stronger by 1 / FVU. On imagenet20 (three seeds) held-out FVU .2068
        and .2062, standard deviation .001, dead .0009 and 0: no difference in quality, so the simpler one is default.
    dead_after_epochs : float
        A latent is dead when it has not fired for so many passes over the data, looked at after each epoch.
    warmup, decay : float
        Fractions of all steps in which the learning rate rises from and falls to 0, linearly.
    pre_bias : {"geometric_median", "mean", "zero"}
        Start of the bias that is taken off the input and added to the output.
    init : {"transpose", "fitted", "random"}
        Encoder = decoder^T at the start; the same times the number that fits the first reconstructions best (least
        squares; plain transposes reconstruct too much, and at a high learning rate the steps that take that back let
        latents die: benchmarks/sae_quality.py); or independent of it.
    products : {"auto", "portable", "bf16", "float32"}
        Arithmetic of the training's encoder product. "portable": float32 in one fixed order, on a CPU: weights are the
        same bits on every CPU with fused multiply-add, at any number of threads. "bf16": faster, depends on the CPU,
        and rounds the pre-activations themselves, so that ties at the k-th place are common; rows gathered by the
        compiled steps are read in bf16, too. "float32": as the device does it; in compiled CPU steps: "portable".
        Parameters, optimiser and all sums are float32. "auto": portable on a CPU; on a GPU bf16 where it is faster.
    ema : float or None
        Decay of an average of the weights over the steps (such as .999), which then is what is returned.
    seed : int
        Of the initialisation and the order of the rows.
    variant : str
        "topk", or another of `variants.REGISTRY`, each with formula and source; trained in plain PyTorch. Checked, with
        its options, where an SAE is made of the settings (`model.model`).
    options : dict
        Hyper-parameters of the variant, by name; `variants.info` lists them with their defaults.

    Raises
    ------
    ValueError, TypeError
        With the key, the value, and what would do.
    """

    __pydantic_config__ = {"extra": "forbid"}

    latents: int
    k: int
    epochs: int = 100
    batch_size: int = 4096
    lr: float | None = None
    normalize: str = "sample"
    relu: str = "before"
    aux_alpha: float = 1 / 32
    aux_k: int | None = None
    aux_rows: float = 1.0
    aux_scale: str = "input"
    dead_after_epochs: float = 1.0
    warmup: float = 0.05
    decay: float = 0.2
    pre_bias: str = "geometric_median"
    init: str = "transpose"
    products: str = "auto"
    ema: float | None = None
    seed: int = 0
    variant: str = "topk"
    options: dict[str, bool | int | float] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for key in ("latents", "k", "epochs", "batch_size"):
            _need_int(key, getattr(self, key), at_least=1)
        _need_int("seed", self.seed, at_least=0)
        if self.aux_k is not None:
            _need_int("aux_k", self.aux_k, at_least=1)
        if self.k > self.latents:
            raise ValueError(f"k is {self.k}, latents {self.latents}: k must be at most latents")
        for key, options in _OPTIONS.items():
            if getattr(self, key) not in options:
                raise ValueError(f"{key} is {getattr(self, key)!r}; one of {', '.join(map(repr, options))} would do")
        if self.lr is not None:
            _need_number("lr", self.lr, lambda v: v > 0, "a number over 0, or None")
        _need_number("aux_alpha", self.aux_alpha, lambda v: v >= 0, "0 or more")
        _need_number("aux_rows", self.aux_rows, lambda v: 0 < v <= 1, "a fraction over 0, at most 1")
        _need_number("dead_after_epochs", self.dead_after_epochs, lambda v: v > 0, "a number over 0")
        for key in ("warmup", "decay"):
            _need_number(key, getattr(self, key), lambda v: 0 <= v <= 1, "a fraction from 0 to 1")
        if self.warmup + self.decay > 1:
            raise ValueError(f"warmup {self.warmup} and decay {self.decay} are over 1 together")
        if self.ema is not None:
            _need_number("ema", self.ema, lambda v: 0 < v < 1, "a number between 0 and 1, such as .999, or None")

    @property
    def peak_lr(self) -> float:
        """The learning rate that is used: `lr`, or the formula of large runs."""
        return self.lr if self.lr is not None else 2e-4 / math.sqrt(self.latents / 2**14)

    @classmethod
    def from_dict(cls, settings: dict) -> SAEConfig:
        """Settings from a file; unknown and missing keys are refused."""
        unknown = sorted(set(settings) - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(f"unknown SAE setting {unknown[0]!r}; known: {', '.join(f.name for f in fields(cls))}")
        missing = sorted({"latents", "k"} - set(settings))
        if missing:
            raise ValueError(f"no setting {missing[0]!r}: latents and k have no default")
        return cls(**settings)


def _need_int(key: str, value: object, at_least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{key} is {value!r}; a whole number would do")
    if value < at_least:
        raise ValueError(f"{key} is {value}; at least {at_least} would do")


def _need_number(key: str, value: object, good: Callable[[float], bool], wanted: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{key} is {value!r}; {wanted} would do")
    if not math.isfinite(value) or not good(value):
        raise ValueError(f"{key} is {value!r}; {wanted} would do")
