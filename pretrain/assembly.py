"""Assemble the parts of a run at the step that it resumes from. start -> assembly -> trainer.

The order matters: first everything that may refuse the start, then changes to the run's folder, then what writes to it.
"""

from __future__ import annotations

import logging
import math
import os
import socket
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec

from pretrain import data_end
from pretrain.checkpoint.duration import save_time
from pretrain.checkpoint.resume import Choice, choose, restore
from pretrain.checkpoint.save import Saver
from pretrain.checkpoint.state import RunState, read_state
from pretrain.checkpoint.store import Checkpoint, CheckpointStore
from pretrain.checkpoint.universal import find_or_convert
from pretrain.config import RunConfig, load_config
from pretrain.engine import Engine
from pretrain.evaluation.eval_set import EvalSet, load_parts, warn_of_training_shards
from pretrain.evaluation.tasks import TaskSet
from pretrain.exchange.base import model_hash, open_base
from pretrain.exchange.folder import open_model
from pretrain.exchange.run_model import RunModel
from pretrain.faults.deadline import Deadline, job_end
from pretrain.faults.interrupt import Interrupt
from pretrain.faults.spikes import SpikeWatch, StepFigures, last_figures, unapplied_in_a_row
from pretrain.faults.stop import StopPolicy
from pretrain.faults.stragglers import StragglerWatch
from pretrain.faults.tripwires import Tripwires
from pretrain.faults.unapplied_steps import UnappliedSteps
from pretrain.faults.watchdog import Watchdog
from pretrain.feed import Feed
from pretrain.gradient_noise import NoiseScale, last_noise
from pretrain.held_out import HeldOut, warn_of_unscored_average
from pretrain.journal import Journal
from pretrain.model.attention_choice import with_fastest_attention
from pretrain.optim import learning_rate_of_run
from pretrain.profiling import StepProfiler
from pretrain.recorder import StepRecorder
from pretrain.rewind import Rewinder
from pretrain.run.description import describe
from pretrain.run.lease import Lease
from pretrain.run.metrics import total_peak_flops
from pretrain.run.once import Once
from pretrain.run.run_folder import RunFolder
from pretrain.run.starts import StartRecord, describe_start, environment_of
from pretrain.run.wandb_tracker import Tracker
from pretrain.standing import Standing, check_figures
from pretrain.stepper import enter
from pretrain.topology import Layout, Topology
from pretrain.trainer import Parts, Trainer
from shards import Loader, Prepared, Tokenizer, check_fingerprint
from shards.suites.suite import Suite

_logger = logging.getLogger(__name__)
_JUMP = 1.5  # a learning rate that grows by more from one step to the next can throw a model off


def checkpoints_of(config: RunConfig) -> CheckpointStore:
    """Return the checkpoint store of a config's run."""
    return CheckpointStore(
        config.folder.checkpoints,
        config.checkpoint,
        config.checkpoint_bytes,
        config.train.rewind_steps if config.train.on_spike == "rewind" else None,
    )


@dataclass(frozen=True)
class Start:
    """The state of one rank once all ranks have met.

    Attributes:
        lease: rank 0's lease on the run's folder; None on other ranks.
        from_step: the checkpoint to go back to; None: the newest.
        engine: that of a training which goes back, whatever its state; None: it is made.
        prepared: what `shards.prepare` returned on rank 0.
        suite: the evaluation's; None: there is none.
    """

    config: RunConfig
    topology: Topology
    tokenizer: Tokenizer
    suite: Suite | None
    interrupt: Interrupt
    prepared: Prepared | None
    lease: Lease | None
    from_step: int | None = None
    engine: Engine | None = None


