"""The members of the zoo: what each is, and how each is fitted on equal terms.

Equal terms: the same training rows, k latents a row, M latents (d where more would not be determined), the same number
of epochs, and a learning rate chosen from one grid by FVU on held-out ID rows (`choose`).
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pandas as pd

from capsae.pipeline.code import digest as code_digest
from capsae.sae import SAEConfig
from capsae.sae.dictionaries import methods as dictionaries
from capsae.sae.model import SparseCoder, TopKSAE
from capsae.sae.variants import thresholds as variants

RATES = (4e-3, 8e-3, 1.6e-2, 3.2e-2)
SEEDS = (0, 1, 2, 3, 4)
# All members of an experiment have the same: fewer than its own SAE, so that all of the zoo takes half an hour.
EPOCHS = {"imagenet20": 8, "mini80": 4}
NEAR = 0.1  # a mean L0 that is off its target by at most this share counts as equal
KINDS = {"variant": "sparse autoencoder", "dictionary": "dictionary without gradients", "control": "control"}
CONTROLS = ("random", "pca", "kmeans", "dense_relu")
SMALL = ("semi_nmf", "pca", "dense_relu")  # d atoms: with more the factorisation is not determined, or there are none
FIXED = ("pca", "dense_relu")  # no random numbers: all seeds are one


@dataclass(frozen=True)
class Member:
    """What a member is: its metadata, and which budget applies."""

    name: str
    kind: str  # of KINDS
    title: str
    formula: str
    source: str
    defaults: dict[str, Any]
    description: str
    trained: bool = False  # by gradient, with a learning rate of its own
    seeded: bool = True  # False: no random numbers, so that one seed is all there is
    small: bool = False  # d atoms in place of M
    targets_k: bool = True  # False: L0 follows from the rule


def members(kind: str | None = None) -> list[str]:
    """Names: the variants, then dictionaries, then controls."""
    others = sorted(dictionaries.METHODS, key=lambda name: (name in CONTROLS, list(dictionaries.METHODS).index(name)))
    return [name for name in (*variants.REGISTRY, *others) if kind in (None, member(name).kind)]


def member(name: str) -> Member:
    """One member; ValueError for an unknown name."""
    if name in variants.REGISTRY:
        return Member(name, "variant", **variants.info(name), trained=True, targets_k=name != "top_afa")
    if name not in dictionaries.METHODS:
        raise ValueError(f"the zoo has no member {name!r}; it has {', '.join(members())}")
    cls, kind = dictionaries.METHODS[name], "control" if name in CONTROLS else "dictionary"
    about = cls.title, cls.formula, cls.source, cls.defaults, cls.__doc__
    return Member(name, kind, *about, seeded=name not in FIXED, small=name in SMALL)


def rates(name: str, grid: Iterable[float] = RATES) -> tuple[float | None, ...]:
    """The learning rates that are tried for a member; (None,) for one that has none."""
    return tuple(grid) if member(name).trained else (None,)


def seeds_of(name: str, seeds: Iterable[int] = SEEDS) -> tuple[int, ...]:
    """The seeds that say something: the first alone for a fit without random numbers."""
    seeds = tuple(seeds)
    return seeds if member(name).seeded else seeds[:1]


def settings(experiment) -> SAEConfig:
    """What all members of an experiment share: its SAE's settings with the zoo's epochs."""
    epochs = EPOCHS.get(experiment.name, experiment.sae.epochs)
    return replace(experiment.sae, epochs=epochs, variant="topk", options={})


@cache
def normalised_head(run):
    """A linear probe on the training rows as the encoder sees them, for g-SAE."""
    from capsae.features.probe import fit_linear_probe

    if run.experiment.sae.normalize == "dataset":
        raise ValueError("normalize is 'dataset': a head on normalised rows needs 'sample', 'l2' or 'none'")
    train = run.features("train")
    rows = TopKSAE(train.cls.shape[1], settings(run.experiment)).normalize(train.cls)
    return fit_linear_probe(rows, train.labels, run.experiment.n_classes, seed=run.experiment.seed)


def fit_rows(
    name: str, shared: SAEConfig, train: np.ndarray, val: np.ndarray, seed: int, lr: float | None, head=None
) -> tuple[SparseCoder, dict[str, float]]:
    """Fit a member on raw rows (N, d): the model, and what its fit took and reached on held-out rows.

    The record: train_cpu_s (all threads of this process), train_wall_s, held_out_fvu, held_out_l0, portable (whether
    other CPUs fit the same bits), best_epoch (variants alone). FloatingPointError where a training diverged.
    """
    from capsae.sae import measures, train_sae

    known, wall, cpu = member(name), time.perf_counter(), time.process_time()
    record = {"portable": False}
    if known.trained:
        config = replace(shared, variant=name, lr=lr, seed=seed)
        model, history = train_sae(train, config, "cpu", val, keep="best", progress=False, head=head)
        record = {name: history.attrs[name] for name in ("best_epoch", "portable")}
    else:
        latents = train.shape[1] if known.small else shared.latents
        model = dictionaries.create(name, latents, min(shared.k, latents), shared.normalize, seed).fit(train)
    record |= {"train_cpu_s": time.process_time() - cpu, "train_wall_s": time.perf_counter() - wall}
    codes = model.encode(val)
    return model, record | {"held_out_fvu": measures.fvu(model, val, codes), "held_out_l0": measures.l0(codes)}


def fit_run(name: str, run, seed: int, lr: float | None) -> tuple[SparseCoder, dict[str, float]]:
    """`fit_rows` on the training and validation rows of a run."""
    head = normalised_head(run) if getattr(variants.REGISTRY.get(name), "needs_head", False) else None
    train, val = run.features("train").cls, run.features("val").cls
    return fit_rows(name, settings(run.experiment), train, val, seed, lr, head)


def choose(grid: pd.DataFrame, k: int) -> pd.Series:
    """The learning rate of each member, by held-out ID rows alone; NaN for members without a rate.

    The lowest FVU decides. A rate whose L0 is off k by more than a tenth is passed over where another's is not, since a
    larger L0 buys a lower FVU; a training that diverged has no FVU and is never chosen. ValueError for a member of
    which every training diverged.

    ``grid``: columns member, lr, held_out_fvu (NaN: diverged), held_out_l0; ``k``: the L0 that was asked for.
    """
    chosen = {}
    for name, rows in grid.dropna(subset="held_out_fvu").groupby("member", sort=False):
        close = rows[(rows["held_out_l0"] / k - 1).abs() <= NEAR]
        rows = close if len(close) else rows
        chosen[name] = rows.loc[rows["held_out_fvu"].idxmin(), "lr"]
    if lost := sorted(set(grid["member"]) - set(chosen)):
        raise ValueError(f"every training of {lost[0]!r} diverged: smaller learning rates would do")
    return pd.Series(chosen, dtype=float, name="lr")


def fit_code(name: str) -> str:
    """Digest of the code that a member's fit hangs on: not that of the other members, nor the trainer where none is."""
    from capsae.sae import train_sae

    cls = variants.REGISTRY.get(name) or dictionaries.METHODS[name]
    others = [member, (variants, "REGISTRY"), (dictionaries, "METHODS")] + ([] if member(name).trained else [train_sae])
    return code_digest(fit_rows, cls, without=others)
