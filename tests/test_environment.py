"""The three descriptions of the environment say the same, and the README's commands exist."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]


def pins() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==\S+", line) for line in lines)
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}


def requirements() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    return [Requirement(r) for r in [*project["dependencies"], *extras["book"], *extras["test"]]]


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_every_requirement_is_pinned_inside_its_range(requirement):
    pinned = pins()
    assert canonicalize_name(requirement.name) in pinned
    assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)])


def test_environment_yml_and_make_install_the_same_under_the_same_constraints():
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    pip = next(entry["pip"] for entry in conda if isinstance(entry, dict))
    install = re.search(r"\$\(BIN\)/pip install .*", (ROOT / "Makefile").read_text()).group()
    assert pip == ["-c constraints.txt", "-e .[book,test] --config-settings editable_mode=compat"]
    assert all(part in install.replace("'", "") for part in pip)
    python = next(entry for entry in conda if isinstance(entry, str) and entry.startswith("python="))
    assert python == "python=3.11"


def test_the_running_environment_is_the_pinned_one():
    """Only where make made it: elsewhere ranges of pyproject.toml hold, not pins."""
    if not (ROOT / ".venv" / ".installed").exists() or Path(sys.prefix).resolve() != (ROOT / ".venv").resolve():
        pytest.skip("not running in the .venv that make installs")
    from importlib.metadata import version

    found = {r.name: version(r.name) for r in requirements()}
    assert found == {name: pins()[canonicalize_name(name)] for name in found}


def test_the_version_is_one():
    import capsae

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert capsae.__version__ == project["version"] == citation["version"]
    done = subprocess.run([sys.executable, "-m", "capsae", "--version"], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == f"capsae {project['version']}\n"


def test_commits_are_checked_by_the_ruff_that_is_pinned():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [one["rev"] for one in hooks] == [f"v{pins()['ruff']}"]


def test_import_is_light():
    heavy = ["timm", "torchvision", "datasets", "pydantic", "matplotlib", "papermill", "jupyter_book", "numba", "torch"]
    code = f"import capsae, sys; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_import_works_above_a_clone_named_capsae(tmp_path):
    """There the clone's folder must not pass for the package."""
    import capsae

    if Path(capsae.__file__).resolve() != (ROOT / "capsae" / "__init__.py"):
        pytest.skip("another capsae is installed")
    (tmp_path / "capsae").symlink_to(ROOT)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    code = "import capsae; print(capsae.load_experiment('imagenet20').name)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.stdout.strip() == "imagenet20", done.stderr


def test_public_names():
    import capsae

    assert callable(capsae.evaluate) and callable(capsae.load_experiment) and callable(capsae.detectors.create)
    for name in capsae.__all__:
        assert getattr(capsae, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = capsae.nothing


def test_readme_commands_exist():
    """Every `make` target and `capsae` command that the README names is there."""
    readme = (ROOT / "README.md").read_text()
    targets = set(re.findall(r"^make ([\w-]+)", readme, re.M))
    assert {"reproduce", "reproduce-all", "test"} <= targets
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{target}:", makefile, re.M) for target in targets)
    help_text = subprocess.run([sys.executable, "-m", "capsae", "--help"], capture_output=True, text=True).stdout
    commands = set(re.findall(r"^capsae (\w+)", readme, re.M))
    assert commands and all(re.search(rf"^\s+(capsae )?{command}\b", help_text, re.M) for command in commands)


@pytest.mark.parametrize("name", ["imagenet20", "imagenet20-augreg", "mini80", "mini80-augreg"])
def test_sae_recipe_is_the_best_of_its_grid(name):
    """Lowest mean held-out FVU among recipes that keep the share of dead latents under the script's limit."""
    import pandas as pd

    import capsae
    from benchmarks.sae_recipe_grid import MAX_DEAD

    grid = pd.read_csv(ROOT / "benchmarks" / "results" / "sae_recipe_grid.csv")
    recipe = ["batch", "lr", "epochs", "decay"]
    means = grid[grid.experiment == name].groupby(recipe)[["held_out_fvu", "dead_fraction"]].mean().reset_index()
    best = means[means.dead_fraction <= MAX_DEAD].nsmallest(1, "held_out_fvu").iloc[0]
    sae = capsae.load_experiment(name).sae
    assert (sae.batch_size, sae.lr, sae.epochs, sae.decay) == tuple(best[recipe])


@pytest.mark.slow
def test_readme_example_runs(tmp_path, monkeypatch):
    """The Python blocks are executed as they stand, one after the other; the table holds every method."""
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S):
        exec(compile(block, "README.md", "exec"), names)
    assert names["sae"].config.variant == "matryoshka" and len(names["codes"]) == len(names["test"])
    assert {"epd", "rpd", "mds++", "energy", "head"} == set(names["table"].method)
    assert (names["score"] >= 0).all() and len(names["score"]) == len(names["test"])
