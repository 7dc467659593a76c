"""Counter-based randomness: hashes of names, never a generator with state."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
import xxhash

from shards.arrays import Hashes, Ints

GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: multiples of it spread evenly over the ring


def key_of(*parts: int | str) -> int:
    """Return a 64-bit key for the thing that `parts` name."""
    return xxhash.xxh3_64_intdigest(msgspec.json.encode(parts))


def permutation(key: int, size: int) -> Ints:
    """Return the keyed permutation of range(size): numbers ordered by their splitmix64 hashes, ties by number."""
    return permutations([key], size)[0]


def permutations(keys: Sequence[int], size: int) -> Ints:
    """Return the permutation of range(size) for each key: int64 [keys, size]."""
    counters = np.arange(1, size + 1, dtype=np.uint64) * np.uint64(GOLDEN)
    return np.argsort(mixed(np.array(keys, np.uint64)[:, None] + counters), axis=1, kind="stable")


def mixed(x: Hashes) -> Hashes:
    """Apply splitmix64's finalizer; Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators"."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
