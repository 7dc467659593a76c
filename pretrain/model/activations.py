"""Measure what flows through a model's blocks during forward passes, to see early that a run goes wrong.

Hooks do it, on blocks that are not compiled for it, so that training passes know nothing of it. Figures are of whole
tensors over all ranks, so they depend on the weights and the tokens alone, not on the layout. Padding does not count.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.model.sequence import own_part
from pretrain.topology import Topology, copy_to


class ActivationMeasurement:
    """Gathers figures of each block over forward passes, by this rank's tokens, for all ranks together.

    The figures, one number for each block:
        residual_rms: root mean square of what the block passes on, the residual stream.
        residual_max: its largest absolute value.
        residual_kurtosis: its fourth moment over its squared second one, both about 0: 3 for a normal distribution, and
            the larger, the more of the stream's size sits in few coordinates.
    A subclass measures more.
    """

    def __init__(self, blocks: nn.ModuleList, topology: Topology) -> None:
        self._blocks, self._topology = blocks, topology
        # count, x^2, x^4
        self._residual = torch.zeros(len(blocks), 3, dtype=torch.float64, device=topology.device)
        self._largest = torch.full((len(blocks),), -torch.inf, device=topology.device)

    @contextmanager
    def of(self, segment_ids: Tensor) -> Iterator[None]:
        """Measure the forward pass inside the block, of rows with these segment ids [B, T], on the host."""
        with ExitStack() as hooks:
            if segment_ids.any():
                own = own_part(segment_ids).flatten().nonzero().flatten()
                self.watch(segment_ids, copy_to(self._topology.device, own), hooks)
            yield

    def watch(self, segment_ids: Tensor, tokens: Tensor, hooks: ExitStack) -> None:
        """Let all blocks be measured in the next pass.

        Args:
            tokens: which of the flattened tokens that this rank has are no padding; there may be none.
            hooks: removes the hooks that are entered into it.
        """
        for number, block in enumerate(self._blocks):
            hooks.enter_context(block.register_forward_pre_hook(_uncompiled))
            if len(tokens):
                hooks.enter_context(block.register_forward_hook(self._measures_stream(number, tokens)))

    def finish(self) -> dict[str, list[float]]:
        """Return the figures over all passes and ranks. Every rank must call it."""
        self._topology.sum_over_all(self._residual)
        self._topology.max_over_all(self._largest)
        square, fourth = (self._residual[:, 1:] / self._residual[:, :1]).unbind(1)
        figures = {
            "residual_rms": square.sqrt(),
            "residual_max": self._largest,
            "residual_kurtosis": fourth / square.square(),
        }
        return {name: values.tolist() for name, values in figures.items()}

    def _measures_stream(self, number: int, tokens: Tensor) -> Any:
        def measure(_block: nn.Module, _inputs: tuple[Any, ...], x: Tensor) -> None:
            x = x[tokens].float()
            square = x.square()
            self._residual[number] += sums(x.numel(), square, square.square())
            self._largest[number] = torch.maximum(self._largest[number], square.max().sqrt())

        return measure


def _uncompiled(_block: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return *inputs[:-1], "uncompiled"


def sums(count: int, *values: Tensor) -> Tensor:
    """Return a count and the sums of tensors, in float64."""
    found = [v.sum(dtype=torch.float64) for v in values]
    return torch.stack([found[0].new_tensor(float(count)), *found])
