"""Executes the notebooks and publishes what succeeded: the pages under ``book/runs``.

A page is one notebook with parameters for one experiment (:mod:`companion.publish.plan`). It is executed under a
temporary name, cleaned of what changes from run to run, stamped with digests of what it was made from, and only then
moved into place. Whether a committed page is fresh follows from these digests alone: :func:`why_stale`.

``python -m companion.build run PAGE...`` and ``python -m companion.build status`` are what the Snakefile calls.
"""

from __future__ import annotations

import ast
import hashlib
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from ..figures.display import RESULT_MIME
from .page_kernel import SharedKernel
from .plan import (
    OVERRIDES,
    SWEEPS,
    SWEPT,
    Page,
    base_page,
    check_parameters,
    overrides,
    pages,
    read_notebook,
    root,
    sweep_pages,
)
from .verify import mark_run

log = logging.getLogger(__name__)

RUNS = Path("book/runs")
SCHEMA = 1


class PublishError(RuntimeError):
    """A page that failed, and so was not published."""


# --- digests


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:20]


def template_digest(template: Mapping) -> str:
    """Digest of a notebook's cells: their kind, text and tags; where imported names lie does not count."""
    return _hash([(c["cell_type"], _without_imports(c), c["metadata"].get("tags", [])) for c in template["cells"]])


def _without_imports(cell: Mapping) -> str:
    text = "".join(cell["source"])
    if cell["cell_type"] != "code":
        return text
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
    return "\n".join(filter(None, lines))


def page_inputs(page: Page) -> dict[str, str]:
    """Digests of what a page is made from: notebook, parameters, settings, data, code, files and pages that it reads.

    Nothing is computed. The code is all that the notebook's cells reach (:mod:`capsae.pipeline.code`).
    """
    from capsae.pipeline import recipes
    from capsae.pipeline.code import notebook_digest

    template = read_notebook(root() / "notebooks" / f"{page.notebook}.ipynb")
    cells = "\n".join("".join(c["source"]) for c in template["cells"] if c["cell_type"] == "code")
    run = _run(page.experiment, json.dumps(overrides(**{n: v for n, v in page.parameters.items() if n in OVERRIDES})))
    inputs = {
        "notebook": template_digest(template),
        "parameters": _hash([dict(page.parameters), page.title, SCHEMA]),
        "experiment": _hash(run.experiment.to_dict()),
        "features": run.digest("features")[:20],
        "code": notebook_digest(cells, without=(recipes.code,))[:20],  # it names artefacts, it makes none
    }
    findings = f"notebooks/{page.notebook}.findings.yml"
    for file in (*page.reads, *([findings] if (root() / findings).is_file() else [])):
        inputs[f"file {file}"] = hashlib.sha256((root() / file).read_bytes()).hexdigest()[:20]
    return inputs | {f"page {name}": page_digest(pages()[name]) for name in page.after}


@cache  # one a process: opening the sources of an experiment takes a second
def _run(experiment: str, changed: str):
    from capsae.pipeline.run import Run

    return Run(experiment, json.loads(changed), progress=False)


@cache
def _cached_digest(name: str, notebook: str, experiment: str, parameters: str, *rest) -> str:
    return _hash(page_inputs(Page(name, notebook, experiment, json.loads(parameters), *rest)))


def page_digest(page: Page) -> str:
    """One digest of :func:`page_inputs`."""
    parameters = json.dumps(dict(page.parameters), sort_keys=True)
    return _cached_digest(page.name, page.notebook, page.experiment, parameters, page.title, page.after, page.reads)


# --- executing


def path_of(name: str) -> Path:
    """Where a page lies, published."""
    return root() / RUNS / f"{name}.ipynb"


