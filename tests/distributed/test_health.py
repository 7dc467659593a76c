"""A run that goes wrong is told of, ended, and leaves its best checkpoint; a rank that is slow is named."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest

from pretrain.commands.begun_run import open_run
from pretrain.run.run_folder import RunFolder
from shards import read_documents
from tests.distributed.ranks import run_starts
from tests.tiny_run import write_config

KILLED = """
import os, signal
from pretrain.journal import Journal
log_step = Journal.log_step

def killing(journal, record, *others, **more):
    log_step(journal, record, *others, **more)
    if record.step == {step}:
        os.kill(os.getpid(), signal.SIGKILL)

Journal.log_step = killing
"""
SLOW = """
import os, time
from pretrain.engine import Engine
forward = Engine._forward

def slowed(engine, *arguments):
    time.sleep(0.2 if os.environ["RANK"] == "1" else 0)
    return forward(engine, *arguments)

Engine._forward = slowed
"""
METRIC = "eval/macro/perplexity"


ABSURD = ["optim.learning_rate=0.3"]


def explosive_config(tmp_path: Path) -> Path:
    documents = itertools.islice(read_documents("shards/sample/train/pile-00.jsonl.zst"), 4)
    for number, document in enumerate(documents):
        domain = tmp_path / "suite" / f"domain-{number % 2}"
        domain.mkdir(parents=True, exist_ok=True)
        with (domain / "val.jsonl").open("a") as file:
            file.write(json.dumps({"text": document.text[:400]}) + "\n")
    return write_config(
        tmp_path,
        "whole",
        train={"steps": 60, "spike_window": 20, "stop": {"metric": METRIC, "patience": 15, "explode": 10.0}},
        checkpoint={"every": 2, "keep": 1, "best": METRIC},
        evaluation={"suite": str(tmp_path / "suite"), "every": 2},
    )


def killed_after(step: int) -> str:
    return KILLED.replace("{step}", str(step))


def figures(folder: RunFolder) -> list[dict[str, Any]]:
    keys = ("step", "loss", "grad_norm", "batch_hash", "spike")
    return [{key: record.get(key) for key in keys} for record in folder.metrics.read()]


@pytest.mark.distributed
def test_a_run_that_explodes_is_told_and_ended_and_keeps_its_best_checkpoint(tmp_path: Path) -> None:
    config = explosive_config(tmp_path)
    codes, output = run_starts(config, [(1, [], killed_after(13))])
    assert codes == [[-9]], output
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    folder = RunFolder(tmp_path / "whole")
    codes, output = run_starts(config, [(1, ABSURD, ""), (1, ABSURD, "")])
    assert codes == [[0], [0]], output
    last_words = output.split("pretrain.run.events: step ")[-1]
    assert f"{METRIC} is more than 10 times" in last_words, "the last start trains nothing and says why"
    assert "train.stop=null" in last_words
    events = list(folder.events.read())
    kinds = [str(event["kind"]) for event in events]
    assert kinds.index("spike") < kinds.index("explosion") < kinds.index("finished")
    steps = [int(str(event["step"])) for event in events]
    assert 12 < steps[kinds.index("spike")] <= steps[kinds.index("explosion")] == steps[-1] < 60
    # A plain search, over the checkpoints that there were
    found = [
        (math.inf if line["perplexity"] is None else float(str(line["perplexity"])), int(str(line["step"])))
        for line in folder.evals.read()
        if line["domain"] == "macro" and line["step"]
    ]
    _, best = min(found)
    store = open_run(folder.root).checkpoints
    assert store.find("best").step == best < steps[-1]
    assert store.steps() == [best, steps[-1]]
    starts = [(1, [*ABSURD, "run.name=killed"], code) for code in (killed_after(steps[kinds.index("spike")]), "")]
    codes, output = run_starts(config, starts)
    assert codes == [[-9], [0]], output
    killed = RunFolder(tmp_path / "killed")
    assert figures(killed) == figures(folder)
    assert [(event["step"], event["kind"]) for event in killed.events.read()] == list(zip(steps, kinds, strict=True))
    assert open_run(killed.root).checkpoints.find("best").step == best


@pytest.mark.distributed
def test_a_rank_that_is_slowed_by_200_ms_a_step_is_named(tmp_path: Path) -> None:
    config = write_config(tmp_path, "slow", train={"steps": 22, "micro_batch_size": 4})
    codes, output = run_starts(config, [(2, [], SLOW)])
    assert codes == [[0, 0]], output
    folder = RunFolder(tmp_path / "slow")
    events = [event for event in folder.events.read() if event["kind"] == "straggler"]
    (event,) = events
    assert event["figures"].items() >= {"rank": 1, "host": socket.gethostname(), "most": "forward"}.items()
    assert int(str(event["step"])) <= 22
    last = folder.metrics.last()
    assert last is not None
    assert last["straggler"] == 1
    assert last["straggler_seconds"] > 0.1
