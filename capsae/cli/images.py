"""The commands for own images: init, train, score, explain."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from ..files import Output, check_folder, csv_text, replacing
from .run import method_of, run_of

TRAINED = (
    *("cfg.json", "sae.safetensors", "head.safetensors", "caps.safetensors", "history.csv", "provenance.json"),
    "scorer.json",
)


def init(options) -> int:
    from ..pipeline.experiments import load_experiment
    from .init import look

    path = Path(options.out or Path(options.folder) / "capsae.toml")
    text, lists = look(options.folder, options.model, options.checkpoint)
    for name in (path, *(Path(options.folder) / name for name in lists)):
        if name.exists():
            raise FileExistsError(f"{name} is there; remove it, or name another by --out")
    if lists and options.out:
        raise ValueError(
            f"--out: without a folder 'test', lists are written beside the experiment, into {options.folder}"
        )
    for name, content in lists.items():
        Output(Path(options.folder) / name).write(content)
    Output(path).write(text)
    experiment = load_experiment(path)
    sys.stdout.write(
        f"{text}\n{path}: {experiment.n_classes} classes; edit it as you like, then\n"
        f"  capsae train --experiment {path} --out my-sae\n  capsae score --sae my-sae IMAGES --out scores.csv\n"
    )
    return 0


def train(options) -> int:
    import json
    import tempfile

    from .. import distributed
    from ..pipeline.arrays import OVERFITTED
    from ..pipeline.own_images import save_scorer

    distributed.start()  # under torchrun, all ranks train one SAE
    out = check_folder(options.out, TRAINED, "provenance.json", "digests")
    run = run_of(options)
    best = run.history.attrs["best_epoch"]
    at_best = run.history.set_index("epoch").loc[best]
    head, caps, provenance = run.head, run.caps, run.provenance()
    run.features("train"), run.features("val")  # by all ranks together, for the thresholds
    if distributed.rank() > 0:
        return 0  # the first one writes
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".new-", dir=out) as new:  # whole before the first old file goes
        new = Path(new)
        run.sae.save(new)
        head.save(new / "head.safetensors")
        caps.save(new / "caps.safetensors")
        save_scorer(run, new)
        (new / "history.csv").write_text(csv_text(run.history), encoding="utf-8")
        (new / "provenance.json").write_text(json.dumps(provenance, indent=1, default=str) + "\n", encoding="utf-8")
        for file in sorted(new.iterdir()):
            with replacing(out / file.name) as path:
                os.rename(file, path)
    fvu, held_out = at_best["fvu"], at_best["held_out_fvu"]
    figures = f"FVU {fvu:.4f}, held out {held_out:.4f}, dead {at_best['dead_fraction']:.1%}"
    sys.stdout.write(f"{out}: epoch {best} of {len(run.history)} kept; {figures}\n")
    if held_out > OVERFITTED * fvu + 0.01:
        sys.stderr.write(
            f"capsae: warning: the SAE is overfitted: FVU {held_out:.3f} on held-out rows, {fvu:.3f} on its training "
            "rows; more training images, or fewer latents (--set sae.latents=), would do\n"
        )
    sys.stdout.write(
        f"`capsae score --sae {out} IMAGES` and capsae.Scorer.load({str(out)!r}) need this folder alone; "
        "`explain` and `compare` take the SAE from the store: give them the same --experiment and --set.\n"
    )
    return 0


def score(options) -> int:
    import pandas as pd
    from tqdm.auto import tqdm

    from ..pipeline.own_images import DEFAULT_METHODS, Scorer, doubts, find_images, join_features
    from ..pipeline.store import Store

    methods = tuple(map(method_of, options.method)) if options.method else None
    if options.sae and (options.set or options.experiment):
        raise ValueError("--sae FOLDER stands for itself: leave --experiment and --set out")
    out = Output(options.out, "path,predicted,")
    kept_features = Output(options.features, what="--features") if options.features else None
    if kept_features and kept_features.path == out.path:
        raise ValueError(f"--out and --features are both {options.out!r}: give two names")
    images = find_images(options.images)
    logging.getLogger("capsae.features.extract").setLevel(logging.ERROR)  # bad images are named below
    if options.sae:
        scorer, store = Scorer.load(options.sae, methods, options.checkpoint, options.device), Store()
    else:
        run = run_of(options)
        scorer, store = Scorer.of(run, methods or DEFAULT_METHODS, options.checkpoint), run.store
    tables, parts = [], [] if kept_features else None
    bar = tqdm(total=len(images), unit="images", disable=options.quiet or len(images) <= 64)
    with out.rows() as add, bar:
        for table in scorer.blocks(images, store.scratch("score", scorer.key), parts):
            add(table)
            tables.append(table)
            bar.update(len(table))
    if kept_features:
        join_features(parts, kept_features.path)
    table, first = pd.concat(tables, ignore_index=True), next(iter(scorer.thresholds))
    for row in table[table["reason"] != ""].itertuples():
        sys.stderr.write(f"capsae: skipped {row.path}: {row.reason}\n")
    for warning in doubts(table, list(scorer.thresholds), scorer.n_val):
        sys.stderr.write(f"capsae: warning: {warning}\n")
    flagged, scored = int(table["flag"].sum()), int(table["flag"].notna().sum())
    sys.stderr.write(f"{flagged} of {scored} images flagged as out of distribution ({first} over its threshold)\n")
    return 0 if scored else 2


def explain(options) -> int:
    from ..latents.explain import describe, explain, plain_name
    from ..pipeline.own_images import class_names, find_images, observe

    if (options.image is None) == (options.from_set is None):
        raise ValueError("give one image file, or --from-set SET --row N")
    out = Output(options.out, "latent,profile,")
    run, row, method = run_of(options), options.row, method_of(options.method)
    if options.from_set:
        run.experiment.source(options.from_set)
        observations, what = run.observations(options.from_set), f"{options.from_set}, row {row}"
    else:
        images = find_images([options.image])[:1]
        observations, _, bad = observe(run, images, options.checkpoint)
        row, what = 0, str(images[0])
        if observations is None:
            raise ValueError(f"{what}: {bad[0]['why']}")
    table = explain(run, observations, row, method)
    score = float(run.detectors([method])[method].score(observations.take([row]))[0])
    threshold = run.threshold(method)
    verdict = "out of distribution" if score > threshold else "in distribution"
    predicted = plain_name(class_names(run)[observations.predicted[row]])
    title = f"{what}: predicted {predicted}; {method} {score:.4f}, threshold {threshold:.4f}: {verdict}"
    sys.stdout.write(describe(table, score, title, options.top) + "\n")
    if options.out:
        out.table(table)
    return 0
