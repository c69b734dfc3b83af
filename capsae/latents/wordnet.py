"""WordNet above the classes of an experiment: which class is a dog, a carnivore, an artifact, and how far apart two
are.

ImageNet names its classes by noun synsets of WordNet 3.0 ("n02088364" is the beagle). The hypernyms above all classes
that occur in the embedded packs lie beside this module in ``wordnet.json``, an extract that :func:`extract` makes; for
other classes, :func:`load` reads a folder with WordNet's own ``data.noun``: Debian's package wordnet-base
(/usr/share/wordnet) or the corpus of nltk (nltk_data/corpora/wordnet). Only 3.0 will do, since other versions number
their synsets differently.

Source: Miller, "WordNet: a lexical database for English", CACM 1995. WordNet is Princeton University's, free to use
and to redistribute with its notice, which the extract holds in "licence".
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from graphlib import TopologicalSorter
from pathlib import Path

import numpy as np

EXTRACT = Path(__file__).with_name("wordnet.json")
FOLDER = "CAPSAE_WORDNET"  # environment variable: where data.noun lies, for classes that the extract does not know
SCHEMA = 1
_WNID = re.compile(r"n\d{8}")
_HYPERNYM = ("@", "@i")  # kind of, instance of


def wnid(class_name: str) -> str | None:
    """The synset that a class name begins with, None where the name is not ImageNet's.

    >>> wnid("n01440764_tench"), wnid("n01440764"), wnid("tench")
    ('n01440764', 'n01440764', None)
    """
    found = re.match(r"(n\d{8})(_|$)", str(class_name))
    return found[1] if found else None


@dataclass(frozen=True)
class Taxonomy:
    """The hypernyms of some classes: a directed graph without cycles, in which a synset may have several parents.

    Made by :func:`load`. Synsets are named as ImageNet names them: "n" and eight digits.
    """

    leaves: tuple[str, ...]  # the classes, in the order in which they were given; C of them
    lemmas: Mapping[str, tuple[str, ...]]
    parents: Mapping[str, tuple[str, ...]]  # hypernyms and instance hypernyms

    def name(self, synset: str) -> str:
        """The first lemma of a synset: "n02084071" is "dog"."""
        return self.lemmas[self._known(synset)][0].replace("_", " ")

    def ancestors(self, synset: str) -> set[str]:
        """The synset and all above it."""
        return set(self._ups[self._known(synset)])

    def members(self, synset: str) -> np.ndarray:
        """(C,) bool: which leaves are the synset or lie under it, in the order of ``leaves``."""
        self._known(synset)
        return np.array([synset in self._ups[leaf] for leaf in self.leaves])

    def depth(self, synset: str) -> int:
        """Hypernyms on the longest way up to the root, which has depth 0: an ancestor is never as deep."""
        return self._depths[self._known(synset)]

    @cached_property
    def synsets(self) -> tuple[str, ...]:
        """The synsets that divide the leaves: at least two under it, not all; from the root down, ties by number.

        Of those with the same leaves under them only the lowest (deepest) is kept: they are one question.
        """
        lowest: dict[bytes, str] = {}
        for synset in self._downwards:
            members = self.members(synset)
            if 2 <= members.sum() < len(members):
                lowest[members.tobytes()] = synset  # a deeper one comes later
        return tuple(synset for synset in self._downwards if synset in set(lowest.values()))

    def path_distance(self) -> np.ndarray:
        """(C, C) int: hypernym links between two leaves by way of the common ancestor that makes them fewest."""
        index = {synset: i for i, synset in enumerate(self.lemmas)}
        up = np.full((len(self.leaves), len(index)), 10**6)
        for row, leaf in zip(up, self.leaves, strict=True):
            for synset, links in self._ups[leaf].items():
                row[index[synset]] = links
        return np.stack([(row + up).min(axis=1) for row in up])

    @cached_property
    def _ups(self) -> dict[str, dict[str, int]]:
        """Of every synset, its ancestors (itself included) with the fewest links up to them."""
        ups: dict[str, dict[str, int]] = {}
        for synset in self._downwards:
            found = {synset: 0}
            for parent in self.parents[synset]:
                for above, links in ups[parent].items():
                    found[above] = min(links + 1, found.get(above, links + 1))
            ups[synset] = found
        return ups

    @cached_property
    def _depths(self) -> dict[str, int]:
        depths: dict[str, int] = {}
        for synset in TopologicalSorter(self.parents).static_order():  # parents first
            depths[synset] = max((depths[parent] + 1 for parent in self.parents[synset]), default=0)
        return depths

    @cached_property
    def _downwards(self) -> list[str]:
        return sorted(self.lemmas, key=lambda synset: (self._depths[synset], synset))

    def _known(self, synset: str) -> str:
        if synset not in self.lemmas:
            raise ValueError(f"{synset!r} is neither one of the {len(self.leaves)} classes nor above any")
        return synset


def load(wnids: Iterable[str], folder: str | Path | None = None) -> Taxonomy:
    """The taxonomy above distinct noun synsets, such as ``[wordnet.wnid(name) for name in features.class_names]``.

    ``folder`` has WordNet 3.0's data.noun. Default: the embedded extract; where that lacks a class, the folder that the
    environment variable CAPSAE_WORDNET names. ValueError for what is no synset, given twice, or not there.
    """
    wnids = tuple(wnids)
    wrong = [one for one in wnids if not (isinstance(one, str) and _WNID.fullmatch(one))]
    if wrong or not wnids:
        found = f"{wrong[0]!r} is no noun synset" if wrong else "no synsets are given"
        raise ValueError(f"{found}: names such as 'n01440764' would do, which ImageNet's class names begin with")
    twice = [one for i, one in enumerate(wnids) if one in wnids[:i]]
    if twice:
        raise ValueError(f"{twice[0]} is given twice: each class once would do")
    lacking = [one for one in wnids if one not in embedded()["synsets"]]
    if folder is None and lacking:
        folder = os.environ.get(FOLDER)
        if not folder:
            raise ValueError(
                f"{lacking[0]} (of {len(lacking)}) is not in the embedded extract of WordNet: "
                f"folder= or {FOLDER} with the folder of WordNet 3.0's data.noun would do"
            )
    synsets = embedded()["synsets"] if folder is None else extract(folder, wnids)["synsets"]
    above, todo = set(), list(wnids)
    while todo:
        synset = todo.pop()
        if synset not in above:
            above.add(synset)
            todo += synsets[synset]["hypernyms"]
    kept = {synset: synsets[synset] for synset in sorted(above)}
    return Taxonomy(
        wnids,
        {synset: tuple(of["lemmas"]) for synset, of in kept.items()},
        {synset: tuple(of["hypernyms"]) for synset, of in kept.items()},
    )


@cache
def embedded() -> dict:
    """The committed extract: "schema", "source", "licence", "wnids" it was made for, "synsets"; read once."""
    return json.loads(EXTRACT.read_text(encoding="utf-8"))


def extract(folder: str | Path, wnids: Iterable[str]) -> dict:
    """What :func:`load` needs of the WordNet 3.0 in a folder: every synset above some classes, as JSON.

    Keys: "schema", "source", "licence" (the notice that redistribution asks for), "wnids" (sorted), "synsets": of each
    its "lemmas" and "hypernyms", instance hypernyms among them. FileNotFoundError or ValueError if there is no
    data.noun, if it is not WordNet 3.0's, or a synset is not in it.
    """
    path = Path(folder) / "data.noun"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: the folder of WordNet 3.0's dictionary files holds one")
    notice, lines = [], {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("  "):
            notice.append(re.sub(r"^ +\d+ ?", "", line).rstrip())
        else:
            lines[f"n{line[:8]}"] = line
    if not any("WordNet 3.0 Copyright" in line for line in notice):
        found = next((line for line in notice if "Copyright" in line), "no version")
        raise ValueError(f"{path} is of {found!r}: synsets are numbered as ImageNet has them in WordNet 3.0 alone")
    wnids = sorted(set(wnids))
    synsets, todo = {}, list(wnids)
    while todo:
        synset = todo.pop()
        if synset in synsets:
            continue
        if synset not in lines:
            raise ValueError(f"{path} has no synset {synset}")
        synsets[synset] = _parsed(lines[synset])
        todo += synsets[synset]["hypernyms"]
    return {
        "schema": SCHEMA,
        "source": "WordNet 3.0, data.noun: every synset above those of wnids, their words and (instance) hypernyms",
        "licence": "\n".join(notice).strip(),
        "wnids": wnids,
        "synsets": {synset: synsets[synset] for synset in sorted(synsets)},
    }


def _parsed(line: str) -> dict:
    """Lemmas and hypernyms of a line: offset file kind n (lemma id)*n m (pointer offset kind place)*m | gloss."""
    parts = line.split(" | ")[0].split()
    n_lemmas = int(parts[3], 16)
    pointers = parts[5 + 2 * n_lemmas :]
    return {
        "lemmas": parts[4 : 4 + 2 * n_lemmas : 2],
        "hypernyms": [f"n{pointers[i + 1]}" for i in range(0, len(pointers), 4) if pointers[i] in _HYPERNYM],
    }
