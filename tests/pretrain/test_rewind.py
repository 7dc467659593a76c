"""Where a run goes back to before a spike: an intact checkpoint that is old enough, and not too often."""

from __future__ import annotations

from pathlib import Path

from pretrain.checkpoint.store import CheckpointConfig, CheckpointFile, CheckpointStore
from pretrain.rewind import Rewinder
from pretrain.run.run_folder import Rewind, RunFolder
from pretrain.topology import Topology


def test_a_run_goes_back_to_an_intact_checkpoint_that_is_old_enough_and_not_too_often(
    tmp_path: Path, topology: Topology
) -> None:
    folder = RunFolder(tmp_path)
    store = CheckpointStore(folder.checkpoints, CheckpointConfig())
    for step in (10, 20, 30):
        store.folder_of(step).mkdir(parents=True)
        missing = [CheckpointFile("lost", 1, "0" * 32)] if step == 20 else []
        store.complete(step, missing, 0.0)
    rewinder = Rewinder(store, folder, topology, steps=5, limit=2)
    assert "no checkpoint before step 6" in str(rewinder.decide(10))
    assert "no checkpoint before step 1 " in str(rewinder.decide(3))
    assert folder.going_back() is None
    assert rewinder.decide(35) == Rewind(spike=35, step=30, passed_over=(31, 35))
    assert rewinder.decide(34) == Rewind(spike=34, step=10, passed_over=(30, 34)), "that of step 20 is damaged"
    assert folder.going_back() == 10
    assert [rewind.spike for rewind in folder.rewinds()] == [35, 34]
    assert "2 times already" in str(rewinder.decide(35))
