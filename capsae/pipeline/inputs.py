"""What an experiment starts from: its images, its backbone, and their features, split into train and validation."""

from __future__ import annotations

import difflib
import logging
from pathlib import Path
from typing import Any

import numpy as np

from ..data.open import by_name, open_source
from ..data.splits import check_classes, holdout_mask
from ..features.copies import check_copies
from ..features.featureset import FeatureSet, LinearHead
from ..files import file_record
from .code import digest as code_digest
from .experiment_errors import ExperimentError
from .experiment_parts import Holdout
from .experiments import Experiment
from .packs import load_pack, pack_info
from .store import Store, artefact_digest

log = logging.getLogger(__name__)

DIGITS_VIT = "capsae/digits_vit"


class Inputs:
    """Features of an experiment's sets, from its pack or by extraction, before any head.

    ``who`` goes into the provenance of what is stored. ExperimentError for a pack that does not fit the experiment, a
    missing file or an unknown backbone.
    """

    def __init__(self, experiment: Experiment, store: Store, device: str, progress: bool, who: dict[str, Any]):
        self.experiment, self.store, self.device, self.progress, self.who = experiment, store, device, progress, who
        self.holdout = experiment.val if isinstance(experiment.val, Holdout) else None
        # Further options of capsae.features.extract.extract, such as batch_size.
        self.extraction = {"dtype": experiment.backbone.dtype} if experiment.backbone.dtype else {}
        self._parts: dict[str, FeatureSet] = {}
        self._sources: dict[str, Any] = {}
        if experiment.pack:
            check_pack(experiment)
        else:
            experiment.check_files()
            check_backbone(experiment)

    def features(self, set_name: str) -> FeatureSet:
        """Return features as extracted, after the split into train and val; logits are the backbone's or None."""
        if set_name not in self._parts:
            before = set(self._parts)
            if self.holdout and set_name in ("train", "val"):
                whole = self._whole("train")
                held_out = holdout_mask(whole.labels, self.holdout.fraction, self.holdout.seed)
                self._parts |= {"train": whole.take(~held_out), "val": whole.take(held_out)}
            else:
                self._parts[set_name] = self._whole(set_name)
            for new in [name for name in self._parts if name not in before]:
                for line in check_copies(new, self._parts, f"experiment {self.experiment.name!r}"):
                    log.warning("experiment %r, %s", self.experiment.name, line)
        return self._parts[set_name]

    def digest(self, set_name: str, whole: bool = False) -> str:
        """Return what :meth:`features` follows from (``whole``: before the split), as a digest; nothing is read."""
        if whole:
            return self._whole_digest("train" if self.holdout and set_name == "val" else set_name)
        if self.holdout and set_name in ("train", "val"):
            split, whole = self.holdout.model_dump(), self._whole_digest("train")
            return artefact_digest(f"split-{set_name}", split, {"whole": whole}, code_digest(Inputs.features))
        return self._whole_digest(set_name)

    @property
    def has_pixels(self) -> bool:
        """Whether the statistics of the images themselves are known; nothing is read but the pack's description."""
        return not self.experiment.pack or bool(pack_info(self.experiment.pack).get("pixel_statistics"))

    def source(self, set_name: str):
        """Return a set's images (an ImageSource), before the split: "val" gives those it is held out of.

        Labels are checked here, so that a class without training samples stops a run before the first extraction.
        """
        own = "train" if set_name == "val" and self.holdout else set_name
        if own not in self._sources:
            self.experiment.check_files([own])
            self._sources[own] = self._with_classes(own, open_source(self.experiment.source_spec(own)))
        return self._sources[own]

    def backbone_settings(self, checkpoint: str | Path | None = None) -> dict[str, Any]:
        """Return what ``load_backbone`` takes, with the weights of ``checkpoint`` if it is given."""
        settings = self.experiment.backbone.model_dump(exclude_none=True, exclude={"dtype"})
        if checkpoint is not None:
            settings["checkpoint"] = str(checkpoint)
        elif "checkpoint" in settings:
            settings["checkpoint"] = str(self.experiment.resolve(settings["checkpoint"]))
        elif settings["model"] == DIGITS_VIT:
            settings["checkpoint"] = str(self._digits_vit())
        return settings

    def backbone_head(self) -> LinearHead:
        """Return the backbone's own classifier as weight and bias, checked against the number of classes."""
        from ..features.backbone import load_backbone

        experiment = self.experiment
        classifier = load_backbone(self.backbone_settings()).net.get_classifier()
        if not hasattr(classifier, "weight"):
            why = f"head = 'backbone': {experiment.backbone.model} has no linear head; use head = 'probe'"
            raise ExperimentError(f"experiment {experiment.name!r} cannot be used", [why])
        weight, bias = classifier.weight.detach().numpy(), classifier.bias
        if len(weight) != experiment.n_classes:
            why = f"n_classes = {experiment.n_classes}: the backbone's head has {len(weight)}; use head = 'probe'"
            raise ExperimentError(f"experiment {experiment.name!r} cannot be used", [why])
        return LinearHead(weight, np.zeros(len(weight), np.float32) if bias is None else bias.detach().numpy())

    def _whole(self, set_name: str) -> FeatureSet:
        if self._packed(set_name):
            features = load_pack(self.experiment.pack, set_name)
        else:
            features = self._extracted(set_name)
        return self._with_classes(set_name, features)  # again: bad images may have taken a class's last sample

    def _packed(self, set_name: str) -> bool:
        """Whether the experiment's pack stands in for this set's images; a set that it lacks is extracted from them."""
        return bool(self.experiment.pack) and set_name in pack_info(self.experiment.pack)["sets"]

    def _with_classes(self, set_name: str, labelled):
        """A source or feature set whose labels count along the classes of train; ValueError if they cannot."""
        what, train = f"experiment {self.experiment.name!r}, {set_name}", set_name == "train"
        if len(labelled) == 0:
            raise ValueError(f"{what}: the set holds no images")
        if set_name in self.experiment.ood:
            return labelled
        of_pack = self._packed(set_name) and isinstance(labelled, FeatureSet)
        # One image of a pack's set is shown without a look at those of train.
        if not train and (of_pack or not self.experiment.pack or "train" in self._sources):
            names = (self.features if of_pack else self.source)("train").class_names
            labelled = by_name(labelled, names, what)
        known = labelled.labels >= 0
        if train and known.any() and not known.all():
            first = labelled.ids[~known][0]
            log.warning("%s: %d images have no class and are left out, the first is %s", what, (~known).sum(), first)
            labelled, known = labelled.take(known), known[known]
        labels = labelled.labels if train else labelled.labels[known]
        check_classes(labels, self.experiment.n_classes, what, train, labelled.class_names)
        return labelled

    def _extracted(self, set_name: str) -> FeatureSet:
        from ..features.backbone import load_weights

        if not self._packed("train"):
            self.source("train")  # labels that do not fit stop the run before the first extraction
        config, inputs = self._recipe(set_name)

        def make():
            from ..features.extract import extract

            shards = self.store.scratch("features", artefact_digest("features", config, inputs, reading_code()))
            source, backbone = self.source(set_name), self.backbone_settings() | self._own_crop(set_name)
            if backbone.get("checkpoint") or backbone.get("pretrained"):
                backbone = load_weights(backbone)
            given = {"device": self.device, "name": set_name, "progress": self.progress}
            return extract(source, backbone, shards, **given, **self.extraction)

        return self.store.get_or_make(
            "features",
            config,
            inputs,
            reading_code(),
            make,
            save=lambda features, folder: features.save(folder / "features.safetensors"),
            load=lambda folder: FeatureSet.load(folder / "features.safetensors"),
            provenance=self.who,
        )

    def _whole_digest(self, set_name: str) -> str:
        if self._packed(set_name):
            return pack_info(self.experiment.pack)["sets"][set_name]["sha256"]
        return artefact_digest("features", *self._recipe(set_name), reading_code())

    def _recipe(self, set_name: str) -> tuple[dict, dict[str, str]]:
        from ..features.extract import EXTRACTOR

        backbone = self.experiment.backbone
        inputs = {"source": self.source(set_name).digest()}
        if backbone.checkpoint:
            inputs["weights"] = file_record(self.experiment.resolve(backbone.checkpoint))["sha256"]
        elif backbone.model == DIGITS_VIT:
            from ..features.tinyvit import WEIGHTS, is_embedded

            embedded = is_embedded(self.experiment.seed, self._trained_on())
            trained = artefact_digest("backbone", *self._recipe_digits_vit())
            inputs["weights"] = file_record(WEIGHTS)["sha256"] if embedded else trained
        left_out = {"checkpoint"} if backbone.dtype else {"checkpoint", "dtype"}
        settings = backbone.model_dump(mode="json", exclude=left_out) | self._own_crop(set_name)
        return {"backbone": settings, "set": set_name, "extractor": EXTRACTOR}, inputs

    def _own_crop(self, set_name: str) -> dict[str, float]:
        own = "train" if set_name == "val" and self.holdout else set_name
        crop = self.experiment.source(own).crop
        return {} if crop is None else {"crop": crop}

    def train_backbone(self):
        """Train the small ViT from pixels, on the experiment's own training images; returns a DigitsViT and these."""
        from ..features.tinyvit import train_digits_vit

        if self.experiment.backbone.model != DIGITS_VIT:
            why = f"backbone.model = {self.experiment.backbone.model!r}: only {DIGITS_VIT!r} is trained here"
            raise ExperimentError(f"experiment {self.experiment.name!r} cannot be used", [why])
        source = self._trained_on()
        return train_digits_vit(source, self.experiment.seed, self.device, progress=self.progress), source

    def _digits_vit(self) -> Path:
        """Return the weights of the small ViT: the embedded ones, or trained for another seed or other images."""
        from ..features.tinyvit import WEIGHTS, is_embedded

        if is_embedded(self.experiment.seed, self._trained_on()):
            return WEIGHTS

        def make():
            return self.train_backbone()[0]

        def save(trained, folder):
            trained.save(folder / "weights.safetensors")
            trained.history.to_csv(folder / "history.csv", index=False)

        recipe = self._recipe_digits_vit()
        self.store.get_or_make("backbone", *recipe, make, save, lambda folder: folder, self.who)
        return self.store.path("backbone", artefact_digest("backbone", *recipe)) / "weights.safetensors"

    def _recipe_digits_vit(self) -> tuple[dict, dict[str, str], str]:
        config = {"model": DIGITS_VIT, "seed": self.experiment.seed}
        made_by = code_digest(Inputs._digits_vit, Inputs._trained_on)
        return config, {"train": self._trained_on().digest()}, made_by

    def _trained_on(self):
        """Training images without the held-out ones: the backbone must not have seen what chooses a threshold."""
        source = self.source("train")
        if not self.holdout:
            return source
        return source.take(~holdout_mask(source.labels, self.holdout.fraction, self.holdout.seed))


