"""Writes a checkpoint, over all ranks together. loop -> save -> {store, engine}.

What happens in which order decides whether a kill can hurt: the files, then their fsync, then COMPLETE, then removal of
older checkpoints. Nothing is changed in place.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from pretrain.checkpoint.state import DataState, RunState
from pretrain.checkpoint.store import CheckpointStore, FileEntry
from pretrain.engine import Engine
from pretrain.topology import Topology
from shards.durable import fsync_folder, hash_file, write_atomically


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
    write_atomically(path, msgspec.json.encode(content) + b"\n")


def _file_names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _made_durable(folder: Path, name: str) -> FileEntry:
    path = folder / name
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return FileEntry(name, path.stat().st_size, hash_file(path))
