"""Where along a vision transformer class profiles form, and where OOD separates: one SAE a site, the same recipe.

At every site (:mod:`companion.chapters.layers.sites`) an SAE, profiles and a linear probe are fitted on the training
rows, and scores are taken of the test rows and the OOD sets. :func:`measure_site` takes arrays; :func:`layers` is the
whole for an experiment.

An experiment that comes as a pack holds no images, so its table is made once, where the images are::

    python -m companion.chapters.layers.maths --experiment imagenet20 --set data_root=FOLDER --checkpoint FILE

writes ``book/layers/imagenet20.csv``, the tests against the network's end beside it, and their provenance. Killed, it
goes on where it stopped: shards of features and finished sites lie in the store.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd

from capsae.caps import ClassActivationProfiles, stability
from capsae.features.featureset import FeatureSet
from capsae.pipeline.code import digest as code_digest

from ..shift import probes
from .against_final import N_BOOT, table_of
from .sites import FINAL, KINDS

SEEDS = (0, 1)
EPOCHS_SHARE = 0.4  # of the experiment's own: the same for every site, a third of the time, nearly the same FVU
END_TOLERANCE = 0.01  # of a vector's length: float16, and the arithmetic of another machine
STRENGTH = 0.01  # of the probes' penalty, on standardised features: one for all sites, nothing is chosen
GROUPS = ("near", "far", "all")
ON_CODES = ("epd", "epd_site", "rpd", "rpd_site")
ON_FEATURES = ("mds++", "knn")
METHODS = (*ON_CODES, *ON_FEATURES)
MEASURES = (
    *("fvu", "dead", "core_overlap", "stability", "between", "gap", "cap_accuracy", "cap_accuracy_val"),
    *("probe_accuracy", "top1_1", "top1_5", "top1_20"),
)


# --- one site


def measure_site(sets: Mapping[str, FeatureSet], n_classes: int, config, core_fraction: float, seeds=SEEDS):
    """Fit SAE, profiles and probe at one site, measure them, and score the test rows and the OOD sets.

    Parameters
    ----------
    sets : {name: FeatureSet}
        "train", "val", "test" and the OOD sets; ``cls`` (N, d) at the site, ``logits`` of the head at the end.
    n_classes : int
    config : SAEConfig
        The same for every site; ``seed`` is replaced.
    core_fraction : float
        p of EPD.
    seeds : of the SAE

    Returns
    -------
    measures : DataFrame
        seed, metric (:data:`MEASURES`), value, n (test rows behind a share, else 0).
    scores : {(method, seed): {set: (N,) float64}}
        Methods :data:`METHODS`; ``epd`` and ``rpd`` take the class (its posterior) from the head at the network's end,
        ``epd_site`` and ``rpd_site`` from a linear probe of this site. ``mds++`` and ``knn`` read the site's features,
        know no SAE, and stand under the first seed.
    """
    from capsae import detectors
    from capsae.detectors import Observations
    from capsae.features.probe import fit_linear_probe
    from capsae.sae import measures as of_sae
    from capsae.sae import train_sae

    train, test = sets["train"], sets["test"]
    scored = [name for name in sets if name not in ("train", "val")]
    probe = fit_linear_probe(train.cls, train.labels, n_classes, strengths=(STRENGTH,))
    rows, scores = [], {}

    def note(seed, metric, value, n=0):
        rows.append({"seed": seed, "metric": metric, "value": float(value), "n": n})

    note(seeds[0], "probe_accuracy", (probe.logits(test.cls).argmax(1) == test.labels).mean(), len(test))
    for seed in seeds:
        given = {"held_out": sets["val"].cls, "keep": "best", "progress": False}
        sae = train_sae(train.cls, replace(config, seed=seed), "cpu", **given)[0]
        codes = {name: sae.encode(features.cls).numpy() for name, features in sets.items()}
        caps = ClassActivationProfiles.fit(codes["train"], train.labels, n_classes)
        within, between = stability(codes["train"], train.labels, n_classes), between_classes(caps)
        note(seed, "fvu", of_sae.fvu(sae, test.cls, codes["test"]))
        note(seed, "dead", of_sae.dead_fraction(codes["train"]))
        note(seed, "core_overlap", of_sae.core_overlap(caps))
        note(seed, "stability", within.mean())
        note(seed, "between", between)
        note(seed, "gap", within.mean() - between)
        for name, metric in (("test", "cap_accuracy"), ("val", "cap_accuracy_val")):
            hit = nearest_cap(codes[name], caps) == sets[name].labels
            note(seed, metric, hit.mean(), len(hit))
        few = of_sae.class_probing(codes["train"], train.labels, codes["test"], test.labels, n_classes)
        for row in few.itertuples():
            note(seed, f"top1_{row.size}", row.top1, len(test))
        for ending, logits in (("", {name: f.logits for name, f in sets.items()}),
                               ("_site", {name: probe.logits(f.cls) for name, f in sets.items()})):  # fmt: skip
            seen = {
                name: Observations(f.cls, logits=logits[name], codes=codes[name],
                                   labels=f.labels if name == "train" else None)
                for name, f in sets.items() if name != "val"
            }  # fmt: skip
            for name, options in (("epd", {"core_fraction": core_fraction}), ("rpd", {})):
                detector = detectors.create(name, **options).fit(seen["train"])
                scores[name + ending, seed] = {where: detector.score(seen[where]) for where in scored}
            if seed == seeds[0] and not ending:
                for name in ON_FEATURES:
                    detector = detectors.create(name).fit(seen["train"])
                    scores[name, seed] = {where: detector.score(seen[where]) for where in scored}
    return pd.DataFrame(rows), scores


def nearest_cap(codes, caps: ClassActivationProfiles) -> np.ndarray:
    """The class (N,) whose profile has the largest cosine with a code; the first where a code is zero."""
    return probes.nearest_cap(codes, caps.mean).argmax(1)


def between_classes(caps: ClassActivationProfiles) -> float:
    """Mean cosine between the profiles of two different classes: what a class's own stability must be held against."""
    unit = caps.mean / np.maximum(np.linalg.norm(caps.mean, axis=1, keepdims=True), 1e-300)
    cosine = unit @ unit.T
    return float(cosine[~np.eye(len(cosine), dtype=bool)].mean())


