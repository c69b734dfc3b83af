"""From an experiment to features, head, SAE, profiles, scores and tables, each from the store or made and kept there.

Files, devices and settings are decided here; the modules that it calls take arrays and return arrays.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from filelock import FileLock

from .. import detectors as _detectors
from .. import distributed
from .. import sae as _sae
from ..caps import ClassActivationProfiles
from ..data.splits import check_classes, stratified_mask
from ..detectors import Observations
from ..device import pick_device, versions
from ..evaluation.evaluate import all_scores, correct
from ..evaluation.tables import compare_scores, evaluate_scores, group_of, seed_values
from ..features import probe
from ..features.featureset import FeatureSet, LinearHead
from ..sae.model import check_rows
from ..sae.rows import start
from . import recipes
from .experiment_detectors import check_detectors
from .experiment_parts import Holdout
from .experiments import Experiment, load_experiment
from .frames import _load_frame, _load_scores, _save_frame, _save_scores
from .inputs import Inputs
from .store import Store, artefact_digest

_CHUNK = 65_536  # rows encoded at a time where only a running sum is kept


class Run:
    """Everything one experiment leads to. Nothing is computed before it is asked for.

    ``overrides`` maps dotted keys to values, e.g. ``{"sae.k": 64}``; ``store`` is a Store or its folder. An experiment
    that cannot be used raises ExperimentError (a ValueError) before any work starts.
    """

    def __init__(
        self,
        experiment: str | Path | Experiment = "imagenet20",
        overrides: Mapping[str, Any] | None = None,
        store: Store | str | Path | None = None,
        device: str = "auto",
        progress: bool = True,
    ):
        self.experiment = load_experiment(experiment, overrides)
        self.store = store if isinstance(store, Store) else Store(store)
        self.device, self.progress = device, progress
        self._features: dict[str, FeatureSet] = {}
        self._observations: dict[str, Observations] = {}
        self._detectors: dict[str, Any] = {}
        check_detectors(self.experiment)
        self.inputs = Inputs(self.experiment, self.store, device, progress, self._who())

    # --- features and head

    def features(self, set_name: str) -> FeatureSet:
        """Return the features of a set: "train", "val", "test" or an OOD set, with the head's logits attached.

        With ``train_fraction`` < 1, "train" is the class-stratified part that SAE, profiles and detectors see; the head
        is fitted on all training rows all the same, so that only their data varies.
        """
        if set_name not in self._features:
            features, fraction = self.inputs.features(set_name), self.experiment.train_fraction
            if set_name == "train" and fraction < 1:
                features = features.take(stratified_mask(features.labels, fraction, self.experiment.seed))
            logits = features.logits if self.experiment.head == "backbone" else None
            if logits is None:
                logits = self.head.logits(features.cls)
            self._features[set_name] = replace(features, logits=logits, name=set_name)
        return self._features[set_name]

    @cached_property
    def head(self) -> LinearHead:
        """The linear classification head: the backbone's own, or a probe fitted on all training rows."""

        def make():
            if self.experiment.head == "backbone":
                return self.inputs.backbone_head()
            train = self.inputs.features("train")
            return probe.fit_linear_probe(train.cls, train.labels, self.experiment.n_classes, seed=self.experiment.seed)

        return self._stored_file("head", make, LinearHead)

    def image(self, set_name: str, row: int):
        """Return the image (PIL, RGB) of a row of ``features(set_name)``; a pack needs ``data_root`` for it."""
        source, wanted = self.inputs.source(set_name), self.features(set_name).ids[row]
        return source.image(int(np.flatnonzero(source.ids == wanted)[0]))

    # --- SAE, codes, profiles

    @property
    def sae(self):
        """The trained SAE (of ``sae.variant``): the epoch with the lowest FVU on held-out ID rows."""
        return self._trained[0]

    @property
    def history(self) -> pd.DataFrame:
        """What its training measured, one row an epoch; ``history.attrs["best_epoch"]`` is the one kept."""
        return self._trained[1]

    @cached_property
    def _trained(self):
        def make():
            train, val, options = self._training("sae")
            return _sae.train_sae(train, self.experiment.sae, self.device, held_out=val, **options)

        return self._stored_sae(make)

    def _stored_sae(self, make):
        def save(trained, folder):
            sae, history = trained
            sae.save(folder)
            _save_frame(history, folder)  # with its attrs

        def load(folder):
            return _sae.TopKSAE.load(folder, device=pick_device(self.device)), _load_frame(folder)

        return self._stored("sae", make, save, load)

    def _training(self, stage: str):
        """Training rows, held-out rows and further options of ``train_sae`` and ``train_saes``."""
        ranks = distributed.world_size()
        # A killed run goes on from there; with another kind of device or other ranks, it would not be the same one.
        name = f"{pick_device(self.device).type}-{ranks}.safetensors"
        checkpoint = self.store.scratch(stage, self.digest("sae")) / name
        train, val = (self.features(name).cls for name in ("train", "val"))
        if ranks > 1:
            train, val = (rows[distributed.share_of(len(rows))] for rows in (train, val))
        options = {"keep": "best", "progress": self.progress, "checkpoint": checkpoint, "sharded": ranks > 1}
        if recipes.needs_head(self.experiment):
            options["head"] = self._head_of_normalized()
        return train, val, options

    @cached_property
    def untrained(self):
        """The same SAE before its first training step: random unit rows; normalisation and pre-bias are set."""
        return start(check_rows(self.features("train").cls), self.experiment.sae, pick_device("cpu"))[0]

    def with_seed(self, seed: int) -> Run:
        """This run with another seed of the SAE alone; head and features are shared."""
        if seed == self.experiment.sae.seed:
            return self
        other = Run(self.experiment, {"sae.seed": seed, "sae_seeds": 1}, self.store, self.device, self.progress)
        other.inputs, other._features = self.inputs, self._features
        other.__dict__["head"] = self.head
        return other

    def seeds(self) -> Iterator[Run]:
        """This run for each of the experiment's ``sae_seeds`` seeds, one after the other, its own first.

        SAEs that are not in the store are trained together, on one copy of the features.
        """
        first = self.experiment.sae.seed
        runs = [self.with_seed(first + number) for number in range(self.experiment.sae_seeds)]
        self._train_together(runs)
        while runs:
            yield runs.pop(0)  # and let go of it: codes of all seeds at once would fill the memory

    def _train_together(self, runs: list[Run]) -> None:
        def missing():
            return [run for run in runs if self.store.provenance("sae", run.digest("sae")) is None]

        if distributed.world_size() > 1 or len(missing()) < 2:
            return  # each is trained when it is asked for
        scratch = self.store.scratch("seeds", self.digest("sae"))
        with FileLock(scratch.with_suffix(".lock")):  # another page of the same experiment may want them too
            wanted = missing()
            if wanted:
                train, val, options = self._training("seeds")
                configs = [run.experiment.sae for run in wanted]
                trained = _sae.train_saes(train, configs, self.device, held_out=val, **options)
                for run, one in zip(wanted, trained, strict=True):
                    run.__dict__["_trained"] = run._stored_sae(lambda one=one: one)
            shutil.rmtree(scratch, ignore_errors=True)

    def _head_of_normalized(self) -> LinearHead:
        """A probe on the training rows as the SAE sees them: what some variants (g-SAE) choose latents by."""
        train = self.features("train")
        x = self.untrained.normalize(train.cls)
        return probe.fit_linear_probe(x, train.labels, self.experiment.n_classes, seed=self.experiment.seed)

    def codes(self, set_name: str):
        """Return the sparse codes (N, k) of a set, rows as in ``features(set_name)``."""
        return self.observations(set_name).codes

    @cached_property
    def caps(self) -> ClassActivationProfiles:
        """Class activation profiles of the training rows (with ``caps.correct_only``: of those predicted correctly)."""

        def make():
            train = self.features("train")
            if self.experiment.caps.correct_only:
                train = train.take(train.logits.argmax(axis=1) == train.labels)
                what = f"experiment {self.experiment.name!r}, training rows predicted correctly (caps.correct_only)"
                check_classes(train.labels, self.experiment.n_classes, what)
            caps = ClassActivationProfiles.empty(self.experiment.n_classes, self.sae.n_latents)
            for first in range(0, len(train), _CHUNK):
                rows = slice(first, first + _CHUNK)
                caps.update(self.sae.encode(train.cls[rows]), train.labels[rows])
            return caps

        return self._stored_file("caps", make, ClassActivationProfiles)

    # --- scores

    def observations(self, set_name: str) -> Observations:
        """Return what detectors see of a set; labels of ID and covariate-shifted sets only.

        With ``predicted = "true"`` (an ablation) "val" and "test" are scored under their label; they then carry none,
        since the head's accuracy would be 1 by construction.
        """
        if set_name not in self._observations:
            features = self.features(set_name)
            known = "/" not in set_name or set_name in self.experiment.shifted
            labels = features.labels if known and (features.labels >= 0).any() else None
            predicted = None
            if self.experiment.predicted == "true" and set_name in ("val", "test"):
                if labels is None or (labels < 0).any():
                    raise ValueError(f'{set_name} has rows without a label: predicted = "true" needs them all')
                predicted, labels = labels, None
            given = {"labels": labels, "predicted": predicted, "head": self.head, "sae": self.sae}
            given |= {"logits": features.logits, "pixels": features.pixels}
            self._observations[set_name] = Observations(features.cls, **given)
        return self._observations[set_name]

    def detectors(self, names: Iterable[str] | None = None) -> dict[str, Any]:
        """Return detectors by name (default: all), fitted with the experiment's options.

        They see the training rows, and those whose ``fitted_on`` is "validation" the validation rows as well.
        """
        names = self.chosen(names)
        for name in names:
            if name not in self._detectors:
                detector = _detectors.create(name, **self.detector_options(name))
                sets = ("train", "val") if detector.fitted_on == "validation" else ("train",)
                self._detectors[name] = detector.fit(*(self.observations(one) for one in sets))
        return {name: self._detectors[name] for name in names}

    def detector_options(self, name: str) -> dict[str, Any]:
        """Return a detector's options: the CAP settings where they apply, then its ``[detectors.NAME]``."""
        caps = self.experiment.caps.model_dump()
        known = _detectors.info(name)["defaults"]
        return {key: value for key, value in caps.items() if key in known} | self.experiment.detectors.get(name, {})

    def table(self, names: Iterable[str] | None = None) -> pd.DataFrame:
        """Return :func:`capsae.evaluate`'s table: method, set, group, metric, value, lo, hi, seeds."""
        names = self.chosen(names)

        def make():
            settings = {"n_boot": self.experiment.n_boot, "seed": self.experiment.seed}
            known = {name: correct(self.observations(name)) for name in ("test", *self.experiment.shifted)}
            return evaluate_scores(self.scores_of_seeds(names), known, self.experiment.ood_sets, **settings)

        return self._stored("table", make, _save_frame, _load_frame, names)

    def compare(
        self, pairs: Iterable[tuple[str, str]], names: Iterable[str] | None = None, n_boot: int = 2000
    ) -> pd.DataFrame:
        """Return :func:`capsae.compare`'s table for (method, other) pairs, of detectors scored together."""
        right, seed = correct(self.observations("test")), self.experiment.seed
        scores, pairs = self.scores_of_seeds(names), list(pairs)
        return compare_scores(scores, self.experiment.ood_sets, pairs, right, n_boot=n_boot, seed=seed)

    def seed_values(self, names: Iterable[str] | None = None) -> pd.DataFrame:
        """Return every seed's mean over all OOD sets: method, metric, seed (0, 1, ...), value."""
        return seed_values(self.scores_of_seeds(names), self.experiment.ood_sets)

    def scores_of_seeds(self, names: Iterable[str] | None = None) -> dict[str, dict[str, np.ndarray]]:
        """Return method -> set -> scores (S, N): a row a seed for what depends on the SAE, else one.

        Sets: "val", "test", those of covariate shift, the OOD sets.
        """
        names = self.chosen(names)

        def make():
            return all_scores(*next(bundles := self._bundles(names)), bundles)

        found = self._stored("scores", make, _save_scores, _load_scores, names)
        return {name: found[name] for name in names}  # a file has no order

    def _bundles(self, names: list[str]):
        """The detectors and sets of each seed; of all seeds but the first only what depends on the SAE."""
        sets = ("val", "test", *self.experiment.shifted, *self.experiment.ood_sets)
        for run in self.seeds():
            needed = [name for name in names if run is self or "codes" in _detectors.info(name)["needs"]]
            yield run.detectors(needed), {name: run.observations(name) for name in sets}

    def scores(self, names: Iterable[str] | None = None) -> pd.DataFrame:
        """Return every sample's scores by the run's own seed, tidy: method, set, group, row, score."""
        frames = []
        for name, sets in self.scores_of_seeds(names).items():
            for where, (score, *_) in sets.items():
                group = group_of(where) if where in self.experiment.ood_sets else "id"
                cells = {"method": name, "set": where, "group": group, "row": np.arange(len(score)), "score": score}
                frames.append(pd.DataFrame(cells))
        return pd.concat(frames, ignore_index=True)

    def threshold(self, name: str, keep: float = 0.95) -> float:
        """Return the score above which a sample is flagged: the lowest that keeps ``keep`` of the ID val rows.

        A detector that is fitted on validation rows gets every other one for that, and the threshold the rest.
        """
        val, detector = self.observations("val"), self.detectors([name])[name]
        if detector.fitted_on == "validation":
            rows = np.arange(len(val))
            fitted = _detectors.create(name, **self.detector_options(name))
            detector = fitted.fit(self.observations("train"), val.take(rows[::2]))
            val = val.take(rows[1::2])
        return float(np.quantile(detector.score(val), keep, method="inverted_cdf"))

    # --- digests and provenance

    def digest(self, stage: str, names: Iterable[str] | None = None) -> str:
        """Return the digest of a stage's artefact, from settings, inputs and code; nothing is computed.

        Stages: "features" (all sets together), "head", "sae", "caps", "scores", "table" (of detectors ``names``).
        """
        if stage == "features":
            return artefact_digest("sets", None, {name: self.inputs.digest(name) for name in self.experiment.sets})
        return artefact_digest(stage, *self._recipe(stage, names))

    def provenance(self) -> dict[str, Any]:
        """Return what stands behind this run's numbers: experiment, seeds, versions, device, digests, wall times."""
        stages = ("head", "sae", "caps", "table")
        digests = {stage: self.digest(stage) for stage in ("features", *stages)}
        made = {stage: self.store.provenance(stage, digests[stage]) or {} for stage in stages}
        return {
            **self._who(),
            "title": self.experiment.title,
            "backbone": self.experiment.backbone.model,
            "pack": self.experiment.pack,
            "versions": versions(),
            "digests": digests,
            **{key: {stage: of[key] for stage, of in made.items() if of} for key in ("wall_s", "peak_rss_mb")},
        }

    def _stored(self, stage: str, make, save, load, names: list[str] | None = None):
        return self.store.get_or_make(stage, *self._recipe(stage, names), make, save, load, self._who())

    def _stored_file(self, stage: str, make, kind):
        name = f"{stage}.safetensors"
        save, load = lambda made, folder: made.save(folder / name), lambda folder: kind.load(folder / name)
        return self._stored(stage, make, save, load)

    def _recipe(self, stage: str, names: Iterable[str] | None = None) -> tuple[dict, dict[str, str], str]:
        """Return what defines a stage's artefact: its own settings, digests of what it is made from and of its code."""
        return *recipes.recipe(self, stage, names), recipes.code(self.experiment, stage)

    def left_out(self) -> dict[str, str]:
        """Return the detectors that this experiment's data cannot feed, with the reason; the tables do without them."""
        if self.inputs.has_pixels:
            return {}
        why = f"pack {self.experiment.pack!r} holds no pixel statistics; `capsae extract --pixels` adds them"
        return {name: why for name in _detectors.available() if "pixels" in _detectors.info(name)["needs"]}

    def chosen(self, names: Iterable[str] | None) -> list[str]:
        """Return detectors by name, default all that the data can feed; ValueError for one that is not among them."""
        left_out = self.left_out()
        if names is None:
            return [name for name in _detectors.available() if name not in left_out]
        names = [names] if isinstance(names, str) else list(names)
        for name in names:
            _detectors.info(name)  # refuses an unknown one before work starts
            if name in left_out:
                raise ValueError(f"detector {name!r}: {left_out[name]}")
        return names

    def _who(self) -> dict[str, Any]:
        first = self.experiment.sae.seed
        last = first + self.experiment.sae_seeds - 1
        seeds = {"experiment": self.experiment.seed, "sae": first if first == last else f"{first} to {last}"}
        if isinstance(self.experiment.val, Holdout):
            seeds["val"] = self.experiment.val.seed
        return {"experiment": self.experiment.name, "seeds": seeds, "device": str(pick_device(self.device))}


def load_features(
    experiment: str | Path | Experiment, set_name: str, device: str = "auto", store: Store | str | Path | None = None
) -> FeatureSet:
    """Return the features of one set ("train", "val", "test" or an OOD set) of an experiment, with the head's logits.

    An unknown set raises ValueError with those there are. Other parameters are those of :class:`Run`.
    """
    run = Run(experiment, store=store, device=device)
    run.experiment.source(set_name)
    return run.features(set_name)
