"""From the weights of another library's SAE to a `TopKSAE` and back: see :mod:`capsae.sae.exchange.folders`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..config import SAEConfig
from ..model import TopKSAE
from . import files

OWN_KEY, OWN_SCHEMA = "capsae", 1
_UNIT = 1e-3  # rows this near to unit length (bfloat16 weights) stay as they are
_EQUAL = 1e-2  # lengths this near to each other count as one


class _Weights(NamedTuple):
    encoder: torch.Tensor  # (M, d)
    encoder_bias: torch.Tensor  # (M,)
    decoder: torch.Tensor  # (M, d)
    pre_bias: torch.Tensor  # (d,)
    level: torch.Tensor | None = None  # (M,) what z has to exceed (threshold), or is added to it (the gate's bias)
    log_gain: torch.Tensor | None = None  # (M,) of gated ones: values are relu(e^r E (v - b) + c)

    def moved(self, offset: torch.Tensor) -> _Weights:
        """The same after (M,) is added to every E (v - b)."""
        if self.log_gain is None:
            return self._replace(encoder_bias=self.encoder_bias + offset)
        bias = self.encoder_bias + offset * self.log_gain.exp()
        return self._replace(encoder_bias=bias, level=self.level + offset)

    def louder(self, g: torch.Tensor) -> _Weights:
        """Codes g times as large, (M,) or a number, from decoder rows g times as short."""
        level = None if self.level is None else self.level * g
        encoder = self.encoder * g.reshape(-1, 1)
        parts = {"encoder": encoder, "encoder_bias": self.encoder_bias * g, "level": level}
        return self._replace(decoder=self.decoder / g.reshape(-1, 1), **parts)


def _lengths(decoder: torch.Tensor) -> torch.Tensor:
    """Of its rows (M,); 1 where a row is zero: such a latent says nothing, whatever its code."""
    return decoder.norm(dim=1).where(decoder.any(dim=1), 1.0)


def _own(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What `_exported` left in a folder, or {}."""
    own = settings.get(OWN_KEY)
    if own is None:
        return {}
    if not isinstance(own, dict) or own.get("schema") != OWN_SCHEMA or not isinstance(own.get("config"), dict):
        raise ValueError(f"{folder}: its key {OWN_KEY!r} is of another version; this one reads schema {OWN_SCHEMA}")
    return own


def _scaled(weights: _Weights, s: float) -> _Weights:
    """The same codes from an input that is s times as long; the reconstruction is s times as long, too."""
    if s == 1:
        return weights
    scaled = {"encoder": weights.encoder / s, "decoder": weights.decoder * s, "pre_bias": weights.pre_bias * s}
    return weights._replace(**scaled)


def _exported(sae: TopKSAE, variants) -> tuple[_Weights, str, dict[str, Any]]:
    """Weights (float64) with "dataset" folded in, the normalisation that is left to the library, and our own key."""
    if sae.config.variant not in variants or type(sae) is not _class_of(sae.config):
        kinds = ", ".join(variants)
        raise TypeError(f"a {type(sae).__name__} was given; this library's folders hold {kinds} SAEs of capsae")
    parts = (sae.encoder, sae.encoder_bias, sae.decoder, sae.pre_bias, *_levels(sae))
    weights = _Weights(*(each.detach().cpu().double() for each in parts))
    own: dict[str, Any] = {"schema": OWN_SCHEMA, "config": asdict(sae.config)}
    if sae.config.normalize != "dataset":
        return weights, sae.config.normalize, own
    mean, std = sae.mean.detach().cpu().double(), sae.std.detach().cpu().double()
    own |= {"mean": mean.tolist(), "std": std.tolist()}
    flat = std <= 0  # such a column is 0 to the encoder, whatever the input holds there
    weights = weights.moved(-(weights.encoder[:, flat] @ weights.pre_bias[flat]))
    std = std.masked_fill(flat, 1)
    encoder, decoder = (weights.encoder / std).masked_fill(flat, 0), weights.decoder * std
    return weights._replace(encoder=encoder, decoder=decoder, pre_bias=mean + std * weights.pre_bias), "none", own


