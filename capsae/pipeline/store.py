"""Content-addressed artefacts: what was made once from the same settings, inputs and code is read, not made again.

An artefact is a folder ``<root>/<stage>/<digest>/`` with its files and a ``provenance.json``. It appears by one rename,
so a killed run leaves no artefact or a whole one; a lock per artefact lets two processes that want the same one share
the work.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from errno import EINVAL, ENOLCK, ENOSYS, ENOTSUP, EOPNOTSUPP
from pathlib import Path
from typing import Any

from filelock import FileLock

from ..device import machine, peak_rss_mb, versions
from ..files import default_root, file_record, sync

log = logging.getLogger(__name__)

__code_version__ = 1  # how a result is kept does not change it: see capsae.pipeline.code
SCHEMA = 2
_PROVENANCE = "provenance.json"


class CorruptArtefact(ValueError):
    """A stored artefact whose files are not those that were written."""


class UnreadableArtefact(OSError):
    """A whole artefact that cannot be read here and now: a device is missing, memory, a right, a free file handle."""


@dataclass(frozen=True)
class Entry:
    """One stored artefact: ``size`` in bytes, ``age`` in seconds, its provenance (empty where that is damaged)."""

    stage: str
    key: str
    path: Path
    size: int
    age: float
    provenance: Mapping[str, Any]


class Store:
    """Artefacts under one folder, by default :func:`default_root`."""

    def __init__(self, root: str | Path | None = None):
        self.root = Path(root).expanduser().absolute() if root is not None else default_root()

    def path(self, stage: str, digest: str) -> Path:
        """Return where an artefact lies or would lie."""
        return self.root / stage / digest[:20]

    def scratch(self, stage: str, digest: str) -> Path:
        """Return a folder that outlives a killed run, for stages that resume; it goes once the artefact is made."""
        path = self.root / "scratch" / f"{stage}-{digest[:20]}"
        path.mkdir(parents=True, exist_ok=True)
        return path

    def get_or_make(
        self,
        stage: str,
        config: Any,
        inputs: Mapping[str, str],
        code: str,
        make: Callable[[], Any],
        save: Callable[[Any, Path], Any],
        load: Callable[[Path], Any],
        provenance: Mapping[str, Any] | None = None,
    ) -> Any:
        """Return the artefact that ``config``, ``inputs`` and ``code`` define, made if it is not there.

        Parameters
        ----------
        stage : str
            Name of the kind of artefact, e.g. ``"sae"``.
        config : JSON value
            The settings of this stage and no others.
        inputs : mapping of names to digests
            What it is made from.
        code : str
            Digest of the code that makes it: :func:`capsae.pipeline.code.digest`.
        make, save, load : callables
            ``save(value, folder)`` writes into a new folder, ``load(folder)`` reads it back.
        provenance : mapping, optional
            Further entries of provenance.json: experiment, seeds, device.

        Raises
        ------
        UnreadableArtefact
            Where files that are whole cannot be read; they are kept.

        Notes
        -----
        An artefact whose files are not those that were written is named in a warning and made again; it goes once the
        new one is whole.

        Under torchrun all ranks come here in the same order. The first alone looks and writes; what is not there, all
        make together.
        """
        from .. import distributed

        recipe = stage, config, inputs, code
        if distributed.world_size() == 1:
            return self._get_or_make(*recipe, make, save, load, provenance)
        if distributed.rank() == 0:

            def lead():
                distributed.broadcast("make")
                return make()

            value = self._get_or_make(*recipe, lead, save, load, provenance)
            distributed.broadcast("there")
            return value
        made = []
        while distributed.broadcast(None) == "make":
            made = [make()]
        return made[0] if made else load(self.path(stage, artefact_digest(*recipe)))

    def _get_or_make(self, stage, config, inputs, code, make, save, load, provenance) -> Any:
        digest = artefact_digest(stage, config, inputs, code)
        path = self.path(stage, digest)
        found, value = _read(path, load)
        if found:
            return value
        with _locked(path.with_name(f"{path.name}.lock")):
            found, value = _read(path, load)  # another process may have made it while we waited
            if found:
                return value
            started = time.perf_counter()
            value = make()
            record = {
                "schema": SCHEMA,
                "stage": stage,
                "digest": digest,
                "config": config,
                "inputs": dict(inputs),
                "code": code[:20],
                **dict(provenance or {}),
                "versions": versions(),
                "machine": machine(),
                "wall_s": round(time.perf_counter() - started, 3),
                "peak_rss_mb": peak_rss_mb(),
            }
            for left in path.parent.glob(f".{path.name}.*"):  # of killed makers; we hold the lock
                shutil.rmtree(left, ignore_errors=True)
            _write(path, value, save, record)
            shutil.rmtree(self.root / "scratch" / f"{stage}-{digest[:20]}", ignore_errors=True)
        return value

    def provenance(self, stage: str, digest: str) -> dict | None:
        """Return an artefact's provenance, or None if it has not been made."""
        path = self.path(stage, digest) / _PROVENANCE
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def entries(self) -> Iterator[Entry]:
        """Yield every stored artefact, by stage and age, and the folders that killed makers left to go on from."""
        for stage in sorted(p for p in self.root.iterdir() if p.is_dir()) if self.root.is_dir() else ():
            folders = [p for p in stage.iterdir() if p.is_dir() and not p.name.startswith(".")]
            for path in sorted(folders, key=lambda p: p.stat().st_mtime):
                size = sum((path / name).stat().st_size for name in _files(path))
                try:
                    record = json.loads((path / _PROVENANCE).read_text(encoding="utf-8"))
                except (FileNotFoundError, ValueError):
                    record = {}
                yield Entry(stage.name, path.name, path, size, time.time() - path.stat().st_mtime, record)

    def remove(self, entry: Entry) -> None:
        """Remove an artefact, with its lock; what a running process makes or reads is not to be removed."""
        shutil.rmtree(entry.path)
        entry.path.with_name(f"{entry.path.name}.lock").unlink(missing_ok=True)


