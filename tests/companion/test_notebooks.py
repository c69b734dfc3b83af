from __future__ import annotations

import ast
import importlib
import json
import re
from types import ModuleType

import pytest

from companion.publish import plan

NOTEBOOKS = sorted((plan.root() / "notebooks").glob("*.ipynb"))
TINY = """\
extends = "imagenet20"
n_boot = 20
[sae]
latents = 384
k = 16
epochs = 2
"""


def _cells(path, kind="code"):
    return [cell for cell in plan.read_notebook(path)["cells"] if cell["cell_type"] == kind]


def _code(path):
    return "\n".join("".join(cell["source"]) for cell in _cells(path))


def test_the_chapters_are_there():
    assert [path.stem for path in NOTEBOOKS] == [
        "01_features",
        "02_train_sae",
        "03_discover_caps",
        "04_score_ood",
        "05_ablation",
        "06_sweep",
        "07_tuning",
        "08_zoo",
        "09_dark_matter",
        "10_ontology",
        "11_shift",
        "12_causal",
        "13_meaning",
        "14_layers",
        "15_rows_per_latent",
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_hold_no_outputs_and_keep_to_the_house_rules(path):
    notebook = plan.read_notebook(path)
    assert notebook["metadata"]["kernelspec"]["language"] == "python"
    assert "papermill" not in notebook["metadata"] and "capsae" not in notebook["metadata"]
    for cell in _cells(path):
        assert cell["outputs"] == [] and cell["execution_count"] is None
        text = "".join(cell["source"])
        assert len(text.splitlines()) <= 15, text
        nodes = list(ast.walk(ast.parse(text)))
        defined = any(isinstance(n, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef) for n in nodes)
        assert not defined or cell["id"].startswith("scratch-"), text  # the method, built from scratch
    first = "".join(notebook["cells"][0]["source"])
    assert first.startswith("# ") and "**Question.**" in first
    assert sum("".join(cell["source"]).startswith("# ") for cell in _cells(path, "markdown")) == 1
    assert "tidy.provenance(run)" in "".join(notebook["cells"][-1]["source"])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_what_a_notebook_calls_exists(path):
    tree, modules = ast.parse(_code(path)), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in ("capsae", "companion"):
            found = importlib.import_module(node.module)
            for alias in node.names:
                if not hasattr(found, alias.name):  # a module that nobody has imported yet
                    importlib.import_module(f"{node.module}.{alias.name}")
                modules[alias.asname or alias.name] = getattr(found, alias.name)
        elif isinstance(node, ast.Import):
            modules |= {a.asname or a.name: importlib.import_module(a.name) for a in node.names if a.name == "capsae"}
    assert modules
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            of = modules.get(node.value.id)
            assert not isinstance(of, ModuleType) or hasattr(of, node.attr), f"{node.value.id}.{node.attr}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_parameters_are_marked_and_default_to_the_main_experiment(path):
    defaults = plan.default_parameters(plan.read_notebook(path))
    assert defaults["experiment"] == "imagenet20"
    assert plan.check_parameters(path.stem, {}) == defaults


def test_the_ablation_notebook_has_the_parameters_of_the_plan():
    path = next(path for path in NOTEBOOKS if path.stem == "05_ablation")
    defaults = plan.default_parameters(plan.read_notebook(path))
    assert set(defaults) == {"experiment", "divergence", *plan.OVERRIDES}
    assert all(value is None for name, value in defaults.items() if name != "experiment")
    handed_on = re.search(r"plan\.overrides\((.*?)\)", _code(path), re.S)[1]
    assert set(re.findall(r"(\w+)=\1\b", handed_on)) == set(plan.OVERRIDES)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_results_in_words_come_from_code(path):
    """Typed text states no result: percentages stand in it only as the paper's numbers or as names of conventions."""
    allowed = ("95 %", "5 %", "18.8 %")
    for cell in _cells(path, "markdown"):
        if "**Finding**" in "".join(cell["source"]):
            continue  # the yml beside the notebook holds the test of each
        found = re.findall(r"\d+(?:\.\d+)? ?%", "".join(cell["source"]))
        assert set(found) <= set(allowed), found


@pytest.mark.slow
def test_the_ablation_notebook_runs_by_itself(tmp_path, monkeypatch):
    import papermill

    (tmp_path / "tiny.toml").write_text(TINY)
    monkeypatch.setenv("CAPSAE_HOME", str(tmp_path / "store"))
    monkeypatch.setenv("PYTHONPATH", str(plan.root()))
    out = tmp_path / "out.ipynb"
    papermill.execute_notebook(
        plan.root() / "notebooks" / "05_ablation.ipynb", out, {"experiment": str(tmp_path / "tiny.toml"), "sae_k": 8},
        cwd=tmp_path, kernel_name="python3", progress_bar=False,
    )  # fmt: skip
    text = json.dumps(json.loads(out.read_text()))
    assert "application/vnd.capsae.result+json" in text and "'sae.k': 8" in text
    assert "data:text/csv;base64," in text and not (tmp_path / "data").exists()


@pytest.mark.slow
def test_the_ablation_notebook_takes_another_variant(tmp_path, monkeypatch):
    import papermill

    (tmp_path / "tiny.toml").write_text(TINY)
    monkeypatch.setenv("CAPSAE_HOME", str(tmp_path / "store"))
    monkeypatch.setenv("PYTHONPATH", str(plan.root()))
    out = tmp_path / "out.ipynb"
    papermill.execute_notebook(
        plan.root() / "notebooks" / "05_ablation.ipynb", out,
        {"experiment": str(tmp_path / "tiny.toml"), "sae_variant": "matryoshka"},
        cwd=tmp_path, kernel_name="python3", progress_bar=False,
    )  # fmt: skip
    assert "'sae.variant': 'matryoshka'" in json.dumps(json.loads(out.read_text()))
    kinds = [json.loads(cfg.read_text())["kind"] for cfg in (tmp_path / "store").rglob("cfg.json")]
    assert set(kinds) == {"matryoshka"} and len(kinds) == 5


@pytest.mark.slow
def test_a_wrong_value_stops_a_notebook_before_its_work(tmp_path, monkeypatch):
    import papermill

    monkeypatch.setenv("CAPSAE_HOME", str(tmp_path / "store"))
    monkeypatch.setenv("PYTHONPATH", str(plan.root()))
    with pytest.raises(papermill.PapermillExecutionError, match="sae.k"):
        papermill.execute_notebook(
            plan.root() / "notebooks" / "05_ablation.ipynb", tmp_path / "out.ipynb", {"sae_k": 1e3},
            cwd=tmp_path, kernel_name="python3", progress_bar=False,
        )  # fmt: skip
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("path", [path for path in NOTEBOOKS if path.stem >= "09"], ids=lambda p: p.stem)
def test_the_visible_cells_are_the_method_and_a_hidden_one_is_one_line(path):
    for cell in _cells(path):
        lines = "".join(cell["source"]).splitlines()
        if {"hide-input", "remove-cell"} & set(cell["metadata"].get("tags", [])):
            assert len(lines) == 1, lines
        else:
            assert max(map(len, lines)) <= 100 and "figures" not in "".join(lines), lines
