"""Which criterion on ID images alone ranks detectors as real OOD sets do.

    python -m benchmarks.id_only_criteria scramble imagenet20 --set data_root=FOLDER --checkpoint FILE
    python -m benchmarks.id_only_criteria measure          # benchmarks/results/id_only_criteria.csv

A criterion is the mean of both FPR95 of a detector that tells ID validation samples from a stand-in for OOD:

held-out classes
    Near: classes that head, SAE and profiles of a fold have not seen (companion.chapters.tuning.criterion).
chimeras
    Features of validation samples, half of whose coordinates come from a sample of another class.
jigsaw
    Far: validation images cut into 4 x 4 tiles that are shuffled.
phase
    Far: validation images whose phase spectrum is replaced by that of noise (the same for all channels), so that
    colours and power spectrum stay and every object goes.

``scramble`` extracts the features of 500 scrambled validation images, once. ``measure`` fits every detector that reads
no pixel statistics, at its defaults and at all settings of the grids of the chapter on tuning, and compares the order
of all by each criterion with the order by the real OOD sets (mean FPR95, OOD positive): Spearman's correlation.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from scipy.stats import rankdata, spearmanr

from benchmarks.rpd_selection import chimeras
from capsae import Observations, Run, detectors
from capsae.detectors.baselines.pixels import PIXEL_CONTROLS
from capsae.features.backbone import load_backbone
from capsae.features.extract import extract
from capsae.features.featureset import FeatureSet
from capsae.metrics import fpr95_id_pos, fpr95_ood_pos
from capsae.pipeline.experiments import overrides_of
from companion.chapters.shift.make_pack import balanced_rows
from companion.chapters.tuning.criterion import GRIDS, HeldOutClasses

RESULTS = Path(__file__).parent / "results"
EXPERIMENTS = ("imagenet20", "imagenet20-augreg", "mini80", "mini80-augreg")
IMAGES, TILES, SAES = 500, 4, 2
CRITERIA = ("held-out classes", "chimeras", "jigsaw", "phase")


def jigsaw(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The image (H, W, 3) uint8 cut into TILES x TILES tiles, shuffled; what does not fill a tile is cut off."""
    high, wide = (n // TILES for n in pixels.shape[:2])
    tiles = [pixels[r * high : (r + 1) * high, c * wide : (c + 1) * wide] for r, c in np.ndindex(TILES, TILES)]
    tiles = [tiles[i] for i in rng.permutation(len(tiles))]
    return np.concatenate([np.concatenate(tiles[r * TILES : (r + 1) * TILES], axis=1) for r in range(TILES)])


def phase(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The image with the phase of noise added at every frequency but 0, the same for all channels."""
    shift = np.angle(np.fft.fft2(rng.standard_normal(pixels.shape[:2])))
    shift[0, 0] = 0
    values = np.fft.ifft2(np.fft.fft2(pixels, axes=(0, 1)) * np.exp(1j * shift)[:, :, None], axes=(0, 1)).real
    return np.rint(values).clip(0, 255).astype(np.uint8)


SCRAMBLES = {"jigsaw": jigsaw, "phase": phase}


def scramble(run: Run, checkpoint: str | None, work: Path) -> None:
    """Extract the features of scrambled validation images of an experiment, as the backbone sees them."""
    given = dict(run.inputs.backbone_settings(checkpoint))
    seen, backbone = load_backbone(given), load_backbone(given | {"crop": 1.0})
    source = run.inputs.source("val")  # the whole training source where validation is a part of it
    source = source.take(np.flatnonzero(np.isin(source.ids, run.features("val").ids)))
    source = source.take(balanced_rows(source.labels, IMAGES // len(np.unique(source.labels))))
    place = {row: i for i, row in enumerate(source.rows.tolist())}
    for name, function in SCRAMBLES.items():

        def read(row: int, name=name, function=function) -> Image.Image:
            seeds = hashlib.sha256(f"{name} {source.ids[place[row]]}".encode()).digest()
            rng = np.random.default_rng(np.frombuffer(seeds, np.uint32))
            return Image.fromarray(function(seen.prepare(source.image(place[row])), rng))

        made = replace(source, read=read, fingerprint=f"{source.fingerprint} {name}")
        found = extract(made, backbone, work / run.experiment.name / name, dtype="float32", logits=False)
        kept = FeatureSet(found.cls, found.labels, found.ids, name=name, meta={"backbone_digest": backbone.digest})
        kept.save(_file(run.experiment.name, name), dtype="int8")


def _file(experiment: str, name: str) -> Path:
    return RESULTS / "id_only_criteria" / f"{experiment}_{name}.safetensors"


def settings(run: Run) -> list[tuple[str, str, dict]]:
    """(detector, setting, options) of every detector that reads features or codes: its own, and its grid's."""
    found = []
    for name in (one for one in detectors.available() if one not in PIXEL_CONTROLS):
        own = run.detector_options(name)
        found.append((name, "own", own))
        grid = GRIDS.get(name, {})
        for values in itertools.product(*grid.values()) if grid else ():
            found.append((name, str(dict(zip(grid, values, strict=True))), own | dict(zip(grid, values, strict=True))))
    return found


def measure(run: Run) -> pd.DataFrame:
    """One row a detector and setting: every criterion, and mean FPR95 (OOD positive) over the near and far sets."""
    train, val, test = (run.observations(name) for name in ("train", "val", "test"))
    given = {"head": train.head, "sae": run.sae}
    held_out = HeldOutClasses(run.experiment.sae, saes=SAES)
    mixed = chimeras(val.cls, val.labels, np.random.default_rng(0))
    stand_ins = {"chimeras": Observations(mixed, **given)}
    stand_ins |= {n: Observations(FeatureSet.load(_file(run.experiment.name, n)).cls, **given) for n in SCRAMBLES}
    sets = {name: run.observations(name) for name in run.experiment.ood_sets}
    rows = []
    for name, setting, options in settings(run):
        try:
            detector = detectors.create(name, **options).fit(train, val)
        except ValueError:  # ViM's dim >= d
            continue
        row = {"experiment": run.experiment.name, "detector": name, "setting": setting}
        row["held-out classes"] = held_out(lambda n=name, o=options: detectors.create(n, **o), train, val)
        known, id_scores = detector.score(val), detector.score(test)
        for stand_in, obs in stand_ins.items():
            scores = detector.score(obs)
            row[stand_in] = (fpr95_ood_pos(known, scores) + fpr95_id_pos(known, scores)) / 2
        for group in ("near", "far"):
            real = [fpr95_ood_pos(id_scores, detector.score(of)) for w, of in sets.items() if w.startswith(group)]
            row[group] = np.mean(real) if real else np.nan
        rows.append(row)
    return pd.DataFrame(rows)


def joined(table: pd.DataFrame, names: tuple[str, ...]) -> np.ndarray:
    """Mean rank (n,) by several criteria."""
    return np.mean([rankdata(table[name]) for name in names], axis=0)


def correlations(table: pd.DataFrame) -> pd.DataFrame:
    """Spearman's correlation of each criterion, and of each mean of ranks, with the real sets; one row an experiment,
    group and rule."""
    rules = [names for n in range(1, len(CRITERIA) + 1) for names in itertools.combinations(CRITERIA, n)]
    rows = []
    for (experiment, of), group in itertools.product(table.groupby("experiment", sort=False), ("near", "far")):
        if of[group].notna().all():
            for names in rules:
                value = spearmanr(joined(of, names), of[group])[0]
                rows.append({"experiment": experiment, "group": group, "rule": " + ".join(names), "spearman": value})
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.id_only_criteria", description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=("scramble", "measure"))
    parser.add_argument("experiments", nargs="*", default=EXPERIMENTS)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override of the experiment")
    parser.add_argument("--checkpoint", help="weights of the backbone")
    parser.add_argument("--work", type=Path, default=Path("build/id_only_criteria"), help="folder of the shards")
    args = parser.parse_args()
    runs = [Run(name, overrides_of(args.set), device="cpu", progress=False) for name in args.experiments]
    if args.step == "scramble":
        for run in runs:
            scramble(run, args.checkpoint, args.work)
        return
    table = pd.concat([measure(run) for run in runs], ignore_index=True)
    table.round(5).to_csv(RESULTS / "id_only_criteria.csv", index=False)
    wide = correlations(table).pivot(index="rule", columns=["group", "experiment"], values="spearman")
    print(wide.round(2).to_string())


if __name__ == "__main__":
    main()