def assemble(start: Start, stack: ExitStack) -> Trainer:
    """Assemble the parts; every rank calls it.

    Args:
        stack: closes the loader's workers and the journal when the caller exits it.
    Raises:
        ConfigError, ShardError, CheckpointError: if the run cannot continue; its folder is then unchanged.
    """
    config, topology = start.config, start.topology
    folder, store = config.folder, checkpoints_of(config)
    loader = open_loader(config, topology, start.prepared, stack, start.tokenizer)
    choice = choose(store, topology, start.from_step)
    engine = _engine(start, choice.checkpoint.step if choice.checkpoint else 0)
    state = _state(start, choice, store, engine, loader)
    save_seconds = save_time(store, nodes=1).seconds
    stages = [stage.of_loader for stage in config.all_stages]
    scored = _load_scored(start)
    suite = next((part.label for part in scored if isinstance(part, EvalSet)), "")
    steps = data_end.foresee(loader, config.train.steps, topology)
    environment = environment_of(topology, engine.attention)
    layout = layout_of(config, topology)
    begun = describe_start(state.step, config.hash(), layout, environment, topology, suite, steps)
    # Nothing below refuses the start.
    if topology.is_main:
        _warn_of_new_rate(config, folder, steps, state.step)
        if config.train.ema:
            warn_of_unscored_average(scored)
        choice.set_damaged_aside(store)
        _begin_folder(start, store, state.step, begun)
    topology.barrier()
    train, figures = config.train, _last_figures(start, state.step)
    labels = [part.label for part in scored]
    tracker = _tracker(start, folder, labels, loader, state) if topology.is_main else None
    journal = stack.enter_context(Journal(folder, tracker, config.metrics, steps, config.run.name, config.tokens_until))
    peak_flops = total_peak_flops(config.metrics, topology)
    noise_scale = NoiseScale(last_noise(folder, state.step) if topology.is_main else ())
    parts = Parts(
        engine=engine,
        feed=Feed(loader, stages, topology),
        journal=journal,
        recorder=StepRecorder(config.model, stages, config.optim.z_loss > 0, peak_flops, topology, noise_scale),
        saver=stack.enter_context(Saver(store, engine, topology, folder, start.lease, journal.tell)),
        held_out=_held_out(config, scored, engine, topology, journal, state.average_total > 0),
        stop=StopPolicy(start.interrupt, Deadline(job_end(os.environ) if topology.is_main else None), save_seconds),
        watchdog=stack.enter_context(Watchdog(config.train.stall_timeout, topology.rank, journal.tell_last)),
        unapplied=UnappliedSteps(
            train.max_nonfinite,
            train.nonfinite_limit,
            folder,
            topology,
            journal.tell,
            unapplied_in_a_row(figures),
        ),
        spikes=SpikeWatch(train.spike_window, train.spike_score, figures),
        rewinder=Rewinder(store, folder, topology, train.rewind_steps, train.max_rewinds),
        standing=Standing(train.stop, store, folder, suite, topology),
        stragglers=StragglerWatch(topology.gather_objects(socket.gethostname())),
        tripwires=Tripwires(config.model, drawn=config.init_from is None),
        profiler=stack.enter_context(StepProfiler(config.metrics.profile, folder.profiles, topology)),
    )
    return Trainer(config, parts, topology, steps, state)


def _load_scored(start: Start) -> list[EvalSet | TaskSet]:
    """Load a rank's part of the suite, if there is one, and of the tasks.

    Raises ConfigError if the suite lacks a figure by which something is decided.
    """
    config, topology = start.config, start.topology
    # The row length is the same in every stage, so that a run has one series of evaluations.
    how = (config.data.seq_len, config.precision, topology.dp_rank, topology.dp_size)
    parts = load_parts(start.suite, config.evaluation, start.tokenizer, *how)
    eval_set = next((part for part in parts if isinstance(part, EvalSet)), None)
    check_figures(config.judging_figures, eval_set, config.train.ema is not None)
    return parts


def _last_figures(start: Start, step: int) -> list[StepFigures]:
    """Read the figures of the last steps up to one, from which spikes and repeated failures are told; on every rank."""
    train, topology = start.config.train, start.topology
    looking_back = max(train.spike_window, train.max_nonfinite)
    figures = last_figures(start.config.folder, step, looking_back) if topology.is_main else []
    return topology.broadcast_object(figures)


