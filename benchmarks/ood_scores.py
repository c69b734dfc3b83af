"""Fitting and scoring against pytorch-ood, in one run: 50,000 test rows of 768 dimensions, 1,000 classes.

    python -m benchmarks.ood_scores      # table; writes benchmarks/results/<machine>-ood-scores.json

Both get the same float32 arrays, and the logits where they take them. Blocks alternate between the two, each a fit and a
score, and the median counts. Where pytorch-ood is slow or large it scores the first rows alone, and its time is scaled to
all of them (`rows` says from how many; its fit is measured whole). Peak memory is what a fresh process's resident set
grows by, for one fit and score of all rows, or of pytorch-ood's `rows`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import resource
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median

import numpy as np
import torch

from benchmarks.parity import _float64, _linear, _po, _tensor, _weights
from capsae import Observations, detectors
from capsae.featureset import LinearHead

D, CLASSES, TRAIN, TEST = 768, 1000, 50_000, 50_000


def world(n_test: int = TEST):
    """(train, test) with logits made: they are part of a set of features, not of a score."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((CLASSES, D), np.float32)
    head = LinearHead(centres / 12, np.zeros(CLASSES, np.float32))

    def observations(n):
        labels = np.arange(n) % CLASSES
        cls = np.abs(centres[labels] + 1.5 * rng.standard_normal((n, D), np.float32))
        return Observations(cls, logits=cls @ head.weight.T, labels=labels, head=head)

    return observations(TRAIN), observations(n_test)


def features(make):
    def fit(train):
        return make(train).fit_features(_tensor(train.cls), _tensor(train.labels))

    return fit, lambda found, test: found.predict_features(_tensor(test.cls))


def logits(make):
    def fit(train):
        found = make(train)
        return found.fit_logits(_tensor(train.logits), _tensor(train.labels)) if found.requires_fit else found

    return fit, lambda found, test: found.predict_logits(_tensor(test.logits))


def maps(make):
    def fit(train):
        found = make(train)
        if found.requires_fit:
            found.fit_feature_maps(_tensor(train.cls)[:, :, None, None], _tensor(train.labels))
        return found

    return fit, lambda found, test: found.predict_feature_maps(_tensor(test.cls)[:, :, None, None])


def head_of(train):
    linear = _linear(train)
    return lambda x: linear(x.flatten(1))


def gradnorm(train):
    linear = _linear(train).requires_grad_(True)
    return _po().GradNorm(linear, param_filter=lambda name: name == "weight")


# name: (pytorch-ood's fit and score, rows that it scores)
PEERS = {
    "msp": (logits(lambda train: _po().MaxSoftmax(None)), TEST),
    "maxlogit": (logits(lambda train: _po().MaxLogit(None)), TEST),
    "energy": (logits(lambda train: _po().EnergyBased(None)), TEST),
    "entropy": (logits(lambda train: _po().Entropy(None)), TEST),
    "gen": (logits(lambda train: _po().GEN(None, M=100)), TEST),
    "klm": (logits(lambda train: _po().KLMatching(None)), TEST),
    "mds": (features(lambda train: _po().Mahalanobis(None)), 500),
    "rmds": (features(lambda train: _po().RMD(None)), 500),
    "knn": (features(lambda train: _po().KNN(None, k=50)), 5000),
    "vim": (features(lambda train: _po().ViM(None, 512, **_weights(train))), TEST),
    "react": (maps(lambda train: _po().ReAct(None, head_of(train))), TEST),
    "ash_b": (maps(lambda train: _po().ASH(None, head_of(train), variant="ash-b", percentile=0.9)), TEST),
    "ash_p": (maps(lambda train: _po().ASH(None, head_of(train), variant="ash-p", percentile=0.9)), TEST),
    "ash_s": (maps(lambda train: _po().ASH(None, head_of(train), variant="ash-s", percentile=0.65)), TEST),
    "scale": (maps(lambda train: _po().SCALE(None, head_of(train), percentile=0.85)), TEST),
    "dice": (features(lambda train: _po().DICE(None, **_weights(train), p=0.9)), 500),
    "she": (features(lambda train: _po().SHE(None, _linear(train))), TEST),
    "nnguide": (features(lambda train: _po().NNGuide(None, _linear(train), k=10)), 5000),
    "fdbd": (features(lambda train: _po().fDBD(None, _linear(train))), TEST),
    "nci": (features(lambda train: _po().NCI(None, _linear(train), alpha=1e-4)), TEST),
    "gradnorm": ((gradnorm, lambda found, test: found.predict(_tensor(test.cls))), 500),
}
SAME_FRACTION = {"knn", "nnguide"}  # ours is scored on as few rows, too: the search takes all the time


def one(name: str, who: str, train: Observations, test: Observations) -> tuple[float, float]:
    """Seconds of a fit and of a score of all given rows."""
    (fit, score), _ = PEERS[name]
    start = time.perf_counter()
    if who == "capsae":
        found = detectors.create(name).fit(train)
    else:
        found = fit(train)
    fitted = time.perf_counter()
    found.score(test) if who == "capsae" else score(found, test)
    return fitted - start, time.perf_counter() - fitted


def fresh(obs: Observations, rows: int) -> Observations:
    """The rows without what an earlier block has computed."""
    return Observations(obs.cls[:rows], logits=obs.logits[:rows], labels=obs.labels[:rows], head=obs.head)


def measure(name: str, train: Observations, test: Observations, blocks: int) -> dict:
    rows = {"pytorch-ood": PEERS[name][1], "capsae": PEERS[name][1] if name in SAME_FRACTION else TEST}
    times = {who: [] for who in rows}
    for _ in range(blocks):
        for who, n in rows.items():
            times[who].append(one(name, who, fresh(train, TRAIN), fresh(test, n)))
    row = {"method": name}
    for who, n in rows.items():
        fit, score = (median(t[i] for t in times[who]) for i in (0, 1))
        row[who] = {"rows": n, "fit_s": fit, "score_s": score * TEST / n, "peak_mb": peak(name, who, n)}
    ours, theirs = row["capsae"], row["pytorch-ood"]
    row["score_ratio"] = theirs["score_s"] / ours["score_s"]
    row["ratio"] = (theirs["fit_s"] + theirs["score_s"]) / (ours["fit_s"] + ours["score_s"])
    return row


def peak(name: str, who: str, rows: int) -> float | None:
    """MiB that a process grows by; None where it fails, as for want of memory."""
    command = [sys.executable, "-m", "benchmarks.ood_scores", "--peak", name, who, str(rows)]
    done = subprocess.run(command, capture_output=True, text=True)
    return float(done.stdout) if done.returncode == 0 else None


def print_peak(name: str, who: str, rows: int) -> None:
    train, test = world(rows)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    one(name, who, train, test)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--methods", nargs="*", default=list(PEERS))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        return print_peak(args.peak[0], args.peak[1], int(args.peak[2]))
