"""A frozen timm backbone: uint8 images in, the vector that its head reads (and its logits) out."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..files import file_record, refuse_stub

_LONGEST = 32  # times its short side: what of a longer image lies in the central square would be the same


class BackboneSpec(BaseModel):
    """Settings of a backbone, and the table ``backbone`` of an experiment.

    Attributes
    ----------
    model : str
        A timm name (``deit_tiny_patch16_224``), or ``torchvision/vit_b_16`` (converted to timm), or
        ``capsae/digits_vit`` (embedded).
    checkpoint : str or None
        A file of weights (safetensors, or a torch state dict); an experiment's relative paths start from data_root.
    pretrained : bool
        Download timm's weights (or torchvision's); ignored if ``checkpoint`` is given.
    pooling : str
        ``cls``: what the model's own head reads, which must be the CLS token after the final norm (the first of the two
        tokens of a distilled model); ``token``: the CLS token of ``forward_features`` whatever the head reads; ``avg``:
        what the head of a pooled model reads (Swin), or the mean patch token of a ViT.
    image_size : int or None
        Side of the square input in pixels; None = the model's own.
    crop : float or None
        Share of the resized image that is kept: the shorter side goes to ``image_size / crop``, then the central
        square is cut out (1 keeps all of a square image). None = the model's own. Of models that timm lists with
        ``crop_mode`` "squash" both sides go there, of "border" the longer one, and a border is added.
    interpolation, mean, std
        None = the model's own.
    dtype : str or None
        Of products, in :func:`capsae.features.extract.extract`; None = bfloat16 on CUDA, else float32.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    model: str
    checkpoint: str | None = None
    pretrained: bool = False
    pooling: Literal["cls", "token", "avg"] = "cls"
    image_size: int | None = Field(None, ge=1)
    crop: float | None = Field(None, gt=0, le=1)
    interpolation: Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    dtype: Literal["float32", "bfloat16"] | None = None


def _spec(settings) -> BackboneSpec:
    if isinstance(settings, BackboneSpec):
        return settings
    given = {"model": settings} if isinstance(settings, str) else {k: v for k, v in settings.items() if v is not None}
    given = {key: os.fspath(value) if isinstance(value, os.PathLike) else value for key, value in given.items()}
    try:
        return BackboneSpec.model_validate(given, strict=False)
    except ValidationError as error:
        wrong = error.errors()[-1]  # a wrong key says more than what is missing for it
        key, known = ".".join(map(str, wrong["loc"])), ", ".join(BackboneSpec.model_fields)
        if wrong["type"] == "extra_forbidden":
            raise ValueError(f"unknown backbone key {key!r}; it takes {known}") from None
        raise ValueError(f"backbone {key} is {wrong['input']!r}: {wrong['msg']}") from None