def execute(page: Page, folder: Path, template: Path | None = None, kernel: SharedKernel | None = None) -> Path:
    """Execute a page's notebook inside ``folder`` and return the cleaned, stamped file there.

    Parameters
    ----------
    kernel : SharedKernel, optional
        Default: one of its own.

    Raises
    ------
    PublishError
        If a cell failed; it names the page and holds the notebook's own traceback.
    """
    import papermill

    if kernel is None:
        with SharedKernel() as kernel:
            return execute(page, folder, template, kernel)
    template = template or root() / "notebooks" / f"{page.notebook}.ipynb"
    parameters = check_parameters(page.notebook, page.parameters, read_notebook(template))
    given = {name: parameters[name] for name in page.parameters}
    stamped = stamp(page, parameters)  # before the run: an experiment that cannot be used is refused here
    raw, out = folder / "raw.ipynb", folder / f"{Path(page.name).name}.ipynb"
    try:
        quiet: dict[str, Any] = {"progress_bar": False, "stderr_file": sys.stderr}
        quiet["km"] = kernel.prepare(folder, f"data/{out.stem}")
        papermill.execute_notebook(template, raw, given, cwd=folder, kernel_name="python3", **quiet)
    except papermill.PapermillExecutionError as error:
        raise PublishError(f"{page.name} failed and is not published:\n{error}") from None
    except RuntimeError as error:  # the kernel died, or did not start: often of too little memory
        raise PublishError(f"{page.name} failed and is not published: {error}") from None
    notebook = clean(read_notebook(raw))
    failed = error_outputs(notebook)
    if failed:
        raise PublishError(f"{page.name} holds an error ({failed[0]}) and is not published")
    set_title(notebook, page)
    notebook["metadata"]["capsae"] = stamped | {"results": take_results(notebook)}
    out.write_text(json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
    raw.unlink()
    return out


def stamp(page: Page, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """What a published notebook says of itself in ``metadata["capsae"]``."""
    from capsae.device import versions

    inputs = page_inputs(page)
    return {
        "schema": SCHEMA,
        "page": page.name,
        "notebook": page.notebook,
        "experiment": page.experiment,
        "parameters": dict(parameters),
        "inputs": inputs,
        "digest": _hash(inputs),
        "versions": versions(),
    }


def clean(notebook: dict) -> dict:
    """Drop what differs between two runs of the same thing: times, random cell ids, progress bars; in place."""
    notebook["metadata"] = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for number, cell in enumerate(notebook["cells"]):
        tags = list(cell["metadata"].get("tags", []))
        if "injected-parameters" in tags:
            tags.append("hide-input")
        if "parameters" in tags:  # defaults, which the injected parameters override: not to be read as this page's
            tags.append("remove-input")
        kept = {key: value for key, value in cell["metadata"].items() if key == "mystnb"}
        cell["metadata"] = kept | ({"tags": sorted(set(tags))} if tags else {})
        cell["id"] = f"cell-{number:02d}"
        if cell["cell_type"] == "code":
            cell["outputs"] = [o for o in cell["outputs"] if o.get("name") != "stderr"]
            for output in cell["outputs"]:
                output.get("metadata", {}).clear()
    return notebook


def take_results(notebook: dict) -> dict[str, Any]:
    """What the notebook recorded with ``display.result``, taken out of its outputs (no page renders that kind)."""
    found: dict[str, Any] = {}
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            found |= output.get("data", {}).pop(RESULT_MIME, {})
    return found


def error_outputs(notebook: Mapping) -> list[str]:
    """Names of the exceptions that a notebook's outputs hold, and papermill's own record of one."""
    failed = [
        output.get("ename", "error")
        for cell in notebook["cells"]
        for output in cell.get("outputs", [])
        if output["output_type"] == "error"
    ]
    return failed + (["papermill.exception"] if notebook["metadata"].get("papermill", {}).get("exception") else [])


def set_title(notebook: dict, page: Page) -> None:
    """Give the run its own H1, or all runs of one notebook would share theirs."""
    for cell in notebook["cells"]:
        lines = "".join(cell["source"]).splitlines()
        if cell["cell_type"] == "markdown" and lines and lines[0].startswith("# "):
            lines[0] = f"# {page.title}" if page.title else f"{lines[0]} ({page.experiment})"
            cell["source"] = "\n".join(lines)
            return
    raise ValueError(f"notebook {page.notebook} has no heading of the first level")


def publish(page: Page, template: Path | None = None, kernel: SharedKernel | None = None) -> Path:
    """Execute a page and put it in its place under book/runs, with its CSVs; if it fails, the old page stays."""
    target = path_of(page.name)
    build = root() / "build"
    build.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=build, prefix="page-") as work:
        made = execute(page, Path(work), template, kernel)
        target.parent.mkdir(parents=True, exist_ok=True)
        data, old = target.parent / "data" / target.stem, Path(work) / "old"
        if data.exists():
            data.rename(old)
        new = Path(work) / "data" / target.stem
        if new.exists():
            data.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(new, data)
        os.replace(made, target)
        mark_run(root(), page.name, target)
    return target


# --- what is published


def why_stale(page: Page) -> str | None:
    """Why a page must be executed (again), as text; None if what is published is fresh."""
    path = path_of(page.name)
    if not path.is_file():
        return "not published yet"
    notebook = read_notebook(path)
    stamped = notebook["metadata"].get("capsae", {}).get("inputs")
    if stamped is None:
        return "it carries no stamp"
    failed = error_outputs(notebook)
    if failed:
        return f"it holds an error ({failed[0]})"
    inputs = page_inputs(page)
    changed = sorted(key for key in stamped.keys() | inputs.keys() if stamped.get(key) != inputs.get(key))
    others = [key for key in changed if key.startswith("page ")]
    if len(others) > 1:
        changed = [key for key in changed if key not in others] + [f"{len(others)} pages that it reads"]
    return f"changed: {', '.join(changed)}" if changed else None


def page_name(page: str | Path) -> str:
    """The name of a page from its name or the path of its file; ValueError if there is no such page."""
    name = str(page)
    if name.endswith(".ipynb"):
        path = Path(name).resolve()
        inside = path.is_relative_to(root() / RUNS)
        name = path.relative_to(root() / RUNS).with_suffix("").as_posix() if inside else name
    if name not in pages():
        raise ValueError(f"no page {name!r}; there are {', '.join(pages())}")
    return name


def results(name: str) -> dict[str, Any]:
    """The numbers that a published page recorded with ``display.result``; FileNotFoundError if it is not published."""
    path = path_of(name)
    if not path.is_file():
        raise FileNotFoundError(f"{name} is not published: python -m companion.build run {name}")
    return read_notebook(path)["metadata"]["capsae"]["results"]


def sweep_table(sweep: str, experiment: str = SWEPT):
    """Results of a sweep's runs as a data frame: sweep, setting, chosen, method, metric, group, value, lo, hi, page."""
    import pandas as pd

    from capsae.detectors import OURS

    rows = []
    for setting, page in sweep_pages(sweep, experiment):
        found = results(page.name)
        own = page.name == base_page(experiment).name
        at = {"sweep": SWEEPS[sweep].title, "setting": str(setting), "chosen": own}
        for row in found["metrics"]:
            # In the sweep over divergences each run is about its own; elsewhere the methods are those of the run.
            method = row["method"]
            if sweep == "divergence" and method not in (found["method"], OURS):
                continue
            label = "EPD or its variant" if sweep == "divergence" and method == found["method"] else row["title"]
            rows.append(
                at
                | row
                | {
                    "series": label,
                    "page": f"{Path(page.name).name}.html",
                    "fvu": found["fvu"],
                    "undefined": found["undefined_id"],
                }
            )
    return pd.DataFrame(rows)
