"""Class activation profiles of sparse autoencoders, for out-of-distribution detection.

A companion to "Sparsity as a Key" (arXiv 2604.26409). The road is
images -> CLS features -> sparse codes -> class activation profiles -> scores; each arrow is one module or folder.
"""

from __future__ import annotations

from importlib import import_module

# Every public name loads on first use, so that `capsae --help` does not wait for torch: {name: its module}.
_PUBLIC = {
    "ClassActivationProfiles": "caps",
    "FeatureSet": "features.featureset",
    "LinearHead": "features.featureset",
    "Observations": "detectors",
    "Experiment": "pipeline.experiments",
    "Run": "pipeline.run",
    "SAEConfig": "sae",
    "Scorer": "pipeline.own_images",
    "SparseCodes": "sae",
    "TopKSAE": "sae",
    "compare": "evaluation.evaluate",
    "energy_profile_divergence": "caps",
    "evaluate": "evaluation.evaluate",
    "load_features": "pipeline.run",
    "load_experiment": "pipeline.experiments",
    "observe_module": "detectors.hooks",
    "train_sae": "sae",
    "train_saes": "sae",
}
_MODULES = ("caps", "detectors", "metrics", "sae")

__all__ = [*_PUBLIC, "detectors", "metrics"]


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
