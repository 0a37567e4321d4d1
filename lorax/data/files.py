import hashlib
from functools import lru_cache
from pathlib import Path

from lorax.errors import LoraxError


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, its line ends as they are, without a byte order mark.

    Raises:
      LoraxError: it cannot be read, or is not UTF-8; then with the line.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise LoraxError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise LoraxError(f"{path}:{line}: not UTF-8 ({error.reason})") from error


def digest_of(path: Path) -> str:
    """The SHA-256 of a file, or of a folder's files and their names, hidden ones left out.

    Raises:
      LoraxError: it cannot be read.
    """
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    sums = hashlib.sha256()
    for file in files:
        if file.is_file() and not file.name.startswith("."):
            stat = file.stat()
            name = file.name if path.is_dir() else ""
            sums.update(f"{name} {_digest(file, stat.st_size, stat.st_mtime_ns)}\n".encode())
    return sums.hexdigest()


@lru_cache(maxsize=64)
def _digest(path: Path, size: int, changed: int) -> str:
    del size, changed  # they tell a file from what it was
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise LoraxError(f"{path}: cannot be read ({error.strerror})") from error
