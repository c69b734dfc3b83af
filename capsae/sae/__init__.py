"""Sparse autoencoders and other dictionaries: models, codes, training, files, measures."""

from __future__ import annotations

from pathlib import Path

from . import dictionaries, exchange, io, measures, variants, variants_batch, variants_rows  # noqa: F401 (register)
from .model import SAEConfig, SparseCodes, TopKSAE
from .train import train_sae, train_saes

__all__ = [
    "SAEConfig", "SparseCodes", "TopKSAE", "dictionaries", "load", "measures", "train_sae", "train_saes", "variants",
]  # fmt: skip


def load(folder: str | Path, device: str = "cpu") -> TopKSAE | dictionaries.Dictionary:
    """Whatever a `save` wrote into a folder, an SAE or a dictionary, or a top-k SAE of another library."""
    if io.kind(folder) in dictionaries.METHODS:
        return dictionaries.load(folder, device)
    return TopKSAE.load(folder, device)
