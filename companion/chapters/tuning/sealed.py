"""Test sets under seal: they open once, for options that are frozen, and never while something is being tuned.

Python hides nothing from code that is out to cheat. What this does: :class:`Sealed` loads a test set only when it is
opened, so that its arrays do not exist before; and while a criterion runs (:func:`tuning`), neither a seal nor
``pipeline.Run`` hands out anything but ID training and validation rows, in any thread. Reaching a test set by oversight
is an error.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

OPEN_SETS = ("train", "val")
_tuned: list[str] = []  # what is being tuned; of the process, so that a criterion's threads are held by it, too


class SealedError(RuntimeError):
    """A test set was asked for while it must not be seen."""


@contextmanager
def tuning(name: str) -> Iterator[None]:
    """While inside, test sets are out of reach; ``name`` is what is being tuned."""
    _tuned.append(name)
    try:
        yield
    finally:
        _tuned.remove(name)


def check_reach(set_name: str) -> None:
    """Raise SealedError for a set other than ID train and val while something is being tuned."""
    if _tuned and set_name not in OPEN_SETS:
        raise SealedError(f"{_tuned[-1]} is being tuned: {set_name!r} is out of reach, use {' or '.join(OPEN_SETS)}")


@dataclass(frozen=True)
class Frozen:
    """Options that will not change any more, as JSON, with their digest; made by :func:`freeze`."""

    text: str

    @property
    def options(self) -> dict[str, dict[str, Any]]:
        """Detector -> options: a new copy at each call, so that nothing can be changed behind the digest's back."""
        return json.loads(self.text)

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()[:12]


def freeze(options: Mapping[str, Mapping[str, Any]]) -> Frozen:
    """Freeze the options {detector: {option: value}}; SealedError inside a criterion, which must not decide alone."""
    if _tuned:
        raise SealedError(f"{_tuned[-1]} is being tuned: options are frozen when all tuning is done")
    return Frozen(json.dumps({name: dict(of) for name, of in options.items()}, sort_keys=True))


class Sealed:
    """Test sets by name, loaded when the seal is opened and not before.

    Parameters
    ----------
    names : the sets
    load : function of a name
        Gives the set's observations, e.g. ``run.observations``.
    """

    def __init__(self, names: Iterable[str], load: Callable[[str], Any]):
        self.names = tuple(names)
        self._load = load
        self._opened_for: str | None = None

    def open(self, frozen: Frozen) -> dict[str, Any]:
        """The sets, once.

        Raises
        ------
        SealedError
            While something is being tuned; without frozen options; at the second time.
        """
        if _tuned:
            raise SealedError(f"{_tuned[-1]} is being tuned: the test sets stay sealed")
        if not isinstance(frozen, Frozen):
            raise SealedError(f"the test sets open for frozen options, found {type(frozen).__name__}: use freeze(...)")
        if self._opened_for is not None:
            raise SealedError(f"the seal was opened already, for the options {self._opened_for}: it opens once")
        self._opened_for = frozen.digest
        return {name: self._load(name) for name in self.names}

    def _closed(self, *_):
        raise SealedError("these test sets are sealed: open(freeze(options)) once all options are chosen")

    __getitem__ = __iter__ = __len__ = __contains__ = _closed

    def __repr__(self) -> str:
        return f"Sealed({', '.join(self.names)}: {'opened for ' + self._opened_for if self._opened_for else 'closed'})"
