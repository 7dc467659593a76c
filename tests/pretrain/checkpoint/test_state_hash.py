"""The hash of a state depends on its bits, their places and their names, and not on how it is cut or summed."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from pretrain.checkpoint.state_hash import Place, digits, hash_sum


def reference(values: np.ndarray, name: str) -> int:
    """Hash a whole weight with numpy's unsigned integers, by the published definition of SplitMix64."""
    flat = np.ascontiguousarray(values, dtype=np.float32).ravel()
    bits = flat.view(np.int32).astype(np.int64).view(np.uint64)  # negative numbers fill the upper half with ones
    key = np.uint64(xxhash.xxh3_64_intdigest(name.encode()))
    with np.errstate(over="ignore"):
        z = (np.arange(flat.size, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + key) ^ bits
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return int((z ^ (z >> np.uint64(31))).sum(dtype=np.uint64))


def of_whole(values: torch.Tensor, name: str = "weight") -> str:
    return digits(int(hash_sum(values.flatten(), name, Place(0, values.numel()))))


@given(st.data())
def test_any_cut_over_ranks_adds_up_to_the_hash_of_the_whole(data: st.DataObject) -> None:
    tp_size, dim = data.draw(st.sampled_from([1, 2, 3])), data.draw(st.sampled_from([None, 0, 1]))
    shape = tuple(tp_size * data.draw(st.integers(1, 9)) for _ in range(2))
    whole = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))
    total = 0
    for tp_rank in range(1 if dim is None else tp_size):
        own = whole if dim is None else whole.chunk(tp_size, dim)[tp_rank].contiguous()
        cuts = data.draw(st.lists(st.integers(0, own.numel()), max_size=4))
        bounds = sorted({0, own.numel(), *cuts})
        for start, stop in itertools.pairwise(bounds):
            place = Place.in_slice(start, tuple(own.shape), dim, tp_rank, tp_size)
            total += int(hash_sum(own.flatten()[start:stop], "w", place))
    assert digits(total) == f"{reference(whole.numpy(), 'w'):016x}"


def test_many_elements_are_hashed_like_few() -> None:
    values = torch.randn(3, 50_001, generator=torch.Generator().manual_seed(1))  # several chunks, the last one short
    assert of_whole(values) == f"{reference(values.numpy(), 'weight'):016x}"


def test_a_change_of_any_bit_changes_the_hash() -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(2))
    before = of_whole(values)
    for element in (0, 517, 999):
        for bit in range(32):
            changed = values.clone()
            changed.view(torch.int32)[element] ^= -(1 << 31) if bit == 31 else 1 << bit
            assert of_whole(changed) != before, (element, bit)


def test_changes_that_a_plain_sum_would_miss_change_the_hash() -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(3))
    before = of_whole(values)
    swapped, negated = values.clone(), values.clone()
    swapped[[3, 700]] = values[[700, 3]]
    negated[[3, 700]] *= -1
    found = [of_whole(swapped), of_whole(negated), of_whole(values.roll(1)), of_whole(values, "another")]
    assert before not in found
    assert len(set(found)) == len(found)
    assert of_whole(torch.zeros(5)) != of_whole(-torch.zeros(5))


def test_other_types_than_fp32_are_a_bug() -> None:
    with pytest.raises(AssertionError, match="weight is torch.bfloat16"):
        of_whole(torch.zeros(3, dtype=torch.bfloat16))
