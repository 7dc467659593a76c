"""Read whole weights from a checkpoint of any topology. zero_files -> weights -> {export, evaluation}.

No process group or GPU is needed: the files are mapped, and each weight is assembled on request.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pretrain.checkpoint.store import Checkpoint
from pretrain.checkpoint.zero_files import AVERAGE, read_partitions, whole
from pretrain.model.architecture import WeightSpec
from pretrain.model.weights import Weights
from shards import CheckpointError


class CheckpointWeights:
    """A checkpoint's weights by name.

    Args:
        checkpoint: its files are mapped unchecked; the caller has verified their hashes.
        specs: specs of all its weights.
        averaged: whether to read their moving average.
    Raises:
        CheckpointError: if the checkpoint's model lacks any of these weights, or there is no average.
    """

    def __init__(self, checkpoint: Checkpoint, specs: Mapping[str, WeightSpec], averaged: bool = False) -> None:
        self._specs = specs
        self._key = AVERAGE if averaged else "fp32"
        self._folder = checkpoint.folder / "engine"
        self._tp_ranks, _ = read_partitions(self._folder)
        for name in specs:
            if not all(any(name in partition for partition in ranks) for ranks in self._tp_ranks):
                raise CheckpointError(f"{self._folder} has no weight {name}; its run's config.yaml names another model")
        if averaged and AVERAGE not in next(iter(self._tp_ranks[0][0].values())).states:
            raise CheckpointError(f"{self._folder} has no average of the weights; train.ema was not set at its step")

    def read(self, name: str, index: int = 0, count: int = 1) -> Tensor:
        """Read a weight, or its slice for tensor-parallel rank `index` of `count`, in fp32.

        Raises:
            CheckpointError: if its shape differs from its spec.
        """
        spec = self._specs[name]
        tp_ranks = self._tp_ranks[: None if spec.shard_dim is not None else 1]
        parts = [whole(ranks, name, self._key) for ranks in tp_ranks]
        found = spec.joined(parts)
        if found is None:
            shape = list(parts[0].shape)
            if spec.shard_dim is not None:
                shape[spec.shard_dim] *= len(parts)
            raise CheckpointError(
                f"{self._folder}: {name} is {shape}, not {list(spec.shape)}; its run's config.yaml names another model"
            )
        return found[spec.bounds(index, count)]


class AveragedWeights:
    """The mean of the weights of several models of the same shape; a `pretrain.model.weights.Weights`."""

    def __init__(self, sources: Sequence[Weights]) -> None:
        self._sources = sources

    def read(self, name: str, index: int = 0, count: int = 1) -> Tensor:
        """Read the mean of a weight, or of its slice for tensor-parallel rank `index` of `count`, in fp32."""
        total = torch.zeros((), dtype=torch.float64)
        for source in self._sources:
            total = total + source.read(name, index, count)
        return (total / len(self._sources)).float()
