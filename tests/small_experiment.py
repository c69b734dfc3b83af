"""An experiment of four Gaussian classes in 16 dimensions with an OOD set or two: a whole run in a second."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np

from capsae.features.featureset import FeatureSet

N_CLASSES, DIM = 4, 16
SETS = {"train": 40, "test": 20, "near/shifted": 20, "far/noise": 20}

TOML = """
title = "Four Gaussian classes"
pack = {pack}
n_classes = 4
n_boot = 20

[backbone]
model = "vit_tiny_patch16_224"

[train]
kind = "folder"
path = "train"

[test]
kind = "folder"
path = "test"

[ood."near/shifted"]
kind = "folder"
path = "shifted"

[ood."far/noise"]
kind = "folder"
path = "noise"

[sae]
latents = 48
k = 6
epochs = 30
batch_size = 32
lr = 0.01
"""


def features(set_name: str, per_class: int, seed: int = 0) -> FeatureSet:
    """Rows around one centre a class (the same centres for every set); OOD sets lie elsewhere."""
    centres = np.random.default_rng(7).normal(size=(N_CLASSES, DIM)) * 2
    rng = np.random.default_rng([seed, *map(ord, set_name)])
    labels = np.repeat(np.arange(N_CLASSES), per_class)
    if set_name == "near/shifted":
        centres = centres[:, ::-1]
    if set_name == "far/noise":
        centres = np.zeros_like(centres)
    cls = centres[labels] + rng.normal(size=(len(labels), DIM))
    ids = np.array([f"{set_name}-{row}" for row in range(len(labels))])
    names = tuple(f"n0000000{c}_kind_{c}" for c in range(N_CLASSES))
    return FeatureSet(cls, labels, ids, name=set_name, class_names=names)


def write(folder: Path, sets: dict[str, FeatureSet] | None = None) -> Path:
    """Write the pack and its experiment into ``folder``; returns the path of its TOML file."""
    pack = folder / "pack"
    pack.mkdir(parents=True)
    listed = {}
    for name, value in (sets or {name: features(name, n) for name, n in SETS.items()}).items():
        path = value.save(pack / f"{name.replace('/', '__')}.safetensors", dtype="float16")
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        listed[name] = {"file": path.name, "sha256": sha256, "bytes": path.stat().st_size, "n": len(value)}
    info = {"name": "small", "backbone": {"model": "vit_tiny_patch16_224"}, "sets": listed}
    (pack / "pack.json").write_text(json.dumps(info))
    experiment = folder / "small.toml"
    experiment.write_text(TOML.format(pack=json.dumps(str(pack))))
    return experiment
