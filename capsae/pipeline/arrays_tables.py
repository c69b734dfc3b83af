"""Tables of features, .csv or .parquet, as the arrays of :data:`capsae.pipeline.arrays_io.LAYOUT`: a row a sample, a
column a feature.

A single file has a column ``set`` (train, test, near/<set>, far/<set> ...); in a folder, ``train.csv`` or
``near/<set>.parquet`` say it by name. Of the other columns, ``label`` is the class, ``logits/<c>`` and
``scores/<name>`` are what the layout says, and all that remain are features, in the order of the first file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from ..files import refuse_stub

SUFFIXES = (".csv", ".parquet")


def read_table(path: Path) -> dict[str, np.ndarray]:
    """Read one file that has a column ``set``; ValueError, naming the column and what would do, if it has none."""
    frame = _read(path)
    if "set" not in frame:
        raise ValueError(
            f"{path} has no column 'set' (train, test, near/<set>, far/<set>); add one, or give a folder with "
            f"train.csv, test.csv, far/<set>.csv. Its columns are {', '.join(map(str, frame.columns[:6]))} ..."
        )
    parts = {str(name): part.drop(columns="set") for name, part in frame.groupby("set", sort=False)}
    return _arrays(parts, str(path))


def read_tables(folder: Path) -> dict[str, np.ndarray]:
    """Read a folder of them."""
    files = {
        f.relative_to(folder).with_suffix("").as_posix(): f for s in SUFFIXES for f in sorted(folder.rglob(f"*{s}"))
    }
    return _arrays({name: _read(file) for name, file in files.items()}, str(folder))


def _read(path: Path) -> pd.DataFrame:
    refuse_stub(path)
    try:
        frame = pd.read_csv(path, encoding="utf-8-sig") if path.suffix == ".csv" else pd.read_parquet(path)
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} cannot be read as {path.suffix}: {error}") from None
    if frame.empty:
        raise ValueError(f"{path} holds no row, only the columns {', '.join(map(repr, frame.columns))}")
    return frame


def _arrays(parts: Mapping[str, pd.DataFrame], where: str) -> dict[str, np.ndarray]:
    found, order = {}, None
    for name, part in parts.items():
        columns = [str(column) for column in part.columns]
        part = part.set_axis(columns, axis=1)
        twice = next((column for column in columns if columns.count(column) > 1), None)
        if twice:
            raise ValueError(f"{where}: {name} has the column {twice!r} twice")
        features = [c for c in columns if c != "label" and not c.startswith(("logits/", "scores/"))]
        order = features if order is None else order
        if set(features) != set(order):
            other = sorted(set(features) ^ set(order))[0]
            raise ValueError(f"{where}: column {other!r} is not in all sets; each set needs the same features")
        text = [c for c in columns if c != "label" and part[c].dtype.kind not in "fiub"]
        if text:
            cell = part[text[0]].iloc[0]
            raise ValueError(f"{where}: column {text[0]!r} of {name} holds {cell!r}; give numbers, or drop the column")
        found[f"{name}/features"] = part[order].to_numpy()
        logits = [c for c in columns if c.startswith("logits/")]
        if logits:
            found[f"{name}/logits"] = part[sorted(logits, key=lambda c: (len(c), c))].to_numpy()
        found |= {f"{name}/{c}": part[c].to_numpy() for c in columns if c.startswith("scores/")}
        if "label" in part and part["label"].notna().any():
            found[f"{name}/labels"] = _labels(part["label"], f"{where}: label of {name}")
    return found


def _labels(column: pd.Series, what: str) -> np.ndarray:
    """Whole numbers, -1 where a cell is empty."""
    column = column.fillna(-1)
    if column.dtype.kind not in "fiu" or (column != column.round()).any():
        bad = column[column != column.round()] if column.dtype.kind == "f" else column
        raise ValueError(f"{what} holds {bad.tolist()[0]!r}; whole numbers from 0 would do")
    return column.to_numpy().astype(np.int64)
