"""Average checkpoints of a run into one model: `headrace average --run runs/x --steps 800 900 1000 --to models/x`.

The mean of the weights of checkpoints of one run is often better than each of them, as long as the learning rate has
not decayed. The model is written as `headrace export` writes one, after the checkpoints' files have been verified;
score it with `headrace evaluate --model`. The run may be training meanwhile.

Exit codes: 0 done, 2 no such run or step, or the layout cannot represent the model, 1 anything else.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

from pretrain import log
from pretrain.checkpoint.weights import AveragedWeights
from pretrain.commands.begun_run import open_run
from pretrain.commands.export import add_output_arguments, open_weights, write
from pretrain.exchange.base import open_base
from shards import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", type=Path, required=True, help="the run's folder, e.g. runs/quickstart")
    parser.add_argument("--steps", type=int, nargs="+", required=True, help="the checkpoints' steps, at least two")
    add_output_arguments(parser, required=True)


def run(arguments: argparse.Namespace) -> int:
    """Average checkpoints. Raises HeadraceError if it cannot be done."""
    log.set_up(0)
    steps = sorted(set(arguments.steps))
    if len(steps) < 2:
        raise ConfigError(f"--steps {steps[0]}: an average needs at least two different steps")
    folder, config, checkpoints = open_run(arguments.run, arguments.overrides)
    positions = [config.stage_of(step).model.positions for step in steps]
    for (before, first), (step, later) in itertools.pairwise(zip(steps, positions, strict=True)):
        if first != later:
            raise ConfigError(
                f"--steps: a stage between steps {before} and {step} changes how positions are computed, from {first}"
                f" to {later}, so their weights belong to two models; average steps of one stage"
            )
    base = open_base(config.init_from, config.model)
    sources = [open_weights(checkpoints.find(step), config, base) for step in steps]
    written = write(AveragedWeights(sources), config, steps[-1], arguments)
    print(f"{arguments.to}: mean of steps {', '.join(map(str, steps))} of {folder.root}, {written}")
    return 0
