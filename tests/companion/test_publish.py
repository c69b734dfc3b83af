from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from capsae.pipeline import code
from companion import build
from companion.figures import display
from companion.publish import plan, publish, verify

GOOD = """\
import os, sys
from pathlib import Path
print("two", file=sys.stderr)
folder = Path(os.environ["CAPSAE_PAGE_DATA"])
folder.mkdir(parents=True)
(folder / "numbers.csv").write_text("a\\n1\\n")
print(sweep)"""


def _notebook(*sources, parameters='experiment = "imagenet20"\nsweep = "all"', title="# A page\n\nText."):
    def cell(number, kind, text, **metadata):
        made = {"cell_type": kind, "id": f"c{number}", "metadata": metadata, "source": text.splitlines(keepends=True)}
        return made | ({"execution_count": None, "outputs": []} if kind == "code" else {})

    cells = [cell(0, "markdown", title), cell(1, "code", parameters, tags=["parameters"])]
    cells += [cell(2 + i, "code", source) for i, source in enumerate(sources)]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """An empty repository; write(...) sets the notebook that its one page is made of."""
    (tmp_path / "notebooks").mkdir()
    for module in (plan, publish):
        monkeypatch.setattr(module, "root", lambda: tmp_path)
    publish._cached_digest.cache_clear()

    def write(*sources, **kwargs):
        path = tmp_path / "notebooks" / "06_sweep.ipynb"
        path.write_text(json.dumps(_notebook(*sources, **kwargs)), encoding="utf-8")

    write(GOOD)
    return SimpleNamespace(path=tmp_path, write=write)


def _page(**changes):
    given = {"name": "imagenet20/ablation/one", "notebook": "06_sweep", "experiment": "imagenet20"}
    return plan.Page(**given | {"parameters": {"sweep": "k"}} | changes)


def test_a_page_is_published_clean_titled_and_stamped(repository, capfd):
    path = publish.publish(_page(title="Its own title"))
    assert "IPKernelApp" not in capfd.readouterr().err, "the log is for what the pages say"
    assert path == repository.path / "book/runs/imagenet20/ablation/one.ipynb"
    notebook = json.loads(path.read_text())
    assert "".join(notebook["cells"][0]["source"]).startswith("# Its own title\n")
    assert (path.parent / "data" / "one" / "numbers.csv").read_text() == "a\n1\n"
    outputs = [o for c in notebook["cells"] for o in c.get("outputs", [])]
    assert [o["name"] for o in outputs] == ["stdout"] and "".join(outputs[0]["text"]) == "k\n"
    tags = {tuple(c["metadata"]["tags"]) for c in notebook["cells"] if c["metadata"]}
    assert tags == {("parameters", "remove-input"), ("hide-input", "injected-parameters")}
    assert set(notebook["metadata"]) == {"kernelspec", "language_info", "capsae"}
    stamp = notebook["metadata"]["capsae"]
    assert stamp["parameters"] == {"experiment": "imagenet20", "sweep": "k"}
    assert {"experiment", "inputs", "digest", "versions", "results"} <= set(stamp)
    assert [each.name for each in (repository.path / "build").iterdir()] == ["ran"]
    assert verify.ran_here(repository.path, _page().name)


def test_a_second_run_of_the_same_is_the_same_to_the_byte(repository):
    first = publish.publish(_page()).read_bytes()
    assert publish.publish(_page()).read_bytes() == first
    assert str(repository.path).encode() not in first


def test_pages_in_one_kernel_see_nothing_of_each_other(repository):
    look = "import os\nprint(os.path.exists('.'), os.environ['CAPSAE_PAGE_DATA'], 'left' in globals())"
    repository.write(look, "left = 1")

    def made(name, kernel):
        return publish.publish(_page(name=f"digits/{name}"), kernel=kernel).read_text().replace(name, "NAME")

    with publish.SharedKernel() as kernel:
        first = made("one", kernel)
        assert '"True data/NAME False\\n"' in first and '"execution_count": 1' in first
        assert made("two", kernel) == first
        repository.write("import os\nos._exit(1)")
        with pytest.raises(publish.PublishError, match="(?is)digits/three failed.*died"):
            made("three", kernel)
        repository.write(look, "left = 1")
        assert made("four", kernel) == first, "a dead kernel is replaced"


