"""A loss or gradient that is no number never gets into the weights, and so into no checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pretrain.config import load_config
from pretrain.provenance import batch_of_step
from pretrain.run_folder import RunFolder
from tests.distributed.ranks import run_forked, run_ranks
from tests.distributed.test_elastic import CONFIG

# NaN as a weight's gradient in the steps that are named
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
def test_nothing_stays_of_a_step_that_is_no_number(tp_size: int) -> None:
    run_ranks(2, "tests.distributed.nonfinite", str(tp_size))


@pytest.mark.distributed
def test_such_steps_are_skipped_and_counted_until_there_are_too_many(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.format(folder=tmp_path, precision="bf16"))
    overrides = ["train.steps=20", "train.max_nonfinite=2", "checkpoint.every=4"]
    codes, output = run_forked(config, [(1, overrides, POISON)])
    assert codes == [[1]], output
    assert "step 7: loss" in output
    assert "2 in a row" in output
    folder = RunFolder(tmp_path / "elastic")
    metrics = [json.loads(line) for line in folder.metrics.path.read_text().splitlines()]
    assert [(m["step"], m.get("nonfinite", False)) for m in metrics] == [(s, s in (3, 6)) for s in range(1, 7)]
    assert [path.name for path in folder.checkpoints.iterdir()] == ["step_00000004"]
    run = load_config(folder.config)
    named = folder.nonfinite(3).read_text().splitlines()[1:]
    origins = batch_of_step(folder, 3, run.data, run.train.global_batch_size, run.run.seed).origins()
    assert named == ["\t".join(map(str, origin)) for origin in origins]
