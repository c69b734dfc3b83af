"""The committed tables of the zoo: `book/zoo/<experiment>.csv`, `<experiment>.grid.csv` and `<experiment>.json`."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd

from capsae.device import versions
from capsae.sae.model import SparseCoder

from ..publish.plan import root
from ..publish.verify import this_machine
from .fitting import NEAR, RATES, SEEDS, fit_run, member, members

FOLDER = Path("book/zoo")
COLUMNS = ["member", "kind", "seed", "lr", "measure", "method", "set", "group", "value", "lo", "hi"]
GRID = ["member", "lr", "seed", "held_out_fvu", "held_out_l0", "best_epoch", "train_cpu_s", "train_wall_s"]
GRID += ["portable", "chosen"]
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
    path, grids, record = (_path(about["experiment"], end, folder) for end in (".csv", ".grid.csv", ".json"))
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(path, index=False, float_format="%.6g", lineterminator="\n")
    grid.to_csv(grids, index=False, float_format="%.6g", lineterminator="\n")
    record.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    return path


def is_whole(names: Sequence[str], seeds: Sequence[int], grid: Sequence[float]) -> bool:
    """Whether a run was of all members, seeds and rates: only then does it replace a committed table."""
    return list(names) == members() and tuple(seeds) == SEEDS and tuple(grid) == RATES


def tidy(found: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """Measures in the order of the members and seeds. Columns: `COLUMNS`."""
    found = found.assign(kind=found["member"].map(lambda name: member(name).kind))
    return _ordered(found, names)[COLUMNS]


def tidy_grid(found: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """Fits in the order of the members, seeds and rates. Columns: `GRID`."""
    return _ordered(found.reindex(columns=GRID).sort_values("lr", kind="stable"), names)


def _ordered(found: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    place = {"member": list(names).index, "seed": lambda seed: seed if seed >= 0 else sys.maxsize}
    key = {"key": lambda column: column.map(place[column.name]), "kind": "stable"}
    return found.sort_values(["member", "seed"], ignore_index=True, **key)


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
        "machine": this_machine(),
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
    of = pd.json_normalize(provenance(experiment, folder)).dropna(axis=1).T[0].astype(str)
    return of.rename_axis("item").rename("value").reset_index()


def _path(experiment: str, suffix: str, folder: Path | None) -> Path:
    return (folder or root() / FOLDER) / f"{experiment}{suffix}"


def _read(experiment: str, suffix: str, folder: Path | None) -> pd.DataFrame:
    path = _path(experiment, suffix, folder)
    if not path.is_file():
        raise FileNotFoundError(f"no table {path}: capsae zoo --experiment {experiment} makes it")
    return pd.read_csv(path)


def fit(name: str, run, seed: int = 0, lr: float | None = None) -> SparseCoder:
    """Fit a member on a run's training rows as the tables of the zoo have it; validation rows choose the epoch.

    ``lr`` None takes the rate that the experiment's committed table chose, or the experiment's own.
    """
    if lr is None and member(name).trained:
        lr = chosen_rates(run.experiment.name).get(name, run.experiment.sae.lr)
    return fit_run(name, run, seed, lr)[0]
