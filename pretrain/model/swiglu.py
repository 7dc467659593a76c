"""SwiGLU of a few tokens at a time, forward and backward. parallel -> swiglu -> transformer.

Of a row of 128k tokens the hidden values alone, several times as wide as the residual stream, would be most of what a
block computes with. Here those of a tile of tokens exist at a time: they are computed again in the backward pass, where
a tile's gradients of the weights are added in fp32 to those of the tiles before it, as the whole product would sum.

Each pass is one operator, one opaque node of a compiled block however many tiles there are, so nothing of a tile is
ever kept. Source: Bekman et al. 2025 (Arctic Long Sequence Training), arXiv 2506.13996, section 3.2.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def tiled_swiglu(x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, tokens: int) -> Tensor:
    """Return w2(silu(w1 x) * w3 x) of x [N, dim], this rank's part of the sums over the tp ranks.

    Args:
        w1, w3: [hidden, dim], this rank's slices; either all three weights have gradients, or none.
        w2: [dim, hidden].
        tokens: of a tile; the last may have fewer.
    """
    kept: Any = _Inputs
    computed: Any = _Output
    result: Tensor = computed.apply(kept.apply(x, w1, w3, w2, tokens), w1, w3, w2, tokens)
    return result


class _Inputs(torch.autograd.Function):
    """Keeps what the gradients need, and computes them from that of the output, which `_Output` passes on.

    It is a function of its own, before the one that computes, so that a checkpointed block that is computed again ends
    when it has the inputs: its last products would be computed for nothing.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, tokens: int) -> Tensor:
        ctx.save_for_backward(x, w1, w3, w2)
        ctx.tokens = tokens
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        of_weights = ctx.needs_input_grad[1]
        found = swiglu_backward(gradient, *ctx.saved_tensors, ctx.tokens, of_weights)
        return *(found if of_weights else (found[0], None, None, None)), None


class _Output(torch.autograd.Function):
    """Computes the output; its gradient is the input's as far as `_Inputs` is concerned, since it has the same shape."""

    @staticmethod
    def forward(_ctx: Any, x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, tokens: int) -> Tensor:
        return swiglu(x, w1, w3, w2, tokens)

    @staticmethod
    def backward(_ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gradient, None, None, None, None


@torch.library.custom_op("headrace::swiglu", mutates_args=())
def swiglu(x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, tokens: int) -> Tensor:
    """Compute the output [N, dim], tile by tile."""
    out = torch.empty_like(x)
    for tile in _tiles(len(x), tokens):
        hidden = F.silu(x[tile] @ w1.t(), inplace=True).mul_(x[tile] @ w3.t())
        torch.mm(hidden, w2.t(), out=out[tile])
    return out


@torch.library.custom_op("headrace::swiglu_backward", mutates_args=())
def swiglu_backward(
    gradient: Tensor, x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, tokens: int, of_weights: bool
) -> list[Tensor]:
    """Return the gradient of x, followed by those of w1, w3 and w2 if they are asked for, tile by tile."""
    of_x = torch.empty_like(x)
    sums: list[Tensor] = []
    for tile in _tiles(len(x), tokens):
        inputs, of_output = x[tile], gradient[tile]
        gate, up, of_hidden = inputs @ w1.t(), inputs @ w3.t(), of_output @ w2
        of_up = F.silu(gate)
        parts = [of_output.t() @ (of_up * up)] if of_weights else []
        of_up.mul_(of_hidden)
        of_gate = torch.ops.aten.silu_backward(of_hidden.mul_(up), gate)
        torch.mm(of_gate, w1, out=of_x[tile])
        of_x[tile].addmm_(of_up, w3)
        if of_weights:
            parts = [of_gate.t() @ inputs, of_up.t() @ inputs, *parts]
            # The first in the weights' type: where it is the only one, nothing is added
            sums = [total.float().add_(part) for total, part in zip(sums, parts, strict=True)] if sums else parts
    return [of_x, *_rounded(sums, w1.dtype)]


def _tiles(length: int, tokens: int) -> Iterator[slice]:
    return (slice(start, start + tokens) for start in range(0, length, tokens))


def _rounded(sums: list[Tensor], dtype: torch.dtype) -> Iterator[Tensor]:
    """Yield sums in another type, each of them freed as soon as it is rounded."""
    while sums:
        yield sums.pop(0).to(dtype)


@swiglu.register_fake
def _(x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, tokens: int) -> Tensor:
    return torch.empty_like(x)


@swiglu_backward.register_fake
def _(
    gradient: Tensor, x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, tokens: int, of_weights: bool
) -> list[Tensor]:
    return [torch.empty_like(tensor) for tensor in (x, *((w1, w3, w2) if of_weights else ()))]
