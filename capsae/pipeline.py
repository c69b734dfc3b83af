"""From a profile to features, head, SAE, profiles, scores and tables: each read from the store, or computed and stored.

This is the edge where files, devices and settings are decided; the modules it calls take arrays and return arrays.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from . import detectors as _detectors
from .caps import ClassActivationProfiles
from .detectors import Observations
from .evaluate import evaluate, scores_table
from .featureset import FeatureSet, LinearHead
from .profile_errors import ProfileError
from .profiles import Holdout, Profile, load_profile
from .splits import check_classes, holdout_mask, stratified_mask
from .store import Store, artefact_digest, versions

log = logging.getLogger(__name__)

# What makes each kind of artefact: a change of this code (comments aside) makes it anew.
MODULES = {
    "backbone": ("capsae.tinyvit", "capsae.builtin"),
    "features": ("capsae.backbone", "capsae.images", "capsae.convert"),
    "split": ("capsae.splits",),
    "head": ("capsae.probe", "capsae.featureset:LinearHead", "capsae.splits"),
    "sae": ("capsae.sae", "capsae.splits"),
    "caps": ("capsae.caps", "capsae.splits"),
    "table": ("capsae.caps", "capsae.detectors", "capsae.metrics", "capsae.stats", "capsae.evaluate"),
}
DIGITS_VIT = "capsae/digits_vit"
_CHUNK = 65_536  # rows encoded at a time where only a running sum is kept


class Run:
    """Everything one profile leads to. Nothing is computed before it is asked for.

    Parameters
    ----------
    profile : str, path or Profile
    overrides : mapping of dotted keys to values, e.g. ``{"sae.k": 64}``
    store : Store or path, optional
        Default: see :func:`capsae.store.default_root`.
    device : str
        "auto" takes a GPU where there is one.
    progress : bool
        Show bars on stderr for what takes long.

    Raises
    ------
    ProfileError (a ValueError)
        For a profile that cannot be used, before any work starts.
    """

    def __init__(
        self,
        profile: str | Path | Profile = "imagenet20",
        overrides: Mapping[str, Any] | None = None,
        store: Store | str | Path | None = None,
        device: str = "auto",
        progress: bool = True,
    ):
        self.profile = load_profile(profile, overrides)
        self.store = store if isinstance(store, Store) else Store(store)
        self.device, self.progress = device, progress
        self._features: dict[str, FeatureSet] = {}
        self._parts: dict[str, FeatureSet] = {}
        self._sources: dict[str, Any] = {}
        self._observations: dict[str, Observations] = {}
        self._detectors: dict[str, Any] = {}
        _check_detectors(self.profile)
        if self.profile.pack:
            _check_pack(self.profile)
        else:
            self.profile.check_files()
            _check_backbone(self.profile)

    # --- features and head

    def features(self, set_name: str) -> FeatureSet:
        """Return the features of a set: "train", "val", "test" or an OOD set, with the head's logits attached.

        With ``train_fraction`` < 1, "train" is the class-stratified part that SAE, profiles and detectors see; the head
        is fitted on all training rows all the same, so that only their data varies.
        """
        if set_name not in self._features:
            features, fraction = self._split(set_name), self.profile.train_fraction
            if set_name == "train" and fraction < 1:
                features = features.take(stratified_mask(features.labels, fraction, self.profile.seed))
            logits = features.logits if self.profile.head == "backbone" else None
            if logits is None:
                logits = self.head.logits(features.cls)
            self._features[set_name] = replace(features, logits=logits, name=set_name)
        return self._features[set_name]

    @cached_property
    def head(self) -> LinearHead:
        """The linear classification head: the backbone's own, or a probe fitted on all training rows."""
        if self.profile.head == "backbone":
            return self._backbone_head()

        def make():
            from .probe import fit_linear_probe

            train = self._split("train")
            return fit_linear_probe(train.cls, train.labels, self.profile.n_classes, seed=self.profile.seed)

        return self._stored(
            "head",
            make,
            save=lambda head, folder: head.save(folder / "head.safetensors"),
            load=lambda folder: LinearHead.load(folder / "head.safetensors"),
        )

    def source(self, set_name: str):
        """Return the images of a set as the profile's source has them, before any split (an ImageSource)."""
        if set_name not in self._sources:
            from .data import open_source

            own = "train" if set_name == "val" and isinstance(self.profile.val, Holdout) else set_name
            if own != set_name:
                return self.source(own)
            self.profile.check_files([set_name])
            source = open_source(self.profile.source_spec(set_name))
            if set_name in ("train", "test"):
                what = f"profile {self.profile.name!r}, {set_name} ({source.name})"
                check_classes(source.labels, self.profile.n_classes, what, every=set_name == "train")
            self._sources[set_name] = source
        return self._sources[set_name]

    def image(self, set_name: str, row: int):
        """Return the image (PIL, RGB) that a row of ``features(set_name)`` was made from."""
        source, wanted = self.source(set_name), self.features(set_name).ids[row]
        return source.image(int(np.flatnonzero(source.ids == wanted)[0]))

    def backbone(self, checkpoint: str | None = None):
        """Return the loaded backbone (``capsae.backbone.Backbone``), from ``checkpoint`` if it is given."""
        from .backbone import load_backbone

        return load_backbone(self._backbone_settings(checkpoint)).to(_torch_device(self.device))

    def _split(self, set_name: str) -> FeatureSet:
        """Features as extracted, after the split into train and val; logits are the backbone's or None."""
        if set_name not in self._parts:
            holdout = self.profile.val if isinstance(self.profile.val, Holdout) else None
            if holdout and set_name in ("train", "val"):
                whole = self._raw("train")
                held_out = holdout_mask(whole.labels, holdout.fraction, holdout.seed)
                self._parts |= {"train": whole.take(~held_out), "val": whole.take(held_out)}
            else:
                self._parts[set_name] = self._raw(set_name)
        return self._parts[set_name]

    def _raw(self, set_name: str) -> FeatureSet:
        features = self._packed(set_name) if self.profile.pack else self._extracted(set_name)
        if set_name in ("train", "test"):
            what = f"profile {self.profile.name!r}, {set_name}"
            check_classes(features.labels, self.profile.n_classes, what, every=set_name == "train")
        if len(features) == 0:
            raise ValueError(f"profile {self.profile.name!r}: set {set_name!r} holds no images")
        return features

    def _packed(self, set_name: str) -> FeatureSet:
        from .packs import load_pack

        return load_pack(self.profile.pack, set_name)

    def _extracted(self, set_name: str) -> FeatureSet:
        if set_name != "train":
            self.source("train")  # labels that do not fit stop the run before the first extraction
        source, (config, inputs) = self.source(set_name), self._recipe_features(set_name)

        def make():
            from .features import extract

            settings = self._backbone_settings()
            shards = self.store.scratch("features", artefact_digest("features", config, inputs, MODULES["features"]))
            return extract(source, settings, shards, device=self.device, name=set_name, progress=self.progress)

        return self.store.get_or_make(
            "features",
            config,
            inputs,
            MODULES["features"],
            make,
            save=lambda features, folder: features.save(folder / "features.safetensors"),
            load=lambda folder: FeatureSet.load(folder / "features.safetensors"),
            provenance=self._who(),
        )

    def _backbone_settings(self, checkpoint: str | None = None) -> dict:
        settings = self.profile.backbone.model_dump(exclude_none=True)
        if checkpoint is not None:
            settings["checkpoint"] = str(checkpoint)
        elif "checkpoint" in settings:
            settings["checkpoint"] = str(self.profile.resolve(settings["checkpoint"]))
        elif settings["model"] == DIGITS_VIT:
            settings["checkpoint"] = str(self._digits_vit())
        return settings

    def _digits_vit(self) -> Path:
        """Return the weights of the small ViT that the digits profile trains."""
        config, inputs = self._recipe_backbone()

        def make():
            from .tinyvit import train_digits_vit

            return train_digits_vit(self.source("train"), seed=self.profile.seed, device=self.device)

        path = self.store.path("backbone", artefact_digest("backbone", config, inputs, MODULES["backbone"]))
        self.store.get_or_make(
            "backbone",
            config,
            inputs,
            MODULES["backbone"],
            make,
            save=lambda trained, folder: trained.save(folder / "weights.safetensors"),
            load=lambda folder: folder,
            provenance=self._who(),
        )
        return path / "weights.safetensors"

    def _backbone_head(self) -> LinearHead:
        """The backbone's own classifier as weight and bias, checked against the profile's number of classes."""
        classifier = self.backbone().net.get_classifier()
        if not hasattr(classifier, "weight"):
            raise ProfileError(
                f"profile {self.profile.name!r}",
                [f"head = 'backbone': {self.profile.backbone.model} has no linear head; use head = 'probe'"],
            )
        weight = classifier.weight.detach().float().cpu().numpy()
        if len(weight) != self.profile.n_classes:
            raise ProfileError(
                f"profile {self.profile.name!r}",
                [f"n_classes = {self.profile.n_classes}: the backbone's head has {len(weight)}; use head = 'probe'"],
            )
        bias = classifier.bias
        return LinearHead(weight, np.zeros(len(weight), np.float32) if bias is None else bias.detach().cpu().numpy())

    # --- SAE, codes, profiles

    @property
    def sae(self):
        """The trained TopKSAE: the epoch with the lowest FVU on held-out ID rows."""
        return self._trained[0]

    @property
    def history(self) -> pd.DataFrame:
        """What its training measured, one row an epoch; ``history.attrs["best_epoch"]`` is the one kept."""
        return self._trained[1]

    @cached_property
    def _trained(self):
        from .sae import TopKSAE, train_sae

        def make():
            train, val = self.features("train").cls, self.features("val").cls
            return train_sae(train, self.profile.sae, self.device, held_out=val, keep="best", progress=self.progress)

        def save(trained, folder):
            sae, history = trained
            sae.save(folder)
            history.to_csv(folder / "history.csv", index=False)
            (folder / "history.json").write_text(json.dumps(history.attrs, default=str), encoding="utf-8")

        def load(folder):
            history = pd.read_csv(folder / "history.csv", float_precision="round_trip")
            history.attrs = json.loads((folder / "history.json").read_text(encoding="utf-8"))
            return TopKSAE.load(folder, device=_torch_device(self.device)), history

        return self._stored("sae", make, save, load)

    def codes(self, set_name: str):
        """Return the sparse codes (N, k) of a set, rows as in ``features(set_name)``."""
        return self.observations(set_name).codes

    @cached_property
    def caps(self) -> ClassActivationProfiles:
        """Class activation profiles of the training rows (with ``caps.correct_only``: of those predicted correctly)."""

        def make():
            train = self.features("train")
            if self.profile.caps.correct_only:
                train = train.take(train.logits.argmax(axis=1) == train.labels)
                what = f"profile {self.profile.name!r}, correctly predicted training rows (caps.correct_only = true)"
                check_classes(train.labels, self.profile.n_classes, what)
            caps = ClassActivationProfiles.empty(self.profile.n_classes, self.profile.sae.latents)
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
        """Return what detectors see of a set. OOD sets carry no labels: theirs count along other classes.

        With ``predicted = "true"`` (an ablation) "val" and "test" are scored under their label; they then carry none,
        since the head's accuracy would be 1 by construction.
        """
        if set_name not in self._observations:
            features = self.features(set_name)
            labels = features.labels if "/" not in set_name and (features.labels >= 0).all() else None
            predicted = None
            if self.profile.predicted == "true" and set_name in ("val", "test"):
                predicted, labels = labels, None
            self._observations[set_name] = Observations(
                features.cls, logits=features.logits, labels=labels, head=self.head, sae=self.sae, predicted=predicted
            )
        return self._observations[set_name]

    def detectors(self, names: Iterable[str] | None = None) -> dict[str, Any]:
        """Return detectors by name (default: all), fitted on the training rows with the profile's options."""
        names = self._names(names)
        for name in names:
            if name not in self._detectors:
                detector = _detectors.create(name, **self.detector_options(name))
                self._detectors[name] = detector.fit(self.observations("train"))
        return {name: self._detectors[name] for name in names}

    def detector_options(self, name: str) -> dict[str, Any]:
        """Return a detector's options: the profile's CAP settings where they apply, then its ``[detectors.NAME]``."""
        caps = self.profile.caps.model_dump()
        known = _detectors.info(name)["defaults"]
        return {key: value for key, value in caps.items() if key in known} | self.profile.detectors.get(name, {})

    def table(self, names: Iterable[str] | None = None) -> pd.DataFrame:
        """Return :func:`capsae.evaluate`'s table: method, set, group, metric, value, lo, hi."""
        names = self._names(names)

        def make():
            ood = {name: self.observations(name) for name in self.profile.ood_sets}
            detectors, profile = self.detectors(names), self.profile
            return evaluate(detectors, self.observations("test"), ood, n_boot=profile.n_boot, seed=profile.seed)

        return self._stored("table", make, _save_frame, _load_frame, names)

    def scores(self, names: Iterable[str] | None = None) -> pd.DataFrame:
        """Return every sample's scores, tidy: method, set, group, row, score; sets "val", "test" and the OOD sets."""
        names = self._names(names)

        def make():
            sets = {name: self.observations(name) for name in ("val", "test", *self.profile.ood_sets)}
            return scores_table(self.detectors(names), sets)

        return self._stored("scores", make, _save_frame, _load_frame, names)

    def threshold(self, name: str, keep: float = 0.95) -> float:
        """Return the score above which a sample is flagged: ``keep`` of the ID validation rows lie at or below it."""
        return float(np.quantile(self.detectors([name])[name].score(self.observations("val")), keep, method="higher"))

    # --- digests and provenance

    def digest(self, stage: str, names: Iterable[str] | None = None) -> str:
        """Return the digest of a stage's artefact, from settings, inputs and code; nothing is computed.

        Stages: "features" (all sets together), "head", "sae", "caps", "scores", "table" (of detectors ``names``).
        """
        if stage == "features":
            return artefact_digest("sets", None, {name: self._features_digest(name) for name in self.profile.sets}, ())
        config, inputs = self._recipe(stage, names)
        return artefact_digest(stage, config, inputs, self._modules(stage))

    def provenance(self) -> dict[str, Any]:
        """Return what stands behind this run's numbers: profile, seeds, versions, device, digests, wall times."""
        stages = ("head", "sae", "caps", "table")
        digests = {stage: self.digest(stage) for stage in ("features", *stages)}
        made = {stage: self.store.provenance(stage, digests[stage]) for stage in stages}
        return {
            **self._who(),
            "title": self.profile.title,
            "backbone": self.profile.backbone.model,
            "pack": self.profile.pack,
            "versions": versions(),
            "digests": digests,
            "wall_s": {stage: record["wall_s"] for stage, record in made.items() if record},
            "peak_rss_mb": {stage: record["peak_rss_mb"] for stage, record in made.items() if record},
        }

    def _stored(self, stage: str, make, save, load, names: list[str] | None = None):
        config, inputs = self._recipe(stage, names)
        return self.store.get_or_make(stage, config, inputs, self._modules(stage), make, save, load, self._who())

    def _modules(self, stage: str) -> tuple[str, ...]:
        return MODULES["table" if stage == "scores" else stage]

    def _recipe(self, stage: str, names: Iterable[str] | None = None) -> tuple[dict, dict[str, str]]:
        """Return a stage's own settings and the digests of what it is made from."""
        profile = self.profile
        amount = {"train_fraction": profile.train_fraction, "seed": profile.seed}
        if stage == "head":
            config = {"head": profile.head, "n_classes": profile.n_classes, "seed": profile.seed}
            return config, {"train": self._features_digest("train")}
        if stage == "sae":
            sets = {name: self._features_digest(name) for name in ("train", "val")}
            return {"sae": asdict(profile.sae), "keep": "best", **amount}, sets
        if stage == "caps":
            inputs = {"train": self._features_digest("train"), "sae": self.digest("sae")}
            if profile.caps.correct_only:
                inputs["head"] = self.digest("head")
            return {"correct_only": profile.caps.correct_only, "n_classes": profile.n_classes, **amount}, inputs
        if stage in ("table", "scores"):
            options = {name: self.detector_options(name) for name in self._names(names)}
            config = {"detectors": options, "predicted": profile.predicted}
            sets = {name: self._features_digest(name) for name in profile.sets}
            inputs = {**sets, "head": self.digest("head"), "sae": self.digest("sae")}
            return config | amount | ({"n_boot": profile.n_boot} if stage == "table" else {}), inputs
        raise ValueError(f"no stage {stage!r}; there are features, head, sae, caps, scores, table")

    def _features_digest(self, set_name: str) -> str:
        """Digest of one set as :meth:`_split` gives it."""
        holdout = self.profile.val if isinstance(self.profile.val, Holdout) else None
        if holdout and set_name in ("train", "val"):
            whole = self._whole_digest("train")
            return artefact_digest(f"split-{set_name}", holdout.model_dump(), {"whole": whole}, MODULES["split"])
        return self._whole_digest(set_name)

    def _whole_digest(self, set_name: str) -> str:
        if self.profile.pack:
            from .packs import pack_info

            return pack_info(self.profile.pack)["sets"][set_name]["sha256"]
        config, inputs = self._recipe_features(set_name)
        return artefact_digest("features", config, inputs, MODULES["features"])

    def _recipe_features(self, set_name: str) -> tuple[dict, dict[str, str]]:
        from .features import EXTRACTOR

        backbone = self.profile.backbone.model_dump(mode="json", exclude={"checkpoint"})
        inputs = {"source": self.source(set_name).digest()}
        if self.profile.backbone.checkpoint:
            inputs["weights"] = _file_digest(self.profile.resolve(self.profile.backbone.checkpoint))
        elif self.profile.backbone.model == DIGITS_VIT:
            inputs["weights"] = artefact_digest("backbone", *self._recipe_backbone(), MODULES["backbone"])
        return {"backbone": backbone, "set": set_name, "extractor": EXTRACTOR}, inputs

    def _recipe_backbone(self) -> tuple[dict, dict[str, str]]:
        return {"model": DIGITS_VIT, "seed": self.profile.seed}, {"train": self.source("train").digest()}

    def _names(self, names: Iterable[str] | None) -> list[str]:
        names = list(_detectors.available() if names is None else [names] if isinstance(names, str) else names)
        for name in names:
            _detectors.info(name)  # an unknown one is refused here, before work starts
        return names

    def _who(self) -> dict[str, Any]:
        seeds = {"profile": self.profile.seed, "sae": self.profile.sae.seed}
        if isinstance(self.profile.val, Holdout):
            seeds["val"] = self.profile.val.seed
        return {"profile": self.profile.name, "seeds": seeds, "device": str(_torch_device(self.device))}


