"""Causal attention within each piece of the flattened tokens, as one custom operator for the CPU and for CUDA.

An operator of its own is one opaque node of a compiled block: where the pieces lie is data to it, so nothing is
compiled again when documents change, and a checkpointing policy can keep its results by name. N tokens, H query heads,
K key-value heads, D head_dim; `Pieces` says what `bounds` and `extent` are.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

_aten = torch.ops.aten


@torch.library.custom_op("headrace::piece_attention", mutates_args=(), device_types="cpu")
def piece_attention(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, extent: Tensor) -> tuple[Tensor, Tensor]:
    """Attend from each token to those of its piece up to itself.

    Args:
        q: [N, H, D]; on CUDA in bf16.
        k, v: [N, K, D]; H is a multiple of K.
        bounds, extent: as in `Pieces`.
    Returns:
        The output [N, H, D], and the logsumexp of each query's scores, [H, N] fp32, which the gradients need.
    """
    out, logsumexp = _results_for(q)
    for tokens, length in _batches(bounds.numpy().tobytes()):
        q_batch, k_batch, v_batch = (_batch_of(x, tokens, length) for x in (q, k, v))
        found, sums = _aten._scaled_dot_product_flash_attention_for_cpu(q_batch, k_batch, v_batch, is_causal=True)
        _put(out, tokens, found.transpose(1, 2).flatten(0, 1))
        _put(logsumexp.T, tokens, sums.transpose(1, 2).flatten(0, 1))
    return out, logsumexp


@torch.library.custom_op("headrace::piece_attention_backward", mutates_args=(), device_types="cpu")
def piece_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor, bounds: Tensor, extent: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v, given that of the output."""
    gradients = _gradients_for(q, k, v)
    for tokens, length in _batches(bounds.numpy().tobytes()):
        batches = (_batch_of(x, tokens, length) for x in (grad, q, k, v, out))
        sums = _at(logsumexp.T, tokens).view(-1, length, q.shape[1]).transpose(1, 2)
        found = _aten._scaled_dot_product_flash_attention_for_cpu_backward(*batches, sums, 0.0, is_causal=True)
        for gradient, batch in zip(gradients, found, strict=True):
            _put(gradient, tokens, batch.transpose(1, 2).flatten(0, 1))
    return gradients


_Tokens = slice | Tensor  # indices of tokens; of neighbours a slice, which need not be copied


@functools.lru_cache(maxsize=4)  # every layer asks for the same, forward and backward
def _batches(bounds: bytes) -> tuple[tuple[_Tokens, int], ...]:
    """Group pieces by length. Return for each length n the tokens of its pieces, in their order, and n.

    One by one, short pieces would cost more in calls than in arithmetic; rounding their lengths up to make fewer groups
    would cost more arithmetic than it saves calls.
    """
    places = np.frombuffer(bounds, np.int32).astype(np.int64)
    lengths = np.diff(places)  # 0 behind the last piece
    batches: list[tuple[_Tokens, int]] = []
    for length in np.unique(lengths[lengths > 0]).tolist():
        tokens = (places[:-1][lengths == length, None] + np.arange(length)).ravel()
        begin, end = int(tokens[0]), int(tokens[-1]) + 1
        batches.append((slice(begin, end) if end - begin == len(tokens) else torch.from_numpy(tokens), length))
    return tuple(batches)


def _batch_of(x: Tensor, tokens: _Tokens, length: int) -> Tensor:
    """Return the rows of x [N, heads, D] for pieces of equal length, [pieces, heads, length, D] fp32.

    PyTorch's kernel took up to five times as long in bf16, in which it would also compute in fp32 and only read and
    write less.
    """
    return _at(x, tokens).view(-1, length, *x.shape[1:]).transpose(1, 2).float()


def _at(x: Tensor, tokens: _Tokens) -> Tensor:
    """Return x [N, ...] at these tokens, contiguous, as the kernel expects it without asking."""
    return x[tokens].contiguous() if isinstance(tokens, slice) else x.index_select(0, tokens)


def _put(x: Tensor, tokens: _Tokens, rows: Tensor) -> None:
    """Set x [N, ...] at these tokens."""
    if isinstance(tokens, slice):
        x[tokens] = rows
    else:
        x.index_copy_(0, tokens, rows.to(x.dtype))


@piece_attention.register_kernel("cuda")
def _(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, extent: Tensor) -> tuple[Tensor, Tensor]:
    return _aten._flash_attention_forward(
        q, k, v, *_lengths(bounds, extent), 0.0, is_causal=True, return_debug_mask=False, **_WINDOW
    )[:2]


@piece_attention_backward.register_kernel("cuda")
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor, bounds: Tensor, extent: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    no_dropout = q.new_empty(2, dtype=torch.uint64), q.new_empty(0)
    return _aten._flash_attention_backward(
        grad, q, k, v, out, logsumexp, *_lengths(bounds, extent), 0.0, True, *no_dropout, **_WINDOW
    )


_WINDOW = {"window_size_left": -1, "window_size_right": 0}  # all tokens before, none after


def _lengths(bounds: Tensor, extent: Tensor) -> tuple[Tensor, Tensor, int, int]:
    """Return FlashAttention's cu_seqlens and longest lengths, of queries and keys, without the places behind the end.

    Each place would cost it 128 rows of scratch memory in the backward pass.
    """
    n_pieces, longest = extent.tolist()
    bounds = bounds[: n_pieces + 1]
    # A longest length of 1 would be taken for decoding, whose results have another shape.
    return bounds, bounds, max(longest, 2), max(longest, 2)


@piece_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, extent: Tensor) -> tuple[Tensor, Tensor]:
    return _results_for(q)


@piece_attention_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor, bounds: Tensor, extent: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients_for(q, k, v)


def _results_for(q: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


def _gradients_for(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, bounds, extent = inputs
    ctx.save_for_backward(q, k, v, *output, bounds, extent)


def _differentiate(ctx: Any, grad: Tensor, _logsumexp: Tensor) -> tuple[Tensor | None, ...]:
    return *piece_attention_backward(grad, *ctx.saved_tensors), None, None


piece_attention.register_autograd(_differentiate, setup_context=_keep)
