"""A run's tables and scores in a folder of the store: written, and read again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd


def _save_frame(frame: pd.DataFrame, folder: Path) -> None:
    frame.to_parquet(folder / "frame.parquet", index=False)


def _load_frame(folder: Path) -> pd.DataFrame:
    return pd.read_parquet(folder / "frame.parquet")


def _save_scores(scores: Mapping[str, Mapping[str, np.ndarray]], folder: Path) -> None:
    from safetensors.numpy import save_file

    save_file(
        {f"{name} {where}": of for name, sets in scores.items() for where, of in sets.items()},
        folder / "scores.safetensors",
    )


def _load_scores(folder: Path) -> dict[str, dict[str, np.ndarray]]:
    from safetensors.numpy import load_file

    found: dict = {}
    for key, of in load_file(folder / "scores.safetensors").items():
        name, _, where = key.partition(" ")
        found.setdefault(name, {})[where] = of
    return found