def test_without_a_title_the_page_has_the_notebooks_own_and_its_experiment(repository):
    notebook = json.loads(publish.publish(_page()).read_text())
    assert "".join(notebook["cells"][0]["source"]).splitlines()[0] == "# A page (imagenet20)"


def test_a_failed_notebook_is_not_published_and_the_old_page_stays(repository):
    old = publish.publish(_page()).read_bytes()
    repository.write(GOOD.replace("1", "2"), "raise RuntimeError('it broke')")
    with pytest.raises(publish.PublishError, match="(?s)imagenet20/ablation/one failed.*it broke"):
        publish.publish(_page())
    path = publish.path_of(_page().name)
    assert path.read_bytes() == old
    assert (path.parent / "data" / "one" / "numbers.csv").read_text() == "a\n1\n"
    assert sorted(p.name for p in path.parent.iterdir()) == ["data", "one.ipynb"]


def test_the_command_fails_with_the_notebook(repository, monkeypatch, capfd):
    repository.write("1 / 0")
    monkeypatch.setattr(build, "pages", lambda: {"p": _page(name="p")})
    assert build.main(["run", "p"]) == 1
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_a_dead_kernel_does_not_stop_the_other_pages(repository, monkeypatch, capfd):
    repository.write("import os, signal\nif sweep == 'k':\n    os.kill(os.getpid(), signal.SIGKILL)")
    known = {"a": _page(name="a"), "b": _page(name="b", parameters={"sweep": "core"})}
    monkeypatch.setattr(build, "pages", lambda: known)
    assert build.main(["run", "a", "b"]) == 1
    assert "a failed and is not published: Kernel died" in capfd.readouterr().err
    assert not publish.path_of("a").is_file() and publish.path_of("b").is_file()
    assert [each.name for each in (repository.path / "build").rglob("*")] == ["ran", "b"]


def test_what_the_notebook_recorded_is_kept_with_the_page(repository):
    repository.write("from companion.figures import figures", "figures.result({'auroc': 0.5, 'of': {'a': [1, None]}})")
    publish.publish(_page())
    assert publish.results(_page().name) == {"auroc": 0.5, "of": {"a": [1, None]}}
    assert display.RESULT_MIME not in json.dumps(json.loads(publish.path_of(_page().name).read_text())["cells"])
    with pytest.raises(FileNotFoundError, match="not published"):
        publish.results("imagenet20/ablation/two")


def test_why_stale_names_what_changed(repository, monkeypatch):
    assert publish.why_stale(_page()) == "not published yet"
    publish.publish(_page())
    assert publish.why_stale(_page()) is None
    assert publish.why_stale(_page(parameters={"sweep": "core"})) == "changed: parameters"
    repository.write(GOOD + "\n1 + 1")
    assert publish.why_stale(_page()) == "changed: code, notebook"
    repository.write(GOOD)
    monkeypatch.setattr(code, "notebook_digest", lambda *_, **__: "other")
    assert publish.why_stale(_page()) == "changed: code"


def test_where_imported_names_lie_makes_no_page_stale(repository):
    repository.write(GOOD, "from capsae.detectors.base import (\n    info,\n)\ninfo('epd')")
    publish.publish(_page())
    repository.write(GOOD, "from capsae.detectors import info\ninfo('epd')")
    assert publish.why_stale(_page()) is None
    repository.write(GOOD, "from capsae.detectors import info\ninfo('rpd')")
    assert publish.why_stale(_page()) == "changed: code, notebook"


