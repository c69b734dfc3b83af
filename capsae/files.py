"""Files that a crash cannot leave half written, and where the command line's outputs go."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

LFS = b"version https://git-lfs"  # what a file begins with that git has not fetched
_NOT_HERE = (errno.EINVAL, errno.ENOTSUP, errno.EPERM, errno.ENOSYS)  # what network disks answer to chmod and fsync
_FORMULA = ("=", "+", "-", "@", "\t")  # a spreadsheet computes a cell that begins so

__code_version__ = 1  # how a file is written does not change what is in it: see capsae.pipeline.code


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary name beside `path` to write to; on leaving, it takes the place of `path` by one rename.

    A killed run leaves the old file or the new one. If writing fails, the old one stays and the temporary one goes; an
    OSError that names no file (a full disk) then names `path`.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        with _where_possible():
            os.chmod(temporary, 0o666 & ~_umask())  # safetensors makes files that only their owner may read
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        if error.errno and error.filename is None:
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file (or a folder's list of names) is on the disk, where the disk can say so."""
    with _where_possible():
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def _where_possible():
    try:
        yield
    except OSError as error:
        if error.errno not in _NOT_HERE:
            raise


def _umask() -> int:
    mask = os.umask(0)  # reading it means setting it
    os.umask(mask)
    return mask


# --- outputs of the command line


class Output:
    """One file that a command writes: checked when this is made, before any work, and replaced whole by :meth:`write`.

    Parameters
    ----------
    path : path or None
        None: standard output. A link's target is replaced, a device or pipe is written to.
    head : str
        How files of this kind begin. An existing file that begins otherwise is somebody's own and is refused.
    what : str
        The option, for messages.

    Raises
    ------
    OSError
        A folder, a folder that is not there or not writable, or a file that is not of this kind.
    """

    def __init__(self, path: str | os.PathLike | None, head: str = "", what: str = "--out"):
        self.path = None if path is None else Path(os.path.realpath(path))
        if self.path is None:
            return
        self.given = f"{what} {os.fspath(path)!r}"
        if self.path.is_dir():
            raise IsADirectoryError(f"{self.given} is a folder; the name of a file would do")
        if not self.path.parent.is_dir():
            raise FileNotFoundError(f"{self.given}: no folder {str(self.path.parent)!r}")
        if not os.access(self.path.parent, os.W_OK | os.X_OK) and not self._special:
            raise PermissionError(f"{self.given}: folder {str(self.path.parent)!r} cannot be written to")
        for path in (self.path, self._part):
            self._check_ours(path, head)

    @property
    def _special(self) -> bool:
        return self.path.exists() and not self.path.is_file()

    @property
    def _part(self) -> Path:
        return self.path.with_name(f"{self.path.name}.part")

    def _check_ours(self, path: Path, head: str) -> None:
        if not path.is_file() or path.stat().st_size == 0:
            return
        with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
            start = file.read(len(head))
            if start != head and not head.startswith(start.strip()):  # an empty table, or one that was cut off
                raise FileExistsError(
                    f"{self.given}: {str(path)!r} is there and is no output of this command; another name would do"
                )

    def write(self, text: str) -> None:
        """Write the whole content."""
        if self.path is None:
            sys.stdout.write(text)
        elif self._special:
            self.path.write_text(text, encoding="utf-8", errors="backslashreplace")
        else:
            with replacing(self.path) as temporary:
                temporary.write_text(text, encoding="utf-8", errors="backslashreplace", newline="")

    def table(self, frame: pd.DataFrame) -> None:
        """Write a table."""
        self.write(csv_text(frame))

    @contextlib.contextmanager
    def rows(self) -> Iterator:
        """Yield a function that takes tables, one after the other, and writes each at once: to standard output, or to
        ``<path>.part``, which takes the place of `path` on leaving. After an error it stays, and so does the old file.
        """
        direct = self.path is None or self._special
        options = {"encoding": "utf-8", "errors": "backslashreplace", "newline": ""}
        with contextlib.ExitStack() as stack:
            file = sys.stdout
            if self.path is not None:
                file = stack.enter_context(open(self.path if direct else self._part, "w", **options))
            started = False

            def add(frame: pd.DataFrame) -> None:
                nonlocal started
                file.write(csv_text(frame, header=not started))
                file.flush()
                started = True

            yield add
        if not direct:
            sync(self._part)
            os.replace(self._part, self.path)


def beside(path: str | os.PathLike, suffix: str) -> Path:
    """Name a file after another: ``table.csv`` -> ``table.json``, and by adding to any other name: ``lr0.05.json``."""
    path = Path(path)
    return path.with_name(path.name.removesuffix(".csv") + suffix)


def check_folder(path: str | os.PathLike, names: tuple[str, ...], mark: str, key: str, what: str = "--out") -> Path:
    """Return the folder that a command will write ``names`` to, checked before any work.

    Files of these names that are there already are replaced only where ``mark``, a JSON file beside them, has ``key``:
    then this command wrote them. Raises OSError for a file, a place that cannot be written to, or a stranger's files.
    """
    folder, given = Path(os.path.realpath(path)), f"{what} {os.fspath(path)!r}"
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{given} is a file; the name of a folder would do")
    there = next(each for each in (folder, *folder.parents) if each.is_dir())
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"{given}: folder {str(there)!r} cannot be written to")
    taken = [name for name in names if os.path.lexists(folder / name)]
    try:
        ours = key in json.loads((folder / mark).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        ours = False
    if taken and not ours:
        raise FileExistsError(f"{given} holds {taken[0]}, which this command did not write; a new folder would do")
    return Path(path)


def csv_text(frame: pd.DataFrame, header: bool = True) -> str:
    """Return a table as CSV in which no spreadsheet finds a formula: a text that begins like one gets a ' before it."""
    import pandas as pd

    frame = frame.copy(deep=False)
    for i in range(frame.shape[1]):
        if frame.dtypes.iloc[i].kind == "O":  # object: pandas' own strings hold no file name that is not UTF-8
            frame.isetitem(i, pd.Series([_harmless(cell) for cell in frame.iloc[:, i]], frame.index, dtype=object))
    frame.columns = [_harmless(name) for name in frame.columns]
    return frame.to_csv(index=False, header=header, lineterminator="\n")


def _harmless(cell):
    if not isinstance(cell, str):
        return cell
    cell = cell.replace("\r", "\\r")  # which would end a row
    return f"'{cell}" if cell.startswith(_FORMULA) else cell


def refuse_stub(path: str | os.PathLike) -> None:
    """Raise ValueError for a file that is empty, or is git-lfs' note in place of the file."""
    with open(path, "rb") as file:
        start = file.read(len(LFS))
    if not start:
        raise ValueError(f"{os.fspath(path)} is empty (0 bytes): was a copy or a download cut off?")
    if start == LFS:
        raise ValueError(f"{os.fspath(path)} is a pointer of git-lfs, not the file: `git lfs pull` would fetch it")


def default_root() -> Path:
    """Return ``$CAPSAE_HOME``, else ``.capsae`` of the project around the current folder, else the user's cache."""
    if os.environ.get(HOME_ENV):
        return Path(os.environ[HOME_ENV]).expanduser().absolute()
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / ".capsae").is_dir() or (folder / "capsae" / "caps.py").is_file():
            return folder / ".capsae"
    cache_home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache_home) / "capsae"


def file_record(path: Path) -> dict:
    """Return size and SHA-256 of a file."""
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


HOME_ENV = "CAPSAE_HOME"
