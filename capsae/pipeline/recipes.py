"""What defines each artefact of a run: settings, digests of what it is made from, and the digest of its code."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict

from ..sae.dictionaries import methods as dictionaries
from ..sae.variants import thresholds as variants
from .code import digest
from .experiments import Experiment
from .inputs import Inputs

# Methods of Run (by name: it imports this module) that make a stage; what they take from other stages is an input.
_MADE_BY = {
    "head": ("features", "head"),
    "sae": ("features", "_trained", "_training"),
    "caps": ("features", "caps"),
    "scores": ("features", "observations", "detectors", "scores_of_seeds", "_bundles", "seeds"),
}
_MADE_BY["table"] = (*_MADE_BY["scores"], "table")


def needs_head(experiment: Experiment) -> bool:
    """Whether the SAE's variant chooses latents by a head's weights."""
    return getattr(variants.model(experiment.sae), "needs_head", False)


def code(experiment: Experiment, stage: str) -> str:
    """Digest of a stage's code: its methods with all that they name; of the variants, the one that is trained."""
    made_by = [f"capsae.pipeline.run:Run.{name}" for name in _MADE_BY[stage]]
    if stage == "head" and experiment.head == "backbone":
        made_by.append(Inputs.backbone_head)
    if stage != "sae":
        return digest(*made_by)
    if needs_head(experiment):
        made_by += ["capsae.pipeline.run:Run._head_of_normalized", "capsae.pipeline.run:Run.untrained"]
    without = ((variants, "REGISTRY"), (dictionaries, "METHODS"))
    return digest(*made_by, variants.model(experiment.sae), without=without)


def recipe(run, stage: str, names: Iterable[str] | None = None) -> tuple[dict, dict[str, str]]:
    """Return a stage's own settings and the digests of what it is made from; ValueError for an unknown stage."""
    experiment, of = run.experiment, run.inputs.digest
    amount = {"train_fraction": experiment.train_fraction, "seed": experiment.seed}
    if stage == "head":
        config = {"head": experiment.head, "n_classes": experiment.n_classes, "seed": experiment.seed}
        return config, {"train": of("train")}
    if stage == "sae":
        own_head = {"n_classes": experiment.n_classes} if needs_head(experiment) else {}
        config = {"sae": asdict(experiment.sae), "keep": "best", **amount, **own_head}
        return config, {"train": of("train"), "val": of("val")}
    if stage == "caps":
        inputs = {"train": of("train"), "sae": run.digest("sae")}
        if experiment.caps.correct_only:
            inputs["head"] = run.digest("head")
        return {"correct_only": experiment.caps.correct_only, "n_classes": experiment.n_classes, **amount}, inputs
    if stage in ("table", "scores"):
        options = {name: run.detector_options(name) for name in run.chosen(names)}
        config = {"detectors": options, "predicted": experiment.predicted, "sae_seeds": experiment.sae_seeds}
        inputs = {name: of(name) for name in experiment.sets}
        inputs |= {"head": run.digest("head"), "sae": run.digest("sae")}
        return config | amount | ({"n_boot": experiment.n_boot} if stage == "table" else {}), inputs
    raise ValueError(f"no stage {stage!r}; there are features, head, sae, caps, scores, table")
