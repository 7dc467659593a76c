"""Train an interval of a run again, from its checkpoint, without changing the run. interval -> replay -> comparison."""

from __future__ import annotations

import contextlib
import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from pretrain import data_end
from pretrain.assembly import first_state, layout_of, load_base, make_engine, open_loader
from pretrain.audit.interval import Figures, Interval, Training
from pretrain.checkpoint.resume import open_verified, restore
from pretrain.checkpoint.state import RunState, read_state
from pretrain.checkpoint.store import CheckpointStore
from pretrain.config import RunConfig
from pretrain.engine import Engine
from pretrain.faults.spikes import SpikeWatch
from pretrain.feed import Feed
from pretrain.run.metrics import Meter
from pretrain.run.starts import StartRecord, describe_start, device_names, environment_of
from pretrain.stepper import Stepper
from pretrain.topology import Topology
from shards import ConfigError, Loader, Prepared

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Replay:
    """The outcome of training an interval again.

    Attributes:
        config: the config that was used.
        start: what it was trained with.
        interval: the figures.
        fingerprint: of the data.
    """

    config: RunConfig
    start: StartRecord
    interval: Interval
    fingerprint: dict[str, object]


class _Scratch(CheckpointStore):
    """A folder for one conversion, which is removed once it is loaded."""

    def check_room_for_universal(self, needed: int) -> None:
        """Check that the disk has room for the conversion. Raises ConfigError if it does not."""
        free = shutil.disk_usage(self.root).free
        if free < needed:
            raise ConfigError(
                f"the checkpoint must be converted to this layout, which takes {needed / 1e9:.2f} GB in {self.root},"
                f" where {free / 1e9:.2f} GB are free; name a folder on a larger disk with --scratch, or audit in the"
                " layout that saved the checkpoint"
            )


def replay(
    training: Training,
    recorded: Interval,
    store: CheckpointStore,
    prepared: Prepared | None,
    scratch: Path | None,
    topology: Topology,
) -> Replay:
    """Train an interval again; every rank calls it. Weights are hashed where the run did, and after the last step.

    Args:
        store: the run's checkpoints, which are only read.
        prepared: what `shards.prepare` returned on rank 0.
        scratch: a folder that all nodes see, for a conversion to another layout; None: the system's.
    Raises:
        ConfigError, ShardError: if the data has changed, or there is no room to convert the checkpoint.
        CheckpointError: if there is no such checkpoint, or it is damaged.
    """
    config = _with_recorded_attention(training, topology)
    _check_dropout(training, topology)
    _check_rounding(training, topology)
    with ExitStack() as stack:
        loader = open_loader(config, topology, prepared, stack)
        engine = make_engine(config, topology, recorded.before.step)
        if recorded.before.step:
            state = _restored(config, recorded.before.step, store, engine, loader, scratch, topology)
        else:
            state = _begun(config, engine, scratch, topology)
        length = data_end.foresee(loader, config.train.steps, topology)
        before = Figures.of_state(state, engine.state_hash())
        environment = environment_of(topology, engine.attention)
        start = describe_start(state.step, config.hash(), layout_of(config, topology), environment, topology)
        fingerprint = topology.broadcast_object(loader.fingerprint if loader else {})
        feed = Feed(loader, [stage.of_loader for stage in config.all_stages], topology)
        spikes = SpikeWatch(config.train.spike_window, config.train.spike_score, training.figures)
        stepper = Stepper(config, engine, length, state.step, spikes)
        steps = list(_trained(stepper, engine, feed, state, recorded))
    return Replay(config, start, Interval(before, steps), fingerprint)


def _with_recorded_attention(training: Training, topology: Topology) -> RunConfig:
    """Return the config with the attention that the run measured to be fastest, if the devices are the run's."""
    config, devices = training.config, device_names(topology)
    if config.parallel.attention != "auto" or config.model.heads is None or not training.starts:
        return config
    recorded = training.starts[0].environment
    if recorded.devices != devices:
        return config
    parallel = config.parallel.model_copy(update={"attention": recorded.attention})
    return config.model_copy(update={"parallel": parallel})


def _check_dropout(training: Training, topology: Topology) -> None:
    """Raise ConfigError if the model has dropout and would draw other masks than the run did."""
    config = training.config
    drawn = ", ".join(f"model.{key}={share}" for key, share in config.model.dropouts.items() if share)
    if not drawn:
        return
    what = f"{drawn}: masks are drawn for each data-parallel rank and micro-step"
    if not training.starts:
        raise ConfigError(f"{what}, and the run did not record how many there were; it cannot be audited")
    here = _drawn_by(config, topology.dp_size, topology.sp_size, topology.tp_size)
    for start, run in zip(training.starts, training.recorded, strict=True):
        wanted = _drawn_by(run, start.dp_size, start.sp_size, start.tp_size)
        if wanted != here:
            of_rows = f" parallel.sp_size={start.sp_size}," if (start.sp_size, topology.sp_size) != (1, 1) else ""
            split = str(run.parallel.sequence_parallel).lower()
            raise ConfigError(
                f"{what}, so other numbers of these train another model; audit the steps after {start.step} on"
                f" {start.layout.world_size} ranks with"
                f" parallel.tp_size={start.tp_size},{of_rows}"
                f" train.micro_batch_size={_micro_batches(run, start.dp_size)[0]} and"
                f" parallel.sequence_parallel={split}"
            )


