"""Evaluation in the loop does not change the training; evaluation afterwards gives the loop's results."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.evaluation.scores import DocumentScores
from pretrain.run.run_folder import RunFolder
from tests.distributed.evaluation import nearly, write_tasks
from tests.distributed.ranks import run_ranks
from tests.distributed.test_resume import Run

# One run for all tests, which work on it in turn.
pytestmark = pytest.mark.distributed

FAST = ("train.steps=6", "checkpoint.every=2", "checkpoint.keep=9", "precision=fp32", "data.num_workers=0")


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Train a run of six steps with dropout that is evaluated before, between and after them."""
    run = Run(tmp_path_factory.mktemp("evaluated"), world_size=1)
    write_tasks(run.folder / "tasks")
    run.finish(*FAST, *evaluated_on(run))
    return run


def evaluated_on(run: Run) -> tuple[str, ...]:
    tasks = [str(run.folder / "tasks" / "completion.jsonl"), {"requests": str(run.folder / "tasks" / "choice.jsonl")}]
    wandb = ("wandb.mode=offline", "wandb.system_metrics=false")
    return "evaluation.every=2", f"evaluation.tasks={json.dumps(tasks)}", *wandb


def evaluate(*arguments: str, world_size: int = 1) -> str:
    return run_ranks(world_size, "pretrain", "evaluate", *arguments)


def evals(folder: Path) -> dict[tuple[int, str, str], dict]:
    lines = [json.loads(line) for line in (folder / "evals.jsonl").read_text().splitlines()]
    found = {(line["step"], line["suite"], line["domain"]): line for line in lines}
    assert len(found) == len(lines), "each figure appears once"
    return found


def test_steps_after_an_evaluation_are_bit_identical_to_those_without(evaluated: Run, tmp_path: Path) -> None:
    plain = Run(tmp_path, world_size=1)
    plain.finish(*FAST, "evaluation.suite=null")
    assert plain.figures() == evaluated.figures()
    lines = evals(evaluated.folder / "resumed")
    assert len(lines) == 4 * 6  # steps 0, 2, 4, 6; two domains, two averages, two tasks
    assert len({line["bits_per_byte"] for (_, _, name), line in lines.items() if name == "choice"}) == 4, "it learns"
    assert not (tmp_path / "resumed" / "evals.jsonl").exists()


def test_an_evaluation_that_was_cut_short_is_completed_alike(evaluated: Run) -> None:
    """Resume from step 4, of whose evaluation the last line was not written."""
    folder = RunFolder(evaluated.folder / "resumed")
    before = evals(folder.root)
    shutil.rmtree(folder.checkpoints / "step_00000006")
    lines = [json.loads(line) for line in folder.evals.path.read_text().splitlines()]
    kept = [line for line in lines if line["step"] < 4 or (line["step"] == 4 and line["domain"] != "choice")]
    assert len(kept) == 3 * 6 - 1
    folder.evals.path.write_text("".join(json.dumps(line) + "\n" for line in kept))
    evaluated.finish(*FAST, *evaluated_on(evaluated))
    assert evals(folder.root) == before


