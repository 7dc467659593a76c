"""A save is expected to take as long as the last one did, or as long as a guess says."""

from __future__ import annotations

from pathlib import Path

from pretrain.checkpoint.duration import SaveTime, save_time
from pretrain.checkpoint.store import COMPLETE, CheckpointConfig, CheckpointStore


def test_a_save_takes_as_long_as_the_last_one(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", CheckpointConfig(), expected_bytes=10**12)
    assert save_time(store, nodes=4) == SaveTime(500, measured=False)
    for step, seconds in ((10, 20.0), (20, 30.0)):
        store.prepare(step)
        store.complete(step, [], seconds)
    assert save_time(store, nodes=4) == SaveTime(30, measured=True)
    (store.folder_of(20) / COMPLETE).write_text("{")
    assert save_time(store, nodes=4) == SaveTime(20, measured=True)
