"""Turn validation errors into lines a person can act on: the key, the value, what would do."""

from __future__ import annotations

import difflib
from typing import Any

from pydantic import ValidationError

_TAGS = {"hub", "parquet", "folder", "imglist", "builtin", "holdout"}
_ADDED = _TAGS | {"bool", "int", "float", "str", "[key]"}
_MAX_LINES = 12  # one screen


class ExperimentError(ValueError):
    """An experiment, or an override of one, that cannot be used; ``lines`` say why, one reason each."""

    def __init__(self, summary: str, lines: list[str]):
        more = [f"... and {len(lines) - _MAX_LINES} more"] if len(lines) > _MAX_LINES else []
        super().__init__("\n  ".join([summary + ":", *lines[:_MAX_LINES], *more]))
        self.lines = lines


def explain_validation(error: ValidationError, raw: dict, known: dict[str, list[str]]) -> list[str]:
    """Return one line for each wrong key of ``raw``: the key, the value, pydantic's message; for an unknown key, those
    that are near it in ``known`` ({table: keys}, see :func:`capsae.pipeline.experiments.known_keys`).
    """
    lines: dict[str, str] = {}
    for item in error.errors():
        path, value = _key_path(item["loc"], raw), item["input"]
        key, message = ".".join(path), item["msg"].removeprefix("Value error, ")
        if item["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            message = f"unknown key; {_nearest(path, known)}"
        elif isinstance(value, float) and item["type"].startswith("int"):
            message = f"{message}; write {value:.0f}" if value.is_integer() else "a whole number is needed"
        elif item["type"] == "union_tag_invalid":
            key, value = f"{key}.kind", item["ctx"]["tag"]
        elif item["type"] == "union_tag_not_found":
            key, message = f"{key}.kind", f"missing; one of {', '.join(sorted(_TAGS - {'holdout'}))} would do"
        shown = key if isinstance(value, dict) else f"{key} = {value!r}"
        # A union of plain types reports once per type; one line a key says enough.
        lines.setdefault(key, f"{shown}: {message}" if key else message)
    return list(lines.values())


def _key_path(loc: tuple, raw: Any) -> tuple[str, ...]:
    """Drop from ``loc`` what pydantic adds (names of union members), keep the keys of the TOML file."""
    path, at = [], raw
    for part in loc:
        inside = isinstance(at, dict) and part in at
        if not inside and part in _ADDED:
            continue
        path.append(str(part))
        at = at[part] if inside else None
    return tuple(path)


def _nearest(path: tuple[str, ...], known: dict[str, list[str]]) -> str:
    *parents, last = path
    table = (parents or [""])[0]
    here = known["source" if table not in known or (table == "val" and last not in known["val"]) else table]
    here = [*here, *known["val"]] if table == "val" else here
    close = difflib.get_close_matches(last, here, n=1, cutoff=0.5)
    meant = [".".join([*parents, name]) for name in close]
    others = {key: f"{other}.{key}".strip(".") for other, keys in known.items() if other != "source" for key in keys}
    if last in others or not close:
        meant += [others[name] for name in difflib.get_close_matches(last, others, n=1, cutoff=0.7)]
    hint = f"did you mean {' or '.join(dict.fromkeys(meant))}? " if meant else ""
    return f"{hint}known here: {', '.join(sorted(set(here)))}"
