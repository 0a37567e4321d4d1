"""Atomic writes of files, and faults of the disk in one line."""

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
    """Write a file atomically: after a kill or a power loss it is complete or absent."""
    partial = path.with_suffix(path.suffix + ".partial")
    with partial.open("w") as file:
        file.write(json.dumps(value, indent=1, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    _sync(path.parent)


def sync_all(path: Path) -> None:
    """Flush a file, or a folder and all its content, to the disk."""
    for held in path.rglob("*"):
        _sync(held)
    _sync(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    if os.name == "nt":  # Windows cannot open folders, and needs a file open for writing
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as fault:
        if fault.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems without fsync
            raise
    finally:
        os.close(handle)


@contextlib.contextmanager
def writing(directory: Path) -> Iterator[None]:
    """Convert the fault of a file or disk that cannot be written to a LoraxError that names it."""
    try:
        yield
    except OSError as fault:
        place = fault.filename or directory
        raise LoraxError(f"cannot write {place}: {fault.strerror or fault}") from fault


@contextlib.contextmanager
def os_faults(path: Path) -> Iterator[None]:
    """Convert TensorStore's ValueError of many lines on a full disk to an OSError."""
    try:
        yield
    except ValueError as fault:
        code = re.search(r"os_error_code='(\d+)'", str(fault))
        if code is None:
            raise
        number = int(code.group(1))
        raise OSError(number, os.strerror(number), str(path)) from fault
