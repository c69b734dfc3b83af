"""Whether what this machine made is what is published: every value of the book's CSVs, to the printed digit.

Published is what the repository's last commit holds; in a copy without git, what ``capsae reproduce`` found before it
overwrote anything. Compared are the CSVs of the pages under ``book/runs`` and the numbers that the pages recorded.
"""

from __future__ import annotations

import csv
import datetime
import hashlib
import io
import json
import os
import platform
import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

RUNS = "book/runs"
KEPT = "build/as_published"  # a copy of RUNS, where there is no git
RAN = "build/ran"  # what was executed here: one file a page, written by companion.publish.publish
MACHINES = "book/reproduced_on"
RESULTS = "recorded results"

# What need not be the same elsewhere: file, column, row (its text cells), and why. Nothing else is exempt.
EXEMPT = (
    ("*.csv", "*_s", "*", "seconds are those of a machine"),
    ("*.csv", "*_mb", "*", "memory is that of a machine"),
    ("provenance.csv", "value", "version, *", "a newer package may be installed; its numbers are compared"),
)
# Variables that make a machine compute as another kind would.
EMULATING = (
    *("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_CBWR"),
    *("MKL_ENABLE_INSTRUCTIONS", "OPENBLAS_CORETYPE", "NPY_DISABLE_CPU_FEATURES"),
)

Files = Mapping[str, bytes]


@dataclass(frozen=True)
class Difference:
    """One value that is not the published one; a table or a page that only one side has stands as a value, too."""

    file: str
    row: str
    column: str
    published: str
    here: str

    def __str__(self) -> str:
        where = ", ".join(filter(None, (self.file, self.row, self.column)))
        return f"{where}: published {self.published}, here {self.here}"


@dataclass
class PageReport:
    """What became of one page's values."""

    page: str
    equal: int = 0
    exempt: int = 0
    differences: list[Difference] = field(default_factory=list)
    ran: bool = True

    @property
    def status(self) -> str:
        """``differ``, ``equal``, or ``not run here`` where the equal values are merely those of the commit."""
        return "differ" if self.differences else "equal" if self.ran else "not run here"


# --- the two sides


def folder_files(folder: Path) -> dict[str, bytes]:
    """Content of the CSVs and notebooks below a folder such as ``book/runs``, by path in it."""
    found = sorted(path for path in folder.rglob("*") if path.suffix in (".csv", ".ipynb"))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def published_files(root: Path, revision: str = "HEAD") -> dict[str, bytes]:
    """Content of the published CSVs and notebooks, by path in ``book/runs``.

    Raises
    ------
    FileNotFoundError
        No such revision, and no copy that ``capsae reproduce`` kept.
    """
    made = _git(root, "archive", "--format=tar", revision, RUNS)
    if made.returncode == 0:
        with tarfile.open(fileobj=io.BytesIO(made.stdout)) as archive:
            members = [member for member in archive if member.name.endswith((".csv", ".ipynb"))]
            return {member.name.removeprefix(f"{RUNS}/"): archive.extractfile(member).read() for member in members}
    if not _in_git(root) and (root / KEPT).is_dir():
        return folder_files(root / KEPT)
    why = made.stderr.decode(errors="replace").strip()
    raise FileNotFoundError(
        f"what is published cannot be read: git archive {revision} {RUNS} says {why!r}, and there is no {KEPT}, "
        "which `capsae reproduce` writes where there is no git"
    )


def keep_published(root: Path) -> None:
    """Copy ``book/runs`` before anything is overwritten, where no commit holds it; done once."""
    if not _in_git(root) and not (root / KEPT).exists() and (root / RUNS).is_dir():
        shutil.copytree(root / RUNS, root / KEPT)


def mark_run(root: Path, page: str, notebook: Path) -> None:
    """Note that a page was executed here: a page is as published by itself before that."""
    mark = root / RAN / page
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.write_text(_sha256(notebook.read_bytes()), encoding="utf-8")


def ran_here(root: Path, page: str) -> bool:
    """Whether the page that lies in ``book/runs`` is one that was executed here."""
    mark, notebook = root / RAN / page, root / RUNS / f"{page}.ipynb"
    return mark.is_file() and notebook.is_file() and mark.read_text() == _sha256(notebook.read_bytes())


