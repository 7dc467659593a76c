"""Train a model, or continue training it: `headrace train --config configs/quickstart.yaml`.

To run on several ranks, start it with the `deepspeed` launcher, torchrun or srun.

Exit codes: 0 finished, 75 stopped early and wants to continue, 2 bad config or input, 1 anything else.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from pretrain.config import RunConfig, load_config
from pretrain.evaluation.tables import domain_table, needle_table, task_table
from pretrain.faults.interrupt import STOPPED, Stopped
from pretrain.optim import learning_rate_of_run
from pretrain.report.page import write_page
from pretrain.run.eval_figure import depths_of, is_of_task
from pretrain.run.history import History
from pretrain.run.run_folder import RunFolder
from pretrain.run.step_log import step_of
from pretrain.start import Report, start
from pretrain.topology import dp_size_of, is_lost_peer, world_size_of
from shards import ConfigError, HeadraceError, installation

_logger = logging.getLogger("headrace")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, required=True, help="a YAML file, see configs/")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="e.g. optim.learning_rate=1e-3")
    parser.add_argument(
        "--fresh", action="store_true", help="start over; an existing run with this name is moved aside"
    )
    parser.add_argument(
        "--from-step",
        type=int,
        metavar="N",
        help="go back to the checkpoint of step N; what came after it is set aside, and its records are kept",
    )
    parser.add_argument("--print-config", action="store_true", help="show what would run, and exit")


def how_to_train_longer(config: RunConfig) -> str:
    """Describe how to train a finished run longer without a jump of the learning rate."""
    steps, part = config.train.steps, config.schedule[-1]
    if steps is None:
        return ""
    last_rate = learning_rate_of_run(steps, config.schedule, steps)
    further = f"train.steps={2 * steps}"
    if part.optim.schedule == "constant":
        return f"the same command with {further} continues from here; "
    advice = f"the same command with run.name={config.run.name}-{2 * steps} {further} is a run with a longer schedule; "
    if last_rate > 0:
        constant = f"optim.schedule=constant optim.learning_rate={last_rate / part.factor(steps):.6g}"
        advice += f"with {further} {constant} this one continues at its final rate; "
    return advice


def note_sample(config: RunConfig, report: Report) -> None:
    """Record the continuation of a finished run, once for each step; a failure is only logged."""
    samples = report.folder.samples
    try:
        if all(sample["step"] != report.step for sample in samples.read()):
            samples.append({"step": report.step, "prompt": config.evaluation.prompt, "text": report.continuation})
    except (OSError, HeadraceError) as error:  # the run is finished and saved
        _logger.warning("the continuation was not recorded: %s", error)


def print_report(config: RunConfig, report: Report) -> None:
    """Print a finished run's summary: figures before and after, a continuation, and what to do next."""
    console = Console(soft_wrap=True)
    evals = list(report.folder.evals.read())
    of_suites, of_tasks = ([e for e in evals if is_of_task(e) == is_task] for is_task in (False, True))
    if of_suites:
        of_one = [
            e for e in of_suites if e["suite"] == of_suites[0]["suite"]
        ]  # `headrace evaluate` may have added more
        console.print(domain_table(*_first_and_last(of_one)))
    if of_tasks:
        before, after = _first_and_last(of_tasks)
        console.print(task_table(after, before))
        if needles := [record for record in after if depths_of(record)]:
            console.print(needle_table(needles))
    console.print("A continuation by the model:", style="bold")
    console.print(config.evaluation.prompt, end="", style="dim", markup=False, highlight=False)
    console.print(report.continuation, markup=False, highlight=False)
    root = report.folder.root
    console.print(f"\nRun folder  {root}\nFigures     {root}/metrics.jsonl, {root}/evals.jsonl", highlight=False)
    if page := write_report(report.folder):
        console.print(f"Report      {page}", highlight=False)
    if config.wandb.mode == "offline":
        console.print(f"wandb       {root}/wandb (upload: wandb sync {root}/wandb/offline-run-*)", highlight=False)
    if report.ending:
        console.print(f"Ended       {report.ending}", highlight=False)
        return
    console.print(
        f"Next        {how_to_train_longer(config)}copy the config, set data.sources to your shards, and start it the"
        " same way",
        highlight=False,
    )


def _first_and_last(evals: Sequence[Mapping[str, object]]) -> list[list[Mapping[str, object]]]:
    """Return the lines of evals.jsonl of the first and the last step among some."""
    steps = [step_of(record) for record in evals]
    return [[record for record in evals if record["step"] == step] for step in (min(steps), max(steps))]


def write_report(folder: RunFolder) -> Path | None:
    """Write the page about a finished run, and return where it is; None, with a warning, if that fails."""
    try:
        history = History(folder.root)
        history.refresh()
        write_page([history], folder.report)
    except Exception as error:  # the run is finished and saved, and no page about it is worth an exit code
        again = installation.typed("report", str(folder.root))
        _logger.warning("no report was written: %r; try again with %s", error, again)
        return None
    return folder.report


def run(arguments: argparse.Namespace) -> int:
    """Train a run until it is finished or has to stop; return the exit code."""
    if arguments.fresh and arguments.from_step is not None:
        raise ConfigError("--fresh starts over, and --from-step goes back to a checkpoint: give one of the two")
    config = load_config(arguments.config, arguments.overrides)
    if arguments.print_config:
        # Without a launcher, show the layout of one copy of the model.
        fewest = config.parallel.tp_size * config.parallel.sp_size
        ranks = world_size_of(os.environ) if "WORLD_SIZE" in os.environ else fewest
        print(config.describe(dp_size_of(ranks, config.parallel)), end="")
        return 0
    rank = int(os.environ.get("RANK", "0"))
    try:
        report = start(config, arguments.fresh, arguments.from_step)
    except Stopped:
        return STOPPED
    except RuntimeError as error:
        if not is_lost_peer(error):
            raise
        # Many ranks print this line; the failed rank's traceback says why.
        reason = str(error).strip().partition("\n")[0]
        _logger.error("another rank is gone, so rank %d exits too: %s", rank, reason)
        return 1
    if rank == 0 and report.finished:
        note_sample(config, report)
        print_report(config, report)
    return 0 if report.finished else STOPPED
