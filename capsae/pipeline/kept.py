"""Which of the stored artefacts today's settings and code ask for: what `capsae store list` and `clean` go by."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .. import detectors
from .experiments import available
from .run import Run
from .store import Entry, Store


def used(store: Store, entries: Iterable[Entry]) -> list[bool | None]:
    """Whether each artefact is what its experiment's settings and today's code ask for; None: that cannot be known.

    Judged are the stages of a :class:`Run`, with the experiment's own settings. Nothing is known of an experiment
    that is not among :func:`capsae.pipeline.experiments.available`, nor where its images are not here.
    """
    runs: dict[str | None, Run | None] = {}
    found: list[bool | None] = []
    for entry in entries:
        name, now = entry.provenance.get("experiment"), None
        try:
            if name not in runs:
                runs[name] = None
                runs[name] = Run(name, store=store, progress=False) if name in available() else None
            now = _digests(runs[name], entry.stage, entry.provenance["config"]) if runs[name] else None
        except (ValueError, OSError):  # the images, or the experiment's file, are not what they were
            pass
        found.append(None if now is None else entry.provenance["digest"] in now)
    return found


def _digests(run: Run, stage: str, config: Any) -> set[str] | None:
    """The digests that a stage's artefacts have today; None for a stage that is not of a run."""
    if stage == "features":
        return {run.inputs.digest(name, whole=True) for name in run.experiment.sets}
    if stage in ("head", "sae", "caps"):
        return {run.digest(stage)}
    if stage in ("table", "scores"):  # one for every choice of detectors: that of the artefact is looked at
        known = [name for name in config["detectors"] if name in detectors.available()]
        return {run.digest(stage, known)} if len(known) == len(config["detectors"]) else set()
    return None
