"""Fitting and scoring against pytorch-ood, in one run: 50,000 test rows of 768 dimensions, 1,000 classes.

    python -m benchmarks.ood_scores      # table; writes benchmarks/results/<machine>-ood-scores.json

Both get the same float32 arrays, and the logits where they take them. Blocks alternate between the two, each a fit and
a score. The median of the CPU seconds of all threads counts, since other programs may run beside. Where pytorch-ood is
slow or large it scores the first rows alone, and its time is scaled to all of them (`rows` says from how many; its fit
is measured whole). Peak memory is what the resident set rises by during a fit and a score of that many rows.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median

import numpy as np
import torch

from benchmarks.parity import _linear, _po, _tensor, _weights
from benchmarks.sae_training import machine
from capsae import Observations, detectors
from capsae.features.featureset import LinearHead

D, CLASSES, TRAIN, TEST = 768, 1000, 50_000, 50_000


def world(n_test: int = TEST):
    """(train, test) with logits made: they are part of a set of features, not of a score."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((CLASSES, D), np.float32)
    head = LinearHead((np.abs(centres) - 0.8) / 12, np.zeros(CLASSES, np.float32))

    def observations(n):
        labels = np.arange(n) % CLASSES
        cls = np.abs(centres[labels] + 0.7 * rng.standard_normal((n, D), np.float32))
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
    "mds": (features(lambda train: _po().Mahalanobis(None)), 100),
    "rmds": (features(lambda train: _po().RMD(None)), 100),
    "knn": (features(lambda train: _po().KNN(None, k=50)), 1000),
    "vim": (features(lambda train: _po().ViM(None, 512, **_weights(train))), TEST),
    "react": (maps(lambda train: _po().ReAct(None, head_of(train))), TEST),
    "ash_b": (maps(lambda train: _po().ASH(None, head_of(train), variant="ash-b", percentile=0.9)), TEST),
    "ash_p": (maps(lambda train: _po().ASH(None, head_of(train), variant="ash-p", percentile=0.9)), TEST),
    "ash_s": (maps(lambda train: _po().ASH(None, head_of(train), variant="ash-s", percentile=0.65)), TEST),
    "scale": (maps(lambda train: _po().SCALE(None, head_of(train), percentile=0.85)), TEST),
    "dice": (features(lambda train: _po().DICE(None, **_weights(train), p=0.9)), 100),
    "she": (features(lambda train: _po().SHE(None, _linear(train))), TEST),
    "nnguide": (features(lambda train: _po().NNGuide(None, _linear(train), k=10)), 1000),
    "fdbd": (features(lambda train: _po().fDBD(None, _linear(train))), TEST),
    "nci": (features(lambda train: _po().NCI(None, _linear(train), alpha=1e-4)), TEST),
    "gradnorm": ((gradnorm, lambda found, test: found.predict(_tensor(test.cls))), 200),
}
SAME_ROWS = {"knn", "nnguide"}  # ours is scored on as few rows, too: the search takes all the time


def one(name: str, who: str, train: Observations, test: Observations) -> tuple[float, float]:
    """CPU seconds, of all threads, of a fit and of a score of all given rows."""
    (fit, score), _ = PEERS[name]
    start = time.process_time()
    if who == "capsae":
        found = detectors.create(name).fit(train)
    else:
        found = fit(train)
    fitted = time.process_time()
    found.score(test) if who == "capsae" else score(found, test)
    return fitted - start, time.process_time() - fitted


def fresh(obs: Observations, rows: int) -> Observations:
    """The rows without what an earlier block has computed."""
    return Observations(obs.cls[:rows], logits=obs.logits[:rows], labels=obs.labels[:rows], head=obs.head)


def peak_of(work) -> float | None:
    """MiB by which the resident set rises above what it is before ``work()``; None where /proc does not tell."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not os.access(reset, os.W_OK):
        work()
        return None

    def kib(field):
        return int(re.search(rf"{field}:\s+(\d+)", status.read_text())[1])

    reset.write_text("5")  # the peak so far is forgotten
    before = kib("VmRSS")
    work()
    return (kib("VmHWM") - before) / 1024


def measure(name: str, train: Observations, test: Observations, blocks: int) -> dict:
    rows = {"pytorch-ood": PEERS[name][1], "capsae": PEERS[name][1] if name in SAME_ROWS else TEST}
    times, peaks = ({who: [] for who in rows} for _ in range(2))
    for _ in range(blocks):
        for who, n in rows.items():
            seen, unseen = fresh(train, TRAIN), fresh(test, n)
            peaks[who].append(peak_of(lambda: times[who].append(one(name, who, seen, unseen))))  # noqa: B023
    row = {"method": name}
    for who, n in rows.items():
        fit, score = (median(t[i] for t in times[who]) for i in (0, 1))
        peak = None if None in peaks[who] else round(max(peaks[who]))
        row[who] = {"rows": n, "fit_s": round(fit, 4), "score_s": round(score * TEST / n, 4), "peak_mb": peak}
    ours, theirs = row["capsae"], row["pytorch-ood"]
    row["score_ratio"] = round(theirs["score_s"] / ours["score_s"], 2)
    row["ratio"] = round((theirs["fit_s"] + theirs["score_s"]) / (ours["fit_s"] + ours["score_s"]), 2)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--methods", nargs="*", default=list(PEERS))
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<machine>-ood-scores.json")
    args = parser.parse_args()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    train, test = world()
    versions = {name: version(name) for name in ("pytorch-ood", "torch", "numpy", "scipy", "scikit-learn")}
    header = {"machine": machine(), "threads": torch.get_num_threads(), "load_before": load, "versions": versions}
    header |= {"train": TRAIN, "test": TEST, "d": D, "classes": CLASSES, "blocks": args.blocks, "clock": "CPU s"}
    slug = re.sub(r"[^a-z0-9]+", "-", header["machine"].lower()).strip("-")
    out = args.out or Path(__file__).parent / "results" / f"{slug}-ood-scores.json"
    results = []
    for name in args.methods:
        row = measure(name, train, test, args.blocks)
        results.append(row)
        cells = [f"{row[who][key]:9.3f}" for who in ("pytorch-ood", "capsae") for key in ("fit_s", "score_s")]
        peaks = [f"{row[who]['peak_mb']} MiB" for who in ("pytorch-ood", "capsae")]
        print(f"{name:10}", *cells, f"{row['ratio']:8.1f}x", *peaks, flush=True)
        out.write_text(json.dumps(header | {"results": results}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
