"""Settings of a whole process: the allocator, the dispatch queue, the program cache."""

import ctypes
import hashlib
import logging
import os
import platform
import sys
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)
# Of glibc's <malloc.h>: do not use mmap for large blocks, do not trim the heap, grow it in large
# steps, and use one heap, since the heaps of threads cannot hold large blocks.
MALLOPT = {"M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, -1), "M_TOP_PAD": (-2, 2**28),
           "M_ARENA_MAX": (-8, 1)}  # fmt: skip


PREPARED: dict[str, Any] = {}  # what was set for this process, for `result.json`


def prepare_process() -> None:
    """Apply settings that make training faster, once; best before JAX computes anything."""
    if PREPARED:
        return
    programs = keep_programs()
    PREPARED["keeps_freed_memory"] = keep_freed_memory()
    PREPARED["keeps_programs"] = programs is not None
    PREPARED["runs_a_step_at_a_time"] = run_a_step_at_a_time()
    log.info("freed memory is kept: %(keeps_freed_memory)s", PREPARED)
    log.info("compiled programs are kept: %s", programs or "no, or as JAX is told")


def keep_freed_memory() -> bool:
    """Let glibc keep freed memory; return whether it does (False without glibc).

    XLA allocates temporaries in each step. The kernel would zero, page by page, memory that was
    returned to the system in between. Settings of malloc in the environment (`MALLOC_...`,
    `GLIBC_TUNABLES`) take precedence.
    """
    is_set = "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "") or any(
        name.startswith("MALLOC_") for name in os.environ
    )
    if is_set or sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return min(mallopt(name, value) for name, value in MALLOPT.values()) == 1


def run_a_step_at_a_time() -> bool:
    """Make a CPU run programs synchronously; return whether the option was set.

    It is not set if the environment sets it, or if JAX does not know it.

    With asynchronous dispatch a step may start before earlier steps have freed their memory. The
    peak is then up to four times as high, and nothing is faster if steps keep all cores busy.
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
    """Cache compiled programs on disk for later processes; return the folder.

    `JAX_COMPILATION_CACHE_DIR` names another folder; `JAX_ENABLE_COMPILATION_CACHE=false`
    disables the cache.
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
    """`~/.cache/lorax/programs/<jaxlib and machine>`: programs are valid for one pair of them."""
    import jaxlib

    return cache_root() / "programs" / f"jaxlib-{jaxlib.__version__}-{_machine()}"


def cache_root() -> Path:
    """`~/.cache/lorax`, for files that can be rebuilt; `$XDG_CACHE_HOME` is respected."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lorax"


def _machine() -> str:
    """A hash of the processor's instruction sets, which XLA compiles for."""
    words = [platform.machine()]
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        words += [line for line in lines if line.startswith(("flags", "Features", "model name"))][
            :2
        ]
    except OSError:
        words.append(platform.processor())
    return hashlib.sha256("\n".join(words).encode()).hexdigest()[:8]
