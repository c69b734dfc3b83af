"""The pages of the book that are executed notebooks: which there are, their parameters, the sweeps of the ablations."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

BOOK_EXPERIMENTS = ("imagenet20", "imagenet20-augreg", "mini80", "mini80-augreg", "digits")
SWEPT = "imagenet20"
TUNED = ("imagenet20", "mini80")  # digits has too few rows a class to play OOD with
ABLATIONS = ("05_ablation", "06_sweep")
MAIN = ("01_features", "02_train_sae", "03_discover_caps", "04_score_ood", *ABLATIONS)
"""The paper's story: what ``capsae reproduce --main`` executes."""
# Notebooks on other dictionaries and on what latents hold, with the experiments that each is executed for.
ANALYSES: dict[str, tuple[str, ...]] = {
    "08_zoo": ("imagenet20",),
    "09_dark_matter": ("imagenet20", "mini80"),
    "10_ontology": ("imagenet20", "mini80"),
    "11_shift": ("imagenet20",),
    "12_causal": ("imagenet20",),
    "13_meaning": ("imagenet20", "digits"),
    "14_layers": ("imagenet20", "digits"),
    "15_rows_per_latent": ("imagenet20",),
}
# Tables that take hours or images to make, made by commands of their own and committed; and the description of a pack.
READS = {
    "08_zoo": (
        *(f"book/zoo/{name}{end}" for name in TUNED for end in (".csv", ".grid.csv", ".json")),
        "book/zoo/backbones.csv",
    ),
    "11_shift": ("capsae/packs/{experiment}_shift/pack.json",),
    "14_layers": (
        "book/layers/{experiment}.csv",
        "book/layers/{experiment}_against_final.csv",
        "book/layers/{experiment}.json",
    ),
    "15_rows_per_latent": ("book/rows_per_latent/{experiment}.csv",),
}

# Parameters of notebook 05, by the key of the experiment that each overrides.
OVERRIDES = {
    "sae_k": "sae.k",
    "sae_latents": "sae.latents",
    "core_fraction": "caps.core_fraction",
    "normalize": "sae.normalize",
    "correct_only": "caps.correct_only",
    "predicted": "predicted",
    "train_fraction": "train_fraction",
    "seed": "sae.seed",
    "sae_variant": "sae.variant",
}
DIVERGENCES = ("kl", "reverse_kl", "symmetric_kl", "hellinger", "cosine", "euclidean", "spearman")


@dataclass(frozen=True)
class Sweep:
    """One ablation: a parameter of notebook 05 and its settings, ``None`` where the setting is the experiment's own."""

    title: str
    parameter: str
    slug: str  # "k-{:03d}": file names sort as the settings do
    settings: tuple


SWEEPS = {
    "k": Sweep("Active latents per sample, k", "sae_k", "k-{:03d}", (8, 16, 32, 64, 96)),
    "latents": Sweep("Dictionary size, D", "sae_latents", "latents-{:05d}", (384, 960, 1920, 3840)),
    "core": Sweep("Core fraction, p", "core_fraction", "core-{:.2f}", (0.05, 0.1, 0.12, 0.15, 0.2, 0.3, 1.0)),
    "normalize": Sweep("Input normalisation", "normalize", "normalize-{}", ("sample", "l2", "dataset", "none")),
    "divergence": Sweep("Divergence", "divergence", "divergence-{}", DIVERGENCES),
    "predicted": Sweep("Predicted or true class", "predicted", "predicted-{}", ("predicted", "true")),
    "correct": Sweep("Profiles of correct samples only", "correct_only", "correct-{}", (False, True)),
    "train": Sweep("Share of the training data", "train_fraction", "train-{:.2f}", (0.1, 0.25, 0.5, 1.0)),
}


@dataclass(frozen=True)
class Page:
    """One executed notebook of the book; ``name`` is its path under book/runs, without suffix."""

    name: str
    notebook: str
    experiment: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    title: str | None = None  # None: the notebook's own, with the experiment
    after: tuple[str, ...] = ()  # pages whose results it reads
    reads: tuple[str, ...] = ()  # committed files that it reads, of the repository; data of the package are found


@cache
def root() -> Path:
    """The repository: the folder, here or above, that holds notebooks and _toc.yml."""
    for folder in (Path.cwd(), *Path.cwd().parents, *Path(__file__).resolve().parents):
        if (folder / "notebooks" / "01_features.ipynb").is_file() and (folder / "_toc.yml").is_file():
            return folder
    raise FileNotFoundError("no notebooks/ and _toc.yml here or above: run this inside a clone of the repository")


def own_value(parameter: str, experiment: str = SWEPT) -> Any:
    """The experiment's own value of a parameter of notebook 05."""
    if parameter == "divergence":
        return "kl"
    value = _experiment(experiment)
    for key in OVERRIDES[parameter].split("."):
        value = getattr(value, key)
    return value


@cache
def _experiment(name: str):
    from capsae.pipeline.experiments import load_experiment

    return load_experiment(name)


