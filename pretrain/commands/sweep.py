"""Train a sweep on this machine: `headrace sweep sweep.yaml --config configs/quickstart.yaml --jobs 2`.

The YAML file lists values for each key, such as

    optim.learning_rate: [1e-3, 3e-3]
    run.seed: [0, 1]

and there is one run for each combination, as with `headrace submit --array`, which takes the same file. Every run has a
folder of its own, NAME-learning_rate-0.001-seed-0 and so on. What its log warns of is shown, once for all runs. The
same command goes on after a Ctrl-C or a kill, and trains no finished run again. It ends with a report of all runs, the
best first.

With --halve, the better half of the runs goes on at each of a few evaluations, by a figure of evals.jsonl, until one is
trained to the end.

Exit codes: 0 finished, 75 stopped early and can continue, 2 bad config or input, 1 a run has failed or anything else.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.live import Live

from pretrain.cluster.submission import Run, runs_of
from pretrain.commands.arguments import at_least
from pretrain.config import load_config
from pretrain.faults.interrupt import STOPPED
from pretrain.report.figures import final_loss, last_eval
from pretrain.report.page import write_page
from pretrain.run.lease import Lease
from pretrain.start import check_inputs
from pretrain.sweep.halving import figure_of
from pretrain.sweep.local import Halving, LocalSweep, Plan, Point
from pretrain.sweep.log_warnings import LogWarnings
from pretrain.sweep.slot import Slot
from pretrain.sweep.table import line_of, sweep_table
from shards import ConfigError, installation

_EVERY = 0.5  # seconds between two looks at the runs
_GOAL = "macro/bits_per_byte"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sweep", type=Path, metavar="SWEEP.YAML", help="lists of values by key")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="for all runs, e.g. train.steps=200")
    parser.add_argument("--config", type=Path, required=True, help="a YAML file, see configs/")
    parser.add_argument("--jobs", type=at_least(1), default=1, help="runs at once; default 1")
    parser.add_argument(
        "--halve",
        nargs="?",
        const=_GOAL,
        metavar="DOMAIN/FIGURE",
        help=f"stop the worse half early, again and again, by an evaluation; default figure: {_GOAL}",
    )


def plans_of(config: Path, typed: Sequence[str], runs: Sequence[Run]) -> list[Plan]:
    """Say how to train each run."""
    script = installation.script("train")
    start = [str(script)] if script else ["-m", "pretrain", "train"]
    plans = []
    for run in runs:
        settings = dict(override.partition("=")[::2] for override in run.overrides)
        for key in ("run.name", "wandb.group"):  # set by the sweep itself
            settings.pop(key)
        plans.append(
            Plan(
                name=run.config.run.name,
                settings=settings,
                folder=run.folder,
                identity=run.config.hash(),
                steps=run.config.train.steps,
                words=(*start, "--config", str(config), *typed, *run.overrides),
            )
        )
    return plans


def halving_of(text: str, runs: Sequence[Run]) -> Halving:
    """Plan the halving of runs. Raises ConfigError if they cannot be compared while they train."""
    lengths = {(run.config.train.steps, run.config.evaluation.every, run.config.evaluation.suite) for run in runs}
    steps, every, suite = next(iter(lengths))
    if len(lengths) > 1 or steps is None or every is None or suite is None:
        raise ConfigError(
            "--halve compares runs at the same steps on the same text: give all of them one train.steps, one"
            " evaluation.every and one evaluation.suite"
        )
    return Halving.of(figure_of(text), len(runs), steps, every)


def slots_of(jobs: int) -> list[Slot]:
    """Return where runs are trained: each slot has a share of the cores, and a GPU if there are any."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    n_devices = torch.cuda.device_count()
    listed = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    devices = listed if listed != [""] else [str(i) for i in range(n_devices)]
    slots = []
    for number in range(jobs):
        environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
        if n_devices:
            environment["CUDA_VISIBLE_DEVICES"] = devices[number % len(devices)]
            environment.pop("DS_ACCELERATOR", None)  # set for this process, which needs none
        slots.append(Slot(environment, is_warm=not n_devices))
    return slots


@contextmanager
def _asked_to_stop() -> Iterator[list[int]]:
    """Collect the signals that ask the sweep to stop."""
    found: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda got, _: found.append(got)) for number in numbers}
    try:
        yield found
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def follow(sweep: LocalSweep, console: Console) -> bool:
    """Train until all is done; return False if it was asked to stop before. Raises: ConfigError as the sweep does."""
    warnings = LogWarnings({point.plan.name: sweep.log_of(point) for point in sweep.points})
    with ExitStack() as stack:
        asked = stack.enter_context(_asked_to_stop())
        live = stack.enter_context(Live(console=console, auto_refresh=False)) if console.is_terminal else None
        while not asked:
            try:
                changed = sweep.advance()
            except ConfigError:
                sweep.stop()
                raise
            if live:
                live.update(sweep_table(sweep.points), refresh=True)
            for point in changed if live is None else ():
                console.print(line_of(point), highlight=False, markup=False, soft_wrap=True)
            for name, text in warnings.new():
                console.print(f"{name} warns: {text}", style="yellow", highlight=False, markup=False, soft_wrap=True)
            if sweep.is_done:
                break
            time.sleep(_EVERY)
        if asked:
            console.print("stopping: each run saves its state", highlight=False)
            sweep.stop()
    return not asked


def best_first(points: Sequence[Point]) -> list[Point]:
    """Order runs by the last evaluation, those that came furthest first; without one, by training loss."""

    def key(point: Point) -> tuple[float, float]:
        scored = last_eval(point.history)
        cost = scored.loss if scored else final_loss(point.history)
        return -float(point.history.last_step), math.inf if math.isnan(cost) else cost

    return sorted(points, key=key)


def run(arguments: argparse.Namespace) -> int:
    """Train the runs of a sweep; return the exit code. Raises ConfigError if a run's config is wrong."""
    console = Console()
    runs = runs_of(arguments.config, arguments.overrides, arguments.sweep)
    halving = halving_of(arguments.halve, runs) if arguments.halve else None
    for one in runs:
        check_inputs(one.config)
    base = load_config(arguments.config, arguments.overrides).folder.root
    root = base.with_name(f"{base.name}.sweep")
    root.mkdir(parents=True, exist_ok=True)
    with Lease(root / "lease", os.environ.get("SLURM_JOB_ID")):
        plans = plans_of(arguments.config, arguments.overrides, runs)
        sweep = LocalSweep(root, plans, slots_of(arguments.jobs), halving)
        if not follow(sweep, console):
            console.print("stopped; the same command continues from there", highlight=False)
            return STOPPED
    if not console.is_terminal:
        console.print(sweep_table(sweep.points))
    began = [point.history for point in best_first(sweep.points) if len(point.history.metrics)]
    if began:
        write_page(began, root / "report.html")
        console.print(f"Report  {root / 'report.html'}", highlight=False, markup=False, soft_wrap=True)
    failed = [point for point in sweep.points if point.state == "failed"]
    for point in failed:
        console.print(
            f"{point.plan.name} has failed: {point.note}", style="red", highlight=False, markup=False, soft_wrap=True
        )
    return 1 if failed else 0
