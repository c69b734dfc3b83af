"""Experiments: everything a run is made of, as one TOML file, checked before any work starts.

The embedded ones lie in the folder ``capsae/experiments/``; a user's own has the same keys. The field names
of :class:`Experiment` are the keys of the TOML file and of overrides (``"sae.k"``, ``"ood.far/textures.limit"``).
"""

from __future__ import annotations

import copy
import glob
import json
import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from ..features.backbone import BackboneSpec
from ..sae.config import SAEConfig
from ..sae.model import model as sae_model
from .experiment_errors import ExperimentError, explain_validation
from .experiment_parts import (
    Builtin,
    CapConfig,
    Holdout,
    Hub,
    ImageFolder,
    ImgList,
    Parquet,
    Part,
    Source,
    Validation,
    path_fields,
)

FOLDER = Path(__file__).parents[1] / "experiments"
_NO_HTML = r"^([^<]|<[^A-Za-z/!?])*<?$"  # pages show it
DATA_ENV = "CAPSAE_DATA"  # where relative paths of sources start when an experiment sets no data_root


class Experiment(Part):
    """One experiment, from backbone to table. See the module's docstring and ``capsae experiments NAME``.

    ``data_root`` is the folder that relative paths of sources and of the checkpoint start from.
    """

    name: str = Field(pattern=r"^[^./\\<>\x00-\x1f][^/\\<>\x00-\x1f]*$")  # it names folders
    title: str = Field(pattern=_NO_HTML)
    description: str = Field("", pattern=_NO_HTML)
    needs: str = ""  # what has to be there or is downloaded, as text, for `capsae experiments`
    pack: str | None = None  # embedded features that stand in for the images
    data_root: str | None = None
    backbone: BackboneSpec
    n_classes: int = Field(ge=1)
    train: Source
    val: Validation = Holdout()
    test: Source
    ood: dict[Annotated[str, Field(pattern=r"^(near|far)/[A-Za-z0-9_.-]+$")], Source] = Field(min_length=1)
    # known classes in other conditions: ID in the full spectrum of OpenOOD v1.5
    shifted: dict[Annotated[str, Field(pattern=r"^shifted/[A-Za-z0-9_.-]+$")], Source] = {}
    head: Literal["probe", "backbone"] = "probe"
    sae: SAEConfig
    caps: CapConfig = CapConfig()
    predicted: Literal["predicted", "true"] = "predicted"  # "true": ID sets are scored under their label (an ablation)
    # share of every class's training rows that SAE, CAPs and detectors see; not the head
    train_fraction: float = Field(1.0, gt=0, le=1)
    detectors: dict[str, dict[str, bool | int | float | str]] = {}  # options by detector name
    n_boot: int = Field(1000, ge=0)
    seed: int = Field(0, ge=0)  # splits, probe and intervals; the SAE has its own
    sae_seeds: int = Field(1, ge=1)  # SAEs from seed sae.seed on, over which tables are means; 1: no interval of seeds
    show_images: bool = False  # may its images stand in a book that is given away?

    @field_validator("pack", mode="before")
    @classmethod
    def _no_pack(cls, value):
        return None if value in ("", "none") else value  # TOML knows no null

    @model_validator(mode="after")
    def _head_fits(self):
        if self.pack and self.head == "backbone":
            raise ValueError('head = "backbone": a pack holds no backbone head; use head = "probe" or pack = "none"')
        return self

    @field_validator("sae")
    @classmethod
    def _known_variant(cls, value):
        sae_model(value)
        return value

    @property
    def ood_sets(self) -> list[str]:
        """Names of the OOD sets, near ones first."""
        return sorted(self.ood, key=lambda name: not name.startswith("near/"))

    @property
    def sets(self) -> list[str]:
        """Every set name: train, val, test, the OOD sets and the covariate-shifted ID sets."""
        return ["train", "val", "test", *self.ood_sets, *self.shifted]

    def source(self, set_name: str) -> Source | Holdout:
        """Return the source of a set as the experiment states it; ValueError for an unknown name."""
        if set_name in ("train", "val", "test"):
            return getattr(self, set_name)
        known = self.ood | self.shifted
        if set_name not in known:
            raise ValueError(f"experiment {self.name!r} has no set {set_name!r}; it has {', '.join(self.sets)}")
        return known[set_name]

    def source_spec(self, set_name: str) -> dict:
        """Return the source as the plain dict of ``data.open_source``, paths resolved against ``data_root``."""
        source = self.source(set_name)
        spec = source.model_dump(mode="json", exclude_none=True, exclude={"crop"})
        return spec | {key: str(self.resolve(getattr(source, key))) for key in path_fields(source)}

    def resolve(self, path: str) -> Path:
        """Return ``path`` itself if absolute, else under ``data_root`` or, without one, $CAPSAE_DATA."""
        path = Path(path).expanduser()
        root = self.data_root or os.environ.get(DATA_ENV)
        if path.is_absolute():
            return path
        if root is None:
            raise ExperimentError(
                f"experiment {self.name!r} reads {str(path)!r} from a folder that nobody has named",
                [f"set data_root to the folder that holds it (--set data_root=FOLDER), or the variable {DATA_ENV}"],
            )
        root = Path(root).expanduser().absolute()
        pattern = glob.has_magic(str(path)) and not (root / path).exists()
        return Path(glob.escape(str(root))) / path if pattern else root / path

    def missing_files(self, sets: list[str] | None = None) -> list[str]:
        """Return one line for each file or folder of ``sets`` (default: all) that is not there."""
        lines = []
        for name in self.sets if sets is None else sets:
            source = self.source(name)
            key = f"{'shifted' if name in self.shifted else 'ood'}.{name}" if "/" in name else name
            lines += [self._missing(f"{key}.{field}", getattr(source, field)) for field in path_fields(source)]
        if self.backbone.checkpoint:
            lines.append(self._missing("backbone.checkpoint", self.backbone.checkpoint))
        return [line for line in lines if line]

    def _missing(self, key: str, value: str) -> str | None:
        path = self.resolve(value)
        if path.exists() or glob.glob(str(path), recursive=True):
            return None
        return f"{key} = {value!r}: nothing at {path}; correct the path, or data_root"

    def check_files(self, sets: list[str] | None = None) -> None:
        """Raise ExperimentError, naming key, value and place, if a file or folder of ``sets`` is missing."""
        lines = self.missing_files(sets)
        if lines:
            raise ExperimentError(f"experiment {self.name!r}: missing files", lines)

    def to_dict(self) -> dict:
        """Return the experiment as plain values, the form of its TOML file."""
        return self.model_dump(mode="json", exclude_none=True)


