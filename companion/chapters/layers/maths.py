"""Where along a vision transformer class profiles form, and where OOD separates: one SAE a site, the same recipe.

At every site (:mod:`companion.chapters.layers.sites`) an SAE, profiles and a linear probe are fitted on the training
samples, and scores are taken of the test samples and the OOD sets. :func:`measure_site` takes arrays; :func:`layers` is
the whole for an experiment.

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

from ...cached import cached
from .against_final import N_BOOT, table_of
from .sites import FINAL, KINDS

SEEDS = (0, 1)
EPOCHS_SHARE = 0.4  # of the experiment's own: the same for every site, a third of the time, nearly the same FVU
END_TOLERANCE = 0.01  # of a vector's length: float16, and the arithmetic of another machine
STRENGTH = 0.01  # of the probes' penalty, on standardised features: one for all sites, nothing is chosen
ON_FEATURES = ("mds++", "knn")


def measure_site(sets: Mapping[str, FeatureSet], n_classes: int, config, core_fraction: float, seeds=SEEDS):
    """Fit SAE, profiles and probe at one site, measure them, and score the test samples and the OOD sets.

    Parameters
    ----------
    sets : {name: FeatureSet}
        "train", "val", "test" and the OOD sets; ``cls`` (N, d) at the site, ``logits`` of the head at the end.
    config : SAEConfig
        The same for every site; ``seed`` is replaced by each of ``seeds``.
    core_fraction : float
        p of EPD.

    Returns
    -------
    measures : DataFrame
        seed, metric, value, n (test samples behind a share, else 0).
    scores : {(method, seed): {set: (N,) float64}}
        ``epd`` and ``rpd`` take the class (its posterior) from the head at the network's end, ``epd_site`` and
        ``rpd_site`` from a linear probe of this site. ``mds++`` and ``knn`` read the site's features, know no SAE, and
        stand under the first seed.
    """
    from capsae import detectors
    from capsae.detectors import Observations
    from capsae.features.probe import fit_linear_probe
    from capsae.sae import measures as of_sae
    from capsae.sae import train_sae

    train, test = sets["train"], sets["test"]
    probe = fit_linear_probe(train.cls, train.labels, n_classes, strengths=(STRENGTH,))
    accuracy = (probe.logits(test.cls).argmax(1) == test.labels).mean()
    rows, scores = [(seeds[0], "probe_accuracy", accuracy, len(test))], {}
    heads = {"": {name: of.logits for name, of in sets.items()}}
    heads["_site"] = {name: probe.logits(of.cls) for name, of in sets.items()}
    for seed in seeds:
        given = {"held_out": sets["val"].cls, "keep": "best", "progress": False}
        sae = train_sae(train.cls, replace(config, seed=seed), "cpu", **given)[0]
        codes = {name: sae.encode(features.cls).numpy() for name, features in sets.items()}
        caps = ClassActivationProfiles.fit(codes["train"], train.labels, n_classes)
        unit = caps.mean / np.maximum(np.linalg.norm(caps.mean, axis=1, keepdims=True), 1e-300)
        between = float((unit @ unit.T)[~np.eye(n_classes, dtype=bool)].mean())  # cosine of two classes' profiles
        within = stability(codes["train"], train.labels, n_classes).mean()
        found = {
            "fvu": of_sae.fvu(sae, test.cls, codes["test"]), "dead": of_sae.dead_fraction(codes["train"]),
            "core_overlap": of_sae.core_overlap(caps), "stability": within, "between": between, "gap": within - between,
        }  # fmt: skip
        rows += [(seed, metric, value, 0) for metric, value in found.items()]
        for name, metric in (("test", "cap_accuracy"), ("val", "cap_accuracy_val")):
            nearest = (codes[name].csr() @ unit.T).argmax(1)  # the largest cosine; the first class for a zero code
            rows.append((seed, metric, (nearest == sets[name].labels).mean(), len(nearest)))
        few = of_sae.class_probing(codes["train"], train.labels, codes["test"], test.labels, n_classes)
        rows += [(seed, f"top1_{row.size}", row.top1, len(test)) for row in few.itertuples()]
        for ending, logits in heads.items():
            seen = {
                name: Observations(of.cls, logits=logits[name], codes=codes[name],
                                   labels=of.labels if name == "train" else None)
                for name, of in sets.items() if name != "val"
            }  # fmt: skip
            wanted = {"epd" + ending: ("epd", {"core_fraction": core_fraction}), "rpd" + ending: ("rpd", {})}
            if seed == seeds[0] and not ending:
                wanted |= {name: (name, {}) for name in ON_FEATURES}
            for method, (name, options) in wanted.items():
                detector = detectors.create(name, **options).fit(seen["train"])
                scores[method, seed] = {where: detector.score(of) for where, of in seen.items() if where != "train"}
    return pd.DataFrame(rows, columns=["seed", "metric", "value", "n"]).astype({"value": float}), scores


def config_of(run):
    """The experiment's SAE with :data:`EPOCHS_SHARE` of its epochs."""
    return replace(run.experiment.sae, epochs=max(1, round(EPOCHS_SHARE * run.experiment.sae.epochs)))


