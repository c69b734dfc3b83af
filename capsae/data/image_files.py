"""Which files below a folder are images, what is left out and why, and what tells one file's content from another's."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import stat
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..files import default_root, replacing
from .images import IMAGE_SUFFIXES, is_image

log = logging.getLogger(__name__)

_OF_THE_SYSTEM = {"@eadir", "#recycle", "$recycle.bin", "__macosx", "__pycache__", "lost+found"}
_PLUGINS = {".heic": "pillow-heif", ".heif": "pillow-heif", ".hif": "pillow-heif", ".jxl": "pillow-jxl-plugin"}
_WORTH = 2**26  # bytes that are read anew each time rather than kept account of
_SETTLED = 2.0  # seconds after which a file that changes gets another time stamp on any file system
LeftOut = tuple[tuple[str, str], ...]  # (path, why)


def images_below(root: str | os.PathLike) -> tuple[list[Path], LeftOut]:
    """Image files at any depth below a folder, sorted, and what was left out.

    What Pillow opens is an image: by suffix, and else by content. Linked folders are followed. Hidden files and folders
    (``._*``, ``.ipynb_checkpoints``) and those that file servers keep (``@eaDir``) are left out, as are broken links,
    pipes, and folders that cannot be read: (path below root, why) for each.
    """
    root, found, left = Path(root), [], []

    def leave(path, why):
        left.append((os.path.relpath(path, root), why))

    unreadable = lambda error: leave(error.filename, f"unreadable folder ({error.strerror})")  # noqa: E731
    places = {os.fspath(root): [os.path.join(os.path.realpath(root), "")]}  # where the folders above one really are
    for folder, folders, files in os.walk(root, followlinks=True, onerror=unreadable):
        above = places.pop(folder)
        for name in list(folders):
            path = os.path.join(folder, name)
            place = os.path.join(os.path.realpath(path), "")
            loop = os.path.islink(path) and any(each.startswith(place) for each in above)
            if loop or is_hidden(name):
                folders.remove(name)
                leave(path, "link to a folder that holds it" if loop else "hidden folder")
            else:
                places[path] = [*above, place]
        for name in files:
            path = Path(folder, name)
            why = _why_not(path, name)
            if why is None:
                found.append(path)
            else:
                leave(path, why)
    return sorted(found), tuple(sorted(left))


def is_hidden(name: str) -> bool:
    """Whether a file or folder is nobody's image: hidden, or kept by a file server or an archiver."""
    return name.startswith(".") or name.lower() in _OF_THE_SYSTEM


def _why_not(path: Path, name: str) -> str | None:
    if is_hidden(name):
        return "hidden file"
    try:
        kind = os.stat(path).st_mode
    except OSError as error:
        return "broken link" if os.path.islink(path) else f"unreadable ({error.strerror})"
    if not stat.S_ISREG(kind):
        return "no regular file"
    suffix = path.suffix.lower()
    if suffix in IMAGE_SUFFIXES or is_image(path):
        return None
    return f"needs {_PLUGINS[suffix]}" if suffix in _PLUGINS else "no image that Pillow opens"


def log_left_out(name: str, left_out: LeftOut) -> None:
    """Log what was left out: how many files for each reason, and the first of them."""
    reasons: dict[str, list[str]] = {}
    for path, why in left_out:
        reasons.setdefault(why, []).append(path)
    if reasons:
        parts = (f"{len(paths)} x {why} ({paths[0]}{', ...' * (len(paths) > 1)})" for why, paths in reasons.items())
        log.warning("%s: left out %s", name, "; ".join(parts))


# --- content


def content_digests(paths: Iterable[str | os.PathLike]) -> list[str]:
    """SHA-256 of each file, in hex. One whose size and times are those of an earlier call is not read again.

    What is known is kept in the store's folder ``hashes``; where that cannot be written, all files are read each time.
    """
    paths = [os.path.abspath(path) for path in paths]
    stamps = [_stamp(path) for path in paths]
    cache = _cache_of(paths) if sum(stamp[0] for stamp in stamps if stamp) >= _WORTH else None
    known = _read_cache(cache) if cache else {}

    def digest(path, stamp):
        if stamp and known.get(path, (None,))[0] == stamp:
            return known[path][1]
        try:
            with open(path, "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError:
            return ""  # a bad image, which the extraction names

    with ThreadPoolExecutor(8) as pool:
        digests = list(pool.map(digest, paths, stamps))
    # A file that changed within a clock tick of its hash would keep its time stamp: such fresh ones are read again.
    settled = (time.time() - _SETTLED) * 1e9
    new = {p: [s, d] for p, s, d in zip(paths, stamps, digests, strict=True) if d and max(s[1:]) < settled}
    if cache and new != known:
        with contextlib.suppress(OSError):
            cache.parent.mkdir(parents=True, exist_ok=True)
            with replacing(cache) as temporary:
                temporary.write_text(json.dumps(new), encoding="utf-8", errors="surrogateescape")
    return digests


def _stamp(path: str) -> list[int]:
    try:
        found = os.stat(path)
    except OSError:
        return []
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _cache_of(paths: list[str]) -> Path:
    name = hashlib.sha256("\n".join(sorted(paths)).encode(errors="surrogateescape")).hexdigest()
    return default_root() / "hashes" / f"{name[:20]}.json"


def _read_cache(path: Path) -> dict:
    with contextlib.suppress(OSError, ValueError):
        return json.loads(path.read_text(encoding="utf-8", errors="surrogateescape"))
    return {}
