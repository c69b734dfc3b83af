"""What is measured on every member: float64, over whole sets, one tidy table.

Columns: measure, method (of OOD scores, else ""), set, group, value, lo, hi. Shares are in [0, 1]; ``lo`` and ``hi``
are bootstrap intervals over samples where there are any.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np
import pandas as pd

from capsae import caps as _caps
from capsae import detectors as _detectors
from capsae.detectors import Observations
from capsae.evaluation.evaluate import evaluate
from capsae.sae import measures

COLUMNS = ["measure", "method", "set", "group", "value", "lo", "hi"]
METHODS = ("epd", "rpd")  # the paper's score and our own
OOD_METRICS = ("fpr95_ood_pos", "fpr95_id_pos", "auroc")
CORE = 0.05  # share of the latents in a core, for its overlap between classes: the paper's figure 2
PROBED = (1, 5, 20)
N_BOOT = 500


def observe(run, model, set_name: str) -> Observations:
    """A set of a run with another model's codes; labels for the training rows alone, which detectors are fitted on."""
    rows = run.features(set_name)
    labels = rows.labels if set_name == "train" else None
    return Observations(rows.cls, labels=labels, logits=rows.logits, head=run.head, sae=model)


def measure(run, model, n_boot: int = N_BOOT) -> pd.DataFrame:
    """All measures of one fitted member on a run's sets.

    Reconstruction and the head on test rows; profiles, monosemanticity and separability on training rows; probing is
    fitted on training rows and measured on test rows.
    """
    observed = {name: observe(run, model, name) for name in ("train", "test", *run.experiment.ood_sets)}
    tables = [
        reconstruction(model, observed["train"], observed["test"], run.features("test").labels, run.head),
        latents(observed["train"], observed["test"], run.features("test").labels, run.experiment.n_classes),
        ood(run, observed, n_boot),
    ]
    return pd.concat(tables, ignore_index=True)[COLUMNS]


def reconstruction(model, train: Observations, test: Observations, test_labels, head) -> pd.DataFrame:
    """FVU, L0, dead latents, and what the exact head still knows of x_hat."""
    kept = measures.head_accuracy(model, test.cls, test_labels, head)
    sets = {"train": train, "test": test}
    found = {("fvu", name): measures.fvu(model, of.cls, of.codes) for name, of in sets.items()}
    found |= {("l0", name): measures.l0(of.codes) for name, of in sets.items()}
    found |= {("dead_fraction", name): measures.dead_fraction(of.codes) for name, of in sets.items()}
    found["n_latents", ""] = test.codes.n_latents
    names = {"head_accuracy": "reconstructed", "head_kept": "kept", "head_agreement": "agreement"}
    found |= {(name, "test"): kept[of] for name, of in names.items()}
    return tidy(found)


def latents(train: Observations, test: Observations, test_labels, n_classes: int) -> pd.DataFrame:
    """What latents stand for. Monosemanticity is by the features themselves, for want of a second encoder."""
    codes, labels = train.codes, train.labels
    single = measures.monosemanticity(codes, measures.stand_in_embeddings(train.cls))
    apart = measures.concept_separability(codes, labels, n_classes)
    profiles = _caps.ClassActivationProfiles.fit(codes, labels, n_classes)
    probed = measures.class_probing(codes, labels, test.codes, test_labels, n_classes, PROBED).set_index("size")
    found = {
        ("monosemanticity", "train"): np.nanmean(single),
        ("monosemanticity_median", "train"): np.nanmedian(single),
        ("monosemanticity_defined", "train"): np.isfinite(single).mean(),
        ("separability", "train"): np.nanmean(apart),
        ("cap_stability", "train"): np.nanmean(_caps.stability(codes, labels, n_classes)),
        ("core_overlap", "train"): measures.core_overlap(profiles, CORE),
    }
    found |= {(f"probing_{size}", "test"): probed.loc[size, "top1"] for size in PROBED}
    found |= {(f"probing_{size}_balanced", "test"): probed.loc[size, "balanced"] for size in PROBED}
    return tidy(found)


