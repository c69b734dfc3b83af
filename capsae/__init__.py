"""Class activation profiles of sparse autoencoders, for out-of-distribution detection.

A companion to "Sparsity as a Key" (arXiv 2604.26409). The road is
images -> CLS features -> sparse codes -> class activation profiles -> scores; each arrow is one module.
"""

from __future__ import annotations

from importlib import import_module

from . import detectors, metrics
from .caps import ClassActivationProfiles, energy_profile_divergence
from .detectors import Observations
from .evaluate import evaluate
from .sae import SAEConfig, SparseCodes, TopKSAE, train_sae

# These pull in pydantic or are needed at the edge only, so they load on first use.
_LAZY = {
    "Profile": "profiles",
    "load_profile": "profiles",
    "FeatureSet": "features",
    "LinearHead": "features",
    "load_features": "pipeline",
    "Run": "pipeline",
}

__all__ = [
    "ClassActivationProfiles",
    "Observations",
    "SAEConfig",
    "SparseCodes",
    "TopKSAE",
    "detectors",
    "energy_profile_divergence",
    "evaluate",
    "metrics",
    "train_sae",
    *_LAZY,
]


def __getattr__(name: str):
    if name in _LAZY:
        value = getattr(import_module(f".{_LAZY[name]}", __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
