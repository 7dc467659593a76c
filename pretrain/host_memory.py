"""The host's memory: how much is free, and an allocator told what suits a training."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
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


def available_memory(root: Path = Path("/")) -> int | None:
    """Return the bytes that a process can still take without swapping, within its container's limits; None: unknown.

    Source: proc(5), MemAvailable, and the kernel's documentation of control groups v2, memory.

    Args:
        root: the folder of proc and sys.
    """
    try:
        kilobytes = _figures(root / "proc/meminfo")["MemAvailable:"]
    except (OSError, KeyError):
        return None
    return min([kilobytes * 1024, *_left_in_groups(root)])


def _left_in_groups(root: Path) -> Iterator[int]:
    """Yield the bytes that each control group around this process has left, as far as it has a limit."""
    named = root / "proc/self/cgroup"
    lines = named.read_text().splitlines() if named.is_file() else []
    inner = [Path(line.removeprefix("0::/")) for line in lines if line.startswith("0::/")]
    # A container may see its own group as the root of all, and not by the name that it is told.
    groups = {Path("."), *(group for path in inner for group in (path, *path.parents))}
    for folder in (root / "sys/fs/cgroup" / group for group in groups):
        try:
            limit = (folder / "memory.max").read_text().strip()
            if limit != "max":
                used = int((folder / "memory.current").read_text())
                # Pages of files that were not used lately are given up before memory is refused.
                yield max(0, int(limit) - used + _figures(folder / "memory.stat")["inactive_file"])
        except OSError:  # the root of a host has no limit, nor has a group without this controller
            continue


def _figures(path: Path) -> dict[str, int]:
    """Read a file of the kernel's that has a name and a number a line."""
    return {words[0]: int(words[1]) for line in path.read_text().splitlines() if len(words := line.split()) > 1}