# --- an experiment


def config_of(run):
    """The experiment's SAE with :data:`EPOCHS_SHARE` of its epochs."""
    return replace(run.experiment.sae, epochs=max(1, round(EPOCHS_SHARE * run.experiment.sae.epochs)))


def layers(run, checkpoint=None, seeds=SEEDS, n_boot: int = N_BOOT, kinds=KINDS, **options):
    """The tables of :func:`table_of` for an experiment: extraction in one pass, then one site after the other.

    Parameters
    ----------
    run : capsae.pipeline.run.Run
    checkpoint : file of the backbone's weights, in place of what the experiment says
    seeds, n_boot : as for :func:`measure_site`, :func:`table_of`
    kinds : of sites; ``final/cls`` is always there
    **options : of :func:`companion.chapters.layers.sites.extract_sites`

    Returns
    -------
    table, against : DataFrames
    read : dict
        What was read of the images, for :func:`write`: ``vectors``, a digest of all sites of a set; ``end``, what
        :func:`end_against_experiment` found.

    Raises
    ------
    ValueError
        Where the vectors read at ``final/cls`` are not the experiment's.
    """
    from .sites import run_sites

    sets = {name: run_sites(run, name, None, checkpoint, **options) for name in run.experiment.sets}
    end = end_against_experiment(
        {name: of[FINAL].cls for name, of in sets.items()}, lambda name: run.features(name).cls
    )
    read = {"end": end, "vectors": {name: _digest_of_sites(of) for name, of in sets.items()}}
    sites = [site for site in next(iter(sets.values())) if site == FINAL or site.split("/")[1] in kinds]
    measured = {}
    for site in sorted(sites, key=lambda name: (name != FINAL, KINDS.index(name.split("/")[1]))):
        here = {name: of[site] for name, of in sets.items()}
        measured[site] = _kept(run, site, here, seeds)
    return *table_of({site: measured[site] for site in sites}, n_boot), read


def end_against_experiment(here: Mapping[str, np.ndarray], experiment: Callable[[str], np.ndarray]) -> dict[str, float]:
    """How far the vectors (N, d) read at ``final/cls`` lie from those of the experiment (of its pack, if it has one).

    Returns
    -------
    {set: float}
        The largest distance of a row, as a share of its length.

    Raises
    ------
    ValueError
        Above :data:`END_TOLERANCE`: other weights, another crop, or other images under the same names.
    """
    found = {}
    for name, x in here.items():
        known = np.asarray(experiment(name), np.float32)
        length = np.linalg.norm(known, axis=1)
        found[name] = float((np.linalg.norm(x - known, axis=1) / np.where(length > 0, length, 1)).max())
        if not found[name] <= END_TOLERANCE:
            raise ValueError(
                f"{name}: {FINAL} as read here lies up to {100 * found[name]:.2g} % of its length off the experiment's "
                f"features, {100 * END_TOLERANCE:.0f} % is allowed; take the experiment's own weights and images"
            )
    return found


def _digest_of_sites(of: Mapping[str, FeatureSet]) -> str:
    text = json.dumps({site: features.digest() for site, features in of.items()})
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def _kept(run, site: str, here: dict[str, FeatureSet], seeds):
    """One site from the store, or measured and kept there."""
    config, core = config_of(run), run.experiment.caps.core_fraction
    recipe = {"site": site, "sae": asdict(config), "core_fraction": core, "seeds": list(seeds)}
    inputs = {name: features.digest() for name, features in here.items()}

    def save(value, folder):
        value[0].to_json(folder / "measures.json", orient="records", double_precision=15)
        flat = {f"{m}|{s}|{w}": v for (m, s), of in value[1].items() for w, v in of.items()}
        np.savez(folder / "scores.npz", **flat)

    def load(folder):
        scores: dict = {}
        with np.load(folder / "scores.npz", allow_pickle=False) as file:
            for name in file.files:
                method, seed, where = name.split("|")
                scores.setdefault((method, int(seed)), {})[where] = file[name]
        return pd.read_json(folder / "measures.json", orient="records"), scores

    def make():
        return measure_site(here, run.experiment.n_classes, config, core, seeds)

    made_by, who = code_digest(measure_site), {"experiment": run.experiment.name}
    return run.store.get_or_make("layer", recipe, inputs, made_by, make, save, load, who)


