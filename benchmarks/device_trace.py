"""What a CUDA device does in a training step, and where the host waits for it."""

from __future__ import annotations

import collections
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

_ROOT = Path(__file__).resolve().parents[1]

# What kernels do, by parts of their names in lower case; the first match counts.
_KINDS = (
    ("attention", ("flash", "fmha", "attention", "sdpa")),
    ("matrix products", ("gemm", "cutlass", "nvjet", "xmma", "cublas", "splitk")),
    ("optimizer", ("adam", "multi_tensor")),
    ("collectives", ("nccl",)),
    ("fused by the compiler", ("triton",)),
    ("copies and fills", ("memcpy", "memset", "copy", "fill", "cat")),
    ("softmax and norms", ("softmax", "norm", "reduce")),
)
_WAITS = ("Synchronize", "cudaMemcpy", "hipMemcpy")  # calls that wait, by parts of their names...
_NO_WAIT = "Async"  # ...unless they say so


def synchronizations(step: Callable[[], object]) -> dict[str, int]:
    """Count where a step waits for the device, by the line of Python that asked for it."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    lines = (_place(w) for w in caught if "synchronizing" in str(w.message))
    return dict(collections.Counter(lines).most_common())


def _place(warning: warnings.WarningMessage) -> str:
    file = Path(warning.filename)
    shown = file.relative_to(_ROOT) if file.is_relative_to(_ROOT) else Path(*file.parts[-3:])
    return f"{shown}:{warning.lineno}"


def device_times(step: Callable[[], object]) -> dict[str, object]:
    """Profile a step on the device.

    Returns:
        `kernel_ms`: milliseconds by kind of kernel; `longest_kernels`: the ten that took the most, by name; `waits`:
        how often each call of the driver that waits was made, one of them being the profiler's own at its end.
    """
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    by_kind: dict[str, float] = collections.defaultdict(float)
    by_name: dict[str, float] = {}
    waits: dict[str, int] = {}
    for event in profiler.key_averages():
        if event.device_type == DeviceType.CUDA:
            milliseconds = event.self_device_time_total / 1e3
            by_kind[kernel_kind(event.key)] += milliseconds
            by_name[event.key[:120]] = round(milliseconds, 2)
        elif any(part in event.key for part in _WAITS) and _NO_WAIT not in event.key:
            waits[event.key] = event.count
    longest = sorted(by_name.items(), key=lambda item: -item[1])[:10]
    kinds = sorted(by_kind.items(), key=lambda item: -item[1])
    return {"kernel_ms": {k: round(v, 2) for k, v in kinds}, "longest_kernels": dict(longest), "waits": waits}


def kernel_kind(name: str) -> str:
    """Name the kind of work of a kernel."""
    lower = name.lower()
    return next((kind for kind, parts in _KINDS if any(part in lower for part in parts)), "other")
