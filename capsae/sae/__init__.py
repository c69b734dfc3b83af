"""Sparse autoencoders and other dictionaries: models, codes, training, files, measures."""

from __future__ import annotations

from pathlib import Path

from . import io, measures
from .config import SAEConfig
from .dictionaries import methods as dictionaries
from .exchange import folders as exchange  # noqa: F401 (registers its readers)
from .model import SparseCodes, TopKSAE
from .train import train_sae, train_saes
from .variants import batch, samples, thresholds  # noqa: F401 (they register)

__all__ = ["SAEConfig", "SparseCodes", "TopKSAE", "dictionaries", "load", "measures", "train_sae", "train_saes"]


def load(folder: str | Path, device: str = "cpu") -> TopKSAE | dictionaries.Dictionary:
    """Whatever a `save` wrote into a folder, an SAE or a dictionary, or a top-k SAE of another library."""
    if io.kind(folder) in dictionaries.METHODS:
        return dictionaries.load(folder, device)
    return TopKSAE.load(folder, device)
