"""An option that is meant for one start is carried out once, wherever the launch was interrupted."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.run.once import Once
from pretrain.run.run_folder import RunFolder
from pretrain.start import step_to_go_back_to

LAUNCHERS = [("SLURM_JOB_ID", "SLURM_RESTART_COUNT"), ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")]


@pytest.mark.parametrize(("job", "count"), LAUNCHERS)
def test_a_launch_carries_an_option_out_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: str, count: str
) -> None:
    option = Once(tmp_path, "--from-step 80")
    monkeypatch.setenv(job, "17")
    assert option.is_due()
    monkeypatch.setenv(count, "1")
    assert option.is_due(), "the first start was ended before it got there"
    option.note_done()
    monkeypatch.setenv(count, "2")
    assert not option.is_due()
    assert Once(tmp_path, "--from-step 40").is_due()
    monkeypatch.setenv(job, "18")  # another launch
    assert option.is_due()
    monkeypatch.setenv(count, "0")
    monkeypatch.setenv(job, "17")
    assert option.is_due(), "typed again, it is meant again"
    monkeypatch.setenv(count, "1")
    assert option.is_due()


def test_a_start_that_was_killed_while_it_went_back_is_brought_to_its_end(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.create()
    assert step_to_go_back_to(folder, None) is None
    folder.note_going_back(80)
    assert step_to_go_back_to(folder, None) == 80
    assert step_to_go_back_to(folder, 60) == 60
    scores = folder.document_scores(90, "suite")
    scores.parent.mkdir(parents=True)
    scores.write_bytes(b"sums")
    folder.metrics.append({"step": 80}, {"step": 90})
    folder.note_data_end(90)
    folder.begin("run", "run: {}\n", 80, rewound=True)
    assert step_to_go_back_to(folder, None) is None
    assert (folder.superseded / scores.relative_to(folder.root)).read_bytes() == b"sums"
    assert not scores.exists()
    assert folder.data_end() is None
    assert [record["step"] for record in folder.metrics.read()] == [80]
