"""The page of the book that lists every autoencoder and dictionary: `templates/dictionaries.md` and their metadata."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from ..findings import render
from .fitting import KINDS, member, members

NAMED = {  # sources without an arXiv number, by the text of the metadata
    "Bricken et al. 2023": "bricken2023monosemanticity",
    "Ding, Li, Jordan 2008": "ding2010convex",
    "Lloyd 1982": "lloyd1982least",
    "Pearson 1901": "pearson1901lines",
}


def dictionaries_page(references: Path, heading: str) -> str:
    """The Markdown of dictionaries.md, from the metadata of every member; sources become citations."""
    keys = citations(references)
    return render(
        "dictionaries.md",
        heading=heading.rstrip(),
        members={kind: [member(name) for name in members(kind)] for kind in KINDS},
        cited=lambda source: cited(source, keys),
        prose=_prose,
        options=_options,
    )


def citations(references: Path) -> dict[str, str]:
    """Keys of the bibliography by arXiv number, and those of `NAMED`."""
    entries = re.split(r"\n(?=@)", references.read_text(encoding="utf-8"))
    found = {}
    for entry in entries:
        key = re.match(r"\s*@\w+\{(\w+),", entry)
        for number in re.findall(r"arxiv\.org/abs/(\d{4}\.\d{5})", entry):
            found[f"arXiv {number}"] = key[1]
    return found | NAMED


def cited(source: str, keys: Mapping[str, str]) -> str:
    """A source's text with a citation after each work that the bibliography has."""
    known = "|".join(map(re.escape, keys))
    return re.sub(known, lambda at: f"{{cite:p}}`{keys[at[0]]}`", source) if keys else source


def _options(options: Mapping) -> str:
    return ", ".join(f"`{key}={value!r}`" for key, value in options.items()) or "none"


def _prose(docstring: str) -> str:
    """The prose of a docstring: up to its first underlined section, one line, double backticks as Markdown has them."""
    prose = re.split(r"\n\s*[A-Z][a-z]+(?: \([^)]*\))?\n\s*-{3,}", docstring or "")[0]
    return " ".join(prose.replace("``", "`").split())
