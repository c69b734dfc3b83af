"""Executes the notebooks and publishes what succeeded: the pages under ``book/runs``.

A page is one notebook with parameters for one profile (:mod:`capsae.plan`). It is executed under a temporary name,
cleaned of what changes from run to run, stamped with digests of what it was made from, and only then moved into
place. Whether a committed page is fresh follows from these digests alone: :func:`why_stale`.

``python -m capsae.publish run PAGE...`` and ``python -m capsae.publish status`` are what the Snakefile calls.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from .display import PAGE_DATA, RESULT_MIME
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

log = logging.getLogger(__name__)

RUNS = Path("book/runs")
SCHEMA = 1

# What a page shows: the stages of its run, and the code that draws it. The stages carry the digests of their own code.
STAGES = {
    "01_features": ("features", "head"),
    "02_train_sae": ("features", "sae"),
    "03_discover_caps": ("features", "sae", "caps"),
    "04_score_ood": ("features", "sae", "caps", "table"),
    "05_ablation": ("features", "sae", "caps", "table"),
    "06_sweep": (),
    "07_tuning": ("features", "sae", "table"),
    "08_zoo": ("features", "head", "sae"),
    "09_dark_matter": ("features", "sae", "table"),
    "10_ontology": ("features", "sae", "caps"),
    "11_shift": ("features", "head", "sae", "caps", "table"),
    "12_causal": ("features", "head", "sae", "caps"),
    "13_meaning": ("features", "sae", "caps"),
    "14_layers": ("features", "head"),
}
# Code of a page's own beside that of its stages, and committed files that it reads (with the page's profile).
MADE_BY: dict[str, tuple[str, ...]] = {
    "08_zoo": tuple(f"capsae.zoo.{part}" for part in ("summary", "verdicts", "figures", "tables", "measure")),
    "09_dark_matter": tuple(f"capsae.analyses.dark_matter{part}" for part in ("", "_scores", "_study", "_figures")),
    "10_ontology": (
        *("capsae.analyses.ontology", "capsae.analyses.ontology_kernels", "capsae.analyses.ontology_study"),
        *("capsae.analyses.ontology_figures", "capsae.analyses.mantel", "capsae.analyses.wordnet", "capsae.sae"),
    ),
    "11_shift": (
        *("capsae.analyses.shift", "capsae.analyses.shift_figures", "capsae.analyses.shift_study"),
        *("capsae.analyses.probes", "capsae.analyses.calibration", "capsae.analyses.corruptions"),
        *("capsae.sae.dictionaries", "capsae.probe"),
    ),
    "12_causal": tuple(f"capsae.analyses.causal{part}" for part in ("", "_effects", "_curves", "_study", "_figures")),
    "13_meaning": (
        *("capsae.analyses.meaning", "capsae.analyses.meaning_study", "capsae.analyses.meaning_figures"),
        *("capsae.analyses.contrast", "capsae.analyses.together", "capsae.analyses.neighbours"),
        *("capsae.analyses.meaning_tables", "capsae.analyses.wordnet"),
    ),
    "14_layers": tuple(f"capsae.analyses.layers{part}" for part in ("", "_study", "_figures")),
}
READS: dict[str, tuple[str, ...]] = {
    "08_zoo": (
        *(f"book/zoo/{name}{end}" for name in ("imagenet20", "mini80") for end in (".csv", ".grid.csv", ".json")),
        "book/zoo/backbones.csv",
    ),
    "10_ontology": ("capsae/analyses/wordnet.json",),
    "11_shift": ("capsae/packs/{profile}_shift/pack.json",),
    "13_meaning": ("capsae/analyses/wordnet.json",),
    "14_layers": ("book/layers/{profile}.csv", "book/layers/{profile}_against_final.csv", "book/layers/{profile}.json"),
}
DRAWN_BY = (
    *("capsae.figures", "capsae.display", "capsae.tidy", "capsae.galleries", "capsae.explain", "capsae.caps"),
    *("capsae.comparisons", "capsae.comparison_figures", "capsae.evaluate", "capsae.stats", "capsae.tuning"),
)


class PublishError(RuntimeError):
    """A page that failed, and so was not published."""


# --- digests


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:20]


def template_digest(template: Mapping) -> str:
    """Digest of a notebook's cells: their kind, text and tags."""
    return _hash([(c["cell_type"], "".join(c["source"]), c["metadata"].get("tags", [])) for c in template["cells"]])


