"""The rows and columns of the page of claims: rows for each of our own scores, verdicts on two backbones together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from capsae.detectors import info

from ...figures.comparisons import HEADLINE
from ...figures.tidy import METRIC_PANELS
from ...findings import FAILS, HOLDS, UNDECIDED

OUR_SCORES = ("rpd",)  # registry names; a claim with ``score: ours`` becomes one for each
NOT_RUN = "not run"
TOGETHER = "{}, both backbones"  # heading of the joint verdict


def number_name(method: str) -> str:
    """A detector in the key of a recorded number, which has no plus: mds++ -> mdspp."""
    return method.replace("+", "p")


def expanded(claims: Mapping[str, Mapping[str, Any]], ours: Iterable[str] = OUR_SCORES) -> dict[str, dict[str, Any]]:
    """Claims in full: one with ``score`` and ``beats`` gets its page, test and numbers.

    ``score: ours`` makes one for each of our scores. ``{score}`` in a sentence becomes the title of the score.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, of in claims.items():
        if "beats" not in of:
            found[name] = dict(of)
            continue
        rest = {key: value for key, value in of.items() if key not in ("score", "beats")}
        for score in ours if of["score"] == "ours" else [of["score"]]:
            pair = f"{number_name(score)}_less_{number_name(of['beats'])}"
            title = info(score)["title"].removesuffix(" (ours)")
            made = {"page": "04_score_ood", "test": f"{pair}_{HEADLINE} < 0", "decided": f"{pair}_{HEADLINE}"}
            made["numbers"] = {f"{pair}_{metric}": label for metric, label in METRIC_PANELS.items()}
            key = f"{score}_{name}" if of["score"] == "ours" else name
            found[key] = rest | made | {"sentence": of.get("sentence", "").format(score=title)}
    return found


def backbones(experiments: Iterable[str]) -> dict[str, list[str]]:
    """Experiments by their images, the name before the backbone's: imagenet20: [imagenet20, imagenet20-augreg]."""
    found: dict[str, list[str]] = {}
    for one in experiments:
        found.setdefault(one.partition("-")[0], []).append(one)
    return found


def joint(marks: Sequence[str]) -> str:
    """The verdict on several backbones: it holds if it holds on each, and fails if it fails on one; "": not run."""
    if not all(marks):
        return NOT_RUN
    if set(marks) <= {HOLDS, UNDECIDED, FAILS}:
        return next(mark for mark in (FAILS, UNDECIDED, HOLDS) if mark in marks)
    return next(mark for mark in marks if mark not in (HOLDS, UNDECIDED, FAILS))


def cells(marks: Mapping[str, Mapping[str, str]], claim: str) -> dict[str, str]:
    """One claim's marks by column: an experiment each, and the joint verdict after those that share their images.

    ``marks``: experiment -> claim -> mark; an experiment that was not run has none, and its cells are empty.
    """
    found = {}
    for images, of in backbones(marks).items():
        found |= {one: marks[one].get(claim, "") for one in of}
        if len(of) > 1:
            found[TOGETHER.format(images)] = joint([found[one] for one in of])
    return found
