"""Features of many sites of a vision transformer at once: any block's CLS token, attention output, mean of patches.

One forward pass a batch gives all sites. Decoding, shards and resuming are those of
:func:`capsae.features.extract.extract`: a :class:`SiteReader` is a backbone whose vector is that of all sites side by
side, which is cut apart at the end. Any site can take the place of the features that the head reads.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import torch

from capsae.features.backbone import Backbone, load_backbone
from capsae.features.featureset import FeatureSet

KINDS = ("cls", "attn", "patches")
FINAL = "final/cls"
READER = 1
"""Raised whenever the same network would give other vectors: stored ones of another number are not read."""


def site_names(backbone) -> tuple[str, ...]:
    """Names of the sites of a vision transformer, in the order of a forward pass.

    ``block01`` is ``net.blocks[0]``; with L blocks, ``block01`` to ``blockL`` each have

    - ``/attn``: what the attention branch puts out at the CLS position, before layer scale and residual;
    - ``/cls``: the CLS token of the block's output, the residual stream, without any norm;
    - ``/patches``: the mean of the patch tokens of the block's output, without CLS and register tokens;

    and ``final/cls`` is the vector that the head reads. A transformer without a CLS token has ``/patches`` and
    ``final/cls`` alone. ``backbone`` is what :func:`capsae.features.backbone.load_backbone` takes; ValueError for one
    that is no plain vision transformer (Swin, ResNet ...): its stages differ in width and tokens.
    """
    from timm.models.vision_transformer import VisionTransformer

    backbone = load_backbone(backbone)
    if not isinstance(backbone.net, VisionTransformer):
        raise ValueError(
            f"backbone {backbone.spec.model!r} is a {type(backbone.net).__name__}, which has no blocks of one width to "
            "read sites from; a plain vision transformer of timm (vit_*, deit_*) or capsae/digits_vit has"
        )
    kinds = ("attn", "cls", "patches") if getattr(backbone.net, "cls_token", None) is not None else ("patches",)
    numbers = range(1, len(backbone.net.blocks) + 1)
    return (*(f"block{number:02d}/{kind}" for number in numbers for kind in kinds), FINAL)


class SiteReader(Backbone):
    """A backbone whose ``forward`` gives the vectors of several sites side by side, (B, S * d), from one pass.

    ``sites`` are names of :func:`site_names`, each once; None = all. ValueError names those there are.
    """

    def __init__(self, backbone, sites: Iterable[str] | None = None):
        whole = load_backbone(backbone)
        self.__dict__.update(whole.__dict__)
        known = site_names(whole)
        self.sites = known if sites is None else tuple(sites)
        unknown = [site for site in self.sites if site not in known]
        if unknown or not self.sites or len(set(self.sites)) < len(self.sites):
            what = f"no site {unknown[0]!r}" if unknown else f"sites are {[*self.sites]}: name one or more, each once"
            raise ValueError(f"{what}; {whole.spec.model} has {', '.join(known)}")
        self.width = whole.dim
        self.dim = whole.dim * len(self.sites)
        self.digest = hashlib.sha256(json.dumps([whole.digest, self.sites]).encode()).hexdigest()

    def describe(self) -> dict:
        """What decides the features, as JSON: the backbone's and the names of the sites."""
        return super().describe() | {"sites": list(self.sites)}

    def forward(self, batch: torch.Tensor, logits: bool = True) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Sites (B, S * d) and logits (B, C) or None of a uint8 batch (B, size, size, 3)."""
        found: dict[str, torch.Tensor] = {}
        first = self.net.num_prefix_tokens

        def reading(site: str, kind: str):
            def hook(module, given, tokens):
                found[site] = tokens[:, first:].mean(dim=1) if kind == "patches" else tokens[:, 0].clone()

            return hook

        with ExitStack() as hooks:  # of this pass alone: others may use the network
            for site in self.sites:
                if site != FINAL:
                    name, kind = site.split("/")
                    block = self.net.blocks[int(name.removeprefix("block")) - 1]
                    module = block.attn if kind == "attn" else block
                    hooks.callback(module.register_forward_hook(reading(site, kind)).remove)
            found[FINAL], scores = super().forward(batch, logits)
        return torch.cat([found[site] for site in self.sites], dim=1), scores

    def split(self, features: FeatureSet) -> dict[str, FeatureSet]:
        """A FeatureSet of vectors (N, S * d) as one (N, d) a site; labels, ids and logits are the same for all."""
        if features.cls.shape[1] != self.dim:
            raise ValueError(f"cls has shape {features.cls.shape}, expected (N, {self.dim}) of {len(self.sites)} sites")
        parts = np.split(features.cls, len(self.sites), axis=1)
        return {
            site: replace(features, cls=np.ascontiguousarray(part), meta=features.meta | {"site": site})
            for site, part in zip(self.sites, parts, strict=True)
        }


def run_sites(
    run, set_name: str, sites: Iterable[str] | None = None, checkpoint: str | os.PathLike | None = None, **options
) -> dict[str, FeatureSet]:
    """Features of an experiment's set at several sites, from the store or extracted from its images.

    An experiment that comes with a pack has features of ``final/cls`` alone: its images are needed here
    (``data_root``), and the backbone's weights (``checkpoint``, or timm's download).

    Samples as in ``run.features(set_name)``, with the same logits: those of the experiment's head, at the network's
    end. Kept as float16 (float32 where a value does not fit). ``options`` are those of ``extract``.
    """
    from capsae.data.splits import holdout_mask
    from capsae.features.extract import EXTRACTOR, extract
    from capsae.pipeline.inputs import reading_code
    from capsae.pipeline.store import artefact_digest

    inputs, store = run.inputs, run.store
    own = "train" if set_name == "val" and inputs.holdout else set_name
    source = inputs.source(own)
    crop = run.experiment.source(own).crop
    reader = SiteReader(inputs.backbone_settings(checkpoint) | ({} if crop is None else {"crop": crop}), sites)
    recipe = "sites", {"reader": READER, "extractor": EXTRACTOR}, {"source": source.digest(), "reader": reader.digest}

    def make():
        shards = store.scratch("sites", artefact_digest(*recipe, reading_code()))
        given = {"device": run.device, "progress": run.progress, "name": own, "logits": False, "shard_size": 1024}
        return extract(source, reader, shards, **given | options)

    def save(features, folder):
        fits = np.abs(features.cls).max() < np.finfo(np.float16).max
        features.save(folder / "features.safetensors", "float16" if fits else "float32")

    def load(folder):
        return FeatureSet.load(folder / "features.safetensors")

    whole = store.get_or_make(*recipe, reading_code(), make, save, load)
    if inputs.holdout and own == "train":
        held_out = holdout_mask(whole.labels, inputs.holdout.fraction, inputs.holdout.seed)
        whole = whole.take(held_out if set_name == "val" else ~held_out)
    known = run.features(set_name)
    if not np.array_equal(whole.ids, known.ids):
        what = f"{set_name}: {len(whole)} images were read here, {len(known)} stand behind the experiment's features"
        raise ValueError(f"{what}, or in another order; train_fraction must be 1, and the images the experiment's own")
    return reader.split(replace(whole, logits=known.logits, name=set_name))