def test_a_page_that_reads_others_and_files_is_stale_with_them(repository, monkeypatch):
    (repository.path / "table.csv").write_text("1")
    names = ("x", "y")
    monkeypatch.setattr(publish, "pages", lambda: {name: _page(name=name, parameters=given) for name in names})
    given, page = {"sweep": "k"}, _page(after=names, reads=("table.csv",))
    publish.publish(page)
    assert publish.why_stale(page) is None
    given = {"sweep": "core"}
    publish._cached_digest.cache_clear()
    (repository.path / "table.csv").write_text("2")
    assert publish.why_stale(page) == "changed: file table.csv, 2 pages that it reads"


def test_a_page_with_an_error_in_it_is_never_fresh(repository):
    path = publish.publish(_page())
    notebook = json.loads(path.read_text())
    notebook["cells"][-1]["outputs"] = [{"output_type": "error", "ename": "KeyError", "evalue": "", "traceback": []}]
    path.write_text(json.dumps(notebook))
    assert publish.why_stale(_page()) == "it holds an error (KeyError)"
    notebook["cells"][-1]["outputs"] = []
    notebook["metadata"]["papermill"] = {"exception": True}
    path.write_text(json.dumps(notebook))
    assert "papermill.exception" in publish.why_stale(_page())


@pytest.mark.parametrize(
    "given, message",
    [
        ({"sae_q": 3}, "no parameter 'sae_q'"),
        ({"sae_k": 1e3}, "sae.k"),
        ({"sae_k": "64"}, "sae.k"),
        ({"sae_k": 10**6}, "k"),
        ({"core_fraction": 0}, "core_fraction"),
        ({"predicted": "guessed"}, "predicted"),
        ({"divergence": "jensen"}, "divergence is 'jensen'"),
        ({"experiment": "imagenet21"}, "imagenet21"),
    ],
)
def test_wrong_parameters_are_refused_before_a_kernel_starts(given, message, monkeypatch):
    import papermill

    monkeypatch.setattr(papermill, "execute_notebook", lambda *a, **k: pytest.fail("a kernel was started"))
    with pytest.raises(ValueError, match=message):
        publish.publish(plan.Page("imagenet20/ablation/x", "05_ablation", "imagenet20", given))


def test_overrides_leaves_out_what_is_none_and_refuses_the_unknown():
    assert plan.overrides(sae_k=64, seed=None, correct_only=False) == {"sae.k": 64, "caps.correct_only": False}
    with pytest.raises(ValueError, match="unknown parameter 'k'"):
        plan.overrides(k=3)


def test_sweeps_hold_the_experiments_own_setting_once_and_names_sort_as_settings_do():
    for sweep, of in plan.SWEEPS.items():
        found = plan.sweep_pages(sweep)
        own = [page for _, page in found if page.name.endswith("/base")]
        assert len(own) == 1, sweep
        others = [page.name for _, page in found if page not in own]
        if sweep not in ("normalize", "divergence", "predicted", "correct"):
            assert others == sorted(others), sweep
        assert all(list(page.parameters) == ["experiment", of.parameter] for _, page in found if page not in own)


def test_every_sweep_waits_for_its_runs():
    known = plan.pages()
    assert len(known) == len(set(known))
    for sweep in plan.SWEEPS:
        page = known[f"imagenet20/ablation/sweep-{sweep}"]
        assert set(page.after) == {p.name for _, p in plan.sweep_pages(sweep)} <= set(known)


def test_a_page_is_found_by_name_and_by_file():
    name = "imagenet20/01_features"
    assert publish.page_name(name) == publish.page_name(publish.path_of(name)) == name
    with pytest.raises(ValueError, match="no page 'imagenet20/09'"):
        publish.page_name("imagenet20/09")


def test_snakemake_tells_what_it_would_execute_and_why():
    command = [sys.executable, "-m", "snakemake", "-n", "--cores", "1", "--config", "everything=1"]
    done = subprocess.run(command, cwd=plan.root(), capture_output=True, text=True, check=False)
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed
    for name in plan.pages():
        assert f"{name}: " in printed
    assert "everything was asked for" in printed or "changed: " in printed or "not published yet" in printed
