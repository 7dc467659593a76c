"""Measure what one optimizer step does to each trained weight. engine, zero_pieces -> weight_norms -> layer_figures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.model.parallel import counts_in_sums
from pretrain.topology import Topology
from pretrain.zero_pieces import own_pieces

_RUN = 4096  # values whose squares are summed in fp32


@dataclass(frozen=True)
class WeightNorms:
    """L2 norms of a whole weight at one step, the same in every layout.

    Attributes:
        weight: of its fp32 values before the step.
        gradient: of its gradient before clipping.
        update: of the change that the step made; 0 if it was not applied.
    """

    weight: float
    gradient: float
    update: float


class WeightMeasurement:
    """Measures the `WeightNorms` of one step.

    Every rank makes one between the last backward pass and the optimizer's step. Until `finish`, it holds a copy of the
    rank's pieces of the fp32 weights, where they are: on the host if they are offloaded, else where the activations
    have just been freed.

    Args:
        optimizer: DeepSpeed's.
    """

    def __init__(self, model: nn.Module, optimizer: Any, topology: Topology) -> None:
        if topology.device.type == "cuda":
            torch.cuda.synchronize(topology.device)  # offloaded gradients may still be on their way to the host
        self._topology = topology
        self._names = []
        self._pieces = []
        self._counts = []
        for name, parameter, piece in own_pieces(model, optimizer, topology.zero_rank):
            self._names.append(name)
            self._pieces.append(piece)
            self._counts.append(counts_in_sums(parameter, topology.tp_rank))
        self._before = [piece.weights.clone() for piece in self._pieces]
        self._gradients = [_squares(piece.gradient).to(piece.weights.device) for piece in self._pieces]

    def finish(self) -> dict[str, WeightNorms]:
        """Return the norms, by the weights' names, after the optimizer's step. Every rank must call it."""
        sums = [
            torch.stack((_squares(before), gradient, _squares(piece.weights - before)))
            for piece, before, gradient in zip(self._pieces, self._before, self._gradients, strict=True)
        ]
        counted = torch.stack(sums).cpu() * torch.tensor(self._counts).unsqueeze(1)
        norms = self._topology.sum_over_all(counted).sqrt().tolist()
        return {name: WeightNorms(*values) for name, values in zip(self._names, norms, strict=True)}


def _squares(values: Tensor) -> Tensor:
    """Sum the squares of a flat tensor, to about 1e-6.

    A norm in fp64 takes 13 times as long on CPUs, and one of all values in fp32 is off by 1e-3 at 50 million of them.
    """
    whole = len(values) // _RUN * _RUN
    norms = torch.linalg.vector_norm(values[:whole].float().view(-1, _RUN), dim=1)
    return norms.double().square().sum() + torch.linalg.vector_norm(values[whole:], dtype=torch.float64).square()
