"""Content-addressed artefacts: what was made once from the same settings, inputs and code is read, not made again.

An artefact is a folder ``<root>/<stage>/<digest>/`` with its files and a ``provenance.json``. It appears by one rename,
so a killed run leaves no artefact or a whole one; a lock per artefact lets two processes that want the same one share
the work.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import json
import logging
import os
import platform
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from importlib import metadata, util
from pathlib import Path
from typing import Any

from .files import sync

log = logging.getLogger(__name__)

SCHEMA = 1
HOME_ENV = "CAPSAE_HOME"
_PROVENANCE = "provenance.json"
_PACKAGES = ("capsae", "torch", "timm", "numpy", "scipy", "scikit-learn", "pandas", "safetensors")


class CorruptArtefact(ValueError):
    """A stored artefact whose files are not those that were written."""


def default_root() -> Path:
    """Return ``$CAPSAE_HOME``, else ``.capsae`` of the project around the current folder, else the user's cache."""
    if os.environ.get(HOME_ENV):
        return Path(os.environ[HOME_ENV]).expanduser().absolute()
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / ".capsae").is_dir() or (folder / "capsae" / "store.py").is_file():
            return folder / ".capsae"
    cache_home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache_home) / "capsae"


class Store:
    """Artefacts under one folder.

    Parameters
    ----------
    root : path, optional
        Default: see :func:`default_root`.
    """

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
        modules: Iterable[str],
        make: Callable[[], Any],
        save: Callable[[Any, Path], Any],
        load: Callable[[Path], Any],
        provenance: Mapping[str, Any] | None = None,
    ) -> Any:
        """Return the artefact that ``config``, ``inputs`` and the code of ``modules`` define, made if it is not there.

        Parameters
        ----------
        stage : str
            Name of the kind of artefact, e.g. ``"sae"``.
        config : JSON value
            The settings of this stage and no others.
        inputs : mapping of names to digests
            What it is made from.
        modules : names of the modules that make it; see :func:`source_digest`
        make, save, load : callables
            ``save(value, folder)`` writes into a new folder, ``load(folder)`` reads it back.
        provenance : mapping, optional
            Further entries of provenance.json: profile, seeds, device.

        Notes
        -----
        A damaged artefact is named in a warning, set aside and made again.

        Under torchrun all ranks come here in the same order. The first alone looks and writes; what is not there, all
        make together.
        """
        from . import distributed

        recipe = stage, config, inputs, tuple(modules)
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

    def _get_or_make(self, stage, config, inputs, modules, make, save, load, provenance) -> Any:
        digest = artefact_digest(stage, config, inputs, modules)
        path = self.path(stage, digest)
        found, value = self._read(path, load)
        if found:
            return value
        with _locked(path.with_name(f"{path.name}.lock")):
            found, value = self._read(path, load)  # another process may have made it while we waited
            if found:
                return value
            self._clear(path)
            started = time.perf_counter()
            value = make()
            record = {
                "schema": SCHEMA,
                "stage": stage,
                "digest": digest,
                "config": config,
                "inputs": dict(inputs),
                "source": {name: source_digest([name])[:20] for name in modules},
                **dict(provenance or {}),
                "versions": versions(),
                "machine": machine(),
                "wall_s": round(time.perf_counter() - started, 3),
                "peak_rss_mb": peak_rss_mb(),
            }
            self._write(path, value, save, record)
            shutil.rmtree(self.root / "scratch" / f"{stage}-{digest[:20]}", ignore_errors=True)
        return value

    def provenance(self, stage: str, digest: str) -> dict | None:
        """Return an artefact's provenance, or None if it has not been made."""
        path = self.path(stage, digest) / _PROVENANCE
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def _read(self, path: Path, load: Callable[[Path], Any]) -> tuple[bool, Any]:
        if not path.is_dir():
            return False, None
        try:
            check_files(path)
            return True, load(path)
        except Exception as error:  # whatever a reader makes of damaged files, the way out is the same
            log.warning("stored artefact %s cannot be read (%s); making it again", path, error)
            return False, None

    def _clear(self, path: Path) -> None:
        """Remove what killed makers of this artefact left, and a damaged one. Called under its lock."""
        for left in path.parent.glob(f".{path.name}.*"):
            shutil.rmtree(left, ignore_errors=True)
        if path.exists():
            aside = path.with_name(f".{path.name}.damaged-{uuid.uuid4().hex[:8]}")
            os.replace(path, aside)
            shutil.rmtree(aside, ignore_errors=True)

    def _write(self, path: Path, value: Any, save: Callable[[Any, Path], Any], record: dict) -> None:
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
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
            try:
                os.rename(temporary, path)
            except OSError:
                # Without a lock (some network file systems) another process may have been first: its artefact stands.
                check_files(path)
            sync(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def artefact_digest(stage: str, config: Any, inputs: Mapping[str, str], modules: Iterable[str]) -> str:
    """Return the hex SHA-256 that names an artefact, from what defines it; nothing is made or read."""
    text = json.dumps([SCHEMA, stage, config, dict(inputs), source_digest(modules)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def check_files(folder: Path) -> None:
    """Raise CorruptArtefact, naming the file, unless all files are as provenance.json records them."""
    record = folder / _PROVENANCE
    if not record.is_file():
        raise CorruptArtefact(f"{folder} holds no {_PROVENANCE}")
    try:
        files = json.loads(record.read_text(encoding="utf-8"))["files"]
    except (ValueError, KeyError) as error:
        raise CorruptArtefact(f"{record} is damaged: {error}") from None
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            raise CorruptArtefact(f"{path} is missing")
        size = path.stat().st_size
        if size != expected["bytes"]:
            raise CorruptArtefact(f"{path} has {size} bytes, {expected['bytes']} were written")
        if file_record(path) != expected:
            raise CorruptArtefact(f"{path} has other content than was written")


def file_record(path: Path) -> dict:
    """Return size and SHA-256 of a file."""
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def source_digest(modules: Iterable[str]) -> str:
    """Return a digest of the code of ``modules`` that comments, docstrings and formatting do not change.

    A name may be a module (``"capsae.caps"``), a package (all its modules), or one definition
    (``"capsae.featureset:LinearHead"``), which counts with all that it uses of its own module.

    Each is read once a process, so an edit while a run goes on does not change what the run's artefacts are called; and
    a plan of many pages asks for the same modules hundreds of times.
    """
    return hashlib.sha256(
        json.dumps([[name, _code_digest(name)] for name in sorted(set(modules))]).encode()
    ).hexdigest()


@cache
def _code_digest(name: str) -> str:
    module, _, definition = name.partition(":")
    parts = []
    for file in _module_files(module):
        tree = _stripped(file)
        nodes = _closure(tree, definition, name) if definition else tree.body
        parts.append([file.name, [_form(node) for node in nodes]])
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _module_files(module: str) -> tuple[Path, ...]:
    spec = util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ValueError(f"no module {module!r} to take a source digest of")
    origin = Path(spec.origin)
    return tuple(sorted(origin.parent.rglob("*.py"))) if origin.name == "__init__.py" else (origin,)


def _stripped(file: Path) -> ast.Module:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            match node.body:
                case [ast.Expr(value=ast.Constant(value=str())), *rest]:
                    node.body = rest
    return tree


def _form(node: Any) -> Any:
    # ast.dump changes between Python versions; empty fields are what they disagree on.
    if isinstance(node, ast.AST):
        fields = {key: _form(value) for key, value in ast.iter_fields(node) if value is not None and value != []}
        return [type(node).__name__, fields]
    if isinstance(node, list):
        return [_form(item) for item in node]
    return node if isinstance(node, str | int | bool) else repr(node)


def _closure(tree: ast.Module, definition: str, name: str) -> list[ast.stmt]:
    """Return the statement that defines a name and those of the module that it uses, in the module's order."""
    defined = {}
    for statement in tree.body:
        for target in _defines(statement):
            defined.setdefault(target, []).append(statement)
    if definition not in defined:
        raise ValueError(f"{name!r}: the module defines no {definition!r}")
    wanted, reached = {definition}, set()
    while wanted:
        current = wanted.pop()
        reached.add(current)
        used = {n.id for statement in defined[current] for n in ast.walk(statement) if isinstance(n, ast.Name)}
        wanted |= (used & defined.keys()) - reached
    keep = {id(statement) for key in reached for statement in defined[key]}
    return [statement for statement in tree.body if id(statement) in keep]


def _defines(statement: ast.stmt) -> list[str]:
    if isinstance(statement, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return [statement.name]
    return [n.id for n in ast.walk(statement) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]


@cache
def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that numbers depend on."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def machine() -> dict[str, Any]:
    """Return what hardware this is, in words and counts."""
    return {"system": platform.system(), "machine": platform.machine(), "cpus": os.cpu_count()}


def peak_rss_mb() -> float | None:
    """Return the largest memory this process has held so far, in MB; None where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1e6 if sys.platform == "darwin" else 1e3), 1)  # bytes on macOS, KiB elsewhere


@contextlib.contextmanager
def _locked(path: Path):
    """Hold an advisory lock; it ends with the process, however that ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        except (ImportError, OSError):  # no such locks here: the rename still keeps artefacts whole
            log.debug("no file lock at %s", path)
        yield


def _files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.name != _PROVENANCE)
