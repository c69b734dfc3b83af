"""The zoo's artefacts: each fit, its measures, the stability of a member over seeds. Content-addressed, so that a
killed run goes on where it stood, and a change of one variant makes that variant's anew and no other's."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from capsae.pipeline.code import digest as code_digest
from capsae.pipeline.run import Run
from capsae.pipeline.store import artefact_digest
from capsae.sae.dictionaries import methods as dictionaries
from capsae.sae.model import SparseCoder, TopKSAE

from . import measure
from .fitting import fit_code, fit_run, member, settings


@dataclass(frozen=True)
class Task:
    """One artefact: kind "fit", "measure" or "stability" (of all `seeds`)."""

    kind: str
    experiment: str
    member: str
    lr: float | None
    seeds: tuple[int, ...]

    def __str__(self) -> str:
        rate = "" if self.lr is None else f" lr {self.lr:g}"
        return f"{self.kind} {Path(self.experiment).stem} {self.member}{rate} seed {','.join(map(str, self.seeds))}"


def perform(run: Run, task: Task) -> pd.DataFrame:
    """Make an artefact, or read it: for a fit its record (one row), else a table of `measure`'s columns."""
    if task.kind == "fit":
        return pd.DataFrame([fitted(run, task.member, task.lr, task.seeds[0])[1]])

    def make():
        models, records = zip(*(fitted(run, task.member, task.lr, seed) for seed in task.seeds), strict=True)
        if task.kind == "stability":
            return measure.stability(models)
        took = {(n, "train"): records[0][n] for n in ("train_cpu_s", "train_wall_s", "best_epoch") if n in records[0]}
        return pd.concat([measure.tidy(took), measure.measure(run, models[0])], ignore_index=True)

    return run.store.get_or_make(
        *recipe(run, task),
        make,
        save=lambda table, folder: table.to_parquet(folder / "table.parquet", index=False),
        load=lambda folder: pd.read_parquet(folder / "table.parquet"),
        provenance={"experiment": run.experiment.name},
    )


def fitted(run: Run, name: str, lr: float | None, seed: int) -> tuple[SparseCoder | None, dict]:
    """A fitted member and its record, from the store or made; no model where the training diverged.

    It is fitted on training rows; validation rows choose its epoch. No other set is read.
    """
    stage, config, inputs, code = _recipe(run, name, lr, seed)

    def make():
        try:
            return fit_run(name, run, seed, lr)
        except FloatingPointError as error:
            return None, {"held_out_fvu": np.nan, "held_out_l0": np.nan, "diverged": str(error)}

    def save(value, folder: Path):
        model, record = value
        if model is not None:
            model.save(folder)
        (folder / "record.json").write_text(json.dumps(record) + "\n", encoding="utf-8")

    def load(folder: Path):
        record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
        if "diverged" in record:
            return None, record
        return (TopKSAE.load if member(name).trained else dictionaries.load)(folder), record

    return run.store.get_or_make(stage, config, inputs, code, make, save, load, {"experiment": run.experiment.name})


def _recipe(run: Run, name: str, lr: float | None, seed: int):
    shared = asdict(settings(run.experiment)) | {"lr": lr, "seed": seed}
    shared |= {"train_fraction": run.experiment.train_fraction}
    inputs = {one: run.inputs.digest(one) for one in ("train", "val")}
    return "zoo-fit", {"member": name, **shared}, inputs, fit_code(name)


def recipe(run: Run, task: Task) -> tuple:
    """Stage, settings, inputs and code of a task's artefact, as `store.artefact_digest` takes them."""
    if task.kind == "fit":
        return _recipe(run, task.member, task.lr, task.seeds[0])
    fits = {str(seed): artefact_digest(*_recipe(run, task.member, task.lr, seed)) for seed in task.seeds}
    if task.kind == "stability":
        return "zoo-stability", {}, fits, code_digest(measure.stability)
    inputs = {name: run.inputs.digest(name) for name in run.experiment.sets}
    inputs |= {"fit": fits[str(task.seeds[0])], "head": run.digest("head")}
    options = {name: run.detector_options(name) for name in measure.METHODS}
    config = {"n_boot": measure.N_BOOT, "detectors": options, "seed": run.experiment.seed}
    return "zoo-measures", config, inputs, code_digest(measure.measure)


def seconds(run: Run, task: Task) -> float:
    """Wall time in which a stored artefact was made, in whatever call; 0 where it is not stored."""
    stage, *rest = recipe(run, task)
    return (run.store.provenance(stage, artefact_digest(stage, *rest)) or {"wall_s": 0.0})["wall_s"]


def code_digests(names: Iterable[str]) -> dict:
    """Digests of the code that the tables hang on: of each member's fit, of the measures, of the stability."""
    of_measures = {"measures": code_digest(measure.measure)[:20], "stability": code_digest(measure.stability)[:20]}
    return {"fit": {name: fit_code(name)[:20] for name in names}} | of_measures