def _begin_folder(start: Start, store: CheckpointStore, step: int, begun: StartRecord) -> None:
    """Make the run's folder belong to this start, which continues after a step, and record it; on rank 0."""
    config, folder, goes_back = start.config, start.config.folder, start.from_step is not None
    if goes_back:
        folder.note_going_back(step)
        store.retract_after(step)
    folder.begin(config.run.name, config.to_yaml(), step or -1, rewound=goes_back)
    if goes_back:
        Once(folder.root, f"--from-step {start.from_step}").note_done()
    folder.note_start(msgspec.to_builtins(begun), begun.config_hash)


def open_loader(
    config: RunConfig,
    topology: Topology,
    prepared: Prepared | None,
    stack: ExitStack,
    tokenizer: Tokenizer | None = None,
) -> Loader | None:
    """Open the loader on the ranks that read rows; every rank calls it.

    Args:
        prepared: what `shards.prepare` returned on rank 0.
        stack: closes the loader's workers.
        tokenizer: the config's, if it is open already.
    """
    loader = None
    if topology.reads_rows:
        loader = Loader(
            config.data,
            config.train.global_batch_size,
            config.run.seed,
            topology.dp_rank,
            topology.dp_size,
            prepared,
            config.later_stages,
            tokenizer,
        )
        stack.enter_context(loader)
    fingerprint = topology.broadcast_object(loader.fingerprint if loader else None)
    if loader and fingerprint is not None:
        check_fingerprint(fingerprint, loader.fingerprint)  # nodes may see different files under the same names
    return loader


def _engine(start: Start, step: int) -> Engine:
    """Return the engine of a start, for the stage of the last step done; every rank calls it."""
    if start.engine is None:
        return make_engine(start.config, start.topology, step)
    enter(start.engine, start.config.stage_of(step))
    return start.engine


def make_engine(config: RunConfig, topology: Topology, step: int) -> Engine:
    """Make the engine that a config asks for, for the stage of the last step done; every rank calls it.

    Args:
        step: optimizer steps done.
    """
    stage, coming = config.stage_of(step), config.stage_at(step)  # which begins with the next step, if at all
    return Engine(
        stage.model,
        config.optim,
        with_fastest_attention(config.parallel, topology, config.attention_shape(topology.dp_size, coming)),
        config.deepspeed_config(),
        micro_batch_size=stage.micro_batch_size(topology.dp_size),
        micro_steps=stage.micro_steps(topology.dp_size),
        topology=topology,
        seed=config.run.seed,
        noise_scale=config.metrics.noise_scale,
    )


def layout_of(config: RunConfig, topology: Topology) -> Layout:
    """Return how the engine's state lies on the ranks."""
    return Layout(topology.tp_size, topology.dp_size, config.parallel.applied_zero_stage, topology.sp_size)


def _state(start: Start, choice: Choice, store: CheckpointStore, engine: Engine, loader: Loader | None) -> RunState:
    """Restore the run from a checkpoint or, without one, begin it."""
    config, topology = start.config, start.topology
    if choice.checkpoint:
        if start.engine is None:  # or it has the model that adapters are trained on
            load_base(config, choice.checkpoint, engine, topology)
        layout = layout_of(config, topology)
        conversion = start.interrupt.starting()
        state = restore(choice.checkpoint, store, layout, engine, loader, topology, conversion)
        return msgspec.structs.replace(state, config_hash=config.hash())
    with start.interrupt.starting():
        return first_state(config, store, engine, topology)


def first_state(config: RunConfig, store: CheckpointStore, engine: Engine, topology: Topology) -> RunState:
    """Give a new engine the weights that a run begins with; every rank calls it.

    Args:
        store: the run's own checkpoints, beside which the state of another run's optimizer is converted.
    """
    init_hash = _load_model(config, config.init_from, store, engine, topology) if config.init_from else ""
    return RunState(
        step=0, tokens=0, tokens_per_source={}, batch_hash="", restarts=0, config_hash=config.hash(),
        init_hash=init_hash, **asdict(layout_of(config, topology)),
    )  # fmt: skip