def reading_code() -> str:
    """Digest of the code that features hang on, what reads images and the backbone; the extractor has a number."""
    from ..data import images
    from ..features import backbone

    return code_digest(backbone, images)


def check_pack(experiment: Experiment) -> None:
    """Raise ExperimentError unless the experiment's pack holds its sets, made by its backbone."""
    info = pack_info(experiment.pack)
    lines = []
    for key in ("model", "pooling", "crop"):
        stored, wanted = info["backbone"].get(key), getattr(experiment.backbone, key)
        same = _architecture(stored) == _architecture(wanted) if key == "model" else stored == wanted
        if None not in (stored, wanted) and not same:
            lines.append(f"backbone.{key} = {wanted!r}: pack {experiment.pack!r} holds features made with {stored!r}")
    missing = sorted(
        set(experiment.sets) - set(info["sets"]) - ({"val"} if isinstance(experiment.val, Holdout) else set())
    )
    for name in missing:
        try:
            gone = experiment.missing_files([name])
        except ExperimentError as error:
            gone = error.lines
        if gone or "/" not in name:
            lines += [f"pack = {experiment.pack!r}: it has no {name}; it has {', '.join(info['sets'])}", *gone]
    if lines:
        raise ExperimentError(f"experiment {experiment.name!r} cannot be used", lines)


def _architecture(model: str) -> str:
    """``deit_tiny_patch16_224`` of ``deit_tiny_patch16_224.fb_in1k``: a checkpoint file is known by the former only."""
    return model.partition(".")[0]


def check_backbone(experiment: Experiment) -> None:
    """Raise ExperimentError, with the nearest names, if nothing here or in timm is called ``backbone.model``."""
    model = experiment.backbone.model
    family, _, rest = model.rpartition("/")
    if model == DIGITS_VIT or family.startswith(("hf-hub:", "hf_hub:", "local-dir:")):
        return
    if family == "torchvision":
        from ..features.convert import TIMM_NAMES

        known = [f"torchvision/{name}" for name in TIMM_NAMES]
    else:
        import timm

        if not family and timm.is_model(_architecture(rest)):
            return
        known = timm.list_models()
    if model in known:
        return
    close = difflib.get_close_matches(_architecture(model), known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else "timm.list_models() lists timm's"
    ours = f"no timm model, nor {DIGITS_VIT} or torchvision/vit_b_16"
    raise ExperimentError(
        f"experiment {experiment.name!r} cannot be used", [f"backbone.model = {model!r}: {ours}; {hint}"]
    )