def artefact_digest(stage: str, config: Any, inputs: Mapping[str, str], code: str = "") -> str:
    """Return the hex SHA-256 that names an artefact, from what defines it; nothing is made or read."""
    text = json.dumps([SCHEMA, stage, config, dict(inputs), code], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def check_files(folder: Path) -> None:
    """Raise CorruptArtefact, naming the file, unless all files are as provenance.json records them."""
    try:
        files = json.loads((folder / _PROVENANCE).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        raise CorruptArtefact(f"{folder} holds no {_PROVENANCE}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptArtefact(f"{folder / _PROVENANCE} is damaged: {error}") from None
    for name, expected in files.items():
        path = folder / name
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            raise CorruptArtefact(f"{path} is missing") from None
        if size != expected["bytes"]:
            raise CorruptArtefact(f"{path} has {size} bytes, {expected['bytes']} were written")
        if file_record(path) != expected:
            raise CorruptArtefact(f"{path} has other content than was written")


def _read(path: Path, load: Callable[[Path], Any]) -> tuple[bool, Any]:
    if not path.is_dir():
        return False, None
    try:
        check_files(path)
        return True, load(path)
    except CorruptArtefact as error:
        log.warning("stored artefact %s is damaged (%s); making it again", path, error)
        return False, None
    except Exception as error:  # its files are those that were written: whatever is wrong is not wrong with them
        why = f"{type(error).__name__}: {error}"
        raise UnreadableArtefact(f"stored artefact {path} is whole and kept, but cannot be read here: {why}") from error


def _write(path: Path, value: Any, save: Callable[[Any, Path], Any], record: dict) -> None:
    temporary, aside = (path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}") for _ in range(2))
    temporary.mkdir(parents=True)
    try:
        save(value, temporary)
        record["files"] = {name: file_record(temporary / name) for name in _files(temporary)}
        text = json.dumps(record, indent=1, sort_keys=True, default=str) + "\n"
        (temporary / _PROVENANCE).write_text(text, encoding="utf-8")
        for name in [*_files(temporary), _PROVENANCE]:
            sync(temporary / name)
        for folder in {temporary, *(p.parent for p in temporary.rglob("*"))}:
            sync(folder)
        if path.exists():
            with contextlib.suppress(CorruptArtefact):
                check_files(path)
                return  # without a lock (some network file systems) another process was first: its artefact stands
            os.rename(path, aside)
        os.rename(temporary, path)
        sync(path.parent)
    finally:
        for folder in (temporary, aside):
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock that ends with the process, however that ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire()
    except (NotImplementedError, OSError) as error:
        if getattr(error, "errno", ENOSYS) not in (ENOSYS, ENOTSUP, EOPNOTSUPP, ENOLCK, EINVAL):
            raise
        log.debug("no file lock at %s", path)  # this file system has none: the rename still keeps artefacts whole
    try:
        yield
    finally:
        lock.release()


def _files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.name != _PROVENANCE)
