"""The provenance of a result: the code, the command, the versions of packages."""

import os
import platform
import re
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

from lorax.runtime.process import PREPARED

_GIVEN: list[str] = []
_ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (
    "jax",
    "jaxlib",
    "jax-cuda12-plugin",
    "jax-cuda13-plugin",
    "libtpu",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
    "scipy",
    "scikit-learn",
    "safetensors",
    "tokenizers",
    "jinja2",
    "hydra-core",
)


def package_versions() -> dict[str, str]:
    """The versions of the installed packages that a trial's numbers may depend on."""
    found = {name: _version(name) for name in PACKAGES}
    return {name: number for name, number in found.items() if number is not None}


def lorax_version() -> str | None:
    """The version of lorax; None for a clone that was not installed."""
    return _version("lorax-flax")


@cache
def code_commit() -> str | None:
    """The commit of lorax's clone, with `-dirty` where tracked files differ; None without a clone.

    It is read once per process, because imported code does not change.
    """
    words = ["git", "-C", str(_ROOT), "describe", "--always", "--abbrev=40", "--exclude=*"]
    if not (_ROOT / ".git").exists():
        return None
    try:
        done = subprocess.run(
            [*words, "--dirty"], capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):  # no git, or a clone of another owner
        return None
    return done.stdout.strip()


def command_line() -> str:
    """The command of this process, quoted for a shell, with passwords in URLs hidden."""
    return without_passwords(_GIVEN[-1] if _GIVEN else shlex.join(sys.orig_argv))


def without_passwords(text: str) -> str:
    """The text with passwords in URLs hidden, as users share results and logs.

    >>> without_passwords("hydra.sweeper.storage=postgresql://me:secret@host/search")
    'hydra.sweeper.storage=postgresql://me:***@host/search'
    """
    return re.sub(r"(://[^\s/:@]*):[^\s/@]+@", r"\1:***@", text)


def set_command_line(command: str) -> None:
    """In a job of a cluster, record the command that submitted it instead of the job's own."""
    _GIVEN[:] = [command]


def now() -> str:
    """The time in UTC, to the second, in ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def environment() -> dict[str, Any]:
    """The hardware and the versions that a trial was measured with."""
    device = jax.devices()[0]
    return {
        "device": _processor() if device.platform == "cpu" else device.device_kind,
        "platform": device.platform,
        "devices": jax.device_count(),
        "cpu_count": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "python": platform.python_version(),
        **package_versions(),
        "lorax": lorax_version(),
        "commit": code_commit(),
        **PREPARED,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