def _drawn_by(config: RunConfig, dp_size: int, sp_size: int, tp_size: int) -> tuple[int, int, list[int], int]:
    """Return what masks depend on: dp and sp ranks, micro-batches, and the tp ranks that have tokens of their own."""
    split = tp_size if config.parallel.sequence_parallel else 0
    return dp_size, sp_size, _micro_batches(config, dp_size), split


def _check_rounding(training: Training, topology: Topology) -> None:
    """Raise ConfigError if moments are rounded at random and would be rounded otherwise than in the run."""
    config = training.config
    if config.optim.moments == "fp32":
        return
    here = layout_of(config, topology)
    for start in training.starts:
        if not start.layout.has_files_of(here):
            raise ConfigError(
                f"optim.moments={config.optim.moments}: each rank rounds its part at random, so another layout trains"
                f" another model; audit the steps after {start.step} on {start.layout.world_size} ranks with"
                f" parallel.tp_size={start.tp_size} and parallel.zero_stage={start.zero_stage}"
            )


def _micro_batches(config: RunConfig, dp_size: int) -> list[int]:
    """Return the rows of a forward pass in each stage."""
    return [stage.micro_batch_size(dp_size) for stage in config.all_stages]


def _restored(
    config: RunConfig,
    step: int,
    store: CheckpointStore,
    engine: Engine,
    loader: Loader | None,
    scratch: Path | None,
    topology: Topology,
) -> RunState:
    """Restore a run at a checkpoint, which is verified first, and converted elsewhere if it has another layout."""
    checkpoint = open_verified(store, step, topology)
    load_base(config, checkpoint, engine, topology)
    layout = layout_of(config, topology)
    with ExitStack() as stack:
        own = store
        if not read_state(checkpoint).layout.has_files_of(layout):
            own = stack.enter_context(_scratch_store(config, scratch, topology))
        state = restore(checkpoint, own, layout, engine, loader, topology, contextlib.nullcontext())
        topology.barrier()  # all ranks have read it
    return state


def _begun(config: RunConfig, engine: Engine, scratch: Path | None, topology: Topology) -> RunState:
    """Begin the run again; what has to be converted for it is converted elsewhere."""
    with _scratch_store(config, scratch, topology) as own:
        state = first_state(config, own, engine, topology)
        topology.barrier()  # all ranks have read it
    return state


@contextlib.contextmanager
def _scratch_store(config: RunConfig, scratch: Path | None, topology: Topology) -> Iterator[CheckpointStore]:
    """Make a store in a temporary folder that every rank sees."""
    with _shared_folder(scratch, topology) as folder:
        yield _Scratch(folder, config.checkpoint)


@contextlib.contextmanager
def _shared_folder(above: Path | None, topology: Topology) -> Iterator[Path]:
    """Make a temporary folder on rank 0 that every rank sees, and remove it at the end."""
    made: list[Path] = []

    def make() -> None:
        if topology.is_main:
            made.append(Path(tempfile.mkdtemp(prefix="headrace-audit-", dir=above)))

    try:
        topology.together(make)
        folder = topology.broadcast_object(made[0] if made else Path())

        def check() -> None:
            if not folder.is_dir():
                raise ConfigError(f"{folder} is not visible on every node; name a folder that is with --scratch")

        topology.together(check)
        yield folder
    finally:
        for folder in made:
            shutil.rmtree(folder, ignore_errors=True)


def _trained(stepper: Stepper, engine: Engine, feed: Feed, state: RunState, recorded: Interval) -> Iterator[Figures]:
    """Train the steps of an interval and yield their figures."""
    for wanted in recorded.steps:
        batch = feed.next(lambda: False)
        if batch is None:
            raise ConfigError(
                f"the data ends before step {wanted.step}, which the run has trained: the data has changed"
            )
        made = stepper.step_on(batch, state, Meter())
        state = made.state
        hashes = engine.state_hash() if wanted.weight_hash or wanted is recorded.steps[-1] else None
        figures = Figures.of_step(made, hashes)
        _logger.info("step %d: loss %s, recorded %s", figures.step, figures.loss, wanted.loss)
        yield figures
