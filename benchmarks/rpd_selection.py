"""How the form and the constants of RPD were chosen: on ID training data alone.

    python -m benchmarks.rpd_selection [--experiment imagenet20] [--out benchmarks/results/rpd_selection.csv]

No OOD set is opened. Two stand-ins for OOD are made from the experiment's training classes:

held-out classes
    The classes are dealt into four folds. SAE, head and profiles are fitted without the fold's classes, whose training
    rows are then scored against the validation rows of the others: near OOD of the same camera and processing.
chimeras
    Validation rows in which a random half of the feature's coordinates comes from a row of another class: every
    coordinate is plausible, their combination is not.

The criterion is the mean of both FPR95 over both stand-ins and all folds. ``weight`` is the factor of the background
term: 0 is the smoothed KL from the profiles, 1 is RPD. ``temperature`` 0 stands for the predicted class alone.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.special import entr, softmax

import capsae
from capsae.features.probe import fit_linear_probe
from capsae.metrics import auroc, fpr95_id_pos, fpr95_ood_pos

FOLDS = 4
TEMPERATURES, EPSILONS, WEIGHTS = (0, 1, 2, 4), (0.01, 0.03, 0.1), (0, 0.5, 1)
REFERENCES = ("epd", "energy", "rmds", "mds++", "rmds++", "knn")


def chimeras(cls: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Rows (N, d) with about half of their coordinates taken from a row of another class."""
    other = rng.permutation(len(cls))
    while (same := labels[other] == labels).any():
        other[same] = rng.integers(len(cls), size=same.sum())
    return np.where(rng.random(cls.shape) < 0.5, cls, cls[other])


def forms(train, obs, temperature: float, epsilon: float, weight: float) -> np.ndarray:
    """sum_c pi_c KL(P || Q~_c) - weight KL(P || B), on dense arrays: (N,)."""
    caps = capsae.ClassActivationProfiles.fit(train.codes, train.labels, train.logits.shape[1])
    background = caps.sums.sum(0) / caps.sums.sum()
    mixed = (1 - epsilon) * caps.mean / caps.mean.sum(1, keepdims=True) + epsilon * background
    seen = background > 0
    h = obs.codes.dense().astype(np.float64)[:, seen]
    p = h / h.sum(1, keepdims=True)
    negentropy = -entr(p).sum(1)
    logits = obs.logits.astype(np.float64)
    pi = softmax(logits / temperature, axis=1) if temperature else np.eye(logits.shape[1])[logits.argmax(1)]
    expected = negentropy - (pi * (p @ np.log(mixed[:, seen]).T)).sum(1)
    return expected - weight * (negentropy - p @ np.log(background[seen]))


def measure(method: dict, scores) -> list[dict]:
    """Rows of the result for scores of (ID validation, stand-ins...)."""
    id_scores, *rest = scores
    metrics = {"fpr95_ood_pos": fpr95_ood_pos, "fpr95_id_pos": fpr95_id_pos, "auroc": auroc}
    return [
        {**method, "stand_in": name, **{key: metric(id_scores, s) for key, metric in metrics.items()}}
        for name, s in zip(("held-out classes", "chimeras"), rest, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experiment", default="imagenet20")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/rpd_selection.csv"))
    args = parser.parse_args()
    experiment = capsae.load_experiment(args.experiment)
    train, val = capsae.load_features(experiment, "train"), capsae.load_features(experiment, "val")
    deal = np.random.default_rng(0).permutation(experiment.n_classes)
    rows: list[dict] = []
    for fold in range(FOLDS):
        held = deal[fold::FOLDS]
        kept = np.setdiff1d(np.arange(experiment.n_classes), held)
        renumber = np.searchsorted(kept, np.arange(experiment.n_classes))
        a, b = train.take(~np.isin(train.labels, held)), val.take(~np.isin(val.labels, held))
        rng = np.random.default_rng(fold)
        out = rng.permutation(np.flatnonzero(np.isin(train.labels, held)))[:1000]
        sae, _ = capsae.train_sae(a.cls, replace(experiment.sae, seed=fold), held_out=b.cls)
        head = fit_linear_probe(a.cls, renumber[a.labels], len(kept))
        seen = capsae.Observations(a.cls, labels=renumber[a.labels], head=head, sae=sae)
        others = [b.cls, train.cls[out], chimeras(b.cls, b.labels, rng)]
        others = [capsae.Observations(cls, head=head, sae=sae) for cls in others]
        for name in REFERENCES:
            detector = capsae.detectors.create(name).fit(seen)
            rows += measure({"method": name, "fold": fold}, [detector.score(obs) for obs in others])
        for temperature in TEMPERATURES:
            for epsilon in EPSILONS:
                for weight in WEIGHTS:
                    setting = {"temperature": temperature, "epsilon": epsilon, "weight": weight}
                    scores = [forms(seen, obs, **setting) for obs in others]
                    rows += measure({"method": "profile", "fold": fold, **setting}, scores)
    frame = pd.DataFrame(rows)
    keys = ["method", "temperature", "epsilon", "weight"]
    table = frame.groupby([*keys, "stand_in"], dropna=False)[["fpr95_ood_pos", "fpr95_id_pos", "auroc"]].mean()
    table = table.unstack("stand_in")
    table.columns = [f"{metric} {stand_in}" for metric, stand_in in table.columns]
    table.insert(0, "criterion", table[[c for c in table.columns if c.startswith("fpr95")]].mean(axis=1))
    table = table.sort_values("criterion").reset_index()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    table.round(5).to_csv(args.out, index=False)
    print(table.round(3).to_string())


if __name__ == "__main__":
    main()
