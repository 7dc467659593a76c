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
    """Computes the output, and passes its gradient on in place of the input's, which has the same shape."""

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
    sums = _Sums()
    for tile in _tiles(len(x), tokens):
        _differentiate(gradient[tile], x[tile], w1, w3, w2, of_x[tile], sums if of_weights else None)
    return [of_x, *sums.rounded(w1.dtype)]


def _differentiate(
    gradient: Tensor, x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, of_x: Tensor, sums: _Sums | None
) -> None:
    """Set the gradient of a tile's x, and add its gradients of the weights; four hidden values a unit at a time."""
    gate, up = x @ w1.t(), x @ w3.t()
    activated = F.silu(gate)
    if sums is not None:
        sums.add("w2", gradient.t() @ (activated * up))
    of_hidden = gradient @ w2
    of_up = activated.mul_(of_hidden)
    of_gate = torch.ops.aten.silu_backward.grad_input(of_hidden.mul_(up), gate, grad_input=of_hidden)
    del gate, up
    torch.mm(of_gate, w1, out=of_x)
    of_x.addmm_(of_up, w3)
    if sums is not None:
        sums.add("w1", of_gate.t() @ x)
        sums.add("w3", of_up.t() @ x)


class _Sums:
    """Gradients of the weights, summed over tiles in fp32; that of a single tile stays as it is."""

    def __init__(self) -> None:
        self._of: dict[str, Tensor] = {}

    def add(self, name: str, part: Tensor) -> None:
        self._of[name] = self._of[name].float().add_(part) if name in self._of else part

    def rounded(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """Yield those of w1, w3 and w2 in the weights' type, if there are any, and keep none of them."""
        yield from (self._of.pop(name).to(dtype) for name in ("w1", "w3", "w2") if name in self._of)


def _tiles(length: int, tokens: int) -> Iterator[slice]:
    return (slice(start, start + tokens) for start in range(0, length, tokens))


@swiglu.register_fake
def _(x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, tokens: int) -> Tensor:
    return torch.empty_like(x)


@swiglu_backward.register_fake
def _(gradient: Tensor, x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, tokens: int, of_weights: bool) -> list[Tensor]:
    return [torch.empty_like(tensor) for tensor in (x, *((w1, w3, w2) if of_weights else ()))]