def ood(run, observed: Mapping[str, Observations], n_boot: int) -> pd.DataFrame:
    """EPD's and our own score's results on every OOD set, and their means over near, far and all sets."""
    fitted = {}
    for name in METHODS:
        fitted[name] = _detectors.create(name, **run.detector_options(name)).fit(observed["train"])
    sets = {name: observed[name] for name in run.experiment.ood_sets}
    table = evaluate(fitted, observed["test"], sets, n_boot, run.experiment.seed)
    return table[table["metric"].isin(OOD_METRICS)].rename(columns={"metric": "measure"})


def tidy(found: Mapping[tuple[str, str], float]) -> pd.DataFrame:
    """A table of values by measure and set."""
    rows = [(measure, "", where, "", float(value), np.nan, np.nan) for (measure, where), value in found.items()]
    return pd.DataFrame(rows, columns=COLUMNS)


def atoms(model) -> tuple[np.ndarray, bool]:
    """Directions (M, d) of a model, and whether their sign means something: not where codes are split by sign."""
    rows = getattr(model, "atoms", model.decoder).detach().double().numpy()
    return rows, model.n_latents == len(rows)


def stability(models: Sequence) -> pd.DataFrame:
    """Mean Hungarian-matched cosine of each pair of seeds, and that of two random dictionaries of the same size.

    Columns as above; ``group`` is the pair, "0-1".
    """
    dictionaries = [atoms(model) for model in models]
    rows = []
    for i, (a, signed) in enumerate(dictionaries):
        for j, (b, _) in enumerate(dictionaries[i + 1 :], i + 1):
            value = measures.matched_cosines(a, b, signed).mean()
            rows.append(("stability", "", "", f"{i}-{j}", float(value), np.nan, np.nan))
    a, signed = dictionaries[0]
    rows.append(("stability_chance", "", "", "", by_chance(*a.shape, signed), np.nan, np.nan))
    return pd.DataFrame(rows, columns=COLUMNS)


@cache  # members of one size share it
def by_chance(n_atoms: int, d: int, signed: bool, seed: int = 0) -> float:
    """Mean matched cosine of two dictionaries of random directions, alike in all of space."""
    rng = np.random.default_rng(seed)
    a, b = (rng.standard_normal((n_atoms, d)) for _ in range(2))
    return float(measures.matched_cosines(a, b, signed).mean())


def backbones(run, other, latents: int, k: int, seeds: Sequence[int] = (0, 1)) -> pd.DataFrame:
    """Jaccard index of the training images that ITDA dictionaries took, between two backbones that saw the same images.

    ``run`` and ``other`` are of one experiment with two backbones; ids of their training rows must be equal. The first
    seed of ITDA is that of both backbones, the second tells how much the order of the rows does. Groups of "jaccard":
    "backbones" (two backbones, one seed), "seeds" (one backbone, two seeds), "chance" (two random choices of as many of
    the images: expectation, by the ratio of expected sizes).
    """
    from capsae.sae.dictionaries import methods as dictionaries

    a, b = run.features("train"), other.features("train")
    if not np.array_equal(a.ids, b.ids):
        raise ValueError("the two runs have other training images, or in another order: Jaccard of rows means nothing")

    def taken(rows, seed):
        return dictionaries.create("itda", latents, k, run.experiment.sae.normalize, seed).fit(rows).rows

    one, two, again = taken(a.cls, seeds[0]), taken(b.cls, seeds[0]), taken(a.cls, seeds[1])
    both = len(one) * len(two) / len(a)
    found = {
        "backbones": measures.jaccard(one, two),
        "seeds": measures.jaccard(one, again),
        "chance": both / (len(one) + len(two) - both),
    }
    sizes = {"first": len(one), "second": len(two), "first, other seed": len(again)}
    parts = {"jaccard": found, "atoms": sizes}
    rows = [(name, "", "train", *cell, np.nan, np.nan) for name, of in parts.items() for cell in of.items()]
    return pd.DataFrame(rows, columns=COLUMNS).astype({"value": float})
