"""``capsae init FOLDER``: look at a folder of images and at weights beside them, write the experiment they can be."""

from __future__ import annotations

import difflib
import json
import re
from pathlib import Path

from ..data.images import IMAGE_SUFFIXES

MODEL = "deit_tiny_patch16_224.fb_in1k"
TRAIN, TEST, VAL = ("train", "training"), ("test", "testing"), ("val", "valid", "validation")
GROUPS = {"near": "near", "far": "far", "ood": "far", "shifted": "shifted"}  # folder -> group of the sets in it
WEIGHTS = {".safetensors", ".pth", ".pt", ".bin"}
LISTS = "capsae-train.txt", "capsae-test.txt"
EVERY = 5  # where there is no test folder, every fifth image of a class is one


def look(folder: str | Path, model: str | None = None, checkpoint: str | None = None) -> tuple[str, dict[str, str]]:
    """Return an experiment (TOML) for a folder, and the content of the lists, by name, that it needs where no part is
    test.

    Parameters
    ----------
    folder : path
        ``train/<class>/*.jpg`` and ``test/<class>/*.jpg``, or class folders alone; optional: ``val``, ``near/<set>``,
        ``far/<set>`` (or ``ood/<set>``), ``shifted/<set>``, one file of weights.
    model : str, optional
        timm's name; default: what the file of weights is called after, else DeiT-Ti.
    checkpoint : path, optional
        Default: the file of weights in the folder, if there is one.

    Raises
    ------
    FileNotFoundError, ValueError
        No such folder, fewer than two classes, an unknown model.
    """
    folder = Path(folder).resolve()
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {str(folder)!r}")
    inside = {path.name.lower(): path for path in _folders(folder)}
    train, test, val = (next((inside[n] for n in names if n in inside), None) for names in (TRAIN, TEST, VAL))
    if test is None:
        test, val = val, None
    ood, shifted = _sets(folder, inside)
    classes = _folders(train or folder)
    classes = [c for c in classes if _images(c) and (train or c.name.lower() not in (*TRAIN, *TEST, *VAL, *GROUPS))]
    if len(classes) < 2:
        raise ValueError(
            f"{train or folder} holds {len(classes)} folder(s) of images; one for each class, and two classes at "
            "least, would do: train/<class>/*.jpg, test/<class>/*.jpg, far/<set>/*.jpg"
        )
    lists = {}
    if test is None:
        lists = _split(folder, classes)
    elif train is None:
        raise ValueError(f"{folder} holds {test.name!r} and no 'train'; train/<class>/*.jpg would do")
    checkpoint, model = _weights(folder, checkpoint, model)
    backbone = {"model": model} | ({"checkpoint": checkpoint} if checkpoint else {"pretrained": True})

    def source(path: Path) -> dict:
        return {"kind": "folder", "path": path.relative_to(folder).as_posix()}

    def listed(name: str) -> dict:
        return {"kind": "imglist", "list": name, "root": ".", "class_names": [c.name for c in classes]}

    sources = {"train": listed(LISTS[0]), "test": listed(LISTS[1])} if lists else {}
    sources = sources or {"train": source(train), "test": source(test)} | ({"val": source(val)} if val else {})
    n_train = len(lists[LISTS[0]].splitlines()) if lists else sum(len(_images(c)) for c in classes)
    lines = [
        "# made by `capsae init`; `capsae experiments imagenet20` prints every key there is",
        f"title = {_toml(folder.name)}",
        f"n_classes = {len(classes)}",
        f"backbone = {_toml(backbone)}",
        *(f"{name} = {_toml(value)}" for name, value in sources.items()),
        f"sae = {_toml(_sae(model, n_train))}",
        "[ood]  # at least one set that is none of the classes",
        *(f"{_toml(name)} = {_toml(source(path))}" for name, path in ood.items()),
    ]
    if not ood:
        lines += ['"far/noise" = { kind = "builtin", name = "noise" }']
    if shifted:
        lines += ["[shifted]", *(f"{_toml(name)} = {_toml(source(path))}" for name, path in shifted.items())]
    return "\n".join(lines) + "\n", lists


def _folders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith((".", "@", "_")))


def _images(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith("."))


def _sets(folder: Path, inside: dict[str, Path]) -> tuple[dict[str, Path], dict[str, Path]]:
    """The OOD sets and the shifted ones, by name; a group without sub-folders is one set."""
    found = {}
    for name, group in GROUPS.items():
        if name in inside:
            sets = [each for each in _folders(inside[name]) if _images(each)] or [inside[name]]
            found |= {f"{group}/{re.sub('[^A-Za-z0-9_.-]', '_', p.name)}": p for p in sets if _images(p)}
    shifted = {name: path for name, path in found.items() if name.startswith("shifted/")}
    return {name: path for name, path in found.items() if name not in shifted}, shifted


def _split(folder: Path, classes: list[Path]) -> dict[str, str]:
    lines: dict[str, list[str]] = {name: [] for name in LISTS}
    for label, each in enumerate(classes):
        for i, path in enumerate(_images(each)):
            lines[LISTS[i % EVERY == EVERY - 1]].append(f"{path.relative_to(folder).as_posix()} {label}\n")
    if not lines[LISTS[1]]:
        raise ValueError(f"{folder}: too few images to keep every {EVERY}th for a test; a folder 'test' would do")
    return {name: "".join(of) for name, of in lines.items()}


def _weights(folder: Path, checkpoint: str | None, model: str | None) -> tuple[str | None, str]:
    """The file of weights, if there is one, and the model: as given, or as the file is called."""
    import timm

    files = [path for path in sorted(folder.iterdir()) if path.suffix in WEIGHTS and path.is_file()]
    if checkpoint is None and len(files) == 1:
        checkpoint = files[0].name
    elif checkpoint is not None:
        if not Path(checkpoint).is_file():
            raise FileNotFoundError(f"--checkpoint {checkpoint!r}: no such file")
        checkpoint = str(Path(checkpoint).absolute())
    names = timm.list_models()
    if model is None and checkpoint:
        stem = Path(checkpoint).name
        model = max((name for name in names if stem.startswith(name)), key=len, default=None)
    model = model or MODEL
    if "/" not in model and not timm.is_model(model.partition(".")[0]):
        close = difflib.get_close_matches(model, names, 3, 0.5)
        raise ValueError(f"--model {model!r}: timm has none of that name; near it are {', '.join(close) or 'none'}")
    return checkpoint, model


def _sae(model: str, n_train: int) -> dict:
    import timm

    from ..pipeline.arrays import default_sae

    config = default_sae(n_train, timm.create_model(model, pretrained=False).num_features)
    return {key: getattr(config, key) for key in ("latents", "k", "epochs", "batch_size", "lr", "decay")}


def _toml(value) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(each)}" for key, each in value.items()) + " }"
    return json.dumps(value, ensure_ascii=False)