# --- the committed tables


def files(experiment: str) -> dict[str, Path]:
    """Where an experiment's tables lie: "table", "against", "provenance"."""
    from ...publish.plan import root

    folder = root() / "book" / "layers"
    names = {
        "table": f"{experiment}.csv",
        "against": f"{experiment}_against_final.csv",
        "provenance": f"{experiment}.json",
    }
    return {key: folder / name for key, name in names.items()}


def read(experiment: str) -> tuple[pd.DataFrame, pd.DataFrame, dict]:
    """The committed tables of an experiment and their provenance; FileNotFoundError says how to make them."""
    at = files(experiment)
    missing = [path for path in at.values() if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"no {missing[0]}: make it by\n  {command(experiment)}")
    table, against = (pd.read_csv(at[key], keep_default_na=False, na_values=[""]) for key in ("table", "against"))
    return table.fillna({"set": ""}), against, json.loads(at["provenance"].read_text(encoding="utf-8"))


def command(experiment: str, pack: bool = True) -> str:
    """The command line that makes an experiment's tables; one that comes as a pack needs its images and weights."""
    images = " --set data_root=FOLDER --checkpoint FILE" if pack else ""
    return f"python -m companion.chapters.layers.maths --experiment {experiment}{images}"


def outdated(experiment: str) -> str | None:
    """Why the committed tables are not today's, with what to run; None if they are."""
    made = read(experiment)[2]
    changed = made["code"] != codes()["code"]
    return f"the code changed since the tables were made: {made['command']}" if changed else None


def codes() -> dict[str, dict[str, str]]:
    """What a table must have been made by, and what is recorded beside it: the SAE's training alone makes none old."""
    from capsae.sae import train_sae

    made_by, training = code_digest(layers, without=(train_sae,)), code_digest(train_sae)
    return {"code": {"layers": made_by[:20]}, "code_recorded_only": {"training": training[:20]}}


def write(run, table: pd.DataFrame, against: pd.DataFrame, read: Mapping, cpu_s: float, weights: str | None = None):
    """Write an experiment's tables and their provenance, ``read`` as :func:`layers` gives it; returns their places."""
    from capsae.device import machine, versions

    at = files(run.experiment.name)
    at["table"].parent.mkdir(parents=True, exist_ok=True)
    for key, data in (("table", table), ("against", against)):
        data.to_csv(at[key], index=False, float_format="%.5g", lineterminator="\n")
    record = {
        "command": command(run.experiment.name, bool(run.experiment.pack)),
        "experiment": run.experiment.name,
        "backbone": run.experiment.backbone.model,
        "weights_sha256": weights,
        "sites": list(dict.fromkeys(table["site"])),
        "seeds": sorted(int(seed) for seed in table["seed"].unique()),
        "sae": asdict(config_of(run)) | {"seed": None},
        "core_fraction": run.experiment.caps.core_fraction,
        "n_boot": N_BOOT,
        "images": {
            name: run.inputs.source(name).digest()[:20]
            for name in run.experiment.sets
            if not (name == "val" and run.inputs.holdout)
        },
        "vectors": read["vectors"],
        "end_against_experiment": {name: float(f"{value:.2g}") for name, value in read["end"].items()},
        "experiment_features": run.digest("features")[:20],
        "head": run.digest("head")[:20],
        **codes(),
        "machine": machine(),
        "versions": versions(),
        "cpu_seconds_of_this_call": round(cpu_s, 1),
    }
    at["provenance"].write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return at


def main(arguments: list[str] | None = None) -> int:
    import torch

    from capsae.pipeline.experiments import overrides_of
    from capsae.pipeline.run import Run

    from .sites import SiteReader

    parser = argparse.ArgumentParser(
        "python -m companion.chapters.layers.maths", description="Make the tables of all sites."
    )
    parser.add_argument("--experiment", default="imagenet20")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--checkpoint", metavar="FILE", help="the backbone's weights (default: as the experiment says)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="of sites (default: all)")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=1, help="decoding threads")
    parser.add_argument("--threads", type=int, default=1, help="threads of products")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    started = time.process_time()
    run = Run(options.experiment, overrides_of(options.set), device="cpu")
    given = {"batch_size": options.batch_size, "workers": options.workers}
    table, against, read = layers(run, options.checkpoint, kinds=options.kinds, **given)
    weights = SiteReader(run.inputs.backbone_settings(options.checkpoint), FINAL).weights
    at = write(run, table, against, read, time.process_time() - started, weights)
    sys.stdout.write("".join(f"{path}\n" for path in at.values()))
    return 0


if __name__ == "__main__":  # by its own name, since digests of code are asked for by the name of the module
    from companion.chapters.layers.maths import main as run

    sys.exit(run())