def sweep_pages(sweep: str, experiment: str = SWEPT) -> list[tuple[Any, Page]]:
    """The settings of a sweep with their pages; the experiment's own setting is one page for all sweeps."""
    of = SWEEPS[sweep]
    own, pages = own_value(of.parameter, experiment), []
    settings = of.settings if own in of.settings else sorted({*of.settings, own})
    for setting in settings:
        if setting == own:
            pages.append((setting, base_page(experiment)))
            continue
        name = f"{experiment}/ablation/{of.slug.format(setting)}"
        parameters = {"experiment": experiment, of.parameter: setting}
        pages.append((setting, Page(name, "05_ablation", experiment, parameters, f"{of.title}: {setting}")))
    return pages


def base_page(experiment: str = SWEPT) -> Page:
    """The ablation notebook at the experiment's own settings."""
    name, title = f"{experiment}/ablation/base", "The experiment's own settings"
    return Page(name, "05_ablation", experiment, {"experiment": experiment}, title)


def pages() -> dict[str, Page]:
    """Every page of the book that is an executed notebook, by name."""
    found = [
        Page(f"{experiment}/{notebook}", notebook, experiment, {"experiment": experiment})
        for experiment in BOOK_EXPERIMENTS
        for notebook in ("01_features", "02_train_sae", "03_discover_caps", "04_score_ood")
    ]
    found += [
        Page(f"{experiment}/07_tuning", "07_tuning", experiment, {"experiment": experiment}) for experiment in TUNED
    ]
    for notebook, of in ANALYSES.items():
        for experiment in of:
            reads = tuple(name.format(experiment=experiment) for name in READS.get(notebook, ()))
            found.append(
                Page(f"{experiment}/{notebook}", notebook, experiment, {"experiment": experiment}, reads=reads)
            )
    runs = [page for sweep in SWEEPS for _, page in sweep_pages(sweep)]
    found += runs
    for sweep, of in SWEEPS.items():
        after = tuple(page.name for _, page in sweep_pages(sweep))
        parameters = {"experiment": SWEPT, "sweep": sweep}
        found.append(Page(f"{SWEPT}/ablation/sweep-{sweep}", "06_sweep", SWEPT, parameters, of.title, after))
    everything = tuple(dict.fromkeys(page.name for page in runs))
    overview, title = {"experiment": SWEPT, "sweep": "all"}, "All ablations at a glance"
    found.append(Page(f"{SWEPT}/ablation/overview", "06_sweep", SWEPT, overview, title, everything))
    return {page.name: page for page in found}


# --- parameters


def read_notebook(path: Path) -> dict:
    """A notebook as the plain dict of its JSON."""
    return json.loads(path.read_text(encoding="utf-8"))


def overrides(**parameters: Any) -> dict[str, Any]:
    """Overrides of the experiment for the parameters of notebook 05 that are not None.

    >>> overrides(sae_k=64, seed=None)
    {'sae.k': 64}
    """
    unknown = sorted(set(parameters) - set(OVERRIDES))
    if unknown:
        raise ValueError(f"unknown parameter {unknown[0]!r}: known are {', '.join(OVERRIDES)}")
    return {OVERRIDES[name]: value for name, value in parameters.items() if value is not None}


def few_seeds(experiment: str, seed: int | None = None) -> dict[str, Any]:
    """The override that lets an ablation do with at most five seeds of the SAE; with one if it names the seed."""
    return {"sae_seeds": 1 if seed is not None else min(5, _experiment(experiment).sae_seeds)}


def detector_of(divergence: str | None) -> str:
    """The detector that compares profiles by a divergence; None and "kl" are EPD itself. ValueError if unknown."""
    if divergence not in (None, *DIVERGENCES):
        raise ValueError(f"divergence is {divergence!r}; use one of {', '.join(DIVERGENCES)}")
    return "epd" if divergence in (None, "kl") else divergence


def default_parameters(notebook: Mapping) -> dict[str, Any]:
    """What the cell tagged "parameters" of a notebook (nbformat dict) sets; ValueError if there is none."""
    for cell in notebook["cells"]:
        if "parameters" in cell["metadata"].get("tags", []):
            body = ast.parse("".join(cell["source"])).body
            return {node.targets[0].id: ast.literal_eval(node.value) for node in body if isinstance(node, ast.Assign)}
    raise ValueError("the notebook has no cell tagged 'parameters'")


def check_parameters(notebook: str, parameters: Mapping[str, Any], template: Mapping | None = None) -> dict[str, Any]:
    """Parameters of a notebook with its defaults, checked against the notebook and the experiment before any work
    starts.

    Raises
    ------
    ValueError (ExperimentError)
        Unknown parameter, wrong type, impossible value: with the name, the value and what would do.
    """
    known = default_parameters(template or read_notebook(root() / "notebooks" / f"{notebook}.ipynb"))
    unknown = sorted(set(parameters) - set(known))
    if unknown:
        raise ValueError(f"notebook {notebook} has no parameter {unknown[0]!r}; it has {', '.join(known)}")
    full = known | dict(parameters)
    detector_of(full.get("divergence"))
    if full.get("sweep", "all") not in ("all", *SWEEPS):
        raise ValueError(f"sweep is {full['sweep']!r}; use one of all, {', '.join(SWEEPS)}")
    from capsae.pipeline.experiments import load_experiment

    load_experiment(full["experiment"], overrides(**{name: full[name] for name in OVERRIDES if name in full}))
    return full
