"""Class activation profiles of sparse autoencoders, for out-of-distribution detection.

A companion to "Sparsity as a Key" (arXiv 2604.26409). The road is
images -> CLS features -> sparse codes -> class activation profiles -> scores; each arrow is one module.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType

# Every public name loads on first use, so that `capsae --help` does not wait for torch: {name: its module}.
_PUBLIC = {
    "ClassActivationProfiles": "caps",
    "FeatureSet": "features",
    "LinearHead": "features",
    "Observations": "detectors",
    "Profile": "profiles",
    "Run": "pipeline",
    "SAEConfig": "sae",
    "Scorer": "scoring",
    "SparseCodes": "sae",
    "TopKSAE": "sae",
    "compare": "evaluate",
    "energy_profile_divergence": "caps",
    "evaluate": "evaluate",
    "load_features": "pipeline",
    "load_profile": "profiles",
    "observe_module": "hooks",
    "train_sae": "sae",
    "train_saes": "sae",
}
_MODULES = ("caps", "detectors", "metrics", "sae")

__all__ = [*_PUBLIC, "detectors", "metrics"]


class _Package(ModuleType):
    """The function ``capsae.evaluate`` has the name of its module, which an import of that module must not cover."""

    def __setattr__(self, name: str, value) -> None:
        if isinstance(value, ModuleType) and _PUBLIC.get(name) == name:
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def _version() -> str:
    """Version of the installed package; in a clone that is not installed, that of its pyproject.toml."""
    from importlib import metadata

    try:
        return metadata.version(__name__)
    except metadata.PackageNotFoundError:
        import tomllib
        from pathlib import Path

        return tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]["version"]


def __getattr__(name: str):
    if name == "__version__":
        return _version()
    if name in _MODULES:
        return import_module(f".{name}", __name__)
    if name in _PUBLIC:
        value = getattr(import_module(f".{_PUBLIC[name]}", __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