# --- comparing


def compare(published: Files, here: Files) -> list[PageReport]:
    """Compare two sets of files, page by page, value by value.

    Parameters
    ----------
    published, here : mapping of paths in ``book/runs`` to content
        As :func:`published_files` and :func:`folder_files` give them.

    Returns
    -------
    list of PageReport
        In the order of the pages' names.
    """
    tables = _tables(published), _tables(here)
    reports = []
    for page in sorted(tables[0].keys() | tables[1].keys()):
        report = PageReport(page)
        theirs, ours = (side.get(page, {}) for side in tables)
        for name in sorted(theirs.keys() | ours.keys()):
            if name in theirs and name in ours:
                _compare_table(report, name, theirs[name], ours[name])
            else:
                there = ["there" if name in side else "missing" for side in (theirs, ours)]
                report.differences.append(Difference(name, "", "", *there))
        reports.append(report)
    return reports


def why_exempt(file: str, column: str, row: str) -> str | None:
    """Why a value need not be the published one; None if it must."""
    for of_file, of_column, of_row, why in EXEMPT:
        if fnmatchcase(file, of_file) and fnmatchcase(column, of_column) and fnmatchcase(row, of_row):
            return why
    return None


def _compare_table(report: PageReport, name: str, published: list[list[str]], here: list[list[str]]) -> None:
    for what, one, other in (("columns", published[:1], here[:1]), ("rows", len(published) - 1, len(here) - 1)):
        if one != other:
            shown = [", ".join(side[0]) if what == "columns" and side else str(side) for side in (one, other)]
            report.differences.append(Difference(name, "", what, *shown))
            return
    columns = published[0] if published else []
    for number, (theirs, ours) in enumerate(zip(published[1:], here[1:], strict=True), 1):
        text = ", ".join(cell for cell in theirs if cell and not _is_number(cell))
        for column, one, other in zip(columns, theirs, ours, strict=True):
            if why_exempt(name, column, text):
                report.exempt += 1
            elif one == other:
                report.equal += 1
            else:
                report.differences.append(Difference(name, f"row {number} ({text})", column, one, other))


def _tables(files: Files) -> dict[str, dict[str, list[list[str]]]]:
    """``{page: {name of its table: header and rows}}``."""
    pages: dict[str, dict[str, list[list[str]]]] = {}
    for path, content in files.items():
        text = content.decode("utf-8")
        if path.endswith(".csv"):  # imagenet20/data/04_score_ood/roc.csv
            *above, _, page, name = path.split("/")
            pages.setdefault("/".join([*above, page]), {})[name] = list(csv.reader(io.StringIO(text)))
        else:
            recorded = json.loads(text)["metadata"].get("capsae", {}).get("results", {})
            rows = [[key, value] for key, value in _flat(recorded)]
            pages.setdefault(path.removesuffix(".ipynb"), {})[RESULTS] = [["result", "value"], *rows]
    return pages


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict | list):
        for name, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _flat(each, f"{key}.{name}" if key else str(name))
    else:
        yield key, f"{value:.6g}" if isinstance(value, float) else str(value)  # as the CSVs print them


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


# --- the command


def verify(root: Path, revision: str = "HEAD", shown: int = 10) -> tuple[list[PageReport], list[str]]:
    """Compare the pages in a clone with what is published; returns the reports and the lines that tell them."""
    reports = compare(published_files(root, revision), folder_files(root / RUNS))
    lines = []
    for report in reports:
        report.ran = ran_here(root, report.page)
        exempt = f", {report.exempt} exempt" if report.exempt else ""
        count = f", {len(report.differences)} differ" if report.differences else ""
        lines.append(f"{report.page}: {report.status} ({report.equal} values equal{count}{exempt})")
        lines += [f"    {difference}" for difference in report.differences[:shown]]
        if len(report.differences) > shown:
            lines.append(f"    and {len(report.differences) - shown} more (--all lists them)")
    if any(report.exempt for report in reports):
        lines.append("exempt:")
        lines += [f"    {file}, column {column}, row {row}: {why}" for file, column, row, why in EXEMPT]
    counts = count_pages(reports)
    lines.append(", ".join(f"{number} pages {status.replace('_', ' ')}" for status, number in counts.items()))
    if not any(report.ran for report in reports):
        lines.append("Nothing was executed here since: `make reproduce` does that.")
    return reports, lines


