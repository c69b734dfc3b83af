"""A function's call kept in the store: what a reader sees is the plain call, what a second run does is read.

>>> sae, history = cached(capsae.train_sae)(train.cls, experiment.sae, held_out=val.cls)  # doctest: +SKIP

The key is the content of the arguments and of the code that the function reaches, so that another argument or another
formula makes another call.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from capsae.caps import ClassActivationProfiles
from capsae.pipeline.code import digest as code_digest
from capsae.pipeline.run import Run
from capsae.pipeline.store import Store
from capsae.sae import SparseCodes, TopKSAE

_KEPT = {kind.__name__: kind for kind in (SparseCodes, ClassActivationProfiles)}  # dataclasses of arrays


def cached(function: Callable, store: Store | str | Path | None = None) -> Callable:
    """Return ``function`` with its results kept.

    Parameters
    ----------
    function : a function of a module
        Its arguments may be numbers, texts, arrays, tensors, data frames, codes, experiments, SAEs, runs,
        configurations, and lists, tuples and dicts of these. It returns arrays, frames, codes, experiments, SAEs, plain
        values, or lists, tuples and dicts of these. It must do nothing but return.
    store : Store or path, optional
        Default: see :func:`capsae.pipeline.store.default_root`.

    Raises
    ------
    TypeError
        For an argument or a result that is none of these.
    """
    store = store if isinstance(store, Store) else Store(store)

    @functools.wraps(function)
    def call(*args, **kwargs):
        bound = inspect.signature(function).bind(*args, **kwargs)
        bound.apply_defaults()
        inputs = {name: content(value) for name, value in bound.arguments.items()}
        config, stage = {"function": function.__qualname__}, f"call-{function.__name__}"
        return store.get_or_make(
            stage, config, inputs, _code(function), lambda: function(*args, **kwargs), _save, _load
        )

    return call


def _code(function: Callable) -> str:
    """The digest of all the code that a function reaches; of a reader's own function, of its text."""
    try:
        return code_digest(function)
    except ValueError:
        return hashlib.sha256(inspect.getsource(function).encode()).hexdigest()


def content(value: Any) -> str:
    """The digest of a value's content; TypeError for what has none that is known."""
    return hashlib.sha256(json.dumps(_form(value), sort_keys=True).encode()).hexdigest()


def _form(value: Any) -> Any:
    """A value as JSON, arrays by their digest."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Run):
        return ["run", *(value.digest(stage) for stage in ("features", "head", "caps", "scores"))]
    if isinstance(value, TopKSAE):
        return ["sae", _form(value.config), {name: _form(of) for name, of in value.state_dict().items()}]
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    if isinstance(value, np.ndarray):
        if value.dtype == object:
            return ["array", [_form(one) for one in value.ravel().tolist()], value.shape]
        digest = hashlib.sha256(np.ascontiguousarray(value)).hexdigest()
        return ["array", str(value.dtype), value.shape, digest]
    if isinstance(value, np.generic | Path):
        return _form(value.item() if isinstance(value, np.generic) else str(value))
    if isinstance(value, pd.DataFrame):
        return ["frame", [[name, _form(of.to_numpy())] for name, of in value.items()]]
    if dataclasses.is_dataclass(value):
        parts = {field.name: _form(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return [type(value).__name__, parts]
    if hasattr(value, "model_dump"):
        return [type(value).__name__, _form(value.model_dump())]
    if isinstance(value, Mapping):
        return ["mapping", [[_form(key), _form(of)] for key, of in value.items()]]
    if isinstance(value, list | tuple):
        return ["sequence", [_form(one) for one in value]]
    raise TypeError(f"cached: an argument of type {type(value).__name__} has no content that is known; arrays would do")


def _save(value: Any, folder: Path) -> None:
    from safetensors.numpy import save_file

    arrays: dict[str, np.ndarray] = {}
    (folder / "value.json").write_text(json.dumps(_taken_apart(value, folder, arrays)), encoding="utf-8")
    save_file(arrays, folder / "arrays.safetensors")


def _taken_apart(value: Any, folder: Path, arrays: dict[str, np.ndarray]) -> Any:
    """JSON of a value; arrays go into ``arrays``, frames and SAEs into files."""
    inner = functools.partial(_taken_apart, folder=folder, arrays=arrays)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    name = f"{len(arrays)}-{sum(1 for _ in folder.iterdir())}"
    match value:
        case TopKSAE():
            value.save(folder / name)
            return {"sae": name}
        case pd.DataFrame():
            value.to_parquet(folder / f"{name}.parquet", index=False)  # with its attrs
            return {"frame": f"{name}.parquet"}
        case np.ndarray():
            arrays[name] = np.ascontiguousarray(value)
            return {"array": name}
        case list() | tuple():
            return {"tuple" if isinstance(value, tuple) else "list": [inner(one) for one in value]}
        case Mapping():
            return {"dict": [[inner(key), inner(of)] for key, of in value.items()]}
        case _ if type(value).__name__ in _KEPT:
            parts = {field.name: inner(getattr(value, field.name)) for field in dataclasses.fields(value)}
            return {"kept": type(value).__name__, "parts": parts}
        case np.generic():
            return value.item()
    raise TypeError(f"cached: a result of type {type(value).__name__} cannot be kept; arrays or frames would do")


def _load(folder: Path) -> Any:
    from safetensors.numpy import load_file

    arrays = load_file(folder / "arrays.safetensors")
    return _put_together(json.loads((folder / "value.json").read_text(encoding="utf-8")), folder, arrays)


def _put_together(form: Any, folder: Path, arrays: Mapping[str, np.ndarray]) -> Any:
    inner = functools.partial(_put_together, folder=folder, arrays=arrays)
    match form:
        case {"sae": name}:
            return TopKSAE.load(folder / name)
        case {"frame": name}:
            return pd.read_parquet(folder / name)
        case {"array": name}:
            return arrays[name]
        case {"list": parts}:
            return [inner(one) for one in parts]
        case {"tuple": parts}:
            return tuple(inner(one) for one in parts)
        case {"dict": pairs}:
            return {inner(key): inner(of) for key, of in pairs}
        case {"kept": kind, "parts": parts}:
            return _KEPT[kind](**{name: inner(of) for name, of in parts.items()})
    return form
