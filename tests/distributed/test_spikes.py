"""A spike's update is skipped, or the run taken back before it: on all ranks alike, and after a kill too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pretrain.run.run_folder import RunFolder
from tests.distributed.ranks import run_starts
from tests.tiny_run import write_config

# Makes the gradient of one weight a thousand times larger in a step; may kill the process after a later one.
SPIKE = """
import os, signal
from pretrain.engine import Engine
from pretrain.journal import Journal
train_step, log_step = Engine.train_step, Journal.log_step

def spoilt(engine, tokens, segment_ids, n_targets, step, *others):
    factor = 1000 if step + 1 == 14 else 1
    hook = engine.model.norm.weight.register_hook(lambda gradient: gradient * factor)
    stats = train_step(engine, tokens, segment_ids, n_targets, step, *others)
    hook.remove()
    return stats

def killing(journal, record, *others, **more):
    log_step(journal, record, *others, **more)
    if record.step == {killed_after}:
        os.kill(os.getpid(), signal.SIGKILL)

Engine.train_step, Journal.log_step = spoilt, killing
"""
FIGURES = ("step", "loss", "grad_norm", "batch_hash", "trained_hash", "weight_hash", "spike", "skipped_update")


def run(tmp_path: Path, name: str, *starts: tuple[int, int], **changes: Any) -> tuple[RunFolder, str]:
    """Run starts on so many ranks, each killed after a step; return the run's folder and its output."""
    train = {"steps": 18, "spike_window": 8, "spike_score": 20.0, "rewind_steps": 3, "weight_hash_every": 1}
    config = write_config(
        tmp_path,
        name,
        train=train | changes.get("train", {}),
        data=changes.get("data", {}),
        optim={"learning_rate": 1e-4},
        checkpoint={"every": 4, "keep": 9},
    )
    codes, output = run_starts(config, [(ranks, [], SPIKE.replace("{killed_after}", str(at))) for ranks, at in starts])
    assert codes[-1] == [0] * starts[-1][0], output
    return RunFolder(tmp_path / name), output


def figures(folder: RunFolder) -> list[dict[str, Any]]:
    return [{key: record.get(key) for key in FIGURES} for record in folder.metrics.read()]


def kinds(folder: RunFolder) -> list[tuple[object, object]]:
    return [(record["step"], record["kind"]) for record in folder.events.read()]


@pytest.mark.distributed
def test_a_spike_is_skipped_on_all_ranks_and_again_after_a_kill(tmp_path: Path) -> None:
    whole, output = run(tmp_path, "whole", (2, 0), train={"on_spike": "skip"})
    found = figures(whole)
    assert [record["step"] for record in found if record["skipped_update"]] == [14], output
    assert found[12]["weight_hash"] == found[13]["weight_hash"] != found[14]["weight_hash"]
    assert found[13]["grad_norm"] > 10 * found[12]["grad_norm"]
    assert kinds(whole) == [(14, "spike"), (18, "finished")]
    killed, _ = run(tmp_path, "killed", (2, 14), (2, 0), train={"on_spike": "skip"})
    assert figures(killed) == found
    assert kinds(killed) == kinds(whole)


@pytest.mark.distributed
def test_a_run_goes_back_before_a_spike_as_if_its_steps_had_been_passed_over_by_hand(tmp_path: Path) -> None:
    by_hand, _ = run(tmp_path, "by-hand", (1, 0), data={"skip_steps": [[12, 14]]})
    # Killed after it went back, at a step that it had not come to before
    rewound, output = run(tmp_path, "rewound", (1, 17), (1, 0), train={"on_spike": "rewind"})
    assert figures(rewound) == figures(by_hand), output
    assert kinds(rewound) == [(8, "rewind"), (18, "finished")]
    retracted = list(RunFolder(rewound.superseded).events.read())
    assert [(record["step"], record["kind"]) for record in retracted] == [(14, "spike")]
    assert "--step 14 --by-loss" in str(retracted[0]["text"])
    assert [(r.spike, r.step, r.passed_over) for r in rewound.rewinds()] == [(14, 8, (12, 14))]
