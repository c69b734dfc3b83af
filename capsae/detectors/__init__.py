"""Out-of-distribution detectors: ``create(name, **options).fit(obs_train).score(obs)``, higher = more OOD.

To add one, subclass :class:`Detector` in the module of its kind and decorate it with :func:`register`.
"""

from __future__ import annotations

from .base import Detector, available, create, info, register, score_all
from .observations import Observations

from . import epd  # noqa: F401  # isort: skip  (the paper's score and its controls first in every table)
from . import rpd  # noqa: F401  # isort: skip
from .baselines import activations, distances, geometry, logits, subspaces, pixels  # noqa: F401  # isort: skip

OURS = "rpd"  # this project's own score that reads codes alone; RPD+ needs the features as well

__all__ = ["OURS", "Detector", "Observations", "available", "create", "info", "register", "score_all"]