def layers(run, checkpoint=None, kinds=KINDS, **options):
    """The tables of :func:`table_of` for an experiment: extraction in one pass, then one site after the other.

    Third comes what was read of the images: ``vectors``, a digest of all sites of a set; ``end_against_experiment``,
    what that function found, with its ValueError where the vectors are not the experiment's.
    """
    from .sites import run_sites

    sets = {name: run_sites(run, name, None, checkpoint, **options) for name in run.experiment.sets}
    end = end_against_experiment(
        {name: of[FINAL].cls for name, of in sets.items()}, lambda name: run.features(name).cls
    )
    read = {"vectors": {name: _digest({site: f.digest() for site, f in of.items()}) for name, of in sets.items()},
            "end_against_experiment": {name: float(f"{value:.2g}") for name, value in end.items()}}  # fmt: skip
    given = run.experiment.n_classes, config_of(run), run.experiment.caps.core_fraction
    sites = [site for site in next(iter(sets.values())) if site == FINAL or site.split("/")[1] in kinds]
    measure = cached(measure_site, run.store)
    measured = {site: measure({name: of[site] for name, of in sets.items()}, *given) for site in sites}
    return *table_of(measured), read


def _digest(content) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:20]


def end_against_experiment(here: Mapping[str, np.ndarray], experiment: Callable[[str], np.ndarray]) -> dict[str, float]:
    """How far the vectors (N, d) read at ``final/cls`` lie from those of the experiment (of its pack, if it has one).

    Returns {set: the largest distance of a vector, as a share of its length}. ValueError above :data:`END_TOLERANCE`:
    other weights, another crop, or other images under the same names.
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


# --- the committed tables


def files(experiment: str) -> dict[str, Path]:
    """Where an experiment's tables lie: "table", "against", "provenance"."""
    from ...publish.plan import root

    endings = {"table": ".csv", "against": "_against_final.csv", "provenance": ".json"}
    return {key: root() / "book" / "layers" / f"{experiment}{ending}" for key, ending in endings.items()}


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


def write(run, table: pd.DataFrame, against: pd.DataFrame, read: Mapping, cpu_s: float, weights: str | None = None):
    """Write an experiment's tables and their provenance, ``read`` as :func:`layers` gives it; returns their places."""
    from capsae.device import machine, versions
    from capsae.pipeline.code import digest as code_digest

    at, experiment, inputs = files(run.experiment.name), run.experiment, run.inputs
    at["table"].parent.mkdir(parents=True, exist_ok=True)
    for key, data in (("table", table), ("against", against)):
        data.to_csv(at[key], index=False, float_format="%.5g", lineterminator="\n")
    own = [name for name in experiment.sets if not (name == "val" and inputs.holdout)]
    record = {
        "command": command(experiment.name, bool(experiment.pack)),
        "experiment": experiment.name,
        "backbone": experiment.backbone.model,
        "weights_sha256": weights,
        "sites": list(dict.fromkeys(table["site"])),
        "seeds": sorted(int(seed) for seed in table["seed"].unique()),
        "sae": asdict(config_of(run)) | {"seed": None},
        "core_fraction": experiment.caps.core_fraction,
        "n_boot": N_BOOT,
        "images": {name: inputs.source(name).digest()[:20] for name in own},
        **read,
        "code": {"layers": code_digest(layers)[:20]},
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
    table, against, read = layers(run, options.checkpoint, options.kinds, **given)
    weights = SiteReader(run.inputs.backbone_settings(options.checkpoint), [FINAL]).weights
    at = write(run, table, against, read, time.process_time() - started, weights)
    sys.stdout.write("".join(f"{path}\n" for path in at.values()))
    return 0


if __name__ == "__main__":  # by its own name, since digests of code are asked for by the name of the module
    from companion.chapters.layers.maths import main as run

    sys.exit(run())
