"""The committed tables of the zoo: `book/zoo/<experiment>.csv`, `<experiment>.grid.csv` and `<experiment>.json`."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd

from capsae.device import machine, versions
from capsae.sae.model import SparseCoder

from ..publish.plan import root
from .fitting import NEAR, RATES, SEEDS, fit_rows, member, members, needs_head, normalised_head, settings

FOLDER = Path("book/zoo")
COLUMNS = ["member", "kind", "seed", "lr", "measure", "method", "set", "group", "value", "lo", "hi"]
GRID = ["member", "lr", "seed", "held_out_fvu", "held_out_l0", "best_epoch", "train_cpu_s", "train_wall_s", "chosen"]
RULE = (
    "The rate with the lowest FVU on held-out ID rows, first seed; one whose L0 there is off k by more than "
    f"{NEAR:.0%} is passed over where another's is not."
)


def load(experiment: str, folder: Path | None = None) -> pd.DataFrame:
    """The committed table of an experiment, with the members' titles.

    Columns: member, title, kind, seed (-1: all), lr, measure, method, set, group, value, lo, hi. FileNotFoundError
    where it was not made: `capsae zoo --experiment ...` makes it.
    """
    table = _read(experiment, ".csv", folder)
    table[["method", "set", "group"]] = table[["method", "set", "group"]].fillna("")
    table.insert(1, "title", table["member"].map(lambda name: member(name).title))
    return table


def load_grid(experiment: str, folder: Path | None = None) -> pd.DataFrame:
    """Every fit of an experiment: all rates with the first seed, the chosen one with all. Columns: `GRID`."""
    return _read(experiment, ".grid.csv", folder)


def provenance(experiment: str, folder: Path | None = None) -> dict:
    """What stands behind a committed table: digests, code, machine, versions, date, times."""
    return json.loads(_path(experiment, ".json", folder).read_text(encoding="utf-8"))


def chosen_rates(experiment: str, folder: Path | None = None) -> dict[str, float]:
    """The learning rate of each trained member of a committed table; empty where there is none."""
    try:
        grid = load_grid(experiment, folder)
    except FileNotFoundError:
        return {}
    rows = grid[grid["chosen"] & grid["lr"].notna()]
    return dict(zip(rows["member"], rows["lr"], strict=True))


def backbones(folder: Path | None = None) -> pd.DataFrame:
    """The committed table of `measure.backbones`: measure, group, value."""
    return _read("backbones", ".csv", folder)


def made_short(experiment: str, folder: Path | None = None) -> dict:
    """When and how long a committed table was made, for the page's record."""
    of = provenance(experiment, folder)
    return {"date": of["date"], "work_s": of["work_s"], "cpu": of["machine"]["cpu"], "epochs": of["settings"]["epochs"]}


