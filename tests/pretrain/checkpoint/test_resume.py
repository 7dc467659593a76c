"""All ranks choose the same checkpoint, whichever of them finds one damaged, and each file is read once for it."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from pretrain.checkpoint.resume import Choice, choose
from pretrain.checkpoint.state import RunState, read_state
from pretrain.checkpoint.store import CheckpointConfig, CheckpointFile, CheckpointStore
from pretrain.topology import Layout, Topology
from shards import CheckpointError
from shards.storage.content_hash import hash_file
from tests.pretrain.checkpoint.test_load_checkpoint import SIZE, on_ranks

STEPS, FILES = (10, 20, 30), 5


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    store = CheckpointStore(tmp_path, CheckpointConfig())
    for step in STEPS:
        folder = store.prepare(step)
        names = [f"engine/{number}.pt" for number in range(FILES)]
        for name in names:
            (folder / name).write_text(f"{step} {name}")
        entries = [CheckpointFile(name, (folder / name).stat().st_size, hash_file(folder / name)) for name in names]
        store.complete(step, entries, seconds=1.0)
    return store


@pytest.mark.parametrize("victim", range(FILES))
def test_all_ranks_skip_a_checkpoint_that_one_finds_damaged(
    store: CheckpointStore, victim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = store.folder_of(30) / f"engine/{victim}.pt"
    path.write_text(path.read_text().replace("30", "31"))
    hashed: list[Path] = []
    monkeypatch.setattr("pretrain.checkpoint.store.hash_file", lambda path: hashed.append(path) or hash_file(path))
    choices = on_ranks(lambda topology: choose(store, topology))
    for choice in choices:
        assert isinstance(choice, Choice)
        assert choice.checkpoint is not None
        assert choice.checkpoint.step == 20
        assert list(choice.damaged) == [30]
        assert f"{path} differs from what was saved" in choice.damaged[30]
    assert sorted(hashed) == sorted(file for step in (20, 30) for file in store.folder_of(step).glob("engine/*"))
    assert store.steps() == list(STEPS), "nothing is set aside before the start is certain"
    assert isinstance(choices[0], Choice)
    choices[0].set_damaged_aside(store)
    assert store.steps() == [10, 20]


def test_rank_0_decides_which_checkpoints_exist(store: CheckpointStore) -> None:
    def work(topology: Topology) -> int:
        own = CheckpointStore(store.root, store.config)
        if not topology.is_main:
            own.steps = list  # type: ignore[method-assign]  # its view of the disk is older
        chosen = choose(own, topology).checkpoint
        return chosen.step if chosen else -1

    assert on_ranks(work) == [30] * SIZE


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_over(store: CheckpointStore) -> None:
    for step in STEPS:
        (store.folder_of(step) / "engine/0.pt").unlink()
    errors = on_ranks(lambda topology: choose(store, topology))
    assert errors[0] == errors[1]
    assert errors[0][0] is CheckpointError  # type: ignore[index]
    assert all(f"step_{step:08d}" in errors[0][1] for step in STEPS)  # type: ignore[index]
    assert (
        on_ranks(lambda topology: choose(CheckpointStore(store.root / "new", store.config), topology))
        == [Choice(None)] * SIZE
    )


def test_a_state_written_by_an_older_version_is_read(store: CheckpointStore) -> None:
    state = RunState(30, 5, {"pile": 5}, "00", restarts=1, config_hash="", tp_size=1, dp_size=4, zero_stage=1)
    content = msgspec.to_builtins(state) | {"wandb_run_id": "abcdef01"}  # until its field was dropped
    (store.folder_of(30) / "state.json").write_bytes(msgspec.json.encode(content))
    assert read_state(store.open(30)) == state
    resumed = state.resumed(Layout(tp_size=2, dp_size=2, zero_stage=3))
    assert (resumed.restarts, resumed.layout) == (2, Layout(2, 2, 3))
    assert (resumed.step, resumed.tokens, resumed.batch_hash) == (30, 5, "00")


def test_a_state_of_before_rows_were_shared_has_a_layout_without() -> None:
    state = RunState(30, 5, {}, "00", restarts=1, config_hash="", tp_size=2, dp_size=4, zero_stage=1)
    old = msgspec.to_builtins(state)
    del old["sp_size"]
    assert msgspec.convert(old, RunState).layout == Layout(2, 4, 1)
    shared = state.resumed(Layout(2, 2, 1, sp_size=2))
    assert (shared.sp_size, shared.layout.has_files_of(state.layout)) == (2, True)
    assert str(shared.layout) == "tp 2 x sp 2 x dp 2, ZeRO-1"
    for other in (Layout(4, 2, 1), Layout(2, 4, 1, 2), Layout(2, 2, 2, 2)):
        assert not other.has_files_of(state.layout)
