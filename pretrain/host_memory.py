"""The C library's memory allocator, told what suits a process that makes the same large tensors in every step."""

from __future__ import annotations

import ctypes
import platform

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