def save(table: pd.DataFrame, grid: pd.DataFrame, about: Mapping, folder: Path | None = None) -> Path:
    """Write the three files, named for the experiment; returns the table's path."""
    experiment = about["experiment"]
    path = _path(experiment, ".csv", folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    for data, suffix in ((table, ".csv"), (grid, ".grid.csv")):
        text = data.to_csv(index=False, float_format="%.6g", lineterminator="\n")
        _path(experiment, suffix, folder).write_text(text, encoding="utf-8")
    _path(experiment, ".json", folder).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    return path


def is_whole(names: Sequence[str], seeds: Sequence[int], grid: Sequence[float]) -> bool:
    """Whether a run was of all members, seeds and rates: only then does it replace a committed table."""
    return list(names) == members() and tuple(seeds) == SEEDS and tuple(grid) == RATES


def tidy(found: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """Measures in the order of the members and seeds. Columns: `COLUMNS`."""
    found = found.assign(kind=found["member"].map(lambda name: member(name).kind))
    return _ordered(found, names)[COLUMNS]


def tidy_grid(found: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """Fits in the order of the members, rates and seeds. Columns: `GRID`."""
    found = found.reindex(columns=GRID).sort_values("lr", kind="stable")
    return _ordered(found, names)


def _ordered(found: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    place = {name: i for i, name in enumerate(names)}
    found = found.assign(_place=found["member"].map(place), _seed=found["seed"].where(found["seed"] >= 0, 10**6))
    return found.sort_values(["_place", "_seed"], kind="stable", ignore_index=True).drop(columns=["_place", "_seed"])


def about(run, names, seeds, grid, wall_s: float, work_s: float, shared) -> dict:
    """Provenance of a table: nothing in it is a result."""
    from .tasks import code_digests

    return {
        "experiment": run.experiment.name,
        "title": run.experiment.title,
        "backbone": run.experiment.backbone.model,
        "settings": asdict(shared) | {"lr": None, "seed": None},
        "rates": list(grid),
        "seeds": list(seeds),
        "rule": RULE,
        "digests": {stage: run.digest(stage)[:20] for stage in ("features", "head")},
        "code": code_digests(names),
        "versions": versions(),
        "machine": machine() | {"cpu": cpu_model()},
        "date": datetime.now(UTC).date().isoformat(),
        "wall_s": round(wall_s, 1),  # of the last call: what a killed one had made was read
        "work_s": round(work_s, 1),  # of all fits and measures, in whatever call: with two processes, half of it passes
    }


def line(experiment: str, folder: Path | None = None) -> str:
    """What stands under a figure that is drawn from a committed table."""
    of = provenance(experiment, folder)
    seeds, settings = of["seeds"], of["settings"]
    return (
        f"Zoo of {experiment} · backbone {of['backbone']} · seeds {min(seeds)} to {max(seeds)} · "
        f"{settings['epochs']} epochs · made {of['date']} on {of['machine']['cpu']} · features "
        f"{of['digests']['features'][:12]} · measures {of['code']['measures'][:12]}"
    )


def made(experiment: str, folder: Path | None = None) -> pd.DataFrame:
    """The provenance of a committed table as a table: item, value."""
    of = provenance(experiment, folder)
    rows = [
        ("experiment", f"{of['experiment']}: {of['title']}"),
        ("learning rates tried", ", ".join(map(str, of["rates"]))),
    ]
    rows += [("rule of choice", of["rule"]), ("seeds", ", ".join(map(str, of["seeds"])))]
    rows += [(f"setting, {key}", value) for key, value in of["settings"].items() if value not in (None, {}, "")]
    rows += [("made", of["date"]), ("work of one process, minutes", f"{of['work_s'] / 60:.1f}")]
    rows += [(f"machine, {key}", value) for key, value in of["machine"].items()]
    rows += [(f"version, {key}", value) for key, value in of["versions"].items()]
    rows += [(f"digest, {key}", value) for key, value in of["digests"].items()]
    rows += [(f"code, {key}", of["code"][key]) for key in ("measures", "stability")]
    rows += [(f"code, fit of {key}", value) for key, value in of["code"]["fit"].items()]
    return pd.DataFrame([(item, str(value)) for item, value in rows], columns=["item", "value"])


def cpu_model() -> str:
    """The processor's name, as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"


def _path(experiment: str, suffix: str, folder: Path | None) -> Path:
    return (folder or root() / FOLDER) / f"{experiment}{suffix}"


def _read(experiment: str, suffix: str, folder: Path | None) -> pd.DataFrame:
    path = _path(experiment, suffix, folder)
    if not path.is_file():
        raise FileNotFoundError(f"no table {path}: capsae zoo --experiment {experiment} makes it")
    return pd.read_csv(path)


def fit(name: str, run, seed: int = 0, lr: float | None = None) -> SparseCoder:
    """Fit a member as the tables of the zoo have it.

    Parameters
    ----------
    name : one of `members()`
    run : capsae.pipeline.run.Run
        Whose training rows it is fitted on; its validation rows choose the epoch.
    seed : int
    lr : float or None
        None takes the rate that the committed table of the experiment chose; the experiment's own where there is none.
    """
    if lr is None and member(name).trained:
        lr = chosen_rates(run.experiment.name).get(name, run.experiment.sae.lr)
    head = normalised_head(run) if needs_head(name) else None
    return fit_rows(name, settings(run.experiment), run.features("train").cls, run.features("val").cls, seed, lr, head)[
        0
    ]