def overrides_of(texts: Iterable[str]) -> dict[str, Any]:
    """Return overrides from ``KEY=VALUE`` texts, as ``--set`` takes them: TOML values, or bare text."""
    overrides = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"--set {text!r}: write KEY=VALUE, e.g. --set sae.k=64 (a set of images is --from-set)")
        key = key.strip().replace('"', "")  # TOML's quotes around a set's name
        try:
            overrides[key] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            overrides[key] = value.strip()  # such as --set pack=none
    return overrides


def available() -> list[str]:
    """Return the names of the embedded experiments, the default first."""
    names = sorted(path.stem for path in FOLDER.glob("*.toml"))
    return sorted(names, key=lambda name: (name != "imagenet20", name.startswith("imagenet1k")))


def load_experiment(name_or_path: str | Path | Experiment, overrides: Mapping[str, Any] | None = None) -> Experiment:
    """Load an experiment by name, from a ``.toml`` path, or from another experiment, with overrides on top.

    Parameters
    ----------
    name_or_path : str, Path or Experiment
    overrides : mapping of dotted keys to values, e.g. ``{"sae.k": 64}``

    Raises
    ------
    ExperimentError (a ValueError)
        Unknown experiment or key, wrong type, impossible value; a missing file where its place is known. Each line
        names the key, the value and what would do. (An embedded experiment whose ``data_root`` is not set yet is
        checked for files when a run begins.)
    """
    overrides = dict(overrides or {})
    if isinstance(name_or_path, Experiment):
        raw, label, own = name_or_path.to_dict(), f"experiment {name_or_path.name!r}", False
    else:
        path = _find(name_or_path)
        own = path.parent != FOLDER
        raw, label = _read(path), f"experiment {path.stem!r}" if not own else str(path)
        if own:
            _anchor(raw, path.parent)
    before = copy.deepcopy(raw)
    for key, value in overrides.items():
        _put(raw, key, value, label)
    try:
        experiment = Experiment.model_validate_json(json.dumps(raw, default=str), strict=True)
    except ValidationError as error:
        raise ExperimentError(f"{label} cannot be used", explain_validation(error, raw, known_keys())) from None
    _check_pack_stands(label, before, overrides)
    if experiment.data_root is not None and not Path(experiment.data_root).expanduser().is_dir():
        raise ExperimentError(f"{label} cannot be used", [f"data_root = {experiment.data_root!r}: no such folder"])
    if experiment.pack is None and (experiment.data_root or own):
        experiment.check_files()
    elif experiment.backbone.checkpoint:
        experiment.check_files([])
    return experiment


