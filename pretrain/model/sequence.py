"""Sequence parallelism: each of the sp ranks has a stretch of every row, but in attention some heads of whole rows.

All but attention works on tokens one by one, so a rank needs only its own. Before attention the ranks exchange queries,
keys and values of all heads of their tokens for those of their heads of all tokens, and afterwards the results back.
Any attention then sees whole rows, as without. Source: Jacobs et al. 2023 (DeepSpeed-Ulysses), arXiv 2309.14509.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pretrain.topology import sequence_group

_Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # as in attention.py


def sp_size() -> int:
    """Return the number of ranks that divide the tokens of the same rows."""
    group = sequence_group()
    return 1 if group is None else group.size()


def own_tokens(length: int) -> slice:
    """Return which of a row's `length` tokens this rank has; sp_size divides them."""
    group = sequence_group()
    if group is None:
        return slice(0, length)
    assert length % group.size() == 0, (length, group.size())
    part = length // group.size()
    return slice(group.rank() * part, (group.rank() + 1) * part)


def own_part(x: Tensor) -> Tensor:
    """Return what of x [B, T, ...] belongs to this rank's tokens, [B, T / sp_size, ...]."""
    return x[:, own_tokens(x.shape[1])]


def over_whole_rows(attend: _Attend) -> _Attend:
    """Return the same attention for tensors [B, T / sp_size, heads, head_dim] of this rank's tokens."""
    if sp_size() == 1:
        return attend

    def exchanging(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _to_own_tokens(attend(*to_own_heads(q, k, v)))

    return exchanging


def to_own_heads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Exchange all heads of this rank's tokens for this rank's heads of all tokens. Every sp rank must call it.

    Args:
        q: [B, T / sp_size, H, D].
        k, v: [B, T / sp_size, K, D]; K divides H.
    Returns:
        q [B, T, H / sp_size, D], and of k and v the heads that these attend to, the same number for each of them. A
        head of k and v that several ranks need is sent to each.
    """
    size = sp_size()
    if size == 1:
        return q, k, v
    copies = copies_of_kv_heads(k.shape[2], size)
    if copies > 1:
        k, v = (x.repeat_interleave(copies, dim=2) for x in (k, v))
    # One collective for all three: [sp_size (heads), B, T / sp_size, heads of a rank, D]
    rows, length, _, head_dim = q.shape
    sent = [x.reshape(rows, length, size, -1, head_dim).movedim(2, 0) for x in (q, k, v)]
    received = torch.split(_all_to_all(torch.cat(sent, dim=3)), [x.shape[3] for x in sent], dim=3)
    q, k, v = (x.movedim(0, 1).flatten(1, 2) for x in received)
    return q, k, v


def copies_of_kv_heads(n_kv_heads: int, sp_size: int) -> int:
    """Return how often each key and value head is sent, so that each rank gets as many as every other."""
    return math.lcm(n_kv_heads, sp_size) // n_kv_heads


def _to_own_tokens(out: Tensor) -> Tensor:
    """Exchange this rank's heads of all tokens [B, T, H / sp_size, D] for all of its own, [B, T / sp_size, H, D]."""
    rows, _, heads, head_dim = out.shape
    received = _all_to_all(out.reshape(rows, sp_size(), -1, heads, head_dim).movedim(1, 0))
    return received.movedim(0, 2).flatten(2, 3)


def _all_to_all(parts: Tensor) -> Tensor:
    """Send parts[i] to rank i; return what each rank has sent, [sp_size, ...], by rank."""
    result: Tensor = _AllToAll.apply(parts)  # type: ignore[no-untyped-call]
    return result


class _AllToAll(torch.autograd.Function):
    """What came from a rank has its gradient sent back there, which is the same exchange."""

    @staticmethod
    def forward(_ctx: Any, parts: Tensor) -> Tensor:
        return _exchanged(parts)

    @staticmethod
    def backward(_ctx: Any, gradient: Tensor) -> Tensor:
        return _exchanged(gradient)


def _exchanged(parts: Tensor) -> Tensor:
    # By its operator, which a compiled block can hold, like those of `parallel.py`
    group = sequence_group()
    assert group is not None
    ones = [1] * group.size()
    collectives = torch.ops._c10d_functional
    return collectives.wait_tensor(collectives.all_to_all_single(parts.contiguous(), ones, ones, group.group_name))
