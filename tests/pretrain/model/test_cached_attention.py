"""Attention to a cache: that of a masked softmax, without ever making a mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pretrain.model import cached_attention as module
from pretrain.model.cached_attention import cached_attention


def masked_softmax(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Return the attention of the last tokens [B, T, H, D] to all up to themselves, [B, K, S, D], by a mask."""
    count, n_tokens = q.shape[1], keys.shape[2]
    keys, values = (x.to(q.dtype).repeat_interleave(q.shape[2] // x.shape[1], dim=1) for x in (keys, values))
    mask = torch.ones(count, n_tokens, dtype=torch.bool, device=q.device).tril(n_tokens - count)
    scores = q.transpose(1, 2) @ keys.mT * q.shape[-1] ** -0.5
    return (scores.masked_fill(~mask, -torch.inf).softmax(-1) @ values).transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 8), (4, 2, 6), (3, 1, 16)])
def test_it_is_that_of_a_masked_softmax(
    heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BLOCK_TOKENS", 4)
    generator = torch.Generator().manual_seed(1)
    for count, n_tokens in ((1, 1), (5, 5), (1, 9), (4, 11), (10, 11), (2, 40)):
        q = torch.randn(2, count, heads, head_dim, generator=generator)
        memory = torch.randn(2, 2, kv_heads, n_tokens + 3, head_dim, generator=generator).to(dtype)
        keys, values = memory[..., :n_tokens, :]  # a cache has room for more
        torch.testing.assert_close(
            cached_attention(q, keys, values), masked_softmax(q, keys, values), rtol=1e-5, atol=1e-5
        )


class LargestTensor(TorchDispatchMode):
    """Notes the elements of the largest storage that operations make."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(made):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in given:
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_it_makes_does_not_grow_with_the_text(dtype: torch.dtype) -> None:
    q = torch.randn(1, 32, 4, 8)
    keys, values = torch.randn(2, 1, 2, 20_000, 8).to(dtype)
    with LargestTensor() as largest:
        cached_attention(q, keys, values)
    converted = 0 if dtype == q.dtype else module._BLOCK_TOKENS * 2 * 8
    assert largest.elements <= max(32 * 4 * 8, converted) < 32 * 20_000


@pytest.mark.parametrize("before", [0, 512])
def test_no_chunk_has_a_matrix_of_scores_where_there_is_no_cpu(before: int) -> None:
    count = 1024
    q = torch.empty(1, count, 8, 16, device="meta")  # on which operators are chosen as on a GPU without bf16
    keys, values = torch.empty(2, 1, 2, before + count, 16, device="meta")
    with LargestTensor() as largest:
        assert cached_attention(q, keys, values).shape == q.shape
    assert largest.elements == q.numel() < count**2
