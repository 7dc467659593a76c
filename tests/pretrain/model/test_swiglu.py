"""SwiGLU a few tokens at a time equals SwiGLU of all of them, sums in fp32, and has no hidden values of more."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pretrain.model import swiglu
from pretrain.model.checkpointing import checkpointed
from pretrain.model.swiglu import tiled_swiglu

DIM, HIDDEN = 16, 40


def inputs(length: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)
    shapes = (length, DIM), (HIDDEN, DIM), (HIDDEN, DIM), (DIM, HIDDEN)
    return [(0.3 * torch.randn(shape, generator=generator)).to(dtype).requires_grad_() for shape in shapes]


def plain(x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
    return F.linear(F.silu(F.linear(x, w1)) * F.linear(x, w3), w2)


def results(function: Any, tensors: list[Tensor]) -> list[Tensor]:
    out = function(*tensors)
    return [out, *torch.autograd.grad(out, tensors, torch.cos(out.detach()))]


@pytest.mark.parametrize("tokens", [1, 7, 30, 31, 100])
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_output_and_gradients_are_those_of_all_tokens_at_once(tokens: int, checkpointing: Any) -> None:
    tensors = inputs(31, torch.float32)
    compute = checkpointed(lambda *x: tiled_swiglu(*x, tokens) * 1.0, checkpointing)
    for found, wanted in zip(results(compute, tensors), results(plain, tensors), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_frozen_weights_have_no_gradient_and_the_input_has_its_own() -> None:
    x, *weights = inputs(31, torch.float32)
    frozen = [weight.detach() for weight in weights]
    found = tiled_swiglu(x, *frozen, 8)
    (of_x,) = torch.autograd.grad(found.sum(), [x])
    torch.testing.assert_close(of_x, torch.autograd.grad(plain(x, *weights).sum(), [x])[0], rtol=1e-5, atol=1e-5)


def test_gradients_of_many_tiles_are_as_precise_in_bf16_as_that_of_all_tokens() -> None:
    tensors = inputs(2048, torch.bfloat16)
    exact = results(plain, [x.detach().double().requires_grad_() for x in tensors])[2:]

    def errors(found: list[Tensor]) -> list[float]:
        return [float((one - other).norm() / other.norm()) for one, other in zip(found[2:], exact, strict=True)]

    whole = errors(results(plain, tensors))
    for error, of_whole in zip(errors(results(lambda *x: tiled_swiglu(*x, 8), tensors)), whole, strict=True):
        assert error < 1.2 * of_whole, "256 tiles added in bf16 would lose far more"


class Largest(TorchDispatchMode):
    """Notes the most numbers of any tensor that operations make."""

    numbers = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        self.numbers = max([self.numbers, *(x.numel() for x in tree_leaves(made) if isinstance(x, Tensor))])
        return made


def test_no_hidden_values_exist_of_more_than_a_tile() -> None:
    x, *weights = (tensor.detach() for tensor in inputs(600, torch.float32))
    with Largest() as largest:  # of what the operators are made of
        out = swiglu.swiglu._init_fn(x, *weights, 50)
        swiglu.swiglu_backward._init_fn(out, x, *weights, 50, True)
    assert largest.numbers == 600 * DIM, "the input's size; the hidden values of all tokens would be more"


def test_a_block_that_is_computed_again_ends_before_the_last_products(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    compute = swiglu.swiglu
    monkeypatch.setattr(swiglu, "swiglu", lambda *arguments: calls.append(1) or compute(*arguments))
    tensors = inputs(31, torch.float32)
    results(checkpointed(lambda x, *weights: tiled_swiglu(torch.tanh(x), *weights, 8), "full"), tensors)
    assert len(calls) == 1