def known_keys() -> dict[str, list[str]]:
    """Return the keys of each table: "" (of the file itself), backbone, sae, caps, val, and "source" of every set."""
    models = {"": Experiment, "backbone": BackboneSpec, "caps": CapConfig, "val": Holdout}
    keys = {table: list(model.model_fields) for table, model in models.items()}
    sources = [list(model.model_fields) for model in (Hub, Parquet, ImageFolder, ImgList, Builtin)]
    return keys | {"sae": [f.name for f in fields(SAEConfig)], "source": list(dict.fromkeys(sum(sources, [])))}


def _find(name_or_path: str | Path) -> Path:
    text = str(name_or_path)
    if not text.endswith(".toml"):
        path = FOLDER / f"{text}.toml"
        if "/" in text or not path.is_file():
            known = ", ".join(available())
            raise ExperimentError(f"no experiment {text!r}", [f"known: {known}; or the path of your own .toml file"])
        return path
    path = Path(text).expanduser()
    if not path.is_file():
        embedded = ", ".join(available())
        raise ExperimentError(f"no experiment file {text!r}", [f"looked at {path.absolute()}; embedded: {embedded}"])
    return path.absolute()


def _read(path: Path) -> dict:
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ExperimentError(f"{path} is no readable TOML", [str(error)]) from None
    parent = raw.pop("extends", None)
    raw.setdefault("name", path.stem)
    if parent is None:
        return raw
    base = _find(path.parent / parent if str(parent).endswith(".toml") else parent)
    if base == path:
        raise ExperimentError(f"{path} extends itself", ["name another experiment"])
    inherited = _read(base)
    _check_pack_stands(str(path), inherited, _flat(raw))
    return _merged(inherited, raw)


def _merged(base: dict, own: dict) -> dict:
    """Lay ``own`` over ``base``; a source, and the table of OOD sets, replaces its predecessor whole."""
    out = dict(base)
    for key, value in own.items():
        whole = key in ("train", "val", "test", "ood", "shifted") or not isinstance(value, dict)
        out[key] = value if whole or not isinstance(out.get(key), dict) else _merged(out[key], value)
    return out


def _flat(raw: dict, prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in raw.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _anchor(raw: dict, folder: Path) -> None:
    """Let the relative paths of a user's own file start from that file's folder."""
    root = raw.get("data_root", os.environ.get(DATA_ENV, "."))
    if isinstance(root, str):
        raw["data_root"] = str((folder / Path(root).expanduser()).resolve())


def _check_pack_stands(label: str, before: Mapping, changes: Mapping[str, Any]) -> None:
    """Refuse changes that a pack's stored features would silently ignore; a new set beside the pack's is none."""
    pack = before.get("pack")
    known = [f"{table}.{name}" for table in ("ood", "shifted") for name in before.get(table, {})]
    if not pack or pack == "none" or "pack" in changes:
        return
    free = ("backbone.checkpoint", "backbone.pretrained", "val.fraction", "val.seed")
    ignored = [
        f"{key} = {value!r}: pack {pack!r} holds stored features, so this would change nothing;"
        ' also set pack = "none" and data_root to the images\' folder'
        for key, value in changes.items()
        if key.split(".")[0] in ("backbone", "train", "val", "test", *(("ood", "shifted") if _of(key, known) else ()))
        and key not in free
    ]
    if ignored:
        raise ExperimentError(f"{label} cannot be used", ignored)


def _of(key: str, known: list[str]) -> bool:
    key = key.replace('"', "")
    return "." not in key or any(key == name or key.startswith(f"{name}.") for name in known)


def _put(raw: dict, key: str, value: Any, label: str) -> None:
    """Set a dotted key in nested dicts; a part may be quoted, as `capsae experiments NAME` and TOML write it."""
    *parents, last = [quoted or bare for quoted, bare in re.findall(r'"([^"]+)"|([^.]+)', key)] or [key]
    at = raw
    for i, part in enumerate(parents):
        at = at.setdefault(part, {})
        if not isinstance(at, dict):
            where = ".".join(parents[: i + 1])
            raise ExperimentError(f"{label} cannot be used", [f"{key} = {value!r}: {where} is a value, it has no keys"])
    if parents in (["ood"], ["shifted"]) and isinstance(value, str):  # --set ood.far/mine=FOLDER
        value = {"kind": "folder", "path": str(Path(value).expanduser().absolute())}
    at[last] = value
