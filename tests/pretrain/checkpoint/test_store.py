"""What counts as a checkpoint, which ones are kept, and how damage is reported."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pretrain.checkpoint.state import read_state
from pretrain.checkpoint.store import COMPLETE, CheckpointConfig, CheckpointFile, CheckpointStore
from shards import CheckpointError
from shards.storage.content_hash import hash_file
from tests.pretrain.checkpoint.disk import make_unreadable


def store(root: Path, **config: object) -> CheckpointStore:
    return CheckpointStore(root, CheckpointConfig.model_validate(config))


def make(checkpoints: CheckpointStore, step: int, complete: bool = True) -> Path:
    folder = checkpoints.prepare(step)
    (folder / "engine" / "weights.pt").write_bytes(bytes([step % 256]) * 1000)
    (folder / "state.json").write_text('{"version": 0}')
    names = ("engine/weights.pt", "state.json")
    if complete:
        entries = [CheckpointFile(name, (folder / name).stat().st_size, hash_file(folder / name)) for name in names]
        checkpoints.complete(step, entries, seconds=1.0)
    return folder


def test_only_complete_folders_are_checkpoints(tmp_path: Path) -> None:
    checkpoints = store(tmp_path)
    make(checkpoints, 10)
    make(checkpoints, 20, complete=False)
    tmp_path.joinpath("step_00000030.damaged").mkdir()
    assert checkpoints.steps() == [10]
    assert checkpoints.open(10).broken_files() == []
    with pytest.raises(CheckpointError, match="step_00000020"):
        checkpoints.open(20)


@pytest.mark.parametrize(
    ("config", "kept"),
    [
        ({"keep": 2}, [50, 60]),
        ({"keep": 1, "keep_every": 20, "every": 10}, [20, 40, 60]),
        ({"keep": 9}, [10, 20, 30, 40, 50, 60]),
    ],
)
def test_retention_keeps_the_newest_and_every_nth(tmp_path: Path, config: dict[str, int], kept: list[int]) -> None:
    checkpoints = store(tmp_path, **config)
    for step in range(10, 70, 10):
        make(checkpoints, step)
    checkpoints.prune()
    assert checkpoints.steps() == kept
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step_{step:08d}" for step in kept]


def test_a_run_that_may_go_back_keeps_a_checkpoint_to_go_back_to(tmp_path: Path) -> None:
    checkpoints = CheckpointStore(tmp_path, CheckpointConfig(keep=1), reach=25)
    kept = {}
    for step in (10, 20, 30, 40, 60, 62):
        make(checkpoints, step)
        checkpoints.prune()
        kept[step] = checkpoints.steps()
    assert kept == {10: [10], 20: [10, 20], 30: [10, 30], 40: [10, 40], 60: [10, 60], 62: [10, 62]}
    for step in (90, 120):
        make(checkpoints, step)
        checkpoints.prune()
    assert checkpoints.steps() == [90, 120]


def test_pruning_removes_what_killed_saves_left_but_not_a_save_in_progress(tmp_path: Path) -> None:
    checkpoints = store(tmp_path, keep=1)
    make(checkpoints, 10, complete=False)
    make(checkpoints, 20)
    make(checkpoints, 30, complete=False)
    checkpoints.prune()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000020", "step_00000030"]


def test_an_interrupted_removal_leaves_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = store(tmp_path, keep=1)
    make(checkpoints, 10)
    make(checkpoints, 20)

    def killed(folder: Path) -> None:
        raise OSError("killed here")

    monkeypatch.setattr(shutil, "rmtree", killed)
    checkpoints.prune()
    assert (tmp_path / "step_00000010" / "engine" / "weights.pt").exists()
    assert checkpoints.steps() == [20]


@pytest.mark.parametrize("damage", ["flip", "shorten", "remove", "complete"])
def test_any_damage_is_detected_and_named(tmp_path: Path, damage: str) -> None:
    checkpoints = store(tmp_path)
    folder = make(checkpoints, 10)
    weights = folder / "engine" / "weights.pt"
    content = bytearray(weights.read_bytes())
    if damage == "flip":
        content[500] ^= 1
        weights.write_bytes(content)
    elif damage == "shorten":
        weights.write_bytes(content[:-1])
    elif damage == "remove":
        weights.unlink()
    else:
        (folder / COMPLETE).write_text("{")
        with pytest.raises(CheckpointError, match=COMPLETE):
            checkpoints.open(10)
        return
    checkpoint = checkpoints.open(10)
    assert len(checkpoint.broken_files()) == 1
    assert "weights.pt" in checkpoint.broken_files()[0]
    assert [*checkpoint.broken_files(0, 2), *checkpoint.broken_files(1, 2)] == checkpoint.broken_files()


def test_a_state_of_another_version_is_refused(tmp_path: Path) -> None:
    checkpoints = store(tmp_path)
    make(checkpoints, 10)
    with pytest.raises(CheckpointError, match="version 0"):
        read_state(checkpoints.open(10))


def test_a_checkpoint_that_the_disk_cannot_show_is_not_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = store(tmp_path, keep=1)
    for step in (10, 20):
        make(checkpoints, step)
    for hidden in (*(checkpoints.folder_of(step) / COMPLETE for step in (10, 20)), tmp_path):
        with monkeypatch.context() as patch:
            make_unreadable(hidden, patch)
            for change in (
                checkpoints.discard_incomplete,
                checkpoints.make_room,
                lambda: make(checkpoints, 20),
            ):
                with pytest.raises((OSError, AssertionError), match="Input/output error|must not be overwritten"):
                    change()
            checkpoints.prune()
    assert checkpoints.steps() == [10, 20]
    assert checkpoints.open(20).broken_files() == []


def test_a_second_damaged_checkpoint_of_a_step_is_set_aside_beside_the_first(tmp_path: Path) -> None:
    checkpoints = store(tmp_path)
    for number in range(3):
        make(checkpoints, 10).joinpath("number").write_text(str(number))
        aside = checkpoints.set_aside(10)
        assert aside.name.endswith(".damaged")
        assert aside.joinpath("number").read_text() == str(number)
    assert sorted(path.joinpath("number").read_text() for path in tmp_path.glob("*.damaged")) == ["0", "1", "2"]
    assert checkpoints.all_steps() == []
