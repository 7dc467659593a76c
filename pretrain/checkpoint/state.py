"""Describe the run and its data in a checkpoint: state.json and data.json. trainer <-> state <-> files."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import msgspec

from pretrain.checkpoint.store import Checkpoint
from pretrain.topology import Layout
from shards import CheckpointError, ConfigError, Tokenizer

_CHECKPOINT_VERSION = 1  # version of state.json and data.json


class RunState(msgspec.Struct, frozen=True):
    """The state of a run after a step: the content of state.json.

    Attributes:
        step: optimizer steps done.
        tokens: trained on since the run's start, over all ranks, without padding.
        tokens_per_source: the same, for each source.
        batch_hash: of all batches so far as they were read, chained; 16 hex digits.
        trained_hash: the same of what was trained on; empty if that is all that was read.
        restarts: how often the run was resumed.
        config_hash: hash of the config that it last ran with.
        tp_size, dp_size, zero_stage, sp_size: the layout of the engine's files.
        init_hash: hash of the files in init_from; empty if the weights were initialized randomly.
        average_total: sum of the weights of the steps in the moving average (train.ema); 0 if there is none.
    """

    step: int
    tokens: int
    tokens_per_source: dict[str, int]
    batch_hash: str
    restarts: int
    config_hash: str
    tp_size: int
    dp_size: int
    zero_stage: int
    init_hash: str = ""
    trained_hash: str = ""
    average_total: float = 0.0
    sp_size: int = 1  # states of before there was another lack it
    version: int = _CHECKPOINT_VERSION

    @property
    def layout(self) -> Layout:
        return Layout(self.tp_size, self.dp_size, self.zero_stage, self.sp_size)

    def resumed(self, layout: Layout) -> RunState:
        """Return this state as a run with the given layout resumes from it."""
        return msgspec.structs.replace(self, restarts=self.restarts + 1, **asdict(layout))


class DataState(msgspec.Struct, frozen=True):
    """The content of data.json: V cursors, and the fingerprint of what the batches depend on."""

    cursors: dict[str, object]  # as returned by `shards.merge_states`
    fingerprint: dict[str, object]  # as returned by `Loader.fingerprint`
    version: int = _CHECKPOINT_VERSION


class _Versioned(msgspec.Struct):
    """The field that every version has."""

    version: int | None = None


State = TypeVar("State", RunState, DataState)


def read_state(checkpoint: Checkpoint) -> RunState:
    """Read the run's state at a checkpoint. Raises CheckpointError if another version of this program wrote it."""
    return _read_json(checkpoint.folder / "state.json", RunState)


def read_data(checkpoint: Checkpoint) -> DataState:
    """Read the loader's state at a checkpoint. Raises CheckpointError if another version wrote it."""
    return _read_json(checkpoint.folder / "data.json", DataState)


def check_tokenizer(checkpoint: Checkpoint, tokenizer: Tokenizer, path: Path) -> None:
    """Raise ConfigError if a checkpoint's weights were trained with another tokenizer than the config names.

    Args:
        tokenizer: the one to be used.
        path: where it was read from.
    """
    trained_with = read_data(checkpoint).fingerprint["tokenizer"]
    if trained_with != tokenizer.content_hash:
        raise ConfigError(
            f"data.tokenizer={path} is not the model that {checkpoint.folder} was trained with: its hash is"
            f" {tokenizer.content_hash}, not {trained_with}; put the right file there, or set data.tokenizer to it"
        )


def _read_json(path: Path, kind: type[State]) -> State:
    try:
        content = path.read_bytes()
        version = msgspec.json.decode(content, type=_Versioned).version
    except (OSError, msgspec.MsgspecError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if version != _CHECKPOINT_VERSION:
        raise CheckpointError(
            f"{path} has version {version}, but this program reads {_CHECKPOINT_VERSION};"
            " continue with the program that wrote it"
        )
    return msgspec.json.decode(content, type=kind)
