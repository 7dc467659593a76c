"""Writes a checkpoint and reads it back, over all ranks together. loop <-> save <-> {store, engine}.

What happens in which order decides whether a kill can hurt: the files, then their fsync, then COMPLETE, then removal of
older checkpoints. Nothing is changed in place.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import msgspec

from pretrain.checkpoint.store import Checkpoint, CheckpointStore, FileEntry, hash_file
from pretrain.engine import Engine
from pretrain.run_folder import atomic_write, fsync_folder
from pretrain.topology import Topology
from shards import CheckpointError, ConfigError

_logger = logging.getLogger(__name__)


STATE_VERSION = 1  # of state.json and data.json


class RunState(msgspec.Struct, frozen=True):
    """Where a run stands after a step: the content of state.json.

    Attributes:
        step: optimizer steps done.
        tokens: trained on since the run's start, over all ranks; padding is not counted.
        tokens_per_source: the same, for each source.
        batch_hash: of all batches so far, chained; 16 hex digits.
        wandb_run_id: one for the run's life.
        restarts: how often the run was taken up again.
        config_hash: of the config that it ran with last.
        tp_size, dp_size, zero_stage: what the engine's files fit.
    """

    step: int
    tokens: int
    tokens_per_source: dict[str, int]
    batch_hash: str
    wandb_run_id: str
    restarts: int
    config_hash: str
    tp_size: int
    dp_size: int
    zero_stage: int
    version: int = STATE_VERSION


class DataState(msgspec.Struct, frozen=True):
    """The content of data.json: V cursors, and what the batches are a pure function of."""

    cursors: dict[str, object]  # as `shards.merge_states` gives it
    fingerprint: dict[str, object]  # as `Loader.fingerprint` gives it
    version: int = STATE_VERSION


State = TypeVar("State", RunState, DataState)


def save(store: CheckpointStore, engine: Engine, state: RunState, data: DataState | None, topology: Topology) -> None:
    """Saves the checkpoint of `state.step`. Every rank calls it; rank 0 alone needs `data`.

    Raises:
        OSError: if the disk is full or broken; what was saved before stays as it was.
    """
    if topology.broadcast_object(topology.is_main and store.is_complete(state.step)):
        return  # a run that stopped right after it was resumed has this one already
    folder = store.folder_of(state.step)
    if topology.is_main:
        assert data is not None
        store.prepare(state.step)
        _write_json(folder / "state.json", state)
        _write_json(folder / "data.json", data)
    topology.barrier()
    engine.save(folder)
    topology.barrier()
    # One rank's listing for all: a network file system may show two ranks different ones
    names = topology.broadcast_object(_file_names(folder) if topology.is_main else None)
    assert isinstance(names, list)
    mine = [_made_durable(folder, name) for name in names[topology.rank :: topology.world_size]]
    entries = [entry for part in topology.gather_objects(mine) for entry in part]
    if topology.is_main:
        for path in {(folder / name).parent for name in names}:
            fsync_folder(path)
        store.complete(state.step, entries)
        store.prune()
    topology.barrier()


def _write_json(path: Path, content: msgspec.Struct) -> None:
    atomic_write(path, msgspec.json.encode(content) + b"\n")


def _file_names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _made_durable(folder: Path, name: str) -> FileEntry:
    path = folder / name
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return FileEntry(name, path.stat().st_size, hash_file(path))


def newest_valid(store: CheckpointStore, topology: Topology) -> Checkpoint | None:
    """The newest checkpoint whose files are all as they were saved; every rank checks a share of them.

    Raises:
        CheckpointError: if there are checkpoints and none of them is whole.
    """
    steps = topology.broadcast_object(store.steps() if topology.is_main else None)
    assert isinstance(steps, list)
    damaged: dict[int, list[str]] = {}
    for step in reversed(steps):
        found = [sentence for part in topology.gather_objects(_damage(store, step, topology)) for sentence in part]
        if not found:
            _set_aside(store, damaged, topology)
            return store.open(step)
        damaged[step] = found
    if damaged or list(store.root.glob("*.damaged")):
        sentences = "; ".join(sentence for found in damaged.values() for sentence in found)
        raise CheckpointError(
            f"none of the checkpoints in {store.root} is whole ({sentences});"
            " restore one from a copy, or start over with --fresh"
        )
    return None


def _damage(store: CheckpointStore, step: int, topology: Topology) -> list[str]:
    """What is wrong with this rank's share of a checkpoint's files."""
    try:
        return store.open(step).broken_files(topology.rank, topology.world_size)
    except CheckpointError as error:
        return [str(error)]


def _set_aside(store: CheckpointStore, damaged: Mapping[int, list[str]], topology: Topology) -> None:
    # Only now that a whole one is found: a disk that cannot be read today may be whole tomorrow
    if topology.is_main:
        for step, sentences in damaged.items():
            aside = store.set_aside(step)
            _logger.warning("checkpoint of step %d is damaged, now in %s: %s", step, aside, "; ".join(sentences))
    topology.barrier()


def read_state(checkpoint: Checkpoint) -> RunState:
    """Where the run stood at a checkpoint. Raises CheckpointError if another version of this program wrote it."""
    return _read_json(checkpoint.folder / "state.json", RunState)


def read_data(checkpoint: Checkpoint) -> DataState:
    """Where the loader stood at a checkpoint. Raises CheckpointError if another version of this program wrote it."""
    return _read_json(checkpoint.folder / "data.json", DataState)


def _read_json(path: Path, kind: type[State]) -> State:
    content = path.read_bytes()
    version = msgspec.json.decode(content).get("version")
    if version != STATE_VERSION:
        raise CheckpointError(
            f"{path} has version {version}, this program reads {STATE_VERSION}; go on with the program that wrote it"
        )
    return msgspec.json.decode(content, type=kind)


def check_topology(state: RunState, topology: Topology, zero_stage: int, folder: Path) -> None:
    """Refuses a checkpoint whose files are divided otherwise than this process group.

    Raises:
        ConfigError: with the topology that it was saved by.
    """
    saved = {"tp_size": state.tp_size, "dp_size": state.dp_size, "zero_stage": state.zero_stage}
    now: Mapping[str, int] = {"tp_size": topology.tp_size, "dp_size": topology.dp_size, "zero_stage": zero_stage}
    changed = [f"{key} {saved[key]} -> {now[key]}" for key in saved if saved[key] != now[key]]
    if changed:
        ranks = state.tp_size * state.dp_size
        raise ConfigError(
            f"{folder} was saved by another topology ({', '.join(changed)});"
            f" start {ranks} ranks with parallel.tp_size={state.tp_size} and parallel.zero_stage={state.zero_stage}"
        )
