"""The model under a run's adapters: opened, and known again by its files. {folder, weights} -> base -> {assembly, ...}.

A run with adapters keeps nothing of it but the hash of its files. Whoever reads one of its checkpoints reads the model
from where the run did, and refuses another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pretrain.checkpoint.state import read_state
from pretrain.checkpoint.store import Checkpoint
from pretrain.checkpoint.weights import CheckpointWeights
from pretrain.exchange.folder import Model, content_hash, file_hashes, open_model
from pretrain.model.architecture import ModelConfig
from pretrain.model.weights import AdaptedWeights, MergedWeights, Weights, trained_specs
from pretrain.topology import Topology
from shards import ConfigError

T = TypeVar("T")


@dataclass(frozen=True)
class Base:
    """A model that adapters are trained on.

    Attributes:
        folder: where it lies.
        hash: of its files, as state.json has it.
    """

    folder: Path
    weights: Weights
    hash: str

    def check(self, checkpoint: Checkpoint) -> None:
        """Raise ConfigError if the adapters in a checkpoint were trained on another model."""
        trained_on = read_state(checkpoint).init_hash
        if trained_on != self.hash:
            raise ConfigError(
                f"init_from={self.folder} is not the model that the adapters in {checkpoint.folder} were trained on:"
                f" the hash of its files is {self.hash}, not {trained_on}; put the right files there, or set init_from"
                " to their folder"
            )


def open_base(folder: Path | None, model: ModelConfig, topology: Topology | None = None) -> Base | None:
    """Open the model under a run's adapters; None if the run has none.

    Args:
        folder: the run's init_from.
        topology: if several ranks call it, all of them together; each then hashes a part of the files.
    Raises:
        ConfigError: if there is no such model.
    """
    if model.adapters is None:
        return None
    assert folder is not None, "a config with adapters has it"
    opened = _together(lambda: open_model(folder, model), topology)
    return Base(folder, opened, model_hash(opened, topology))


def model_hash(model: Model, topology: Topology | None = None) -> str:
    """Return the hash of a model's files; the topology is as for `open_base`."""
    part, parts = (topology.rank, topology.world_size) if topology else (0, 1)
    own = _together(lambda: file_hashes(model, part, parts), topology)
    hashes = topology.gather_objects(own) if topology else [own]
    return content_hash([line for of_rank in hashes for line in of_rank])


def _together(action: Callable[[], T], topology: Topology | None) -> T:
    return topology.together(action) if topology else action()


def run_weights(
    checkpoint: Checkpoint, model: ModelConfig, base: Base | None, averaged: bool = False, merged: bool = False
) -> Weights:
    """Open the weights in a checkpoint; of a run with adapters, those of their model too.

    Args:
        checkpoint: its files are mapped unchecked; the caller has verified their hashes.
        base: as `open_base` returned it.
        averaged: whether to read the moving average of what is trained.
        merged: whether to add the adapters' updates to the weights, rather than give each by its own name.
    Raises:
        CheckpointError: if the checkpoint does not fit the model, or there is no average.
        ConfigError: if the adapters were trained on another model.
    """
    trained = CheckpointWeights(checkpoint, trained_specs(model), averaged)
    if base is None:
        return trained
    base.check(checkpoint)
    return MergedWeights(base.weights, trained, model) if merged else AdaptedWeights(base.weights, trained)
