"""Train an interval of a run again: `headrace audit --run runs/a --from-step 88000 --steps 20`.

The interval starts from the run's checkpoint of --from-step, or with 0 from the run's first weights, on however many
ranks a launcher starts and in any layout, such as parallel.zero_stage=3. Batches are compared with what metrics.jsonl
says bit for bit; so are losses, gradient norms, weights and moments where layout, device and libraries are the run's,
else losses and norms within a tolerance.

The run is only read, so it may be training meanwhile. Start the command in the folder that the run was started in,
since its config's relative paths start there; if shards were moved since, say so: data.sources.0.paths=[...]. A
conversion to another layout goes to a temporary folder. See docs/reliability.md.

Exit codes: 0 the run agrees, 1 it differs, 2 it cannot be audited: no such run, checkpoint or step, or other data.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from rich.console import Console
from rich.table import Table

import shards
from pretrain.audit.certificate import certificate, check_place, write
from pretrain.audit.comparison import Comparison, compare, deviation, obstacles_to_equality
from pretrain.audit.interval import Figures, Interval, Training, read_interval, read_training
from pretrain.audit.replay import replay
from pretrain.audit.verdict import verdict
from pretrain.commands.begun_run import open_run
from pretrain.start import IndexingLog
from pretrain.startup_barrier import StartupBarrier
from pretrain.topology import dp_size_of, started, world_size_of
from shards import CheckpointError, ConfigError, Prepared


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="the run's folder, e.g. runs/quickstart")
    parser.add_argument("--from-step", type=int, required=True, metavar="N", help="a step with a checkpoint, or 0")
    parser.add_argument("--steps", type=int, required=True, metavar="K", help="steps to train again")
    parser.add_argument("--certificate", type=Path, metavar="FILE", help="where to write what was found, as JSON")
    parser.add_argument(
        "--scratch", type=Path, metavar="DIR", help="on all nodes the same folder, for a conversion to another layout"
    )
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="overrides for the run's config")


def audit(arguments: argparse.Namespace) -> bool:
    """Audit an interval, print the outcome and write the certificate; return whether the run agrees.

    Raises:
        HeadraceError: if it cannot be audited.
    """
    folder, _, store = open_run(arguments.run)
    interval = read_interval(folder, arguments.from_step, arguments.steps)
    if interval.before.step:
        store.find(interval.before.step)  # or list those that are there
    training = read_training(folder, interval, arguments.overrides)
    config = training.config
    config.check(dp_size_of(world_size_of(os.environ), config.parallel))
    prepared: Prepared | None = None
    with StartupBarrier(config.parallel.timeout_minutes) as barrier:
        if barrier.is_host:
            if arguments.certificate:
                check_place(arguments.certificate, folder)
            prepared = shards.prepare(config.data, IndexingLog(barrier.advance), config.later_stages)
        else:
            barrier.wait()
    with started(config.parallel, barrier.store) as topology:
        interval, prepared = topology.broadcast_object((interval, prepared))
        found = replay(training, interval, store, prepared, arguments.scratch, topology)
        obstacles = obstacles_to_equality(training, found)
        comparison = compare(interval, found.interval, config.precision, obstacles)
        if topology.is_main:
            _show(comparison, training)
            if arguments.certificate:
                write(arguments.certificate, certificate(training, found, comparison))
    return comparison.agrees


def _show(comparison: Comparison, training: Training) -> None:
    """Print the table of steps and the verdict."""
    console = Console()
    console.print(step_table(comparison))
    for obstacle in comparison.obstacles:
        console.print(f"Not compared bit for bit: {obstacle}", highlight=False)
    if not comparison.agrees:
        for start in training.starts:
            nodes = ", ".join(start.hosts)
            console.print(f"Trained from step {start.step} on, by commit {start.commit}, on {nodes}", highlight=False)
    console.print(verdict(comparison), style="green" if comparison.agrees else "red", highlight=False)


def step_table(comparison: Comparison) -> Table:
    """Show what was recorded of each step, and by how much it deviates."""
    table = Table(title="What the run recorded, trained again")
    for head in ("step", "batch", "loss", "deviation", "gradient norm", "deviation", "weights", "moments"):
        table.add_column(head, justify="right")
    pairs = zip(_all(comparison.recorded), _all(comparison.found), strict=True)
    for recorded, found in pairs:
        cells = [str(recorded.step), _equality(recorded.batch_hash, found.batch_hash)]
        for figure in ("loss", "grad_norm"):
            values = getattr(recorded, figure), getattr(found, figure)
            is_trained = recorded.step > comparison.recorded.before.step
            cells += [_number(values[0]), f"{deviation(*values):.1e}"] if is_trained else ["", ""]
        hashes = ((recorded.weight_hash, found.weight_hash), (recorded.optimizer_hash, found.optimizer_hash))
        is_compared = comparison.tolerances is None or recorded.step == comparison.recorded.before.step
        cells += [_equality(*pair) if is_compared else "" for pair in hashes]
        differs = any(difference.step == recorded.step for difference in comparison.differences)
        table.add_row(*cells, style="red" if differs else None)
    return table


def _all(interval: Interval) -> list[Figures]:
    return [interval.before, *interval.steps]


def _equality(recorded: str | None, found: str | None) -> str:
    return "" if recorded is None else "equal" if recorded == found else "differs"


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.6g}"


def run(arguments: argparse.Namespace) -> int:
    """Audit; return 0 if the run agrees, 1 if it differs. Raises HeadraceError, of exit code 2, if it cannot."""
    try:
        return 0 if audit(arguments) else 1
    except CheckpointError as error:
        raise ConfigError(str(error)) from error  # an audit that was not made is no finding about the run