def _class_of(config: SAEConfig) -> type[TopKSAE]:
    from ..variants import thresholds as variants  # which need io, and io this module

    return variants.model(config)


def _levels(sae: TopKSAE) -> tuple[torch.Tensor, ...]:
    """`level` and `log_gain` of `_Weights`, the shift that calibrates a variant included."""
    variant = sae.config.variant
    if variant == "gated":
        return sae.gate_bias - sae.shift, sae.log_gain
    if variant == "topk":
        return ()
    threshold = sae.log_threshold.exp() if variant == "jumprelu" else sae.threshold.expand(sae.n_latents)
    return ((threshold + sae.shift).clamp_min(0),)


def _build(
    folder: Path, weights: _Weights, cfg: Mapping, normalize: str, own: dict, unit_rows: bool, variant: str = "topk"
) -> TopKSAE:
    """An SAE of weights that read normalised rows ("dataset": raw rows, the statistics are in our own key)."""
    latents, d = weights.encoder.shape
    ours = SAEConfig.from_dict(own["config"]) if own else None
    if variant == "topk" or "k" in cfg:
        k = files.whole(folder, cfg, "k")
    else:  # a threshold alone decides: k only says what a training would aim at
        k = ours.k if ours else max(1, min(latents, d // 6))
    if ours and variant == "jumprelu" and ours.variant == "batch_topk":
        variant = "batch_topk"
    config = replace(ours or SAEConfig(latents, k), latents=latents, k=k, normalize=normalize, variant=variant)
    sae = _class_of(config)(d, config)
    if normalize == "dataset":
        mean, std = (torch.tensor(own.get(key, []), dtype=torch.float64) for key in ("mean", "std"))
        if mean.shape != (d,) or std.shape != (d,):
            raise ValueError(f"{folder}: mean and std of its key {OWN_KEY!r} must hold {d} numbers each")
        sae.mean, sae.std = mean.float(), std.float()
        std = std.masked_fill(std <= 0, 1)
        parts = {"encoder": weights.encoder * std, "decoder": weights.decoder / std}
        weights = weights._replace(**parts, pre_bias=(weights.pre_bias - mean) / std)
    if unit_rows:
        weights = _with_unit_rows(folder, weights, own_levels=variant in ("jumprelu", "gated"))
    values = weights._asdict()
    level, log_gain = values.pop("level"), values.pop("log_gain")
    if variant == "gated":
        values |= {"gate_bias": level, "log_gain": log_gain}
    elif variant == "jumprelu":
        values["log_threshold"] = level.clamp_min(0).log()
    elif variant == "batch_topk":
        values["threshold"] = level[:1]
    with torch.no_grad():
        for name, value in values.items():
            getattr(sae, name).copy_(value)
    return sae


def _with_unit_rows(folder: Path, weights: _Weights, own_levels: bool) -> _Weights:
    """Decoder rows of one length g become unit rows, and codes g times as large; the selection stays as it was. Where
    each latent has a level of its own, rows may have several lengths.
    """
    lengths = _lengths(weights.decoder)
    full = weights.decoder.any(dim=1)
    g = lengths[full].mean() if full.any() else torch.ones((), dtype=lengths.dtype)
    if own_levels:
        g = lengths
    elif not ((lengths[full] - g).abs() <= _EQUAL * g).all() or not full.any():
        raise ValueError(
            f"{folder}: decoder rows have lengths from {lengths.min():.3g} to {lengths.max():.3g}; rows of one length "
            "would do, for unit rows would change which latents are the k largest. unit_rows=False of the reader keeps "
            "them as they are, with the library's codes"
        )
    return weights if ((g - 1).abs() <= _UNIT).all() else weights.louder(g)