def count_pages(reports: Iterable[PageReport]) -> dict[str, int]:
    """Number of pages by status."""
    found = [report.status.replace(" ", "_") for report in reports]
    return {status: found.count(status) for status in ("equal", "differ", "not_run_here")}


def record(root: Path, reports: list[PageReport], revision: str = "HEAD") -> Path:
    """Write what this machine is and how it agreed, and the table of the page *Reproduced on* anew; returns the file.

    Raises
    ------
    ValueError
        Nothing was executed here.
    """
    if not any(report.ran for report in reports):
        raise ValueError("nothing was executed here, so there is nothing to record: run `make reproduce` first")
    today = datetime.date.today().isoformat()
    commit = _git(root, "rev-parse", "--short=12", revision).stdout.decode().strip()
    values = {
        "equal": sum(report.equal for report in reports if report.ran),
        "differ": sum(len(report.differences) for report in reports),
        "exempt": sum(report.exempt for report in reports if report.ran),
    }
    made = {"date": today, "commit": commit or None, **this_machine(), "pages": count_pages(reports), "values": values}
    slug = re.sub(r"[^a-z0-9]+", "-", f"{made['cpu']} {' '.join(made['emulated'].values())}".lower()).strip("-")
    path = root / MACHINES / f"{today}-{slug}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    (root / MACHINES / "machines.csv").write_text(machines_table(root / MACHINES), encoding="utf-8")
    return path


def machines_table(folder: Path) -> str:
    """The records of a folder as CSV, the newest first: what the page *Reproduced on* shows."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["CPU", "Instructions", "Emulated by", "Cores", "System", "Versions", "Date", "Commit", "Pages"])
    records = sorted(folder.glob("*.json"), reverse=True)
    if not records:  # Sphinx refuses a table without rows
        table.writerow(["none yet", *[""] * 8])
    for path in records:
        made = json.loads(path.read_text(encoding="utf-8"))
        versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
        emulated = ", ".join(f"{name}={value}" for name, value in made["emulated"].items()) or "no"
        pages = ", ".join(f"{number} {status.replace('_', ' ')}" for status, number in made["pages"].items() if number)
        instructions = f"{made['core']}, {made['instructions']}"
        cells = [made["cpu"], instructions, emulated, made["cores"], made["system"], versions]
        table.writerow([*cells, made["date"], made["commit"] or "", pages])
    return text.getvalue()


def this_machine() -> dict[str, Any]:
    """CPU, instruction set, what emulates another one, cores, threads of a page, system, versions."""
    import llvmlite.binding as llvm
    import numba
    import numpy
    import torch

    from capsae.device import available_cores

    versions = {"python": platform.python_version(), "numpy": numpy.__version__, "numba": numba.__version__}
    return {
        "cpu": _cpu_name(),
        "core": llvm.get_host_cpu_name(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "emulated": {name: os.environ[name] for name in EMULATING if os.environ.get(name)},
        "cores": available_cores(),
        "threads": int(os.environ.get("OMP_NUM_THREADS") or 1),  # of one page: the Snakefile's default is one
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions | {"torch": torch.__version__},
    }


def _cpu_name() -> str:
    if Path("/proc/cpuinfo").is_file():
        named = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
        if named:
            return " ".join(named[1].split())
    if platform.system() == "Darwin":
        found = subprocess.run(
            ["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False
        )
        return found.stdout.strip() or platform.machine()
    return platform.processor() or platform.machine()


def _git(root: Path, *arguments: str) -> subprocess.CompletedProcess:
    try:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, check=False)
    except FileNotFoundError:
        return subprocess.CompletedProcess(arguments, 1, b"", b"git is not installed")


def _in_git(root: Path) -> bool:
    """Whether a commit holds the pages: an archive unpacked inside another project's clone is not in git."""
    return _git(root, "ls-files", "--error-unmatch", RUNS).returncode == 0


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
