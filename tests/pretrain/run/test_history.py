"""A history holds what a run wrote, follows it as it grows, and says what it cannot read."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from pretrain.report.figures import state_of
from pretrain.run.history import History
from pretrain.run.run_folder import RunFolder


def written(root: Path) -> RunFolder:
    root.mkdir()
    folder = RunFolder(root)
    folder.config.write_text("run: {name: x}\ntrain: {steps: 9}\n")
    for step in range(1, 7):
        folder.metrics.append({"step": step, "loss": 10.0 / step, "tokens_per_source": {"b": step, "a": 2}})
    return folder


def test_numbers_become_columns_and_what_a_record_lacks_is_nan(tmp_path: Path) -> None:
    folder = written(tmp_path / "x")
    folder.metrics.append({"step": 7, "loss": math.inf, "mfu": 0.5, "weight_hash": "abc"})
    history = History(folder.root)
    history.refresh()
    assert history.steps.tolist() == [1, 2, 3, 4, 5, 6, 7]
    np.testing.assert_array_equal(history.metrics["loss"], [*(10 / n for n in range(1, 7)), math.nan])
    np.testing.assert_array_equal(history.metrics["mfu"], [math.nan] * 6 + [0.5])
    np.testing.assert_array_equal(history.metrics["tokens_per_source/b"], [1, 2, 3, 4, 5, 6, math.nan])
    assert set(history.metrics.names_of("tokens_per_source")) == {"a", "b"}
    assert history.metrics.texts == {"weight_hash": (7, "abc")}
    assert (history.name, history.length, history.last_step, history.problems()) == ("x", 9, 7, [])


def test_a_growing_folder_is_followed_and_a_resume_cuts_it_back(tmp_path: Path) -> None:
    folder = written(tmp_path / "x")
    history = History(folder.root)
    history.refresh()
    folder.evals.append({"step": 6, "suite": "s", "domain": "macro", "bits_per_byte": 2.0})
    history.refresh()
    assert history.evals["s"]["macro"][6]["bits_per_byte"] == 2.0
    folder.cut_back(4, "resumed")
    history.refresh()
    assert history.steps.tolist() == [1, 2, 3, 4]
    assert history.evals == {}
    assert history.superseded == 2
    folder.metrics.append({"step": 5, "loss": 7.0})
    history.refresh()
    assert history.metrics["loss"][-1] == 7.0


def test_what_is_missing_or_damaged_is_said(tmp_path: Path) -> None:
    folder = written(tmp_path / "x")
    folder.config.write_text("run: [")
    lines = folder.metrics.path.read_text().splitlines(keepends=True)
    folder.metrics.path.write_text(lines[0] + lines[3] + "{broken\n" + lines[2] + lines[5] + '{"step": 7')
    folder.root.joinpath("layers.jsonl").write_text('{"step": 1, "layers": {"norm": ["x"], "rms": [1, null]}}\n')
    history = History(folder.root)
    history.refresh()
    said = "\n".join(history.problems())
    for what in (
        "the config cannot be read",
        "metrics.jsonl: 1 of its lines cannot be read and are left out (3:",
        "metrics.jsonl: its last line is incomplete",
        "no record of 4 steps (2 to 3, 4 to 5)",
        "1 records are not in the order of their steps (first step 3)",
        "layers.jsonl: 1 lines without numbers by layer",
    ):
        assert what in said, said
    np.testing.assert_array_equal(history.layers["rms"][1], [1, math.nan])
    assert history.name == "x", "the folder's"


def test_the_end_of_a_run_whose_data_ends_it_is_known_as_its_last_start_foresaw_it(tmp_path: Path) -> None:
    folder = written(tmp_path / "x")
    folder.config.write_text("run: {name: x}\ntrain: {epochs: 2}\n")
    history = History(folder.root)
    for start, length in (({}, None), ({"last_step": 0}, None), ({"last_step": 30}, 30), ({"last_step": 28}, 28)):
        folder.starts.append({"step": 0, **start})
        history.refresh()
        assert (history.length, history.foreseen_length) == (None, length)
    assert state_of(history) == "stopped at step 6 of 28"
    folder.note_data_end(27)
    history.refresh()
    assert (history.length, history.foreseen_length) == (27, 27)
