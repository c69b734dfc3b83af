"""One folder a SAE: `sae.safetensors` (weights, input statistics) and `cfg.json` (settings, schema number)."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch

from ..files import replacing
from .config import SAEConfig

SCHEMA = 1
WEIGHTS, CONFIG = "sae.safetensors", "cfg.json"
FOREIGN: list = []  # readers (folder, device) of other libraries' files, which give None where they find none
PICKLES = {".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt"}


def save(folder: str | Path, state: dict[str, torch.Tensor], config, kind: str = "topk") -> Path:
    """Write both files, each under a temporary name first; the settings come last and make the folder valid."""
    from safetensors.torch import save as to_bytes

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / WEIGHTS, to_bytes({name: t.detach().cpu().contiguous() for name, t in state.items()}))
    cfg = {"schema": SCHEMA, "kind": kind, "d": state["pre_bias"].shape[0], "config": asdict(config)}
    write(folder / CONFIG, (json.dumps(cfg, indent=1) + "\n").encode())
    return folder


def load(folder: str | Path) -> tuple[dict[str, torch.Tensor], SAEConfig]:
    """Read what `save` wrote of an SAE of any variant. Errors are those of `read`."""
    state, cfg = read(folder)
    if cfg.get("kind") != cfg["config"].get("variant", "topk"):
        raise ValueError(f"{folder} holds a {cfg.get('kind')!r}, not an SAE; capsae.sae.load would do")
    return state, SAEConfig.from_dict(cfg["config"])


def read(folder: str | Path) -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors and the content of `cfg.json`, of any kind that `save` wrote.

    ValueError: a pickle (loading one runs code of whoever wrote it), an unknown schema, a damaged or foreign file.
    FileNotFoundError: one of the two files is missing.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    if folder.suffix in PICKLES:
        raise ValueError(
            f"{folder} is a pickle, and loading a pickle runs the code in it; a folder with {WEIGHTS} and {CONFIG} "
            "would do (TopKSAE.save writes one)"
        )
    for name in (WEIGHTS, CONFIG):
        if not (folder / name).is_file():
            hint = "; a folder written by TopKSAE.save would do" + singles(folder)
            raise FileNotFoundError(f"{folder} has no {name}{hint}")
    try:
        cfg = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG} is no JSON: {error}") from error
    if not isinstance(cfg, dict) or cfg.get("schema") != SCHEMA:
        found = cfg.get("schema") if isinstance(cfg, dict) else type(cfg).__name__
        raise ValueError(f"{folder / CONFIG} has schema {found!r}; this version reads {SCHEMA}")
    if not isinstance(cfg.get("config"), dict):
        raise ValueError(f"{folder / CONFIG} has no 'config', an object with the SAE's settings")
    try:
        return load_file(folder / WEIGHTS), cfg
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} is no whole safetensors file: {error}") from error


def kind(folder: str | Path) -> str | None:
    """What a folder says it holds ("topk", "itda", ...), or None where it says nothing: no error before `read`."""
    try:
        return json.loads((Path(folder) / CONFIG).read_text(encoding="utf-8"))["kind"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write(path: Path, content: bytes) -> None:
    """All of it or nothing."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def singles(folder: Path, settings: str = CONFIG) -> str:
    """The end of an error message that names the single SAEs in sub-folders, or nothing."""
    inside = sorted(path.parent.name for path in folder.glob(f"*/{settings}"))
    return f"; it holds folders of single SAEs, load one: {', '.join(inside[:5])}" if inside else ""
