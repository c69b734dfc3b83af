"""The order of the house: who may import whom, how long a file may be, how much may lie in the package's root."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# The road from image to score, each part knowing only those before it (README, "How the code is laid out").
ROAD = (
    *("files", "device", "distributed", "data", "features", "sae", "caps", "metrics", "bootstrap", "stats"),
    *("detectors", "evaluation", "latents", "pipeline", "cli", "__main__"),
)
LONGEST = 400


def _modules() -> dict[str, Path]:
    found = {}
    for package in ("capsae", "companion"):
        for file in (ROOT / package).rglob("*.py"):
            name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = file
    return found


MODULES = _modules()


def imports(name: str) -> set[str]:
    """Modules of ours that a module imports anywhere in it, also inside functions."""
    file = MODULES[name]
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            inside = {f"{base}.{alias.name}" for alias in node.names}
            found |= {each if each in MODULES else base for each in inside}
    return {each for each in found if each in MODULES and each != name}


GRAPH = {name: imports(name) for name in MODULES}


def test_the_library_does_not_know_the_book():
    assert not {
        (name, of) for name, known in GRAPH.items() if name.startswith("capsae") for of in known if "companion" in of
    }


def test_no_import_circle():
    try:
        TopologicalSorter(GRAPH).prepare()
    except CycleError as error:
        pytest.fail(f"import circle: {' -> '.join(error.args[1])}")


def test_no_part_imports_one_further_down_the_road():
    def place(name):
        return ROAD.index(name.split(".")[1])

    parts = {name: known for name, known in GRAPH.items() if name.startswith("capsae.")}
    assert {name.split(".")[1] for name in parts} == set(ROAD)
    assert not {(n, of) for n, known in parts.items() for of in known if of != "capsae" and place(of) > place(n)}


@pytest.mark.parametrize("name", MODULES)
def test_no_file_is_too_long(name):
    lines = MODULES[name].read_text(encoding="utf-8").count("\n")
    assert lines <= LONGEST, f"{name} has {lines} lines: split it where it holds two ideas"


def test_the_root_of_the_package_fits_on_a_screen():
    entries = [path.name for path in (ROOT / "capsae").iterdir() if path.name != "__pycache__"]
    assert len(entries) <= 20, entries
