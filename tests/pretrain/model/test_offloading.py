"""Inputs of blocks that lie on the host until the backward pass: the same bits, and two at a time on the device."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pretrain.model import offloading
from pretrain.model.checkpointing import checkpointed
from pretrain.model.offloading import keep_inputs_on_host


class Block(nn.Module):
    """A block with full checkpointing; notes how many inputs are on the device when it is computed again."""

    def __init__(self, moved: weakref.WeakSet[Any], held: list[int]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))
        self._compute = checkpointed(self._layer, "full")
        self._moved, self._held = moved, held

    def forward(self, x: Tensor, factor: Tensor, _use: str) -> Tensor:
        return self._compute(x, factor)

    def _layer(self, x: Tensor, factor: Tensor) -> Tensor:
        self._held.append(sum(item._on_device is not None for item in self._moved))
        return x + torch.tanh(x @ self.weight) * factor


def test_two_inputs_are_on_the_device_and_none_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    moved: weakref.WeakSet[Any] = weakref.WeakSet()
    make = offloading._Moved.__init__

    def remember(self: Any, *arguments: Any) -> None:
        make(self, *arguments)
        moved.add(self)

    monkeypatch.setattr(offloading._Moved, "__init__", remember)
    held: list[int] = []
    plain, blocks = (nn.ModuleList(Block(moved, held) for _ in range(5)) for _ in range(2))
    keep_inputs_on_host(blocks)
    factor = torch.full((8,), 0.5)
    found = []
    for layers in (plain, blocks, blocks):  # the last is another micro-step
        layers.zero_grad()
        held.clear()
        start = torch.linspace(-1, 1, 24).view(3, 8).requires_grad_()
        x = start * 1.0  # as an embedding's result, which the graph needs no more
        for block in layers:
            x = block(x, factor, "training")
        counts = len(moved), sum(item._on_device is not None for item in moved)
        assert counts == ((0, 0) if layers is plain else (5, 1)), "the last is where it is needed first"
        x.square().sum().backward()
        assert max(held) == (0 if layers is plain else 2)
        del x
        assert not moved, "nothing of a pass outlives its graph"
        found.append([start.grad, *(block.weight.grad for block in layers)])
    for others in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], others, strict=True))
