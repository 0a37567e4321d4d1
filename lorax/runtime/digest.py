"""SHA-256 of files. A file is hashed again only if the file system reports a change.

Digests of large files are cached under `~/.cache/lorax/digests` (`$XDG_CACHE_HOME` is respected)
for later processes, so that a base of gigabytes is not read again for each trial. The cache may
be deleted at any time.
"""

import contextlib
import hashlib
import logging
import os
import re
import tempfile
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from lorax.errors import LoraxError
from lorax.runtime.process import cache_root

log = logging.getLogger(__name__)
KEPT_FROM = 2**20  # bytes; hashing a smaller file is faster than a lookup
TOLD_FROM = 2**30
Stamp = tuple[int, int, int, int, int]


def file_digest(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal.

    Raises:
      LoraxError: it cannot be read.
    """
    try:
        return _digest(_stamp(path), path)
    except OSError as error:
        raise LoraxError(f"{path}: cannot be read ({error.strerror})") from error


def files_digest(files: Iterable[Path]) -> str:
    """The SHA-256 of files by name and content, in the order given.

    Raises:
      LoraxError: one cannot be read.
    """
    return lines_digest((file.name, file_digest(file)) for file in files)


def lines_digest(pairs: Iterable[tuple[str, str]]) -> str:
    """The SHA-256 of (name, digest) pairs."""
    text = "".join(f"{name} {digest}\n" for name, digest in pairs)
    return hashlib.sha256(text.encode()).hexdigest()


def _stamp(path: Path) -> Stamp:
    """Values that change with a file's content; the ctime changes even if the mtime is reset."""
    stat = path.stat()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


@lru_cache(maxsize=1024)
def _digest(stamp: Stamp, path: Path) -> str:
    size = stamp[2]
    if size < KEPT_FROM:
        return _hash(path)
    name = hashlib.sha256(repr(stamp).encode()).hexdigest()
    place = cache_root() / "digests" / name
    if (kept := _read(place)) is not None:
        return kept
    if size >= TOLD_FROM:
        log.info("hashing %s, %.1f GB, once", path, size / 1e9)
    digest = _hash(path)
    if _stamp(path) == stamp:  # unchanged while it was read
        _write(place, digest)
    return digest


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(place: Path) -> str | None:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        text = place.read_text()
        return text if re.fullmatch("[0-9a-f]{64}", text) else None
    return None


def _write(place: Path, digest: str) -> None:
    """Write a digest to the cache atomically; do nothing if the cache cannot be written."""
    with contextlib.suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(".partial", "digest-", place.parent)
        try:
            with os.fdopen(handle, "w") as file:
                file.write(digest)
            Path(name).replace(place)
        finally:
            Path(name).unlink(missing_ok=True)
