"""Turn validation errors into lines a person can act on: the key, the value, what would do."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from typing import Any

from pydantic import BaseModel, ValidationError

_TAGS = {"hub", "parquet", "folder", "imglist", "builtin", "holdout"}
_MAX_LINES = 12  # one screen


class ProfileError(ValueError):
    """A profile, or an override of one, that cannot be used; ``lines`` say why, one reason each."""

    def __init__(self, summary: str, lines: list[str]):
        more = [f"... and {len(lines) - _MAX_LINES} more"] if len(lines) > _MAX_LINES else []
        super().__init__("\n  ".join([summary + ":", *lines[:_MAX_LINES], *more]))
        self.lines = lines


def explain_validation(error: ValidationError, raw: dict, model: type) -> list[str]:
    """Return one line for each wrong key of ``raw``."""
    lines = {}
    for item in error.errors():
        path = _key_path(item["loc"], raw)
        # A union of plain types reports once per type; one line a key says enough.
        lines.setdefault(path, _line(path, item, raw, model))
    return list(lines.values())


def _key_path(loc: tuple, raw: Any) -> tuple[str, ...]:
    """Drop from ``loc`` what pydantic adds (names of union members), keep the keys of the TOML file."""
    path, at = [], raw
    for part in loc:
        inside = isinstance(at, dict) and part in at
        added = isinstance(part, str) and (part in _TAGS or part in ("bool", "int", "float", "str"))
        if added and not inside:
            continue
        path.append(str(part))
        at = at[part] if inside else None
    return tuple(path)


def _line(path: tuple[str, ...], item: dict, raw: dict, model: type) -> str:
    key, kind, value, context = ".".join(path), item["type"], item["input"], item.get("ctx", {})
    if kind == "missing" or kind == "missing_argument":
        return f"{key}: missing; this key has to be given"
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"{key} = {value!r}: unknown key; {_nearest(path, raw, model)}"
    shown = f"{key} = {value!r}" if not isinstance(value, dict) else key
    if kind == "value_error":
        return f"{shown}: {context['error']}" if key else str(context["error"])
    if kind == "int_type" and isinstance(value, float):
        hint = f"write {int(value)}" if value == int(value) else "it has none"
        return f"{shown}: a float, where a whole number is needed; {hint}"
    if kind == "literal_error":
        return f"{shown}: unknown option; use {context['expected']}"
    if kind == "union_tag_invalid":
        kinds = f"one of {context['expected_tags']}"
        return f"{key}.kind = {context['tag']!r}: unknown kind of source; use {kinds}"
    if kind == "union_tag_not_found":
        return f"{key}.kind: missing; use one of {', '.join(sorted(_TAGS - {'holdout'}))}"
    return f"{shown}: {type(value).__name__} found; {item['msg'].lower().replace('an object', 'a table')}"


def _nearest(path: tuple[str, ...], raw: dict, model: type) -> str:
    prefix = ".".join([*path[:-1], ""]) if len(path) > 1 else ""
    known = sorted(_keys_at(model, path[:-1], raw))
    close = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.5)
    by_name = {key.rpartition(".")[2]: key for key in reversed(all_keys(model))}
    # The same name in another table, or, if nothing here is near, a near one there.
    elsewhere = [path[-1]] if path[-1] in by_name else []
    elsewhere = elsewhere or ([] if close else difflib.get_close_matches(path[-1], by_name, n=1, cutoff=0.7))
    meant = [prefix + name for name in close] + [by_name[name] for name in elsewhere]
    hint = f"did you mean {' or '.join(meant)}? " if meant else ""
    return f"{hint}known here: {', '.join(known)}"


def all_keys(model: type, prefix: str = "") -> list[str]:
    """Return every dotted key that has a fixed name, e.g. ``sae.k``."""
    keys = []
    for name, annotation in _fields(model).items():
        keys.append(prefix + name)
        for part in _members(annotation):
            keys += all_keys(part, f"{prefix}{name}.")
    return sorted(set(keys))


def _keys_at(model: type, path: tuple[str, ...], raw: Any) -> set[str]:
    """Return the keys that may stand in the table at ``path``; a source's depend on its kind."""
    models, at = [model], raw
    for part in path:
        at = at.get(part) if isinstance(at, dict) else None
        annotations = [_fields(m)[part] for m in models if part in _fields(m)]
        # A dict field (ood, detectors) has free names: its values' types are already among the members.
        models = [member for a in annotations for member in _members(a)] or models
    kind = at.get("kind") if isinstance(at, dict) else None
    of_kind = [m for m in models if (kind in str(_fields(m)["kind"]) if "kind" in _fields(m) and kind else not kind)]
    of_kind = [m for m in of_kind if kind or "kind" not in _fields(m)]
    return {name for m in of_kind or models for name in _fields(m)}


def _fields(model: type) -> dict[str, Any]:
    if isinstance(model, type) and issubclass(model, BaseModel):
        return {name: field.annotation for name, field in model.model_fields.items()}
    if dataclasses.is_dataclass(model):
        return {field.name: field.type for field in dataclasses.fields(model)}
    return {}


def _members(annotation: Any) -> list[type]:
    """Return the models and dataclasses an annotation is made of (through unions, Annotated, dict values)."""
    if isinstance(annotation, type) and _fields(annotation):
        return [annotation]
    return [member for part in typing.get_args(annotation) for member in _members(part)]
