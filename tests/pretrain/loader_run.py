"""Runs' folders as training leaves them, written by a loader alone, and all that their batches held."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import msgspec

from pretrain.checkpoint.state import DataState, RunState, read_data, read_state
from pretrain.checkpoint.store import CheckpointFile, CheckpointStore
from pretrain.config import load_config
from pretrain.feed import chain_hash
from pretrain.run.run_folder import RunFolder
from shards import Batch, Loader
from shards.storage.content_hash import hash_file

CURSORS_EVERY = 50  # steps, as in training
STEP_SECONDS = 2.0


class Held(NamedTuple):
    """A piece of a document in a row of a step."""

    source: str
    shard: str
    line: int
    step: int
    row: int
    start: int
    stop: int


def held_by(batch: Batch, step: int) -> list[Held]:
    return [Held(o.source, o.shard, o.line, step, o.slot, o.start, o.stop) for o in batch.origins()]


def train(folder: RunFolder, until: int, saves: set[int]) -> dict[int, list[Held]]:
    """Go on with a run from its newest checkpoint; return what each step held, in the order of rows."""
    config = load_config(folder.config, begun=True)
    store = CheckpointStore(folder.checkpoints, config.checkpoint)
    (_, data, rows), *later = [stage.of_loader for stage in config.all_stages]
    state, held = RunState(0, 0, {}, "", 0, config.hash(), 1, 1, 0), {}
    with Loader(data, rows, config.run.seed, stages=later) as loader:
        if store.steps():
            checkpoint = store.find()
            state = read_state(checkpoint)
            loader.load_state_dict(read_data(checkpoint).cursors)
        else:
            folder.cursors.append({"step": 0, **loader.state_dict()})
        while state.step < until:
            batch, step = next(loader), state.step + 1
            held[step] = held_by(batch, step)
            passed_over = any(first <= step <= last for first, last in data.skip_steps)
            tokens = 0 if passed_over else sum(batch.source_tokens.values())
            state = msgspec.structs.replace(
                state, step=step, tokens=state.tokens + tokens, batch_hash=chain_hash(state.batch_hash, batch.row_hash)
            )
            record = {"step": step, "batch_hash": state.batch_hash, "tokens": state.tokens}
            record |= {"step_seconds": STEP_SECONDS} | ({"passed_over": True} if passed_over else {})
            folder.metrics.append(record)
            if step % CURSORS_EVERY == 0:
                folder.cursors.append({"step": step, **loader.state_dict()})
            if step in saves:
                _save(store, state, DataState(loader.state_dict(), loader.fingerprint))
    return held


def _save(store: CheckpointStore, state: RunState, data: DataState) -> None:
    folder = store.prepare(state.step)
    for name, content in (("state.json", state), ("data.json", data)):
        (folder / name).write_bytes(msgspec.json.encode(content))
    (folder / "engine" / "weights.pt").write_bytes(b"weights")
    names = ("state.json", "data.json", "engine/weights.pt")
    files = [CheckpointFile(name, (folder / name).stat().st_size, hash_file(folder / name)) for name in names]
    store.complete(state.step, files, 0.0)


def begin(path: Path) -> RunFolder:
    """Make the folder of a run that has not trained yet. Args: path: its config."""
    config = load_config(path)
    config = config.settled(None)
    config.folder.create()
    config.folder.config.write_text(config.to_yaml())
    return config.folder
