"""Files that a crash cannot leave half written."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from errno import EINVAL, ENOTSUP, EPERM
from pathlib import Path

__code_version__ = 1  # how a file is written does not change what is in it: see capsae.code


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary name beside `path` to write to; on leaving, it takes the place of `path` by one rename.

    A killed run leaves the old file or the new one. If writing fails, the old one stays and the temporary one goes.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        with contextlib.suppress(PermissionError):  # some network file systems know no modes
            os.chmod(temporary, 0o666 & ~_umask())  # safetensors makes files that only their owner may read
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file (or a folder's list of names) is on the disk, where the file system can tell."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (EINVAL, ENOTSUP, EPERM):  # what network file systems answer
            raise
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)  # reading it means setting it
    os.umask(mask)
    return mask