def page_inputs(page: Page) -> dict[str, str]:
    """Digests of what a page is made from: notebook, parameters, drawing code, stages of its run, pages it reads.

    Nothing is computed; a stage's digest covers its settings, its data and its code.
    """
    from .store import source_digest

    template = read_notebook(root() / "notebooks" / f"{page.notebook}.ipynb")
    inputs = {
        "notebook": template_digest(template),
        "parameters": _hash([dict(page.parameters), page.title, SCHEMA]),
        "drawing": source_digest(DRAWN_BY)[:20],
    }
    if STAGES[page.notebook]:
        chosen = {name: page.parameters[name] for name in OVERRIDES if name in page.parameters}
        run = _run(page.profile, json.dumps(overrides(**chosen)))
        inputs |= {f"stage {stage}": run.digest(stage)[:20] for stage in STAGES[page.notebook]}
        inputs["profile"] = _hash(run.profile.to_dict())
    if page.notebook in MADE_BY:
        inputs["analysis"] = source_digest(MADE_BY[page.notebook])[:20]
    for name in READS.get(page.notebook, ()):
        file = name.format(profile=page.profile)
        inputs[f"file {file}"] = hashlib.sha256((root() / file).read_bytes()).hexdigest()[:20]
    return inputs | {f"page {name}": page_digest(pages()[name]) for name in page.after}


@cache  # one a process: opening the sources of a profile takes a second
def _run(profile: str, changed: str):
    from .pipeline import Run

    return Run(profile, json.loads(changed), progress=False)


@cache
def _cached_digest(name: str, notebook: str, profile: str, parameters: str, title: str | None, after: tuple) -> str:
    return _hash(page_inputs(Page(name, notebook, profile, json.loads(parameters), title, after)))


def page_digest(page: Page) -> str:
    """One digest of :func:`page_inputs`."""
    parameters = json.dumps(dict(page.parameters), sort_keys=True)
    return _cached_digest(page.name, page.notebook, page.profile, parameters, page.title, page.after)


# --- executing


def path_of(name: str) -> Path:
    """Where a page lies, published."""
    return root() / RUNS / f"{name}.ipynb"


