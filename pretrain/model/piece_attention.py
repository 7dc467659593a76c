"""Causal attention within each piece of the flattened tokens, one custom operator for the CPU and for CUDA.

An operator of its own is one opaque node of a compiled block: where the pieces lie is data to it, so nothing is
compiled again when documents change, and a checkpointing policy can keep its results by name. `Pieces` says what
`bounds` and `extent` are. N tokens, H query heads, K key-value heads, D head_dim.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

_aten = torch.ops.aten

_QUANTUM = 16  # tokens; pieces whose lengths agree when rounded up to a multiple of it are computed together


@torch.library.custom_op("headrace::piece_attention", mutates_args=(), device_types="cpu")
def piece_attention(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, extent: Tensor) -> tuple[Tensor, Tensor]:
    """Attend from each token to those of its piece up to itself.

    Args:
        q: [N, H, D].
        k, v: [N, K, D]; H is a multiple of K.
        bounds, extent: as in `Pieces`.
    Returns:
        The output [N, H, D], and the logsumexp of each query's scores, [H, N] fp32.
    """
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    logsumexp = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    for group in _groups(bounds.numpy().tobytes(), len(q)):
        found, sums = _aten._scaled_dot_product_flash_attention_for_cpu(*map(group.take, (q, k, v)), 0.0, True)
        group.put(out, found)
        logsumexp[:, group.tokens] = sums.transpose(0, 1).flatten(1)[:, group.slots]
    return out, logsumexp


@torch.library.custom_op("headrace::piece_attention_backward", mutates_args=(), device_types="cpu")
def piece_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor, bounds: Tensor, extent: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v, given that of the output."""
    gradients = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    for group in _groups(bounds.numpy().tobytes(), len(q)):
        inputs = [group.take(x) for x in (q, k, v, out)]
        sums = logsumexp[:, group.index].view(len(logsumexp), *group.shape).transpose(0, 1)
        found = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            group.take_real(grad), *inputs, sums, 0.0, True
        )
        for gradient, values in zip(gradients, found, strict=True):
            group.put(gradient, values)
    return gradients  # type: ignore[return-value]  # three of them


@dataclass(frozen=True)
class _Group:
    """Pieces of similar length, computed as one batch of n rows of the same length.

    Attributes:
        shape: (n, length).
        index: [n * length] the token in each slot of the batch; after a piece's end its last token stands again,
            which no causal query of the piece sees.
        tokens, slots: the tokens of these pieces, and the slot of each.
    """

    shape: tuple[int, int]
    index: Tensor
    tokens: Tensor
    slots: Tensor

    def take(self, x: Tensor) -> Tensor:
        """Gather x [N, heads, D] into the batch, [n, heads, length, D] fp32, in which CPUs compute fastest."""
        return x.index_select(0, self.index).view(*self.shape, *x.shape[1:]).transpose(1, 2).float()

    def take_real(self, x: Tensor) -> Tensor:
        """Gather x as `take` does, with zeros after each piece's end."""
        batch = x.new_zeros((len(self.index), *x.shape[1:]), dtype=torch.float32)
        batch[self.slots] = x.index_select(0, self.tokens).float()
        return batch.view(*self.shape, *x.shape[1:]).transpose(1, 2)

    def put(self, x: Tensor, batch: Tensor) -> None:
        """Scatter the batch [n, heads, length, D] into x [N, heads, D]."""
        x[self.tokens] = batch.transpose(1, 2).reshape(-1, *x.shape[1:]).index_select(0, self.slots).to(x.dtype)


@functools.lru_cache(maxsize=4)  # every layer asks for the same, forward and backward
def _groups(bounds: bytes, n_tokens: int) -> tuple[_Group, ...]:
    starts = np.frombuffer(bounds, np.int32)
    starts = starts[: np.searchsorted(starts, n_tokens) + 1].astype(np.int64)
    lengths = np.diff(starts)
    rounded = -(-lengths // _QUANTUM) * _QUANTUM
    groups = []
    for length in np.unique(rounded):
        members = rounded == length
        slot = np.arange(length)
        real = slot < lengths[members][:, None]
        index = starts[:-1][members][:, None] + np.minimum(slot, lengths[members][:, None] - 1)
        groups.append(
            _Group(
                shape=index.shape,
                index=torch.from_numpy(index.ravel()),
                tokens=torch.from_numpy(index[real]),
                slots=torch.from_numpy(np.flatnonzero(real)),
            )
        )
    return tuple(groups)


@piece_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, extent: Tensor) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


@piece_attention_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor, bounds: Tensor, extent: Tensor
) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, bounds, extent = inputs
    ctx.save_for_backward(q, k, v, *output, bounds, extent)


def _differentiate(ctx: Any, grad: Tensor, _logsumexp: Tensor) -> tuple[Tensor | None, ...]:
    return *piece_attention_backward(grad, *ctx.saved_tensors), None, None


piece_attention.register_autograd(_differentiate, setup_context=_keep)
