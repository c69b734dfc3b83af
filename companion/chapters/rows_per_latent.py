"""Training samples per latent: is a trained dictionary worth it where there are few?

The paper has 167 training samples a latent, imagenet20 about 4. For shares of the training samples and sizes of the
dictionary, EPD and RPD on the trained SAE, on the same SAE before its first step (untrained), on a random dictionary,
and on the rectified feature itself (dense). The share is drawn anew for each seed, by class, so that the spread over
seeds holds the draw too; head and held-out samples stay. Recipe and number of *optimiser steps* are the experiment's
in every cell (epochs grow as samples shrink): with the epochs kept, a tenth of the samples would also mean a tenth of
the training. The epoch with the lowest held-out FVU is kept, so that more epochs do not overfit.

``python -m companion.chapters.rows_per_latent imagenet20`` makes book/rows_per_latent/imagenet20.csv, one seed and
size after the other; stopped, it goes on from what the file holds.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from capsae import metrics
from capsae.data.splits import stratified_mask
from capsae.detectors import Observations, create
from capsae.detectors.epd import dense_codes
from capsae.files import replacing
from capsae.sae import SAEConfig, train_sae
from capsae.sae.dictionaries import methods
from capsae.sae.rows import start
from capsae.stats import seeds_and_images

from ..figures.figures import BLUE, GREEN, GREY, ORANGE, _figure
from ..findings import Numbers
from ..publish.plan import root

FRACTIONS = (0.1, 0.25, 0.5, 1.0)
SEEDS: dict[int | None, int] = {None: 10, 384: 10, 1920: 10, 7680: 3}  # by size; None: dense. The largest costs most
DICTIONARIES = {"trained": BLUE, "untrained": ORANGE, "random": GREEN, "dense": GREY}
SCORES, GROUPS = ("epd", "rpd"), ("near", "far", "all")
METRICS = {"fpr95_ood_pos": metrics.fpr95_ood_pos, "auroc": metrics.auroc}
COLUMNS = ["fraction", "N", "D", "samples_per_latent", "dictionary", "score", "seed", "group", "metric", "value"]


def file(experiment: str) -> Path:
    """The committed table of an experiment."""
    return root() / f"book/rows_per_latent/{experiment}.csv"


def read(experiment: str) -> pd.DataFrame:
    """The committed table; values are shares."""
    return pd.read_csv(file(experiment))


def source_line(experiment: str) -> str:
    """Where the numbers come from, to stand under the figure."""
    digest = hashlib.sha256(file(experiment).read_bytes()).hexdigest()[:12]
    return f"Experiment {experiment} · book/rows_per_latent/{experiment}.csv, digest {digest}"


def measure(features: Mapping, sae: SAEConfig, seed: int, size: int | None, options: Mapping) -> pd.DataFrame:
    """All cells of one seed and size (None: dense). ``features``: set -> FeatureSet; ``options``: of each score."""
    cells, whole = [], features["train"]
    for fraction in FRACTIONS:
        train = whole.take(stratified_mask(whole.labels, fraction, seed))
        for name, encode in dictionaries(train.cls, features["val"].cls, sae, seed, fraction, size):
            atoms = size or train.cls.shape[1]
            about = {"fraction": fraction, "N": len(train), "D": atoms, "samples_per_latent": len(train) / atoms}
            found = scored(features | {"train": train}, encode, options)
            cells += [about | {"dictionary": name, "seed": seed} | row for row in found]
    return pd.DataFrame(cells)[COLUMNS]


def dictionaries(train, val, sae: SAEConfig, seed: int, fraction: float, size: int | None) -> Iterator[tuple]:
    """Name and encoder (cls -> SparseCodes) of every dictionary of a size; ``size`` None: the rectified feature."""
    config = replace(sae, latents=size or sae.latents, seed=seed, epochs=round(sae.epochs / fraction))
    untrained = start(torch.as_tensor(train), config, torch.device("cpu"))[0]
    if size is None:
        yield "dense", lambda cls: dense_codes(np.maximum(untrained.normalize(cls), 0))
        return
    yield "trained", train_sae(train, config, "cpu", val, keep="best", progress=False)[0].encode
    yield "untrained", untrained.encode
    yield "random", methods.create("random", size, config.k, config.normalize, seed).fit(train).encode


def scored(features: Mapping, encode, options: Mapping) -> list[dict]:
    """Score, group, metric and value: means over the OOD sets of each group."""
    known = {
        where: Observations(of.cls, of.logits, of.labels if where == "train" else None, codes=encode(of.cls))
        for where, of in features.items()
        if where != "val"
    }
    rows = []
    for name in SCORES:
        detector = create(name, **options.get(name, {})).fit(known["train"])
        scores = {where: detector.score(obs) for where, obs in known.items() if where != "train"}
        for metric, function in METRICS.items():
            of = {where: function(scores["test"], scores[where]) for where in scores if where != "test"}
            for group in GROUPS:
                value = np.mean([value for where, value in of.items() if group in ("all", where.split("/")[0])])
                rows.append({"score": name, "group": group, "metric": metric, "value": float(value)})
    return rows


def numbers(table: pd.DataFrame, metric: str = "fpr95_ood_pos") -> Numbers:
    """What the trained dictionary gains over the untrained one, paired by seed; the interval holds seeds alone."""
    made, rows = Numbers(), table.query("group == 'all' and metric == @metric")
    made.add("seeds", int(rows["seed"].nunique()))
    wide = rows.pivot_table(index=["score", "D", "fraction", "seed"], columns="dictionary", values="value")
    for (score, size, fraction), part in wide.dropna(subset="trained").groupby(level=[0, 1, 2]):
        for other in ("untrained", "random"):
            found = seeds_and_images(part["trained"] - part[other], 0.0)
            key = f"{score}_{size}_{round(100 * fraction)}_less_{other}"
            ends = (found["lo"], found["hi"]) if len(part) > 1 else (None, None)  # one seed says nothing of seeds
            made.add(key, found["value"], *ends, unit="points")
    return made


def curves(table: pd.DataFrame, metric: str = "fpr95_ood_pos") -> pd.DataFrame:
    """Mean and interval over seeds of a metric over all sets, in %. Columns: dictionary, score, D, x, value, lo, hi."""
    rows, found = table.query("group == 'all' and metric == @metric"), []
    for keys, part in rows.groupby(["dictionary", "score", "D", "fraction"], sort=False):
        mean = seeds_and_images(100 * part["value"], 0.0)
        found.append((*keys[:3], part["samples_per_latent"].mean(), mean["value"], mean["lo"], mean["hi"]))
    return pd.DataFrame(found, columns=["dictionary", "score", "D", "x", "value", "lo", "hi"])


def figure(data: pd.DataFrame) -> Figure:
    """A panel a score: the metric along training samples per latent, a line a dictionary and size."""
    drawn, axes = _figure(7, 3.8, 1, len(SCORES), sharey=True)
    markers = dict(zip(sorted(data["D"].unique()), "*so^v", strict=False))
    for ax, score in zip(axes.flat, SCORES, strict=True):
        for (name, size), part in data[data["score"] == score].groupby(["dictionary", "D"], sort=False):
            part, colour = part.sort_values("x"), DICTIONARIES[name]
            label = f"{name}, {size} latents"
            ax.plot(part["x"], part["value"], color=colour, marker=markers[size], markersize=4, label=label)
            ax.fill_between(part["x"], part["lo"], part["hi"], color=colour, alpha=0.15, linewidth=0)
        ax.set(xscale="log", title=score.upper(), xlabel="training samples per latent")
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter("")
    axes[0, 0].set_ylabel("FPR95, OOD positive, %")
    drawn.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    return drawn


def main() -> None:
    from capsae.pipeline.run import Run

    run = Run(sys.argv[1], device="cpu", progress=False)
    path = file(run.experiment.name)
    features = {name: run.features(name) for name in ("train", "val", "test", *run.experiment.ood_sets)}
    given = {name: run.detector_options(name) for name in SCORES}
    table = pd.read_csv(path) if path.is_file() else pd.DataFrame(columns=COLUMNS)
    path.parent.mkdir(parents=True, exist_ok=True)
    done = set(zip(table["seed"], table["D"], strict=True))
    units = [(seed, size) for seed in range(max(SEEDS.values())) for size, seeds in SEEDS.items() if seed < seeds]
    for seed, size in sorted(units, key=lambda unit: SEEDS[unit[1]], reverse=True):
        if (seed, size or features["train"].cls.shape[1]) not in done:
            more = measure(features, run.experiment.sae, seed, size, given)
            table = more if table.empty else pd.concat([table, more])
            with replacing(path) as temporary:
                table.to_csv(temporary, index=False, float_format="%.6g", lineterminator="\n")


if __name__ == "__main__":
    main()
