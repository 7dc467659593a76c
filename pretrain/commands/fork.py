"""Begin a run from a checkpoint of another: `headrace fork --run runs/a --step 90000 --name b [key=value ...]`.

The new run has the parent's weights, optimizer state, counters and cursors at that step, a folder and a wandb run of
its own, and the parent's records up to there. The checkpoint's files are shared by hard links, so it takes no space,
and nothing that happens to the parent harms it. Train it with `headrace train --config runs/b/config.yaml`.

What changes from that step on is written with `stage.`:

    stage.data.weights='{wiki: 2.0}'   stage.data.seq_len=4096   stage.data.forget=list.jsonl
    stage.train.global_batch_size=512  stage.optim.schedule=linear stage.optim.floor=0

Any other key.path=value changes what may change when a run resumes, such as train.steps or data.skip_steps. See
docs/branching.md.

Exit codes: 0 done, 2 no such run or step, or the fork would change the past, 1 anything else.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pretrain.checkpoint.store import wanted_step
from pretrain.commands.begun_run import open_run
from pretrain.fork import fork
from shards import installation


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", type=Path, required=True, help="the parent's folder, e.g. runs/quickstart")
    parser.add_argument("--step", type=wanted_step, required=True, help="of one of its checkpoints, or best")
    parser.add_argument("--name", required=True, help="run.name of the new run")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="what the new run changes")


def run(arguments: argparse.Namespace) -> int:
    """Make the fork and say how to train it."""
    parent = open_run(arguments.run)
    step = parent.checkpoints.find(arguments.step).step
    config = fork(parent.folder, parent.checkpoints, step, arguments.name, arguments.overrides)
    path = config.folder.config
    print(f"{config.folder.root} begins at step {step} of {arguments.run}. To train it:")
    print(f"deepspeed {installation.typed('train').removeprefix('python ')} --config {path}")
    return 0
