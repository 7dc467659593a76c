"""The host's memory: how much is free, and an allocator told what suits a training."""

from __future__ import annotations

import ctypes
import platform
from pathlib import Path

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt, in <malloc.h>


def keep_freed_memory() -> None:
    """Keep memory that is freed for the next tensor, rather than giving it back to the system.

    By default glibc returns a tensor of more than 32 MB as soon as it is freed, and the next of that size is made of
    fresh pages, each of which costs a page fault: a fifth of a step of a small model on a CPU. Other C libraries are
    left alone.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    library = ctypes.CDLL(None)
    library.mallopt(_M_MMAP_THRESHOLD, 1 << 30)  # bytes; larger tensors are rare, and their faults with them
    library.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)  # bytes of free memory at the end of the heap: all of it


def available_memory() -> int | None:
    """Return the bytes that a process can still take without swapping, within a container's limit; None: unknown.

    Source: proc(5), MemAvailable, and the kernel's documentation of control groups v2, memory.max.
    """
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        kilobytes = next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
    limit = Path("/sys/fs/cgroup/memory.max")
    allowed = limit.read_text().strip() if limit.is_file() else "max"
    available = int(kilobytes) * 1024
    return available if allowed == "max" else min(available, int(allowed))
