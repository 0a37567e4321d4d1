"""Locks on directories: one process per trial."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from lorax.errors import LoraxError


def is_free(directory: Path) -> bool:
    """Whether no other process holds a directory now."""
    try:
        with locked(directory):
            return True
    except BusyError:
        return False
    except OSError:  # missing; or not writable, which training will report
        return True


class BusyError(LoraxError):
    """Another process holds the directory."""


@contextlib.contextmanager
def locked(directory: Path, *, waits: bool = False) -> Iterator[None]:
    """Hold a directory for this process; the system releases it when the process dies.

    Args:
      directory: its file `lock` is created.
      waits: whether to wait for a process that holds it.

    Raises:
      BusyError: another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # Windows has no flock
        yield
        return
    with (directory / "lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if waits else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise BusyError(
                f"{directory} is being trained by another process ({holder}); wait, or stop it"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}")
        file.flush()
        yield
