from pathlib import Path

from lorax.errors import LoraxError
from lorax.runtime.digest import file_digest, files_digest, lines_digest


def read_text(path: Path) -> str:
    """The text of a UTF-8 file with its line ends unchanged, without a byte order mark.

    Raises:
      LoraxError: it cannot be read, or is not UTF-8 (names the line).
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
    """The SHA-256 of a file, or of a folder's files and their names without hidden ones.

    Raises:
      LoraxError: it cannot be read.
    """
    if not path.is_dir():
        return lines_digest([("", file_digest(path))])
    files = (file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
    return files_digest(sorted(files))
