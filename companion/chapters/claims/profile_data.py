"""Tidy data of the chapter on class activation profiles, one data frame a figure."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd

from capsae.caps import ClassActivationProfiles, core_activations, core_reference, energy_profile_divergence
from capsae.pipeline.latents import class_names

from ...figures.tidy import group_of
from .profile_claims import of_samples


def by_class(names: Iterable[str], **columns) -> pd.DataFrame:
    """Numbers (C,) of the classes beside their names. Columns: class and those given."""
    return pd.DataFrame({"class": list(names), **columns})


def active(caps: ClassActivationProfiles, names: Iterable[str]) -> pd.DataFrame:
    """Share of the latents active in a class. Columns: class, active_fraction (over 5 %), active_in_any_sample."""
    return by_class(names, active_fraction=caps.active_fraction(0.05), active_in_any_sample=caps.active_fraction())


def core_overlap(caps: ClassActivationProfiles, names: Iterable[str], fraction: float) -> pd.DataFrame:
    """Jaccard index of the classes' core sets. Columns: class_a, class_b, jaccard."""
    names, matrix = list(names), caps.jaccard(fraction)
    a, b = np.indices(matrix.shape).reshape(2, -1)
    return pd.DataFrame({"class_a": np.take(names, a), "class_b": np.take(names, b), "jaccard": matrix.ravel()})


def core_activity(run) -> pd.DataFrame:
    """Mean activation of each class's core latents. Columns: class, kind, activation.

    Kinds: ID test samples of the class, OOD samples predicted as it, OOD samples predicted as another (all OOD sets
    together). A class as which no OOD sample is predicted has no row of the second kind.
    """
    caps, names = run.caps, class_names(run)
    mask = caps.core_mask(run.experiment.caps.core_fraction)
    known = ClassActivationProfiles.empty(caps.n_classes, caps.n_latents)
    known.update(run.codes("test"), run.features("test").labels)
    ood = ClassActivationProfiles.empty(caps.n_classes, caps.n_latents)
    for name in run.experiment.ood_sets:
        ood.update(run.observations(name).codes, run.observations(name).predicted)
    others = (ood.sums.sum(0) - ood.sums, ood.counts.sum() - ood.counts)
    kinds = {
        "ID": (known.sums, known.counts),
        "OOD, predicted\nas this class": (ood.sums, ood.counts),
        "OOD, predicted\nas another": others,
    }
    rows = []
    for kind, (sums, counts) in kinds.items():
        activation = (sums * mask).sum(1) / np.maximum(counts, 1) / mask.sum(1)
        rows += [(names[c], kind, activation[c]) for c in np.flatnonzero(counts)]
    return pd.DataFrame(rows, columns=["class", "kind", "activation"])


def sorted_shares(run, smallest: float = 1e-4) -> pd.DataFrame:
    """Mean over samples of the sorted core profile. Columns: set, group, rank, share (cut where below ``smallest``)."""
    frames = []
    for name in ("test", *run.experiment.ood_sets):
        obs = run.observations(name)
        inside = core_activations(obs.codes, obs.predicted, run.caps, run.experiment.caps.core_fraction)
        total = inside.sum(axis=1, keepdims=True)
        share = np.divide(inside, total, out=np.zeros_like(inside), where=total > 0)
        mean = (-np.sort(-share, axis=1)).mean(axis=0)
        rank = np.arange(1, len(mean) + 1)
        frames.append(pd.DataFrame({"set": name, "group": group_of(name), "rank": rank, "share": mean}))
    data = pd.concat(frames, ignore_index=True)
    return data[data["share"] >= smallest]


PEAKEDNESS = ("inside", "fired", "largest", "entropy", "evenness")


def peakedness(run) -> pd.DataFrame:
    """How peaked and how full core profiles are: means of :func:`of_samples` by set. Columns: set, group, and these.

    Samples with fewer than two firing latents are left out of the evenness.
    """
    rows = []
    for name in ("test", *run.experiment.ood_sets):
        obs = run.observations(name)
        found = of_samples(obs.codes, obs.predicted, run.caps, run.experiment.caps.core_fraction)
        means = {key: float(np.nanmean(found[key])) for key in PEAKEDNESS}
        rows.append({"set": name, "group": group_of(name)} | means)
    return pd.DataFrame(rows)


def class_divergences(codes, row: int, caps: ClassActivationProfiles, core_fraction: float) -> np.ndarray:
    """EPD (C,) of one sample under every class, had that class been the predicted one."""
    repeated = codes[np.full(caps.n_classes, row)]
    return energy_profile_divergence(repeated, np.arange(caps.n_classes), caps, core_fraction)


def profile_under(codes, row: int, of_class: int, caps, core_fraction: float, panel: str) -> pd.DataFrame:
    """One sample's profile against a class's, on that class's core. Columns: panel, rank, latent, expected, profile."""
    core = caps.core(core_fraction)[of_class]
    expected = core_reference(caps, core_fraction)[0][of_class, core]
    inside = codes[row : row + 1].dense()[0, core].astype(np.float64)
    total = inside.sum()
    return pd.DataFrame(
        {
            "panel": panel,
            "rank": np.arange(1, len(core) + 1),
            "latent": core,
            "expected": expected,
            "profile": inside / total if total > 0 else inside,
        }
    )


def two_classes(obs, row: int, under: np.ndarray, caps, core_fraction: float, names: list[str]) -> pd.DataFrame:
    """:func:`profile_under` for the predicted class and for the nearest other; ``under`` (C,): EPD under each class."""
    predicted = int(obs.predicted[row])
    other = int(np.argmin(np.where(np.arange(len(under)) == predicted, np.inf, under)))
    panels = {predicted: "predicted class", other: "nearest other class by EPD"}
    label = {c: f"{panel}: {names[c]} (EPD {under[c]:.2f})" for c, panel in panels.items()}
    return pd.concat([profile_under(obs.codes, row, c, caps, core_fraction, text) for c, text in label.items()])
