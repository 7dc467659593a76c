"""wandb, with the real client: after any kill a reader sees each step once, with its evaluation, as last trained."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pretrain.run.description import git_commit
from pretrain.run.eval_figure import is_average
from pretrain.run.run_folder import RunFolder
from pretrain.run.wandb_rows import SentRows, eval_rows, last_local_step, rows_of, step_row
from pretrain.run.wandb_tracker import Tracker, WandbConfig
from shards import installation
from tests.pretrain.run.wandb_server import wandb_server
from tests.pretrain.run.wandb_sessions import records, session

pytestmark = pytest.mark.distributed

CONFIG = WandbConfig(system_metrics=False)


def history(root: Path, run_id: str = "an-id") -> list[dict[str, object]]:
    return [record["history"]["item"] for record in records(root, run_id) if record["type"] == "history"]  # type: ignore[index]


def test_after_kills_each_step_appears_once_with_all_its_figures(tmp_path: Path) -> None:
    root = tmp_path / "run"
    session(root, 0, 22, "killed")
    session(root, 10, 30, "service stopped")  # as the launcher does
    session(root, 25, 32, "left before the evaluation")
    session(root, 32, 34, "finished")
    rows = history(root)
    assert [row["step"] for row in rows] == list(range(1, 35))
    assert all(row["_step"] == row["step"] for row in rows)
    assert [row["loss"] for row in rows] == [1 / step for step in range(1, 35)]
    assert [row["tokens_per_source/pile"] for row in rows] == list(range(1, 35))
    assert [row["step"] for row in rows if "eval/wiki/perplexity" in row] == [4, 8, 12, 16, 20, 24, 28, 32, 34]


def check_retrained(rows: list[dict[str, Any]], last: int) -> None:
    """Check that each step appears once: up to 20 as first trained, with rate 1, later ones as last trained."""
    assert [row["step"] for row in rows] == list(range(1, last + 1))
    assert all(row["_step"] == row["step"] for row in rows)
    assert [row["learning_rate"] for row in rows] == [1.0 if step <= 20 else 2.0 for step in range(1, last + 1)]
    assert [row["step"] for row in rows if "eval/wiki/perplexity" in row] == list(range(4, last + 1, 4))


def test_offline_a_step_that_comes_out_differently_begins_a_new_wandb_run(tmp_path: Path) -> None:
    root = tmp_path / "run"
    session(root, 0, 33, "left before the evaluation")
    said = session(root, 20, 28, "left before the evaluation", rate=2.0)
    new = (root / "wandb" / "run_id").read_text()
    assert new != "an-id"
    assert f"step 21 came out differently when trained again: all figures go to a new wandb run, {new}" in said
    assert "came out differently" not in session(root, 24, 30, "left before the evaluation", rate=2.0)
    assert (root / "wandb" / "run_id").read_text() == new
    check_retrained(history(root, new), last=30)
    assert [row["step"] for row in history(root)] == list(range(1, 34))  # as they were trained at the time


def test_steps_retrained_without_wandb_are_noticed_at_the_next_start(tmp_path: Path) -> None:
    root = tmp_path / "run"
    session(root, 0, 33, "left before the evaluation")
    session(root, 20, 36, "left before the evaluation", rate=2.0, mode="disabled")
    said = session(root, 34, 40, "left before the evaluation", rate=2.0)
    assert "step 21 came out differently" in said
    check_retrained(history(root, (root / "wandb" / "run_id").read_text()), last=39)


@pytest.mark.parametrize("rewinds", [True, False])
def test_online_wandb_is_rewound_to_before_a_step_that_comes_out_differently(tmp_path: Path, rewinds: bool) -> None:
    root = tmp_path / "run"
    with wandb_server(rewinds) as server:
        online = {"mode": "online", **server.environment}
        session(root, 0, 33, "stopped", **online)
        before = server.history["an-id"]
        assert [row["learning_rate"] for row in before] == [1.0] * 33
        session(root, 28, 33, "stopped", **online)  # the same again
        assert server.history == {"an-id": before}
        said = session(root, 20, 27, "stopped", rate=2.0, **online)
        run_id = (root / "wandb" / "run_id").read_text()
        assert ("go to a new wandb run" in said) == (run_id != "an-id") == (not rewinds)
        session(root, 26, 31, "stopped", rate=2.0, **online)
        check_retrained(server.history[run_id], last=31)
        assert set(server.history) == {"an-id", run_id}
        assert rewinds or server.history["an-id"] == before


@pytest.mark.parametrize("rewinds", [True, False])
def test_wandb_goes_back_with_a_run_at_once(tmp_path: Path, rewinds: bool) -> None:
    root = tmp_path / "run"
    with wandb_server(rewinds) as server:
        online = {"mode": "online", **server.environment}
        session(root, 0, 11, "stopped", **online)
        said = session(root, 6, 6, "stopped", rewound=True, **online)  # trains nothing yet
        run_id = (root / "wandb" / "run_id").read_text()
        assert rewinds or "step 7 is retracted, since the run has gone back before it" in said
        assert (run_id == "an-id") == rewinds
        assert [row["step"] for row in server.history[run_id]] == [1, 2, 3, 4, 5, 6]
        session(root, 6, 9, "stopped", rate=2.0, **online)
        assert [row["learning_rate"] for row in server.history[run_id]] == [1.0] * 6 + [2.0] * 3
        assert rewinds or len(server.history["an-id"]) == 11


def test_events_are_alerts_online_one_of_a_kind(tmp_path: Path) -> None:
    with wandb_server(rewinds=True) as server:
        session(tmp_path / "run", 0, 1, "finished", mode="online", **server.environment)
    assert sorted(server.alerts) == [
        ("disk: name", "step 1: about disk"), ("finished: name", "step 1: about finished"),
    ]  # fmt: skip


def test_the_wandb_run_has_its_config_and_its_axis(tmp_path: Path) -> None:
    root = tmp_path / "run"
    session(root, 0, 2, "finished")
    found = records(root)
    text = json.dumps(found)
    assert {record["run"]["run_id"] for record in found if record["type"] == "run"} == {"an-id"}  # type: ignore[index]
    assert "c0ffee" in text
    assert '"glob_name": "*"' in text
    assert '"step_metric": "step"' in text
    assert last_local_step(root / "wandb", "an-id") == 2
    assert last_local_step(root / "wandb", "another-id") == -1


def test_a_wheel_does_not_report_the_commit_of_the_repository_around_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "is_clone", lambda: False)
    assert git_commit() == ""


def test_disabled_costs_nothing(tmp_path: Path) -> None:
    command = (
        "import sys; from pathlib import Path\n"
        "from pretrain.run import wandb_tracker as t; from pretrain.run.run_folder import RunFolder\n"
        f"folder = RunFolder(Path({str(tmp_path)!r}))\n"
        "with t.Tracker(t.WandbConfig(mode='disabled'), folder, 'n', 'i', {}) as tracker:\n"
        "    tracker.log_step({'step': 1})\n"
        "assert 'wandb' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", command], check=True)
    assert list(tmp_path.iterdir()) == []


def test_a_failing_wandb_does_not_stop_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(self: Tracker, mode: str) -> None:
        raise OSError("no such luck")

    monkeypatch.setattr(Tracker, "_init", broken)
    with Tracker(CONFIG, RunFolder(tmp_path), "name", "id", {}) as tracker:
        tracker.log_step({"step": 1, "loss": 2.0})
    assert "no such luck" in caplog.text


def test_an_error_of_the_training_is_passed_on(tmp_path: Path) -> None:
    config = WandbConfig(mode="disabled")
    with pytest.raises(ZeroDivisionError), Tracker(config, RunFolder(tmp_path), "name", "id", {}):
        raise ZeroDivisionError


def test_a_changed_suite_is_shown_under_its_own_name(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.create()
    for first, last, suite in ((0, 2, "s@1"), (2, 3, "s@2")):
        with Tracker(CONFIG, folder, "name", "an-id", {}, [suite]) as tracker:
            for step in range(first + 1, last + 1):
                tracker.log_step({"step": step}, more=True)
                record = {"step": step, "suite": suite, "domain": "wiki", "perplexity": 2.0 * step}
                folder.evals.append(record)
                tracker.log_evals([record])
    rows = history(folder.root)
    own = {int(str(row["step"])): key for row in rows for key in row if key.startswith("eval")}
    changed = "eval/s@2/wiki/perplexity"
    assert own == {1: "eval/wiki/perplexity", 2: "eval/wiki/perplexity", 3: changed}


def of_task(step: int, name: str, label: str, accuracy: float) -> dict[str, object]:
    return {"step": step, "suite": label, "domain": name, "metric": "acc_raw", "accuracy": accuracy}


def test_tasks_are_shown_by_name_and_a_changed_one_under_its_label(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    suite = {"step": 1, "suite": "s@1", "domain": "macro", "perplexity": 2.0}
    folder.evals.append(suite, of_task(1, "a", "a@1", 0.5), of_task(1, "b", "b@1", 0.25), of_task(2, "a", "a@2", 0.75))
    (first,) = rows_of(folder, ["s@1", "a@1", "b@1"])
    assert first == {"step": 1, "eval/macro/perplexity": 2.0, "tasks/a/accuracy": 0.5, "tasks/b/accuracy": 0.25}
    assert list(rows_of(folder, ["a@2"])) == [{"step": 2, "tasks/a@2/accuracy": 0.75}]
    assert list(rows_of(folder, [])) == []
    assert [sorted(row) for row in rows_of(folder, None)][1] == ["step", "tasks/a/accuracy"]


def test_a_task_that_was_scored_later_contradicts_nothing(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.wandb.mkdir()
    sent = SentRows(folder.wandb_rows, "id")
    row = {"step": 1, "loss": 2.0, "eval/macro/perplexity": 2.0, "tasks/a/accuracy": 0.5}
    sent.note(row)
    sent.note({key: value for key, value in row.items() if "tasks" not in key} | {"step": 2})
    assert [set(record) for record in folder.wandb_rows.read()] == [
        {"step", "run", "figures", "evals", "tasks"}, {"step", "run", "figures", "evals"},
    ], "rows without tasks are recorded as ever"  # fmt: skip
    again = SentRows(folder.wandb_rows, "id")
    later = row | {"tasks/b/accuracy": 0.25}
    assert not again.contradicts(row)
    assert not again.contradicts(later)
    assert not again.contradicts(later | {"step": 2})
    assert again.differs(later)
    assert again.contradicts(later | {"tasks/a/accuracy": 0.75})
    assert again.contradicts({key: value for key, value in row.items() if "tasks" not in key} | {"loss": 3.0})
    assert not again.contradicts(row | {"eval/macro/by_context/1-16/perplexity": 2.0}), "as an older program sent it"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ({"domain": "macro"}, True),
        ({"domain": "ema:micro"}, True),
        ({"domain": "econ-micro"}, False),
        ({"domain": "macro", "metric": "acc_raw"}, False),
    ],
)
def test_a_domain_is_no_average_for_how_its_name_ends(line: dict[str, object], expected: bool) -> None:
    assert is_average(line) is expected


def test_the_rows_of_a_run_have_the_figures_of_its_layers(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for step in range(1, 6):
        folder.metrics.append({"step": step, "loss": 2.0})
    for step in (1, 4):
        layers = {"update_ratio": [step / 10 + block / 100 for block in range(12)]}
        folder.layers.append({"step": step, "layers": layers, "weights": {"norm.weight": [1, 2, 3]}, "seconds": 1})
    for after in (-1, 2):
        rows = {int(str(row.pop("step"))): row for row in rows_of(folder, None, after)}
        assert sorted(rows) == [step for step in range(1, 6) if step > after]
        for step, row in rows.items():
            wanted = {f"layers.update_ratio/{block:02}": step / 10 + block / 100 for block in range(12)}
            assert row == {"loss": 2.0} | (wanted if step in (1, 4) else {})


def test_rows_are_flattened() -> None:
    assert step_row({"step": 1, "loss": 2.0, "epoch_per_source": {"a": 0.5}}) == {
        "step": 1, "loss": 2.0, "epoch_per_source/a": 0.5,
    }  # fmt: skip
    lines = [
        {"step": step, "suite": "val", "domain": domain, "perplexity": step + 0.5, "tokens": 3}
        for step in (1, 2)
        for domain in ("wiki", "macro")
    ]
    first, second = eval_rows(lines)
    assert first == {
        "step": 1, "eval/wiki/perplexity": 1.5, "eval/wiki/tokens": 3,
        "eval/macro/perplexity": 1.5, "eval/macro/tokens": 3,
    }  # fmt: skip
    assert second["step"] == 2
    assert list(eval_rows([])) == []
    by_context = {"by_context": {"1-16": {"perplexity": 2.5}}}
    needles = {"metric": "acc_greedy", "accuracy": 0.5, "length": 64, "by_depth": {"0.5": {"accuracy": 0.25}}}
    (row,) = eval_rows(
        [line | by_context for line in lines[:2]]
        + [{"step": 1, "suite": "needles_64@1", "domain": "needles_64", **needles}]
    )
    assert row == first | {
        "eval/macro/by_context/1-16/perplexity": 2.5,
        "tasks/needles_64/accuracy": 0.5, "tasks/needles_64/by_depth/0.5/accuracy": 0.25,
    }, "of the averages alone"  # fmt: skip