def load_base(config: RunConfig, checkpoint: Checkpoint, engine: Engine, topology: Topology) -> None:
    """Load the model that a run's adapters are trained on into a new engine, if it has any; every rank calls it.

    Raises ConfigError if those in the checkpoint were trained on another one.
    """
    if base := open_base(config.init_from, config.model, topology):
        base.check(checkpoint)
        engine.set_weights(base.weights)
        _logger.info("the adapters are of the model in %s (hash of the files: %s)", base.folder, base.hash)


def _load_model(config: RunConfig, path: Path, store: CheckpointStore, engine: Engine, topology: Topology) -> str:
    """Load another model into the engine; return the hash of its files."""
    model = open_model(path, config.model)
    found = model_hash(model, topology)
    if isinstance(model, RunModel) and config.init_optimizer:
        # There may be a conversion of another run's checkpoint of the same step
        topology.together(store.discard_universal if topology.is_main else lambda: None)
        saved, wanted = read_state(model.checkpoint).layout, layout_of(config, topology)
        engine.load_universal(find_or_convert(store, model.checkpoint, saved, wanted, topology))
        engine.average.drop()
        what = "weights and optimizer"
    else:
        engine.set_weights(model)
        what = "weights"
    _logger.info("starting from the %s in %s (hash of the files: %s)", what, path, found)
    return found


def _warn_of_new_rate(config: RunConfig, folder: RunFolder, steps: int, step: int) -> None:
    """Warn if the learning rate of the next step differs from what the run's previous config gave it.

    Args:
        steps: length of the whole run.
        step: steps already done.
    """
    if step == 0 or step >= steps:
        return
    old = load_config(folder.config, begun=True)
    before = learning_rate_of_run(step, old.schedule, old.train.steps or steps)
    after = learning_rate_of_run(step, config.schedule, steps)
    if not math.isclose(before, after, rel_tol=1e-3):
        gentler = (
            f". A stage, here or in a fork, begins a schedule of its own after a warm-up instead: add"
            f" {{step: {step}, optim: {{warmup_steps: 100}}}} to stages"
        )
        _logger.warning(
            "the learning rate of step %d is %.4g; the run's previous schedule gave %.4g: optim, that of a"
            " stage, or train.steps has changed%s",
            step + 1, after, before, gentler if after > _JUMP * before else "",
        )  # fmt: skip


def _tracker(start: Start, folder: RunFolder, labels: Sequence[str], loader: Loader | None, state: RunState) -> Tracker:
    """Make the tracker on rank 0, which always has a loader."""
    assert loader is not None
    config = start.config
    warn_of_training_shards(start.suite, loader.fingerprint)
    plain = config.model_dump(mode="json")
    described = describe(plain, config.hash(), loader.fingerprint, state.init_hash, folder.ancestors())
    rewound_to = None if start.from_step is None else state.step
    return Tracker(config.wandb, folder, config.run.name, folder.run_id(), described, labels, rewound_to)


def _held_out(
    config: RunConfig,
    parts: Sequence[EvalSet | TaskSet],
    engine: Engine,
    topology: Topology,
    journal: Journal,
    averaged: bool,
) -> HeldOut | None:
    """Return what is scored between steps; None if there is nothing.

    Args:
        averaged: whether there is a moving average of the weights at the step that the run resumes from.
    """
    if not parts:
        return None
    last = {
        part.label: journal.last_evaluated(part.label, part.name if isinstance(part, TaskSet) else None)
        for part in parts
    }
    suites = [part.label for part in parts if averaged and isinstance(part, EvalSet)]
    of_average = {label: journal.last_averaged(label) for label in suites}
    batch_size = config.evaluation.batch_size or config.stage_at(0).micro_batch_size(topology.dp_size)
    return HeldOut(parts, engine, topology, batch_size, *topology.broadcast_object((last, of_average)))
