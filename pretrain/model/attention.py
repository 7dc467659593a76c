"""Attention within documents: a row holds several pieces, and a token sees only its own piece, from the piece's start.

Three backends with the same result. "varlen" computes each piece by itself: FlashAttention on CUDA, batches of pieces
on the CPU. "flex" is FlexAttention on CUDA, which skips the blocks of the row-by-row mask in which no token may see
another. "sdpa" is PyTorch's attention with that whole mask, on any device, and the only one with dropout.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from pretrain.model.parallel import tp_rank, tp_size
from pretrain.model.piece_attention import piece_attention
from pretrain.model.pieces import Pieces

# q [B, T, n_heads, head_dim], k and v [B, T, n_kv_heads, head_dim] -> [B, T, n_heads, head_dim]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
AttentionBackend = Literal["sdpa", "flex", "varlen"]

MASK_LIMIT = 1 << 30  # bytes of the mask of "sdpa" for one row, which grows with the square of its length


def attention_within_pieces(pieces: Pieces, backend: AttentionBackend, dropout: float = 0.0) -> Attend:
    """Return causal attention that stays within a piece; made once per forward pass, used by every block.

    Args:
        pieces: padding attends to padding, so that its rows stay finite.
        backend: "flex" compiles at its first use and needs CUDA.
        dropout: share of the attention's weights that are set to 0 at random; above 0 only for "sdpa".
    """
    if dropout:
        assert backend == "sdpa"
        return functools.partial(_attention_with_dropout, mask=_mask_of(pieces), dropout=dropout)
    return {"sdpa": _masked_attention, "flex": _flex_attention, "varlen": _varlen_attention}[backend](pieces)


def mask_bytes(length: int) -> int:
    """Return the size of the mask of "sdpa" for a row of so many tokens; others have none that large."""
    return length**2


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Return PyTorch's attention, in the layout of `Attend`, where a mask [..., T (query), T (key)] allows it."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2)


def _attention_with_dropout(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, dropout: float) -> Tensor:
    """Return attention of which a part of the weights is set to 0 and the others are scaled up, as dropout does.

    Every tp rank draws for the heads of all and takes those of its own, so that each tp_size drops the same ones.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)  # [B, H, T (query), T (key)]
    weights = scores.masked_fill_(~mask, -torch.inf).softmax(-1, dtype=torch.float32).type_as(q)
    rows, heads, length = weights.shape[:3]
    of_all = (rows, heads * tp_size(), length, length)
    dropped = torch.empty(of_all, dtype=torch.bool, device=q.device).bernoulli_(dropout)[:, heads * tp_rank() :]
    return (weights.masked_fill(dropped[:, :heads], 0) @ v / (1 - dropout)).transpose(1, 2)


def _mask_of(pieces: Pieces) -> Tensor:
    """Return which keys each query attends to, bool [B, 1, T (query), T (key)]."""
    numbers = pieces.numbers
    length = numbers.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=numbers.device).tril()
    return ((numbers.unsqueeze(2) == numbers.unsqueeze(1)) & causal).unsqueeze(1)


def _masked_attention(pieces: Pieces) -> Attend:
    return functools.partial(_sdpa, mask=_mask_of(pieces))


def _varlen_attention(pieces: Pieces) -> Attend:
    bounds, extent = pieces.bounds, pieces.extent

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, _ = piece_attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), bounds, extent)
        return out.view_as(q)

    return attend


def _flex_attention(pieces: Pieces) -> Attend:
    numbers = pieces.numbers

    def visible(batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (numbers[batch, query] == numbers[batch, key])

    rows, length = numbers.shape
    mask = _compiled(create_block_mask)(visible, rows, None, length, length, device=numbers.device)
    flex = _compiled(flex_attention)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out: Tensor = flex(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
        return out.transpose(1, 2)

    return attend


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)