def load_features(
    profile: str | Path | Profile, set_name: str, device: str = "auto", store: Store | str | Path | None = None
) -> FeatureSet:
    """Return the features of one set of a profile with the head's logits attached.

    Parameters
    ----------
    profile : name, path or Profile
    set_name : "train", "val", "test" or one of ``profile.ood_sets``
    device, store : as for :class:`Run`

    Raises
    ------
    ValueError
        For an unknown set; the message lists those there are.
    """
    run = Run(profile, store=store, device=device)
    run.profile.source(set_name)  # an unknown name is refused with the list of known ones
    return run.features(set_name)


def _torch_device(device: str):
    import torch

    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)


def _check_detectors(profile: Profile) -> None:
    lines = []
    for name, options in profile.detectors.items():
        if name not in _detectors.available():
            lines.append(f"detectors.{name}: no such detector; known: {', '.join(_detectors.available())}")
            continue
        known = _detectors.info(name)["defaults"]
        lines += [
            f"detectors.{name}.{key} = {value!r}: no such option; known: {', '.join(known) or 'none'}"
            for key, value in options.items()
            if key not in known
        ]
    if lines:
        raise ProfileError(f"profile {profile.name!r} cannot be used", lines)


def _check_pack(profile: Profile) -> None:
    from .packs import pack_info

    info = pack_info(profile.pack)
    stored = info["backbone"]["model"]
    lines = []
    if stored.partition(".")[0] != profile.backbone.model.partition(".")[0]:
        lines.append(f"backbone.model = {profile.backbone.model!r}: pack {profile.pack!r} holds features of {stored!r}")
    wanted = {"train", "test", *profile.ood} | ({"val"} if not isinstance(profile.val, Holdout) else set())
    missing = sorted(wanted - set(info["sets"]))
    if missing:
        lines.append(f"pack = {profile.pack!r}: it has no {', '.join(missing)}; it has {', '.join(info['sets'])}")
    if lines:
        raise ProfileError(f"profile {profile.name!r} cannot be used", lines)


def _check_backbone(profile: Profile) -> None:
    model = profile.backbone.model
    ours = (DIGITS_VIT, "torchvision/vit_b_16")
    if model in ours or model.startswith(("hf-hub:", "hf_hub:", "local-dir:")):
        return
    import difflib

    import timm

    if not timm.is_model(model.partition(".")[0]):
        close = difflib.get_close_matches(model.partition(".")[0], timm.list_models(), n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(close)}?" if close else "timm.list_models() lists them"
        raise ProfileError(
            f"profile {profile.name!r} cannot be used",
            [f"backbone.model = {model!r}: no timm model (nor {' or '.join(ours)}); {hint}"],
        )


def _file_digest(path: Path) -> str:
    from .store import file_record

    return file_record(path)["sha256"]


def _save_frame(frame: pd.DataFrame, folder: Path) -> None:
    frame.to_parquet(folder / "frame.parquet", index=False)


def _load_frame(folder: Path) -> pd.DataFrame:
    return pd.read_parquet(folder / "frame.parquet")
