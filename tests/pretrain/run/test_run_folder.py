"""Run folders: files survive a kill at any byte, steps appear once, nothing is deleted, bad permissions are named."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from pretrain.run.run_folder import RunFolder
from pretrain.run.step_log import StepLog
from shards import ConfigError, HeadraceError
from tests.pretrain.checkpoint.disk import make_unreadable

NAMES = ["metrics.jsonl", "cursors.jsonl.zst"]


def filled(path: Path, steps: list[int]) -> StepLog:
    log = StepLog(path)
    for step in steps:
        log.append({"step": step, "loss": 1 / (step + 1), "per_source": {"pile": step}})
    return log


@pytest.mark.parametrize("name", NAMES)
def test_a_log_returns_what_was_appended(tmp_path: Path, name: str) -> None:
    log = filled(tmp_path / name, [1, 2, 2, 3])
    assert [record["step"] for record in log.read()] == [1, 2, 2, 3]
    assert [record["step"] for record in log.read(after=2)] == [3]
    assert [record["step"] for record in log.read(1, until=2)] == [2, 2]
    assert next(log.read()) == {"step": 1, "loss": 0.5, "per_source": {"pile": 1}}


@pytest.mark.parametrize("name", NAMES)
def test_last_returns_the_newest_record_up_to_a_step(tmp_path: Path, name: str) -> None:
    log = filled(tmp_path / name, [0, 50, 100])
    newest = [record and record["step"] for record in map(log.last, (-1, 0, 49, 50, 99, 1000, None))]
    assert newest == [None, 0, 0, 50, 50, 100, 100]
    assert StepLog(tmp_path / "nowhere.jsonl").last() is None


@pytest.mark.parametrize("name", NAMES)
def test_a_log_cut_at_any_byte_keeps_its_whole_records_and_accepts_more(tmp_path: Path, name: str) -> None:
    log = filled(tmp_path / name, [1, 2, 3])
    content = log.path.read_bytes()
    ends = [0, *(end for _, end in log._lines())]
    for size in range(len(content) + 1):
        log.path.write_bytes(content[:size])
        whole = sum(end <= size for end in ends) - 1
        assert [record["step"] for record in log.read()] == [1, 2, 3][:whole], size
        log.cut_back(2, tmp_path / "aside", "resumed")
        log.append({"step": 3})
        assert [record["step"] for record in log.read()] == [*[1, 2][:whole], 3], size


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("step", [-1, 0, 2, 9])
def test_cut_back_keeps_exactly_the_steps_up_to_one(tmp_path: Path, name: str, step: int) -> None:
    steps = [0, 1, 1, 2, 4, 5]
    log = filled(tmp_path / name, steps)
    log.cut_back(step, tmp_path / "aside", "resumed")
    assert [record["step"] for record in log.read()] == [s for s in steps if s <= step]
    assert log.cut_back(step, tmp_path / "aside", "resumed") == 0


def test_other_readers_read_the_logs(tmp_path: Path) -> None:
    plain, packed = (filled(tmp_path / name, [1, 2]) for name in NAMES)
    plain.append({"step": 3, "loss": float("nan"), "grad_norm": float("inf")})
    lines = [json.loads(line, parse_constant=pytest.fail) for line in plain.path.read_text().splitlines()]
    assert lines[2] == {"step": 3, "loss": None, "grad_norm": None}
    with (
        packed.path.open("rb") as file,
        zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True) as text,
    ):
        assert text.read().splitlines() == plain.path.read_bytes().splitlines()[:2]


def test_a_missing_log_is_empty(tmp_path: Path) -> None:
    log = StepLog(tmp_path / "metrics.jsonl")
    log.sync()
    assert log.cut_back(3, tmp_path / "aside", "resumed") == 0
    assert list(log.read()) == []


def test_a_partly_written_record_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = filled(tmp_path / "metrics.jsonl", [1])
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:7]))  # as on a full disk
    with pytest.raises(HeadraceError, match=r"metrics\.jsonl.*disk full"):
        log.append({"step": 2, "loss": 0.5})
    monkeypatch.undo()
    log.append({"step": 2, "loss": 0.25})
    assert [record["step"] for record in log.read()] == [1, 2]


def test_an_unwritable_folder_is_named() -> None:
    folder = Path(tempfile.mkdtemp())  # not tmp_path, which another user could not access
    folder.chmod(0o555)
    user = os.geteuid()
    try:
        if user == 0:  # root may write anywhere
            os.seteuid(65534)
        with pytest.raises(
            ConfigError, match=rf"cannot write to the run folder {folder}/runs/x: Permission denied.*run\.dir"
        ):
            RunFolder(folder / "runs" / "x").create()
    finally:
        os.seteuid(user)
        folder.rmdir()


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    with pytest.raises(ConfigError, match="Not a directory"):
        RunFolder(tmp_path / "runs" / "x").create()


def test_moving_aside_deletes_nothing_and_numbers_the_copies(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    for n in (1, 2, 3):
        folder.create()
        folder.config.write_text(str(n))
        assert folder.move_aside() == tmp_path / f"run.{n}"
        if n == 2:
            (tmp_path / "run.1").rename(tmp_path / "kept")  # its number is not reused
    assert [(tmp_path / name / "config.yaml").read_text() for name in ("kept", "run.2", "run.3")] == ["1", "2", "3"]
    assert not folder.root.exists()


def test_the_run_id_persists(tmp_path: Path) -> None:
    folder, other = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "other")
    folder.create()
    other.create()
    assert folder.settle_run_id("run") == folder.settle_run_id("run")
    assert folder.settle_run_id("run") != other.settle_run_id("other")


def begun(root: Path) -> RunFolder:
    folder = RunFolder(root)
    folder.create()
    folder.begin(root.name, f"run: {{name: {root.name}, dir: {root.parent}}}", -1)
    return folder


def test_a_copied_folder_gets_its_own_wandb_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    parent = begun(tmp_path / "run")
    run_id = parent.settle_run_id("run")
    shutil.copytree(parent.root, tmp_path / "other")
    shutil.copytree(parent.root, tmp_path / "elsewhere" / "run")
    for copy in (RunFolder(tmp_path / "other"), RunFolder(tmp_path / "elsewhere" / "run")):
        caplog.clear()
        drawn = copy.settle_run_id(copy.root.name)
        assert drawn != run_id
        assert f"all its figures go to a new wandb run, {drawn}, and none to {run_id}" in caplog.text
        copy.begin(copy.root.name, f"run: {{name: {copy.root.name}, dir: {copy.root.parent}}}", -1)
    (tmp_path / "run").rename(tmp_path / "archived")
    for copy in (RunFolder(tmp_path / "other"), RunFolder(tmp_path / "elsewhere" / "run")):
        assert copy.settle_run_id(copy.root.name) == (copy.wandb / "run_id").read_text() != run_id


def test_a_moved_folder_keeps_its_wandb_run_and_logs_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = begun(tmp_path / "run")
    run_id = folder.settle_run_id("run")
    (tmp_path / "elsewhere").mkdir()
    folder.root.rename(tmp_path / "elsewhere" / "run")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    begun(tmp_path / "run")  # another run with this name has its own
    caplog.set_level("INFO")
    assert RunFolder(tmp_path / "elsewhere" / "run").settle_run_id("run") == run_id
    assert f"continues its wandb run {run_id}" in caplog.text
    begun(tmp_path / "elsewhere" / "run")
    caplog.clear()
    assert RunFolder(tmp_path / "link" / "run").settle_run_id("run") == run_id  # the same place under another name
    assert not caplog.text


def test_another_run_name_gets_another_wandb_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run_id = begun(tmp_path / "run").settle_run_id("run")
    (tmp_path / "run").rename(tmp_path / "renamed")
    assert RunFolder(tmp_path / "renamed").settle_run_id("renamed") != run_id
    assert "was called run before" in caplog.text


def test_a_folder_is_cut_back_in_all_its_logs(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.create()
    for log in (folder.metrics, folder.evals, folder.cursors):
        filled(log.path, [1, 2, 3])
    folder.cut_back(1, "resumed")
    folder.sync()
    assert [len(list(log.read())) for log in (folder.metrics, folder.evals, folder.cursors)] == [1, 1, 1]
    aside = [StepLog(folder.superseded / log.path.name) for log in (folder.metrics, folder.evals, folder.cursors)]
    assert [[record["step"] for record in log.read()] for log in aside] == [[2, 3]] * 3
    folder.cut_back(-1, "resumed")  # as if there were no checkpoint
    assert [[record["step"] for record in log.read()] for log in aside] == [[2, 3, 1]] * 3
    assert next(aside[0].read())["per_source"] == {"pile": 2}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("step", [-1, 1, 3])
def test_kept_and_cut_off_records_together_are_all_records(tmp_path: Path, name: str, step: int) -> None:
    log, aside = filled(tmp_path / name, [0, 1, 1, 2, 4, 5]), StepLog(tmp_path / "superseded" / name)
    before = list(log.read())
    assert log.cut_back(step, aside.path, "resumed") == sum(int(str(record["step"])) > step for record in before)
    cut = [*aside.read()]
    marks = [record.pop("retracted") for record in cut]
    assert [*log.read(), *cut] == before
    assert marks == ["resumed"] * len(cut)
    log.append({"step": 9})
    log.cut_back(step, aside.path, "resumed")
    assert [*aside.read()][-1] == {"step": 9, "retracted": "resumed"}


def test_a_torn_line_does_not_swallow_the_next_record(tmp_path: Path) -> None:
    log = filled(tmp_path / "evals.jsonl", [1, 2])
    whole = log.path.read_bytes()
    for size in range(len(whole) // 2, len(whole) + 1):  # a kill within the second line
        log.path.write_bytes(whole[:size])
        log.append({"step": 3})
        log.append({"step": 4})
        whole_ones = [1, 2] if size >= len(whole) - 1 else [1]  # only its newline may be missing
        assert [record["step"] for record in log.read()] == [*whole_ones, 3, 4], size


def test_an_unreadable_file_is_not_treated_as_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.create()
    folder.config.write_text(f"run: {{name: run, dir: {tmp_path}}}")
    run_id = folder.settle_run_id("run")
    folder.checkpoints.joinpath("step_00000010").mkdir()
    cases: list[tuple[Path, Callable[[], object]]] = [
        (folder.checkpoints, folder.has_begun),
        (folder.wandb / "run_id", lambda: folder.settle_run_id("run")),
        (folder.metrics.path, folder.has_begun),
        (folder.metrics.path, lambda: folder.cut_back(0, "resumed")),
    ]
    for path, ask in cases:
        if path == folder.metrics.path:
            filled(path, [1, 2])
        with monkeypatch.context() as patch:
            make_unreadable(path, patch)
            with pytest.raises(OSError, match="Input/output error"):
                ask()
    assert folder.settle_run_id("run") == run_id
    assert len(list(folder.metrics.read())) == 4


def test_a_kill_never_separates_the_lines_of_one_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = StepLog(tmp_path / "evals.jsonl")
    records: list[dict[str, object]] = [{"step": 3, "domain": domain} for domain in ("wiki", "web", "micro")]
    write, writes = os.write, iter((True, False))

    def killed_after_one(descriptor: int, content: bytes) -> int:
        if not next(writes):
            raise KeyboardInterrupt
        return write(descriptor, content)

    monkeypatch.setattr(os, "write", killed_after_one)
    log.append(*records)
    assert list(log.read()) == records
