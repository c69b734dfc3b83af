"""The Top-k sparse autoencoder: model, codes, training, files."""

from __future__ import annotations

from .model import SAEConfig, SparseCodes, TopKSAE
from .train import train_sae, train_saes

__all__ = ["SAEConfig", "SparseCodes", "TopKSAE", "train_sae", "train_saes"]
