"""The latents of a run: its classes by readable names, and what each latent is named after them."""

from __future__ import annotations

from ..latents.explain import plain_name
from ..latents.naming import FILL, HOLD, Named, name_latents, taxonomy_of


def class_names(run) -> list[str]:
    """Readable names of the experiment's classes: ``n02086240_Shih-Tzu`` -> ``Shih-Tzu``."""
    n_classes = run.experiment.n_classes
    names = run.features("test").class_names or run.features("train").class_names
    if len(names) != n_classes:
        return [f"class {c}" for c in range(n_classes)]
    return [plain_name(name) for name in names]


def of_run(run, hold: float = HOLD, fill: float = FILL) -> Named:
    """The latents of a run's SAE, named from its training rows."""

    taxonomy = taxonomy_of(run.features("train").class_names)
    return name_latents(run.caps, class_names(run), taxonomy, hold, fill)
