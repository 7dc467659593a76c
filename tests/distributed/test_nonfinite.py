"""A loss or gradient that is not finite never reaches the weights, hence no checkpoint."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from pretrain.config import load_config
from pretrain.provenance import batch_of_step
from pretrain.run.run_folder import RunFolder
from tests.distributed.ranks import run_ranks, run_starts
from tests.tiny_run import write_config

# Sets a weight's gradient to NaN in certain steps.
POISON = """
from pretrain.engine import Engine
train_step = Engine.train_step

def poisoned(engine, tokens, segment_ids, n_targets, step, *others):
    if step + 1 not in (3, 6, 7, 8):
        return train_step(engine, tokens, segment_ids, n_targets, step, *others)
    hook = engine.model.norm.weight.register_hook(lambda gradient: gradient * float("nan"))
    stats = train_step(engine, tokens, segment_ids, n_targets, step, *others)
    hook.remove()
    return stats

Engine.train_step = poisoned
"""


@pytest.mark.distributed
@pytest.mark.parametrize("tp_size", [1, 2])
def test_a_step_that_is_not_finite_leaves_no_trace(tp_size: int) -> None:
    run_ranks(2, "tests.distributed.nonfinite", str(tp_size))


@pytest.mark.distributed
def test_steps_that_are_not_finite_are_skipped_and_counted_until_there_are_too_many(tmp_path: Path) -> None:
    config = write_config(tmp_path, "elastic")
    overrides = ["train.steps=20", "train.max_nonfinite=2", "checkpoint.every=4"]
    codes, output = run_starts(config, [(1, overrides, POISON)])
    assert codes == [[1]], output
    assert "step 7: loss" in output
    assert "2 in a row" in output
    folder = RunFolder(tmp_path / "elastic")
    metrics = [json.loads(line) for line in folder.metrics.path.read_text().splitlines()]
    assert [(m["step"], m.get("nonfinite", False)) for m in metrics] == [(s, s in (3, 6)) for s in range(1, 7)]
    assert [path.name for path in folder.checkpoints.iterdir()] == ["step_00000004"]
    run = load_config(folder.config)
    named = folder.nonfinite(3).read_text().splitlines()[1:]
    origins = batch_of_step(folder, 3, [stage.of_loader for stage in run.all_stages], run.run.seed).origins()
    assert named == ["\t".join(map(str, origin)) for origin in origins]


# Leaves nothing to predict in the batches of certain steps.
EMPTIED = """
import dataclasses
from pretrain.feed import Feed
draw, drawn = Feed.next, []

def emptied(feed, *arguments):
    batch = draw(feed, *arguments)
    drawn.append(batch)
    if len(drawn) not in (2, 3, 5):
        return batch
    return dataclasses.replace(batch, segment_ids=batch.segment_ids * 0, n_targets=0)

Feed.next = emptied
"""


@pytest.mark.distributed
def test_steps_without_targets_are_logged_and_end_a_run_that_has_no_others(tmp_path: Path) -> None:
    config = write_config(tmp_path, "elastic")
    (tmp_path / "words.jsonl").write_text('{"text": "the"}\n' * 20_000)
    paths = json.dumps([str(tmp_path / "words.jsonl")])
    words = ["run.name=words", "data.bos=false", "data.eos=false", f"data.sources.0.paths={paths}"]
    few = ["train.steps=6", "train.max_nonfinite=4", "train.on_nonfinite=stop"]
    codes, output = run_starts(config, [(1, few, EMPTIED), (1, [*few, *words], "")])
    assert codes == [[0], [1]], output
    metrics = [json.loads(line) for line in (tmp_path / "elastic" / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics if m.get("without_targets")] == [2, 3, 5]
    assert [m["step"] for m in metrics if m["loss"] is None and m["grad_norm"] is None] == [2, 3, 5]
    said = [int(step) for step in re.findall(r"step (\d+): there is nothing to predict in its batch", output)]
    assert said == [2, 5, 1, 4], "once for consecutive ones, and at the end"
    metrics = [json.loads(line) for line in (tmp_path / "words" / "metrics.jsonl").read_text().splitlines()]
    assert [(m["step"], m["loss"]) for m in metrics] == [(1, None), (2, None), (3, None)]
    assert "none of its pieces has a second token" in output
    assert "4 in a row that changed nothing" in output
    assert not list((tmp_path / "words" / "checkpoints").iterdir())
