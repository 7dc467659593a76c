"""What happens to one rank reaches all of them: a signal in an evaluation, an error, a step that hangs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed.ranks import run_starts
from tests.tiny_run import write_config

# Rank 1 is asked to stop in the middle of the evaluation of step 2.
SIGNALLED = """
import os, signal
from pretrain.trainer import Trainer
before_batch, batches = Trainer._before_evaluation_batch, []

def signalled(trainer):
    batches.append(trainer.state.step)
    if rank == 1 and batches.count(2) == 2:
        os.kill(os.getpid(), signal.SIGUSR1)
        while not trainer._parts.stop.wanted():
            pass
    before_batch(trainer)

Trainer._before_evaluation_batch = signalled
"""

FAILING = """
import os, time
from pretrain.engine import Engine
train_step = Engine.train_step

def failing(engine, tokens, segment_ids, n_targets, step, *others):
    if rank == 1 and step + 1 == {step}:
        {fault}
    return train_step(engine, tokens, segment_ids, n_targets, step, *others)

Engine.train_step = failing
"""


@pytest.mark.distributed
def test_a_signal_during_an_evaluation_an_error_and_a_hang_all_end_the_run_properly(tmp_path: Path) -> None:
    suite = tmp_path / "suite" / "wiki"
    suite.mkdir(parents=True)
    lines = [json.dumps({"text": f"Document {i} is about the number {i}. " * 20}) + "\n" for i in range(40)]
    suite.joinpath("val.jsonl").write_text("".join(lines))
    config = write_config(tmp_path, "elastic")
    evaluated = ["train.steps=4", "evaluation.every=2", f"evaluation.suite={suite.parent}", "evaluation.batch_size=2"]
    run = tmp_path / "elastic"

    codes, output = run_starts(config, [(2, evaluated, SIGNALLED)])
    assert codes == [[75, 75]], output
    assert {json.loads(line)["step"] for line in (run / "evals.jsonl").read_text().splitlines()} == {0}
    assert (run / "checkpoints" / "step_00000002" / "COMPLETE").exists(), output

    faults = [(3, "raise ValueError('out of luck')"), (3, "os.kill(os.getpid(), 9)"), (4, "time.sleep(100)")]
    evaluated.append("train.stall_timeout=3")
    starts = [(2, evaluated, FAILING.format(step=step, fault=fault)) for step, fault in faults]
    codes, output = run_starts(config, [*starts, (2, evaluated, "")])
    # Rank 0 waits for the rank that hangs: it notices as well, unless that rank is gone before.
    first = codes[2][0]
    assert first in (75, 1), output
    assert codes == [[1, 1], [1, -9], [first, 75], [0, 0]], output
    assert output.count("ValueError: out of luck") == 1
    assert output.count("Traceback (most recent call last)") == 1, output  # only the failed rank's
    assert output.count("another rank is gone, so rank 0 exits too") == 2 + (first == 1)
    assert output.index("out of luck") < output.index("another rank is gone")
    assert "rank 1: step 4 has taken more than train.stall_timeout=3 s" in output
    steps = [json.loads(line)["step"] for line in (run / "evals.jsonl").read_text().splitlines()]
    assert sorted(set(steps)) == [0, 2, 4]
    assert len(steps) == 3 * steps.count(0)
