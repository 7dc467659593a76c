"""Hash the weights and moments of a run, the same in every layout of the same values. engine -> state_hash.

The hash is a sum mod 2^64 over all elements, so neither their order nor the ranks that hold them matter. What is added
for an element is a bijective mix of its bits, its position in the whole weight and the weight's name: a change of any
single element always changes the sum, and several changes cancel with a probability of 2^-64. It finds accidents and
careless tampering; someone who sets out to forge a 64-bit sum can.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
import xxhash
from torch import Tensor

# Elements mixed at once, in two buffers of 8 bytes each: on CPUs they fit in a core's cache, on GPUs they are so many
# that starting a kernel costs nothing beside its work.
_CHUNK = {"cpu": 1 << 15, "cuda": 1 << 22}
# SplitMix64: its increment, and the shifts and factors of its finalizer (Steele, Lea and Flood 2014; Stafford's mix 13)
_INCREMENT = 0x9E3779B97F4A7C15
_SHIFTS = (30, 27, 31)
_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


@dataclass(frozen=True)
class StateHash:
    """The hashes of a run's state after a step, 16 hex digits each.

    Attributes:
        weights: of the fp32 master weights.
        optimizer: of their moments together.
    """

    weights: str
    optimizer: str


@dataclass(frozen=True)
class Place:
    """The place of consecutive elements of a tensor-parallel rank's slice in the whole weight.

    Attributes:
        start: position of the first of them in the flattened slice.
        run: how many consecutive elements of the slice are consecutive in the whole weight too.
        tp_rank, tp_size: which of how many slices it is; 0 of 1 if the weight is replicated.
    """

    start: int
    run: int
    tp_rank: int = 0
    tp_size: int = 1

    @classmethod
    def in_slice(cls, start: int, shape: tuple[int, ...], dim: int | None, tp_rank: int, tp_size: int) -> Place:
        """Return the place of elements from `start` on in a slice of this shape.

        Args:
            dim: the dimension along which the whole weight is split; None if it is replicated.
        """
        if dim is None:
            return cls(start, prod(shape))
        return cls(start, prod(shape[dim:]), tp_rank, tp_size)

    def positions(self, offset: int, count: int, device: torch.device) -> Tensor:
        """Return the positions in the flattened whole weight of `count` elements, from the `offset`-th on."""
        first = self.start + offset
        found = torch.arange(first, first + count, device=device)
        if self.tp_size > 1:
            found += found.div(self.run, rounding_mode="floor") * (self.run * (self.tp_size - 1))
            found += self.tp_rank * self.run
        return found


@torch.no_grad()
def hash_sum(values: Tensor, name: str, place: Place) -> Tensor:
    """Return the sum mod 2^64 of the mixed elements, as an int64 scalar on their device.

    Args:
        values: [n] fp32, without padding.
        name: of the weight; of another state of it, a name that differs from those of all weights.
    """
    assert values.dtype == torch.float32, f"{name} is {values.dtype}, but hashes are of fp32 state"
    total = torch.zeros((), dtype=torch.int64, device=values.device)
    key, size = _signed(xxhash.xxh3_64_intdigest(name.encode())), _CHUNK[values.device.type]
    for offset in range(0, values.numel(), size):
        bits = values[offset : offset + size].view(torch.int32)
        mixed = place.positions(offset, bits.numel(), values.device)
        mixed.mul_(_signed(_INCREMENT)).add_(key).bitwise_xor_(bits)
        shifted = torch.empty_like(mixed)
        for shift, factor in zip(_SHIFTS, _FACTORS, strict=False):
            _xor_shifted(mixed, shift, shifted).mul_(_signed(factor))
        total += _xor_shifted(mixed, _SHIFTS[-1], shifted).sum()
    return total


def _xor_shifted(mixed: Tensor, shift: int, buffer: Tensor) -> Tensor:
    """Xor numbers, in place, with themselves shifted right, as if they were unsigned."""
    torch.bitwise_right_shift(mixed, shift, out=buffer)
    return mixed.bitwise_xor_(buffer.bitwise_and_((1 << (64 - shift)) - 1))


def digits(total: int) -> str:
    """Write a sum as 16 hex digits."""
    return f"{total % 2**64:016x}"


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value