class Backbone:
    """A loaded backbone; made by :func:`load_backbone`.

    Attributes
    ----------
    spec : BackboneSpec
    net : torch.nn.Module
        In evaluation mode, without gradients.
    size : int
        Side of the input in pixels.
    dim, n_logits : int
        Width d of the features, C of the logits (0 if the model has no head).
    digest : str
        SHA-256 of weights and preprocessing: equal digests give equal features.
    """

    def __init__(self, net: torch.nn.Module, spec: BackboneSpec, weights: str | None = None):
        from timm.data import resolve_model_data_config

        own = resolve_model_data_config(net)
        self.net, self.spec = net.eval().requires_grad_(False), spec
        if not spec.image_size and len(set(own["input_size"][1:])) > 1:
            sides = " x ".join(map(str, own["input_size"][1:]))
            raise ValueError(f"backbone {spec.model!r} takes {sides} pixels: set image_size, the side of a square")
        self.size = int(spec.image_size or own["input_size"][-1])
        self.mean = tuple(spec.mean or own["mean"])
        self.std = tuple(spec.std or own["std"])
        self.interpolation = spec.interpolation or own["interpolation"]
        self.crop = float(spec.crop or own["crop_pct"])
        self.crop_mode = own.get("crop_mode") or "center"
        self.n_logits = int(getattr(net, "num_classes", 0) or 0)
        self.weights = weights or _weights_digest(net)
        described = {key: value for key, value in self.describe().items() if key not in ("checkpoint", "pretrained")}
        self.digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
        with torch.inference_mode():
            blank = torch.zeros(1, self.size, self.size, 3, dtype=torch.uint8)
            self.dim = int(self.forward(blank)[0].shape[1])

    def describe(self) -> dict:
        """Everything that decides the features, as JSON."""
        spec = self.spec.model_dump(exclude={"dtype"})
        spec["checkpoint"] = spec["checkpoint"] and Path(spec["checkpoint"]).name  # the path is this machine's affair
        own = {key: getattr(self, key) for key in ("crop", "mean", "std", "interpolation")}
        own |= {"crop_mode": self.crop_mode} if self.crop_mode != "center" else {}
        return spec | own | {"image_size": self.size, "weights_sha256": self.weights}

    @cached_property
    def _transform(self):
        from timm.data import create_transform

        chosen = {"crop_pct": self.crop, "crop_mode": self.crop_mode, "interpolation": self.interpolation}
        whole = create_transform((3, self.size, self.size), mean=self.mean, use_prefetcher=True, **chosen)
        return type(whole)(whole.transforms[:-1])  # the last makes a tensor of it

    def prepare(self, image: Image.Image) -> np.ndarray:
        """An RGB image as (size, size, 3) uint8: resized and cropped by timm's own transform of the model, not yet
        normalised. Safe to call from threads."""
        width, height = image.size
        reach = _LONGEST * min(width, height)
        if max(width, height) > reach and self.crop_mode == "center":  # a line of pixels would become gigabytes
            left, top = max(0, (width - reach) // 2), max(0, (height - reach) // 2)
            image = image.crop((left, top, min(width, left + reach), min(height, top + reach)))
        return np.asarray(self._transform(image))

    def to(self, device: str | torch.device) -> Backbone:
        """Move the weights."""
        self.net.to(device)
        return self

    def forward(self, batch: torch.Tensor, logits: bool = True) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Features (B, d) and logits (B, C) or None of a uint8 batch (B, size, size, 3) on the network's device."""
        pixels = batch.permute(0, 3, 1, 2).to(torch.float32)
        scale = [1.0 / (255.0 * s) for s in self.std]
        shift = [-m / s for m, s in zip(self.mean, self.std, strict=True)]
        scale, shift = (torch.tensor(v, device=batch.device).view(1, 3, 1, 1) for v in (scale, shift))
        tokens = self.net.forward_features(pixels * scale + shift)
        pooled = self._pool(tokens)
        return pooled, (self.net.forward_head(tokens) if logits and self.n_logits else None)

    def _pool(self, tokens: torch.Tensor) -> torch.Tensor:
        net, pooling = self.net, self.spec.pooling
        pooled_by = getattr(net, "global_pool", None)
        has_token = getattr(net, "cls_token", None) is not None and tokens.ndim == 3
        if pooling in ("cls", "token") and not has_token:
            found = f"backbone {self.spec.model!r} has no CLS token, so pooling = {pooling!r} is impossible"
            raise ValueError(f"{found}; use 'avg'")
        if pooling == "cls" and pooled_by != "token":
            found = f"the head of {self.spec.model!r} reads the {pooled_by!r} pool, not the CLS token"
            raise ValueError(f"{found}; use pooling = 'token' or 'avg'")
        if pooling == "token" or (pooling == "cls" and getattr(net, "head_dist", None) is not None):
            return tokens[:, 0]
        if pooling == "avg" and has_token and pooled_by == "token":
            return tokens[:, getattr(net, "num_prefix_tokens", 1) :].mean(dim=1)
        return net.forward_head(tokens, pre_logits=True)


def load_backbone(settings) -> Backbone:
    """Load a backbone.

    Parameters
    ----------
    settings : str, mapping, BackboneSpec or Backbone
        A name of a model, the fields of :class:`BackboneSpec` (None = default), or a backbone, which is returned as it
        is.

    Raises
    ------
    ValueError
        Unknown model or setting, weights that do not fit it, a pooling that it does not have.
    FileNotFoundError
        No such checkpoint.
    """
    if isinstance(settings, Backbone):
        return settings
    spec = _spec(settings)
    if spec.checkpoint is not None and not os.path.isfile(spec.checkpoint):
        raise FileNotFoundError(f"no checkpoint file {spec.checkpoint!r} for backbone {spec.model!r}")
    family, _, name = spec.model.partition("/")
    if family == "torchvision":
        from .convert import load_torchvision_vit

        weights = spec.checkpoint or ("DEFAULT" if spec.pretrained else None)
        return Backbone(load_torchvision_vit(name, weights=weights), spec)
    if family == "capsae":
        from .tinyvit import WEIGHTS, load_digits_vit

        if name != "digits_vit":
            raise ValueError(f"unknown backbone {spec.model!r}; ours is 'capsae/digits_vit'")
        return Backbone(load_digits_vit(spec.checkpoint or WEIGHTS), spec)
    return Backbone(_timm_model(spec), spec, file_record(Path(spec.checkpoint))["sha256"] if spec.checkpoint else None)


def load_weights(settings: Mapping) -> Backbone:
    """Load a backbone that must have weights: as :func:`load_backbone`, with errors that say how to get them.

    Raises FileNotFoundError where neither a file of weights nor downloaded ones can be had, ValueError for a file that
    is empty, a pointer of git-lfs, damaged, or of another model.
    """
    model, file = settings["model"], settings.get("checkpoint")
    if not file and not settings.get("pretrained"):
        raise FileNotFoundError(f"backbone {model!r} has no weights: give --checkpoint FILE or set backbone.pretrained")
    if file and os.path.isfile(file):
        refuse_stub(file)
    try:
        return load_backbone(settings)
    except (ValueError, MemoryError, ImportError):
        raise
    except OSError as error:
        if file:
            raise
        why = str(error).strip().split(". ")[0] or type(error).__name__
        raise FileNotFoundError(
            f"the weights of {model!r} are neither on this machine nor to be downloaded: give --checkpoint FILE (or "
            f"--set backbone.checkpoint=FILE), or run once with a connection ({why})"
        ) from None
    except Exception as error:  # whatever torch, pickle and safetensors make of a damaged file
        first = (str(error).strip().splitlines() or [""])[0]
        raise ValueError(f"{file or model} holds no weights of {model!r} that can be read: {first}") from None


def _timm_model(spec: BackboneSpec, **options) -> torch.nn.Module:
    import timm

    if spec.image_size:
        own = (timm.get_pretrained_cfg(spec.model, allow_unregistered=True) or None) if "/" not in spec.model else None
        if own is None or own.input_size[-1] != spec.image_size:
            options["img_size"] = spec.image_size
    arguments = {"pretrained": spec.pretrained and not spec.checkpoint, "checkpoint_path": spec.checkpoint or ""}
    try:
        try:
            return timm.create_model(spec.model, **arguments, **options)
        except TypeError:  # fully convolutional: takes any size and no img_size
            return timm.create_model(spec.model, **arguments, **{k: v for k, v in options.items() if k != "img_size"})
    except RuntimeError as error:
        if spec.checkpoint and "num_classes" not in options:  # fine-tuned weights: their head has its own classes
            return _timm_model(spec, num_classes=_classes_in(spec.checkpoint))
        first = str(error).strip().splitlines()
        raise ValueError(f"backbone {spec.model!r} (checkpoint {spec.checkpoint}): {' '.join(first[:2])}") from None


def _classes_in(checkpoint: str) -> int:
    """Classes of the linear head in a file of weights, 0 where there is none."""
    from timm.models import load_state_dict

    weights = load_state_dict(checkpoint)
    names = ("head.weight", "head.fc.weight", "fc.weight", "classifier.weight")
    return next((len(weights[name]) for name in names if name in weights), 0)


def _weights_digest(net: torch.nn.Module) -> str:
    sha = hashlib.sha256()
    for key, value in sorted(net.state_dict().items()):
        sha.update(key.encode())
        sha.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return sha.hexdigest()
