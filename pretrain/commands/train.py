"""Trains a model, or goes on training it: `deepspeed launch/pretrain.py --config configs/quickstart.yaml`.

Exit codes: 0 finished, 75 stopped early and wants to go on, 2 bad config or input, 1 anything else.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    # Python puts launch/ first, where `pretrain` is this very file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

if not torch.cuda.is_available():
    # Where DeepSpeed has to look for a device itself, it reports what it found on stdout
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

from rich.console import Console

from pretrain import log
from pretrain.config import RunConfig, load_config
from pretrain.evaluation.tables import domain_table
from pretrain.faults.interrupt import STOPPED, Stopped
from pretrain.optim import learning_rate_at
from pretrain.start import Report, start
from pretrain.topology import dp_size_of, is_lost_peer, slurm_environment, world_size_of
from shards import HeadraceError

_logger = logging.getLogger("headrace")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="a YAML file, see configs/")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="e.g. optim.learning_rate=1e-3")
    parser.add_argument("--fresh", action="store_true", help="start over; an existing run of this name is moved aside")
    parser.add_argument("--print-config", action="store_true", help="show what would run, and stop")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    return parser.parse_intermixed_args()


def how_to_train_longer(config: RunConfig) -> str:
    """Say what to add to the command of a finished run so that its learning rate does not jump."""
    steps, optim = config.train.steps, config.optim
    if steps is None:
        return ""
    last_rate = learning_rate_at(steps, optim, steps)
    further = f"train.steps={2 * steps}"
    if optim.schedule == "constant":
        return f"the same command with {further} trains on from here; "
    advice = f"the same command with run.name={config.run.name}-{2 * steps} {further} is a run with a longer schedule; "
    if last_rate > 0:
        constant = f"optim.schedule=constant optim.learning_rate={last_rate:.6g}"
        advice += f"with {further} {constant} this one goes on at the rate that it ended with; "
    return advice


def print_report(config: RunConfig, report: Report) -> None:
    """What a finished run closes with: figures before and after, a sample, and where to go from here."""
    console = Console(soft_wrap=True)
    evals = list(report.folder.evals.read())
    if evals:
        evals = [e for e in evals if e["suite"] == evals[0]["suite"]]  # others are of launch/evaluate.py
        steps = [int(str(e["step"])) for e in evals]
        first, last = min(steps), max(steps)
        console.print(
            domain_table([e for e in evals if e["step"] == first], [e for e in evals if e["step"] == last]),
        )
    console.print("A continuation by the model:", style="bold")
    console.print(config.evaluation.prompt, end="", style="dim", markup=False, highlight=False)
    console.print(report.sample, markup=False, highlight=False)
    root = report.folder.root
    console.print(f"\nRun folder  {root}\nFigures     {root}/metrics.jsonl, {root}/evals.jsonl", highlight=False)
    if config.wandb.mode == "offline":
        console.print(f"wandb       {root}/wandb (upload: wandb sync {root}/wandb/offline-run-*)", highlight=False)
    console.print(
        f"Next        {how_to_train_longer(config)}copy the config, set data.sources to your shards, and start it the"
        " same way",
        highlight=False,
    )


def main() -> int:
    arguments = parse_arguments()
    os.environ.update(slurm_environment(os.environ))
    rank = int(os.environ.get("RANK", "0"))
    log.set_up(rank)
    try:
        config = load_config(arguments.config, arguments.overrides)
        if arguments.print_config:
            # Without a launcher, of one copy of the model
            ranks = world_size_of(os.environ) if "WORLD_SIZE" in os.environ else config.parallel.tp_size
            print(config.describe(dp_size_of(ranks, config.parallel)), end="")
            return 0
        report = start(config, arguments.fresh)
    except HeadraceError as error:
        _logger.error("%s", error)
        return error.exit_code
    except Stopped:
        return STOPPED
    except RuntimeError as error:
        if not is_lost_peer(error):
            raise
        # One line of each of many ranks; the traceback that says why is the other's
        reason = str(error).strip().partition("\n")[0]
        _logger.error("another rank is gone, and rank %d ends with it: %s", rank, reason)
        return 1
    if rank == 0:
        if report.finished:
            print_report(config, report)
        else:
            _logger.info("stopped after step %d; the same command goes on from there", report.step)
    return 0 if report.finished else STOPPED


if __name__ == "__main__":
    sys.exit(main())