def test_old_checkpoints_score_the_same_on_other_numbers_of_ranks(evaluated: Run) -> None:
    folder = RunFolder(evaluated.folder / "resumed")
    before = evals(folder.root)
    # The same documents under another name: what the loop has scored is not scored again.
    (evaluated.folder / "again.yaml").write_text(
        json.dumps({"sources": [{"name": name, "path": f"suite/{name}"} for name in ("code", "wiki")]})
    )
    suite = str(evaluated.folder / "again.yaml")
    renamed = json.dumps([{"name": "again", "requests": str(evaluated.folder / "tasks" / "choice.jsonl")}])
    command = ("--run", str(folder.root), "--suite", suite, f"evaluation.tasks={renamed}")
    assert "wiki" in evaluate(*command, "--steps", "2", "--tp", "2", world_size=2)
    assert "wiki" in evaluate(*command, "--steps", "6", "--sp", "2", world_size=2)
    after = evals(folder.root)
    (task,) = {key[1] for key in before if key[2] == "choice"}
    for step in (2, 6):
        one, two = before[step, task, "choice"], after.pop((step, task.replace("choice", "again"), "again"))
        assert two | {"suite": task, "domain": "choice"} == nearly(one)
    before, after = ({key: found[key] for key in found if "metric" not in found[key]} for found in (before, after))
    (own,), (again,) = {key[1] for key in before}, {key[1] for key in after.keys() - before.keys()}
    assert own.partition("@")[0] == "suite.seq64.fp32"
    assert again.replace("again", "suite") == own, "the same documents, hence the same content"
    for step in (2, 6):
        for domain in ("code", "wiki", "macro", "micro"):
            one, two = (figures[step, suite, domain] for figures, suite in ((before, own), (after, again)))
            assert two["nll_per_token"] == pytest.approx(one["nll_per_token"], rel=1e-5), (step, domain)
            assert two["tokens"] == one["tokens"]
    assert {key for key in after if key[1] == own} == set(before)
    assert "already" in evaluate(*command)
    written = folder.config.read_text()
    changed = written.replace("sequence_parallel: false", "sequence_parallel: true")
    changed = changed.replace("tp_size: 1", "tp_size: 2").replace("sp_size: 1", "sp_size: 2")
    assert changed != written
    folder.config.write_text(changed)
    assert "already" in evaluate(*command), "a run of ranks that split tokens is scored on one"
    folder.config.write_text(written)
    rows = wandb_rows(folder.wandb)
    late = [row for row in rows if f"eval-{again}/wiki/perplexity" in row]
    assert [row["eval_step"] for row in late] == [2, 6]
    assert all("step" not in row for row in late), "a resumed training must not take them for its own"
    assert any(key.startswith(f"eval-{again}/domains") for row in rows for key in row)
    shown = [row for row in rows if "tasks/choice/accuracy" in row]
    assert [row["step"] for row in shown] == [0, 2, 4, 6], "with the step's other figures"
    of_task = [row for row in rows if f"eval-{task.replace('choice', 'again')}/accuracy" in row]
    assert of_task == late


def wandb_rows(folder: Path) -> list[dict]:
    rows = []
    for file in sorted(folder.glob("offline-run-*/*.wandb")):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
        lines = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
        rows += [json.loads(line)["history"]["item"] for line in lines if '"type":"history"' in line]
    return rows


def test_a_resumed_training_keeps_evaluations_of_earlier_steps(evaluated: Run) -> None:
    """Run after the test above, on lines that are out of order."""
    folder = RunFolder(evaluated.folder / "resumed")
    kept = {key for key in evals(folder.root) if key[0] <= 4}
    folder.evals.cut_back(4, folder.superseded / "evals.jsonl", "lost")
    assert set(evals(folder.root)) == kept
    for suite in {key[1] for key in kept if key[2] == "macro"}:
        assert DocumentScores.load(folder.document_scores(2, suite)).suite == suite


def test_a_changed_suite_begins_its_own_series(evaluated: Run) -> None:
    """Run last: the run resumes with other text under the suite's name."""
    folder = evaluated.folder / "resumed"
    before = evals(folder)
    documents = evaluated.folder / "suite" / "wiki" / "val.jsonl"
    documents.write_text(documents.read_text().replace("the", "a"))
    output = evaluated.finish("train.steps=8", *FAST[1:], *evaluated_on(evaluated), "wandb.mode=disabled")
    after = evals(folder)
    assert before.items() <= after.items()
    (fresh,) = {key[1] for key in after} - {key[1] for key in before}
    assert {key[0] for key in after if key[2] == "choice"} == {0, 2, 4, 6, 8}, "the tasks go on as they were"
    assert fresh.startswith("suite.seq64.fp32@")
    assert {key[0] for key in after if key[1] == fresh} == {6, 8}
    assert f"those of this start are labelled {fresh}" in " ".join(output.split())
