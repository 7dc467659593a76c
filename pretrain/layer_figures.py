"""Measure each layer in one step, by its activations and weights. engine -> layer_figures -> {layers.jsonl, wandb}."""

from __future__ import annotations

import math
import re
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pretrain.model.architecture import Model
from pretrain.topology import Topology
from pretrain.weight_norms import WeightMeasurement, WeightNorms


@dataclass(frozen=True)
class LayerFigures:
    """The figures of one step, the same on every rank and in every layout.

    Attributes:
        activations: those of the model's `measurement`: of the step's batch, by the weights before the step, without
            dropout.
        weights: the norms of each weight, by its name.
        seconds: how long the activations took to measure, which is not part of the step.
    """

    activations: Mapping[str, list[float]]
    weights: Mapping[str, WeightNorms]
    seconds: float

    def as_record(self, step: int) -> dict[str, object]:
        """Return a line of layers.jsonl: each figure block by block, and the norms of each weight.

        The norms of a block are those of all its weights together; `update_ratio` is its update's over its weights'.
        """
        blocks: dict[int, list[WeightNorms]] = defaultdict(list)
        for name, norms in self.weights.items():
            if found := re.match(r"blocks\.(\d+)\.", name):
                blocks[int(found[1])].append(norms)
        together = [_together(blocks[number]) for number in sorted(blocks)]
        layers = {
            "weight_norm": [norms.weight for norms in together],
            "gradient_norm": [norms.gradient for norms in together],
            "update_norm": [norms.update for norms in together],
            "update_ratio": [norms.update / norms.weight if norms.weight else None for norms in together],
        }
        return {
            "step": step,
            "layers": {**layers, **self.activations},
            "weights": {name: [norms.weight, norms.gradient, norms.update] for name, norms in self.weights.items()},
            "seconds": self.seconds,
        }


class LayerMeasurement:
    """Measures the `LayerFigures` of one step. Every rank calls its methods in this order.

    Args:
        optimizer: DeepSpeed's.
    Attributes:
        activations: measures the passes over the step's batch.
    """

    def __init__(self, model: Model, optimizer: Any, topology: Topology) -> None:
        self._start = time.perf_counter()
        self._model, self._optimizer, self._topology = model, optimizer, topology
        self.activations = model.measurement(topology)

    def end_activations(self) -> None:
        """Note that all passes have been made; wait for them."""
        self._activations = self.activations.finish()
        self._seconds = time.perf_counter() - self._start

    def before_update(self) -> None:
        """Measure the weights between the last backward pass and the optimizer's step."""
        self._weights = WeightMeasurement(self._model, self._optimizer, self._topology)

    def finish(self) -> LayerFigures:
        """Return the figures after the optimizer's step."""
        return LayerFigures(self._activations, self._weights.finish(), self._seconds)


def _together(norms: list[WeightNorms]) -> WeightNorms:
    """Return the norms of several weights seen as one vector."""
    return WeightNorms(
        weight=math.hypot(*(of.weight for of in norms)),
        gradient=math.hypot(*(of.gradient for of in norms)),
        update=math.hypot(*(of.update for of in norms)),
    )
