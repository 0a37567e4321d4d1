"""Files that are whole or absent, and faults of the disk in one line."""

import contextlib
import errno
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorax.errors import LoraxError


def write_json(path: Path, value: Any) -> None:
    """Write a file that is whole or absent, whenever the process dies or the power goes."""
    partial = path.with_suffix(path.suffix + ".partial")
    with partial.open("w") as file:
        file.write(json.dumps(value, indent=1, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    _sync(path.parent)


def sync_all(path: Path) -> None:
    """Have a file, or a folder and all that it holds, reach the disk."""
    for held in path.rglob("*"):
        _sync(held)
    _sync(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    """Have a file, or the names in a folder, reach the disk."""
    if os.name == "nt":  # Windows opens no folders, and files for writing only
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as fault:
        if fault.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that know no such thing
            raise
    finally:
        os.close(handle)


@contextlib.contextmanager
def writing(directory: Path) -> Iterator[None]:
    """Raise a file or disk that cannot be written as a LoraxError that names it."""
    try:
        yield
    except OSError as fault:
        place = fault.filename or directory
        raise LoraxError(f"cannot write {place}: {fault.strerror or fault}") from fault


@contextlib.contextmanager
def os_faults(path: Path) -> Iterator[None]:
    """TensorStore reports a full disk as a ValueError of many lines: an OSError again."""
    try:
        yield
    except ValueError as fault:
        code = re.search(r"os_error_code='(\d+)'", str(fault))
        if code is None:
            raise
        number = int(code.group(1))
        raise OSError(number, os.strerror(number), str(path)) from fault
