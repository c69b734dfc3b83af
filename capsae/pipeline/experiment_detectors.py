"""What an experiment says of detectors, against the detectors that there are."""

from __future__ import annotations

from .. import detectors as _detectors
from .experiment_errors import ExperimentError
from .experiments import Experiment


def check_detectors(experiment: Experiment) -> None:
    """Raise ExperimentError if ``[detectors.NAME]`` names what no detector has."""
    lines = []
    for name, options in experiment.detectors.items():
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
        raise ExperimentError(f"experiment {experiment.name!r} cannot be used", lines)
