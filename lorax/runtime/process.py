"""What an entry point sets for its whole process: the allocator, the queue, kept programs."""

import ctypes
import hashlib
import logging
import os
import platform
import sys
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)
# Of glibc's <malloc.h>: never map large blocks apart, never give the heap's end back, let it grow
# in large steps, and have one heap, since those of threads cannot hold large blocks.
MALLOPT = {"M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, -1), "M_TOP_PAD": (-2, 2**28),
           "M_ARENA_MAX": (-8, 1)}  # fmt: skip


PREPARED: dict[str, Any] = {}  # what was set for this process, for `result.json`


def prepare_process() -> None:
    """Set what makes training faster, once; best before JAX computes anything."""
    if PREPARED:
        return
    programs = keep_programs()
    PREPARED["keeps_freed_memory"] = keep_freed_memory()
    PREPARED["keeps_programs"] = programs is not None
    PREPARED["runs_a_step_at_a_time"] = run_a_step_at_a_time()
    log.info("freed memory is kept: %(keeps_freed_memory)s", PREPARED)
    log.info("compiled programs are kept: %s", programs or "no, or as JAX is told")


def keep_freed_memory() -> bool:
    """Let glibc keep what is freed, where there is glibc; whether it does.

    XLA allocates a step's temporaries anew each time; memory that went back to the system in
    between is zeroed by the kernel, page by page. Settings of malloc in the environment
    (`MALLOC_...`, `GLIBC_TUNABLES`) go before.
    """
    is_set = "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "") or any(
        name.startswith("MALLOC_") for name in os.environ
    )
    if is_set or sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return min(mallopt(name, value) for name, value in MALLOPT.values()) == 1


def run_a_step_at_a_time() -> bool:
    """Have a CPU's programs run when they are called; whether that was asked for.

    Not where the environment says something about it, or JAX does not know the option.

    Otherwise a step may start before the memory of the one before it, or of several, is free:
    peaks are then up to four times as high, and nothing is faster where steps keep all cores busy.
    """
    import jax

    if "JAX_CPU_ENABLE_ASYNC_DISPATCH" in os.environ:
        return False
    try:
        jax.config.update("jax_cpu_enable_async_dispatch", False)
    except AttributeError:
        return False
    return True


def keep_programs() -> Path | None:
    """Keep compiled programs on disk for later processes; where.

    `JAX_COMPILATION_CACHE_DIR` names another place; `JAX_ENABLE_COMPILATION_CACHE=false` keeps
    none.
    """
    import jax

    config: Any = jax.config
    if config.jax_compilation_cache_dir or not config.jax_enable_compilation_cache:
        return None
    place = cache_dir()
    config.update("jax_compilation_cache_dir", str(place))
    config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    return place


def cache_dir() -> Path:
    """`~/.cache/lorax/programs/<jaxlib and machine>`: programs hold for one kind of both."""
    import jaxlib

    return cache_root() / "programs" / f"jaxlib-{jaxlib.__version__}-{_machine()}"


def cache_root() -> Path:
    """`~/.cache/lorax`, where all that may be made anew is kept; `$XDG_CACHE_HOME` is respected."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lorax"


def _machine() -> str:
    """A processor's instructions, as a hash: XLA compiles for those that it finds."""
    words = [platform.machine()]
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        words += [line for line in lines if line.startswith(("flags", "Features", "model name"))][
            :2
        ]
    except OSError:
        words.append(platform.processor())
    return hashlib.sha256("\n".join(words).encode()).hexdigest()[:8]
