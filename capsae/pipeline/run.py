"""From an experiment to features, head, SAE, profiles, scores and tables: each read from the store, or computed and
stored.

This is the edge where files, devices and settings are decided; the modules it calls take arrays and return arrays.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from .. import detectors as _detectors
from ..caps import ClassActivationProfiles
from ..data.splits import check_classes, stratified_mask
from ..detectors import Observations
from ..device import versions
from ..evaluation.evaluate import all_scores, correct
from ..evaluation.tables import compare_scores, evaluate_scores, group_of, seed_values
from ..features.featureset import FeatureSet, LinearHead
from .code import digest as code_digest
from .experiment_detectors import check_detectors
from .experiment_parts import Holdout
from .experiments import Experiment, load_experiment
from .frames import _load_frame, _load_scores, _save_frame, _save_scores
from .inputs import Inputs
from .store import Store, artefact_digest

log = logging.getLogger(__name__)

_CHUNK = 65_536  # rows encoded at a time where only a running sum is kept


class Run:
    """Everything one experiment leads to. Nothing is computed before it is asked for.

    Parameters
    ----------
    experiment : str, path or Experiment
    overrides : mapping of dotted keys to values, e.g. ``{"sae.k": 64}``
    store : Store or path, optional
        Default: see :func:`capsae.pipeline.store.default_root`.
    device : str
        "auto" takes a GPU where there is one.
    progress : bool
        Show bars on stderr for what takes long.

    Raises
    ------
    ExperimentError (a ValueError)
        For an experiment that cannot be used, before any work starts.
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
            from ..features.probe import fit_linear_probe

            if self.experiment.head == "backbone":
                return self.inputs.backbone_head()
            train = self.inputs.features("train")
            return fit_linear_probe(train.cls, train.labels, self.experiment.n_classes, seed=self.experiment.seed)

        return self._stored(
            "head",
            make,
            save=lambda head, folder: head.save(folder / "head.safetensors"),
            load=lambda folder: LinearHead.load(folder / "head.safetensors"),
        )

    def image(self, set_name: str, row: int):
        """Return the image (PIL, RGB) that a row of ``features(set_name)`` was made from.

        An experiment with a pack needs ``data_root`` for that. Whether images may be published says ``show_images``.
        """
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
        from ..sae import train_sae

        def make():
            train, val, options = self._training("sae")
            return train_sae(train, self.experiment.sae, self.device, held_out=val, **options)

        return self._stored_sae(make)

    def _stored_sae(self, make):
        from ..sae import TopKSAE

        def save(trained, folder):
            sae, history = trained
            sae.save(folder)
            _save_frame(history, folder)  # with its attrs

        def load(folder):
            return TopKSAE.load(folder, device=_torch_device(self.device)), _load_frame(folder)

        return self._stored("sae", make, save, load)

    def _training(self, stage: str):
        """Training rows, held-out rows and further options of ``train_sae`` and ``train_saes``."""
        from .. import distributed

        ranks = distributed.world_size()
        # A killed run goes on from there; with another kind of device or other ranks, it would not be the same one.
        name = f"{_torch_device(self.device).type}-{ranks}.safetensors"
        checkpoint = self.store.scratch(stage, self.digest("sae")) / name
        train, val = (self.features(name).cls for name in ("train", "val"))
        if ranks > 1:
            train, val = (rows[distributed.share_of(len(rows))] for rows in (train, val))
        options = {"keep": "best", "progress": self.progress, "checkpoint": checkpoint, "sharded": ranks > 1}
        if self._chooses_by_head:
            options["head"] = self._head_of_normalized()
        return train, val, options

    @cached_property
    def untrained(self):
        """The same SAE before its first training step: random unit rows; normalisation and pre-bias are set."""
        import torch

        from ..sae.rows import start

        train = torch.as_tensor(self.features("train").cls, dtype=torch.float32)
        return start(train, self.experiment.sae, torch.device("cpu"))[0]

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
        from filelock import FileLock

        from .. import distributed
        from ..sae import train_saes

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
                trained = train_saes(train, configs, self.device, held_out=val, **options)
                for run, one in zip(wanted, trained, strict=True):
                    run.__dict__["_trained"] = run._stored_sae(lambda one=one: one)
            shutil.rmtree(scratch, ignore_errors=True)

    @property
    def _chooses_by_head(self) -> bool:
        from ..sae.variants import thresholds as variants

        return getattr(variants.model(self.experiment.sae), "needs_head", False)

    def _head_of_normalized(self) -> LinearHead:
        """A probe on the training rows as the SAE sees them: what some variants (g-SAE) choose latents by."""
        from ..features.probe import fit_linear_probe
        from ..sae.model import check_rows
        from ..sae.rows import start

        train, device = self.features("train"), _torch_device("cpu")
        x = start(check_rows(train.cls), self.experiment.sae, device)[0].normalize(train.cls)
        return fit_linear_probe(x, train.labels, self.experiment.n_classes, seed=self.experiment.seed)

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
                what = (
                    f"experiment {self.experiment.name!r}, correctly predicted training rows (caps.correct_only = true)"
                )
                check_classes(train.labels, self.experiment.n_classes, what)
            caps = ClassActivationProfiles.empty(self.experiment.n_classes, self.sae.n_latents)
            for start in range(0, len(train), _CHUNK):
                rows = slice(start, start + _CHUNK)
                caps.update(self.sae.encode(train.cls[rows]), train.labels[rows])
            return caps

        return self._stored(
            "caps",
            make,
            save=lambda caps, folder: caps.save(folder / "caps.safetensors"),
            load=lambda folder: ClassActivationProfiles.load(folder / "caps.safetensors"),
        )

    # --- scores

    def observations(self, set_name: str) -> Observations:
        """Return what detectors see of a set. OOD sets carry no labels: theirs count along other classes. Those of
        covariate-shifted ID sets are kept.

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
        names = self._names(names)
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
        names = self._names(names)

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
        names = self._names(names)

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
            for where, of in sets.items():
                group = group_of(where) if where in self.experiment.ood_sets else "id"
                cells = {"method": name, "set": where, "group": group, "row": np.arange(of.shape[1]), "score": of[0]}
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
        config, inputs = self._recipe(stage, names)
        return artefact_digest(stage, config, inputs, self._code(stage))

    def provenance(self) -> dict[str, Any]:
        """Return what stands behind this run's numbers: experiment, seeds, versions, device, digests, wall times."""
        stages = ("head", "sae", "caps", "table")
        digests = {stage: self.digest(stage) for stage in ("features", *stages)}
        made = {stage: self.store.provenance(stage, digests[stage]) for stage in stages}
        return {
            **self._who(),
            "title": self.experiment.title,
            "backbone": self.experiment.backbone.model,
            "pack": self.experiment.pack,
            "versions": versions(),
            "digests": digests,
            "wall_s": {stage: record["wall_s"] for stage, record in made.items() if record},
            "peak_rss_mb": {stage: record["peak_rss_mb"] for stage, record in made.items() if record},
        }

    def _stored(self, stage: str, make, save, load, names: list[str] | None = None):
        config, inputs = self._recipe(stage, names)
        return self.store.get_or_make(stage, config, inputs, self._code(stage), make, save, load, self._who())

    def _code(self, stage: str) -> str:
        """Digest of a stage's code: its methods with all that they name; what they take from others is its input."""
        from ..sae.dictionaries import methods as dictionaries
        from ..sae.variants import thresholds as variants

        if stage == "head":
            return code_digest(Run.features, Run.head, *[Inputs.backbone_head] * (self.experiment.head == "backbone"))
        if stage == "sae":  # of the variants, the one that is trained
            made_by = Run.features, Run._trained, Run._training, variants.model(self.experiment.sae)
            made_by += (Run._head_of_normalized,) * self._chooses_by_head
            return code_digest(*made_by, without=((variants, "REGISTRY"), (dictionaries, "METHODS")))
        if stage == "caps":
            return code_digest(Run.features, Run.caps)
        scores = Run.features, Run.observations, Run.detectors, Run.scores_of_seeds, Run._bundles, Run.seeds
        return code_digest(*scores, *[Run.table] * (stage == "table"))

    def _recipe(self, stage: str, names: Iterable[str] | None = None) -> tuple[dict, dict[str, str]]:
        """Return a stage's own settings and the digests of what it is made from."""
        experiment = self.experiment
        amount = {"train_fraction": experiment.train_fraction, "seed": experiment.seed}
        if stage == "head":
            config = {"head": experiment.head, "n_classes": experiment.n_classes, "seed": experiment.seed}
            return config, {"train": self.inputs.digest("train")}
        if stage == "sae":
            sets = {name: self.inputs.digest(name) for name in ("train", "val")}
            own_head = {"n_classes": experiment.n_classes} if self._chooses_by_head else {}
            return {"sae": asdict(experiment.sae), "keep": "best", **amount, **own_head}, sets
        if stage == "caps":
            inputs = {"train": self.inputs.digest("train"), "sae": self.digest("sae")}
            if experiment.caps.correct_only:
                inputs["head"] = self.digest("head")
            return {"correct_only": experiment.caps.correct_only, "n_classes": experiment.n_classes, **amount}, inputs
        if stage in ("table", "scores"):
            options = {name: self.detector_options(name) for name in self._names(names)}
            config = {"detectors": options, "predicted": experiment.predicted, "sae_seeds": experiment.sae_seeds}
            sets = {name: self.inputs.digest(name) for name in experiment.sets}
            inputs = {**sets, "head": self.digest("head"), "sae": self.digest("sae")}
            return config | amount | ({"n_boot": experiment.n_boot} if stage == "table" else {}), inputs
        raise ValueError(f"no stage {stage!r}; there are features, head, sae, caps, scores, table")

    def left_out(self) -> dict[str, str]:
        """Return the detectors that this experiment's data cannot feed, with the reason; the tables do without them."""
        if self.inputs.has_pixels:
            return {}
        why = f"pack {self.experiment.pack!r} holds no pixel statistics; `capsae extract --pixels` adds them"
        return {name: why for name in _detectors.available() if "pixels" in _detectors.info(name)["needs"]}

    def _names(self, names: Iterable[str] | None) -> list[str]:
        left_out = self.left_out()
        if names is None:
            return [name for name in _detectors.available() if name not in left_out]
        names = [names] if isinstance(names, str) else list(names)
        for name in names:
            _detectors.info(name)  # an unknown one is refused here, before work starts
            if name in left_out:
                raise ValueError(f"detector {name!r}: {left_out[name]}")
        return names

    def _who(self) -> dict[str, Any]:
        first = self.experiment.sae.seed
        seeds = {"experiment": self.experiment.seed, "sae": first}
        if self.experiment.sae_seeds > 1:
            seeds["sae"] = f"{first} to {first + self.experiment.sae_seeds - 1}"
        if isinstance(self.experiment.val, Holdout):
            seeds["val"] = self.experiment.val.seed
        return {"experiment": self.experiment.name, "seeds": seeds, "device": str(_torch_device(self.device))}


def load_features(
    experiment: str | Path | Experiment, set_name: str, device: str = "auto", store: Store | str | Path | None = None
) -> FeatureSet:
    """Return the features of one set of an experiment with the head's logits attached.

    Parameters
    ----------
    experiment : name, path or Experiment
    set_name : "train", "val", "test" or one of ``experiment.ood_sets``
    device, store : as for :class:`Run`

    Raises
    ------
    ValueError
        For an unknown set; the message lists those there are.
    """
    run = Run(experiment, store=store, device=device)
    run.experiment.source(set_name)  # an unknown name is refused with the list of known ones
    return run.features(set_name)


def _torch_device(device: str):
    import torch

    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