def execute(page: Page, folder: Path, template: Path | None = None) -> Path:
    """Execute a page's notebook inside ``folder`` and return the cleaned, stamped file there.

    Raises
    ------
    PublishError
        If a cell failed; it names the page and holds the notebook's own traceback.
    """
    import papermill

    template = template or root() / "notebooks" / f"{page.notebook}.ipynb"
    parameters = check_parameters(page.notebook, page.parameters, read_notebook(template))
    given = {name: parameters[name] for name in page.parameters}
    stamped = stamp(page, parameters)  # before the run: a profile that cannot be used is refused here
    raw, out = folder / "raw.ipynb", folder / f"{Path(page.name).name}.ipynb"
    # The kernel must import the package whose digests the page will carry, installed or not.
    paths = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH")]
    variables = {
        PAGE_DATA: f"data/{out.stem}",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONWARNINGS": "ignore:IProgress not found",  # bars are text here, widgets are not needed
    }
    try:
        with _environment(variables):
            # ipykernel warns of each kernel that others could listen: it talks to this machine alone, over loopback.
            quiet = {"progress_bar": False, "stderr_file": sys.stderr, "extra_arguments": ["--log-level=ERROR"]}
            papermill.execute_notebook(template, raw, given, cwd=folder, kernel_name="python3", **quiet)
    except papermill.PapermillExecutionError as error:
        raise PublishError(f"{page.name} failed and is not published:\n{error}") from None
    notebook = clean(read_notebook(raw))
    failed = error_outputs(notebook)
    if failed:
        raise PublishError(f"{page.name} holds an error ({failed[0]}) and is not published")
    set_title(notebook, page)
    notebook["metadata"]["capsae"] = stamped | {"results": take_results(notebook)}
    out.write_text(json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
    raw.unlink()
    return out


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set variables for the kernels started inside."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def stamp(page: Page, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """What a published notebook says of itself in ``metadata["capsae"]``."""
    from .store import versions

    inputs = page_inputs(page)
    return {
        "schema": SCHEMA,
        "page": page.name,
        "notebook": page.notebook,
        "profile": page.profile,
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
    """What the notebook recorded with ``figures.result``, taken out of its outputs (no page renders that kind)."""
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
            lines[0] = f"# {page.title}" if page.title else f"{lines[0]} ({page.profile})"
            cell["source"] = "\n".join(lines)
            return
    raise ValueError(f"notebook {page.notebook} has no heading of the first level")


def publish(page: Page, template: Path | None = None) -> Path:
    """Execute a page and put it in its place under book/runs, with its CSVs; if it fails, the old page stays."""
    target = path_of(page.name)
    build = root() / "build"
    build.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=build, prefix="page-") as work:
        made = execute(page, Path(work), template)
        target.parent.mkdir(parents=True, exist_ok=True)
        data, old = target.parent / "data" / target.stem, Path(work) / "old"
        if data.exists():
            data.rename(old)
        new = Path(work) / "data" / target.stem
        if new.exists():
            data.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(new, data)
        os.replace(made, target)
    return target


# --- what is published


def why_stale(page: Page) -> str | None:
    """Why a page must be executed (again), in words; None if what is published is fresh."""
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
    return f"changed: {', '.join(changed)}" if changed else None


def is_fresh(page: Page | str) -> bool:
    """Whether a published page (or its name, or the path of its file) was made from today's code, data and settings."""
    return why_stale(page if isinstance(page, Page) else pages()[page_name(page)]) is None


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
    """The numbers that a published page recorded with ``figures.result``; FileNotFoundError if it is not published."""
    path = path_of(name)
    if not path.is_file():
        raise FileNotFoundError(f"{name} is not published: python -m capsae.publish run {name}")
    return read_notebook(path)["metadata"]["capsae"]["results"]


def sweep_table(sweep: str, profile: str = SWEPT):
    """Results of a sweep's runs as a data frame: sweep, setting, chosen, method, metric, group, value, lo, hi, page."""
    import pandas as pd

    from .detectors import OURS

    rows = []
    for setting, page in sweep_pages(sweep, profile):
        found = results(page.name)
        own = page.name == base_page(profile).name
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


def reproduce(
    jobs: int | None = None,
    dry_run: bool = False,
    book: bool = True,
    targets: Iterable[str | Path] = (),
    everything: bool = False,
) -> int:
    """Execute the pages that are not fresh (by Snakemake), write the pages made of data, build the book.

    Parameters
    ----------
    jobs : int, optional
        Pages at a time; default 2, or the number of cores.
    dry_run : bool
        Say what would be executed, and why.
    targets : page names or paths of their files, optional
        Only these; default all.
    everything : bool
        Execute fresh pages, too.

    Returns
    -------
    int
        Exit status; the place of the book goes to stdout.
    """
    names = [page_name(target) for target in targets]
    why = {name: why_stale(pages()[name]) for name in names or pages()}
    wanted = [name for name, reason in why.items() if everything or reason]
    if dry_run:
        sys.stdout.writelines(f"{name}: {why[name] or 'fresh; everything was asked for'}\n" for name in wanted)
        sys.stdout.write(f"{len(wanted)} of {len(why)} pages would be executed\n")
        return 0
    command = [sys.executable, "-m", "snakemake", "--cores", str(jobs or min(2, os.cpu_count() or 1))]
    command += ["--quiet", "host", *["--config", "everything=1"] * everything]
    status = 0
    if wanted:
        # All of them: Snakemake finds the same ones, and their names would make a long line.
        command += ["--", *wanted] if names else []
        status = subprocess.run(command, cwd=root(), check=False).returncode
    if status:
        return status
    from .pages import write_pages

    write_pages()
    if not book:
        return 0
    tool = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()"]
    status = subprocess.run([*tool, "build", "-W", "-n", "--keep-going", "book/"], cwd=root(), check=False).returncode
    if status == 0:
        sys.stdout.write(f"\nThe book lies at {root() / '_build' / 'html' / 'index.html'}\n")
    return status


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m capsae.publish", description="Execute and publish pages of the book.")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="execute pages and publish those that succeed")
    run.add_argument("page", nargs="+", help="e.g. imagenet20/04_score_ood")
    commands.add_parser("status", help="list the pages that are not fresh, and why; exit status 1 if there are any")
    commands.add_parser("pages", help="write the pages that are made from data: claims and detectors")
    chosen = parser.parse_args(arguments)
    if chosen.command == "run":
        known, failed = pages(), 0
        for name in chosen.page:
            if name not in known:
                parser.error(f"no page {name!r}; there are {', '.join(known)}")
        for name in chosen.page:
            try:
                log.info("published %s", publish(known[name]))
            except (PublishError, ValueError) as error:
                sys.stderr.write(f"{error}\n")
                failed += 1
        return 1 if failed else 0
    if chosen.command == "pages":
        from .pages import write_pages

        write_pages()
        return 0
    stale = {name: why for name, page in pages().items() if (why := why_stale(page))}
    sys.stdout.writelines(f"{name}: {why}\n" for name, why in stale.items())
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
