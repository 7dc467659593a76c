"""Seeds that depend on the place of a computation in the run, never on what ran before it.

A run that resumes at step k draws the same dropout masks as one that never stopped, because the generator is seeded
anew for each (step, micro-step, dp_rank), and sp_rank where ranks share rows. Tensor-parallel ranks that hold the same
activations share a seed and drop the same ones; under sequence parallelism each has tokens, and a seed, of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import xxhash


def derive_seed(seed: int, *path: int | str) -> int:
    """Derive a 63-bit seed for one place in the run: `derive_seed(seed, "dropout", step, micro_step, dp_rank)`."""
    key = "/".join(str(part) for part in (seed, *path))
    return xxhash.xxh3_64_intdigest(key.encode()) >> 1


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's default generators inside the block and restore their previous state after it."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
