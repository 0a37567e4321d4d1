"""One process a trial."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from lorax.errors import LoraxError


class BusyError(LoraxError):
    """Another process holds the directory."""


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold a directory for this process; the system lets go of it when the process dies.

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
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
