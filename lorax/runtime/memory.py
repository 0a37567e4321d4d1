"""Available memory, and memory used."""

import os
import sys
from pathlib import Path

GIB = 2**30


def device_memory() -> int | None:
    """Bytes that each device of this process may hold; None if devices use the host's memory."""
    import jax

    found = [(device.memory_stats() or {}).get("bytes_limit") for device in jax.local_devices()]
    return min((n for n in found if n), default=None)


def free_host_memory() -> int:
    """Free bytes of the machine, or of the control groups that limit this process."""
    free = [_free_in(group) for group in _control_groups()]
    return min([_meminfo("MemAvailable"), *(n for n in free if n is not None)])


def _control_groups() -> list[Path]:
    """This process's control group (version 2) and its parents."""
    root = Path("/sys/fs/cgroup")
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return [root]
    names = [line.removeprefix("0::/") for line in lines if line.startswith("0::/")]
    own = root / names[0] if names else root
    return [own, *(parent for parent in own.parents if parent.is_relative_to(root))]


def _free_in(group: Path) -> int | None:
    """Bytes that a control group may still take, cached files included. None without a limit."""
    try:
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        words = (group / "memory.stat").read_text().split()
    except (OSError, ValueError):  # no such group, or no limit ("max")
        return None
    cached = int(words[words.index("inactive_file") + 1]) if "inactive_file" in words else 0
    return limit - used + cached


def _meminfo(name: str) -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        line = next(line for line in lines if line.startswith(name))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def reset_peak_rss() -> None:
    """Reset the resident peak (Linux only; elsewhere the peak is the whole process's)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_rss() -> int:
    """Largest resident size of this process, in bytes, since `reset_peak_rss`."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        line = next(line for line in lines if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):  # not Linux, or a sandbox that omits the line
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_device() -> int | None:
    """Peak bytes in use on the first device; None if it does not report them."""
    import jax

    stats = jax.devices()[0].memory_stats()
    return stats.get("peak_bytes_in_use") if stats else None
