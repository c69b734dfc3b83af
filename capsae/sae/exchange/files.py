"""Folders of SAEs that other libraries wrote: whose they are, their two files, and what may stand in them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from .. import io

_FILES = {
    "saelens": ("sae_weights.safetensors", "cfg.json"),
    "sparsify": ("sae.safetensors", "cfg.json"),
    "dictionary_learning": ("ae.safetensors", "config.json"),
}
CONVERT = (
    "convert it once, where you trust the file: from safetensors.torch import save_file; "
    "weights = torch.load('ae.pt', map_location='cpu', weights_only=True); "
    "save_file({name: t.contiguous() for name, t in weights.items()}, 'ae.safetensors')"
)


def layout(folder: str | Path) -> str | None:
    """Whose folder this is: "saelens", "sparsify" or "dictionary_learning"; None for our own and for anything else."""
    folder = Path(folder)
    if (folder / "sae_weights.safetensors").is_file():
        return "saelens"
    if any((folder / name).is_file() for name in ("ae.safetensors", "ae.pt")):
        return "dictionary_learning"
    try:
        cfg = json.loads((folder / "cfg.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return "sparsify" if isinstance(cfg, dict) and "d_in" in cfg and "schema" not in cfg else None


def read(whose: str, folder: str | Path) -> tuple[Path, dict[str, Any], dict[str, torch.Tensor]]:
    """Folder, settings and tensors (on the CPU, as stored); pickles are refused unread."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    weights, settings = _FILES[whose]
    pickles = [folder] if folder.suffix in io.PICKLES else sorted(p for p in _entries(folder) if p.suffix in io.PICKLES)
    if pickles and not (folder / weights).is_file():
        remedy = CONVERT if whose == "dictionary_learning" else f"a folder with {weights} and {settings} would do"
        raise ValueError(f"{pickles[0]} is a pickle, and loading a pickle runs the code in it; {remedy}")
    for name in (settings, weights):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}{io.singles(folder, settings)}")
    try:
        cfg = json.loads((folder / settings).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / settings} is no JSON: {error}") from error
    if not isinstance(cfg, dict):
        raise ValueError(f"{folder / settings} holds a {type(cfg).__name__}; an object with settings would do")
    try:
        return folder, cfg, load_file(folder / weights)
    except SafetensorError as error:
        raise ValueError(f"{folder / weights} is no whole safetensors file: {error}") from error


def _entries(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def need(folder: Path, cfg: Mapping[str, Any], key: str, good: Iterable[Any], default: Any = None) -> None:
    """Raise ValueError unless a setting is one of those that a TopKSAE can have."""
    found = cfg.get(key, default)
    if found not in good:
        raise ValueError(f"{folder}: {key} is {found!r}, which no TopKSAE is; {' or '.join(map(repr, good))} would do")


def whole(folder: Path, cfg: Mapping[str, Any], key: str) -> int:
    """A setting that must be a whole number over 0."""
    found = cfg.get(key)
    if isinstance(found, bool) or not isinstance(found, int) or found < 1:
        raise ValueError(f"{folder}: {key} is {found!r} in the settings; a whole number over 0 would do")
    return found


def take(folder: Path, tensors: dict[str, torch.Tensor], shapes: dict[str, tuple[int, ...]]) -> list[torch.Tensor]:
    """The named tensors in float64, in which the folding is done; missing, foreign and misshapen ones are refused."""
    missing, foreign = sorted(shapes.keys() - tensors), sorted(tensors.keys() - shapes)
    if missing or foreign:
        what = f"no tensor {missing[0]!r}" if missing else f"a tensor {foreign[0]!r} that a TopKSAE has no place for"
        raise ValueError(f"{folder} has {what}; {', '.join(shapes)} would do")
    for name, shape in shapes.items():
        found = tensors[name]
        if tuple(found.shape) != shape:
            hint = " (transposed?)" if tuple(found.shape) == shape[::-1] else ""
            raise ValueError(f"{folder}: {name} has shape {tuple(found.shape)}{hint}; {shape} would fit the settings")
        if not found.is_floating_point() or not found.isfinite().all():
            raise ValueError(f"{folder}: {name} ({found.dtype}) holds what is no finite floating number")
    return [tensors[name].double() for name in shapes]


def write(whose: str, folder: str | Path, tensors: dict[str, torch.Tensor], cfg: dict[str, Any]) -> Path:
    """Both files, each whole or not at all, the settings last; never over an SAE of another layout."""
    from safetensors.torch import save as to_bytes

    folder = Path(folder)
    weights, settings = _FILES[whose]
    if (folder / settings).exists() and layout(folder) != whose:
        raise ValueError(f"{folder} holds an SAE in another layout than {whose}'s; another folder would do")
    folder.mkdir(parents=True, exist_ok=True)
    io.write(folder / weights, to_bytes({name: t.float().contiguous() for name, t in tensors.items()}))
    io.write(folder / settings, (json.dumps(cfg, indent=1) + "\n").encode())
    return folder
