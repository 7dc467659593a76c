"""From a config to a finished or interrupted training: what surrounds the loop. commands.train -> start -> loop.

The checks are ordered so that mistakes show within the first second: the config against the number of ranks, the
tokenizer, the run folder and its lease, the shards' indexes (on rank 0, while the others wait). Nothing in the run
folder changes before every rank has passed all checks.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

import shards
from pretrain.assembly import Start, assemble, checkpoints_of
from pretrain.checkpoint.store import CheckpointStore
from pretrain.config import RunConfig, load_config
from pretrain.config_changes import check_skips, compare_for_resume
from pretrain.config_problems import check_masks
from pretrain.engine import Engine
from pretrain.evaluation.eval_set import find_suite
from pretrain.evaluation.tasks import check_tasks
from pretrain.exchange.folder import open_model, pinned
from pretrain.exchange.run_model import RunModel
from pretrain.exchange.tokenizer_files import check_tokenizer
from pretrain.faults.interrupt import Interrupt
from pretrain.inference.generate import Sampling, codec_of, generate
from pretrain.loop import train
from pretrain.model.size import flops_per_token, memory_per_rank, parameter_count, trained_count
from pretrain.run.events import check_command
from pretrain.run.lease import Lease
from pretrain.run.once import Once
from pretrain.run.run_folder import RunFolder
from pretrain.run.step_log import step_of
from pretrain.standing import learn_from_records
from pretrain.startup_barrier import StartupBarrier
from pretrain.topology import Topology, dp_size_of, named_layout, started, world_size_of
from shards import ConfigError, Prepared, Tokenizer, installation, tokenizer_check
from shards.storage.atomic import is_there
from shards.suites.suite import Suite

_logger = logging.getLogger(__name__)

_INDEXING_LINE_SECONDS = 10.0
_CONTINUATION_TOKENS = 80  # length of the continuation that a finished run prints


@dataclass(frozen=True)
class Report:
    """The outcome of a start.

    Attributes:
        finished: False if it stopped early and will continue when restarted.
        step: optimizer steps done.
        folder: the run's folder.
        continuation: the model's, of evaluation.prompt, if the run is finished.
        ending: why it is finished before its last step, if it is, and how to go on.
    """

    finished: bool
    step: int
    folder: RunFolder
    continuation: str
    ending: str | None


def start(config: RunConfig, fresh: bool, from_step: int | None = None) -> Report:
    """Train a config's run from its current state; every process that the launcher started calls it.

    Args:
        fresh: start from scratch; an existing folder of this name is moved aside first.
        from_step: go back to the checkpoint of this step.
    Raises:
        ConfigError, ShardError: if the config or its data cannot be trained on.
        Stopped: if a signal arrived before there was anything to save.
    """
    dp_size = dp_size_of(world_size_of(os.environ), config.parallel)
    config.check(dp_size)
    starts_over = fresh and Once(config.folder.root, "--fresh").is_due()
    tokenizer, suite = check_inputs(config, starts_over)
    folder = config.folder
    with ExitStack() as stack:
        interrupt = stack.enter_context(Interrupt())
        claim: Claim | None = None
        with interrupt.starting():
            with StartupBarrier(config.parallel.timeout_minutes) as barrier:
                if barrier.is_host:
                    check_texts(config, tokenizer, suite)
                    progress = IndexingLog(barrier.advance)
                    claim = claim_run(config, folder, fresh, from_step, progress, stack)
                else:
                    barrier.wait()
            topology = stack.enter_context(started(config.parallel, barrier.store))
        config, prepared, from_step = topology.broadcast_object(
            (claim.config, claim.prepared, claim.from_step) if claim else (config, None, None)
        )
        if topology.is_main:
            announce(config, topology)
        lease = claim.lease if claim else None
        return _train(Start(config, topology, tokenizer, suite, interrupt, prepared, lease, from_step))


def _train(begun: Start) -> Report:
    """Train to the run's end, a stop, or again from a checkpoint wherever the run goes back before a spike."""
    config, tokenizer, topology = begun.config, begun.tokenizer, begun.topology
    while True:
        with ExitStack() as stack:
            trainer = assemble(begun, stack)
            finished = train(trainer)
            if trainer.rewind is None or trainer.stopping:  # a start that is stopped leaves it to the next one
                seq_len = config.stage_of(trainer.state.step).data.seq_len
                continuation = continuation_of(trainer.engine, config, seq_len, tokenizer, topology) if finished else ""
                ending = trainer.ending.text if trainer.ending else None
                return Report(finished, trainer.state.step, config.folder, continuation, ending)
        config = config.passing_over([trainer.rewind])
        begun = replace(begun, config=config, from_step=trainer.rewind.step, engine=trainer.engine)


def continuation_of(
    engine: Engine, config: RunConfig, max_length: int, tokenizer: Tokenizer, topology: Topology
) -> str:
    """Return the model's continuation of evaluation.prompt, in so many tokens together; every rank calls it."""
    codec, sampling = codec_of(tokenizer, config.data.bos), Sampling(max_tokens=_CONTINUATION_TOKENS, top_k=50)
    given = (codec, config.evaluation.prompt, sampling, topology)
    parts = generate(engine.next_logits, config.model.new_cache, max_length, *given)
    return "".join(parts)


def check_inputs(config: RunConfig, starts_over: bool = False) -> tuple[Tokenizer, Suite | None]:
    """Check that the tokenizer fits the model, no mask is too large, and evaluation's texts exist; return what it read.

    Args:
        starts_over: whether the run begins anew, whatever there is of it.
    Returns:
        The tokenizer, and the suite, if there is one.
    Raises:
        ConfigError, ShardError: if something is missing or does not fit.
    """
    check_masks(config.all_stages, config.model, config.parallel)
    tokenizer = Tokenizer.of(config.data)
    vocab_size = tokenizer.vocab_size
    if vocab_size != config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size={config.model.vocab_size}, but the tokenizer {config.data.tokenizer} has {vocab_size}"
            f" tokens; set model.vocab_size={vocab_size}"
        )
    if config.init_from and (starts_over or config.model.adapters or not checkpoints_of(config).steps()):
        _check_initial_model(config, config.init_from, tokenizer)
    suite = find_suite(config.evaluation)
    check_tasks(config.evaluation.tasks)
    return tokenizer, suite


def _check_initial_model(config: RunConfig, path: Path, tokenizer: Tokenizer) -> None:
    """Check that the run can begin with the model in a folder. Raises: as `check_inputs`."""
    model, key = open_model(path, config.model), f"data.tokenizer={config.data.tokenizer}"
    if not isinstance(model, RunModel):
        if config.init_optimizer:
            raise ConfigError(f"init_optimizer: init_from={path} is no run, so it has no state of an optimizer")
        check_tokenizer(path, tokenizer, key)
        return
    if config.init_optimizer:
        model.check_optimizer(config.optim.name, config.model)
    if model.tokenizer_hash != tokenizer.content_hash:
        if Tokenizer(model.tokenizer, bos=False, eos=False).content_hash != model.tokenizer_hash:
            raise ConfigError(
                f"init_from={path}: the run read another tokenizer from {model.tokenizer} than is there now, so it"
                f" cannot be compared with {key}; put that of the run back"
            )
        check_tokenizer(model.tokenizer, tokenizer, key)


def check_texts(config: RunConfig, tokenizer: Tokenizer, suite: Suite | None) -> None:
    """Check the tokenizer on a sample of training and evaluation text; on rank 0 only. Raises ConfigError."""
    tokenizer_check.check_sources(config.all_stages[-1].data, tokenizer)
    if suite:
        tokenizer_check.check_suite(suite, tokenizer)


@dataclass(frozen=True)
class Claim:
    """The results of rank 0's preparations, for which the other ranks wait."""

    lease: Lease  # on the run's folder
    config: RunConfig  # including what follows from the run that it resumes
    prepared: Prepared  # the shards, and data.decontaminate's filters
    from_step: int | None  # the checkpoint to go back to, if that is still to be done


def claim_run(
    config: RunConfig, folder: RunFolder, fresh: bool, from_step: int | None, progress: IndexingLog, stack: ExitStack
) -> Claim:
    """Take the lease on the run's folder and prepare its data; on rank 0 only.

    A refused start leaves the folder unchanged. What can be checked only once all ranks have met is left to `assembly`,
    which then makes the folder belong to this start.

    Args:
        fresh, from_step: as for `start`.
        progress: is told what is indexed.
        stack: releases the lease.
    Raises:
        ConfigError: if the folder cannot be written to, or holds a run that this config would corrupt.
        ShardError: if a shard is missing or damaged.
        HeadraceError: if another process is using the folder.
    """
    check_command(config.metrics.on_event)
    folder.create()
    job_id = os.environ.get("SLURM_JOB_ID")
    once = Once(folder.root, "--fresh")
    fresh = fresh and once.is_due()
    replaced = fresh and is_there(folder.config)
    from_step = None if replaced else step_to_go_back_to(folder, from_step)
    holding = stack.enter_context(ExitStack())
    lease = holding.enter_context(Lease(folder.lease, job_id))
    store = checkpoints_of(config)
    begun = load_config(folder.config, begun=True) if folder.has_begun() and not replaced else None
    config = config.settled(begun)
    if config.init_from:
        exactly = pinned(config.init_from, begun.init_from if begun else None)
        config = config.model_copy(update={"init_from": exactly})
    if not replaced:
        config = config.passing_over(folder.rewinds())
    if begun:
        steps = store.steps()
        done = from_step if from_step is not None else steps[-1] if steps else 0
        check_same_run(begun, config, folder, done)
        check_checkpoints_there(store, begun, folder)
    prepared = shards.prepare(config.data, progress, config.later_stages)
    if replaced:
        _logger.info("the run in %s was moved to %s", folder.root, folder.move_aside())
        holding.close()  # the lease has moved with the folder
        folder.create()
        lease = holding.enter_context(Lease(folder.lease, job_id))
    if begun:
        learn_from_records(store, folder)  # what it must not remove
    store.check_room()
    if fresh:
        once.note_done()
    return Claim(lease, config, prepared, from_step)


def step_to_go_back_to(folder: RunFolder, from_step: int | None) -> int | None:
    """Return the step of the checkpoint that a start goes back to; None if it goes on from the newest.

    Args:
        from_step: the step that the command names, if any.
    """
    if from_step is not None and Once(folder.root, f"--from-step {from_step}").is_due():
        return from_step
    if from_step is not None:
        _logger.info("this job went back to step %d before; now it goes on from its newest checkpoint", from_step)
    return folder.going_back()  # which a start that was killed has begun


def check_same_run(old: RunConfig, new: RunConfig, folder: RunFolder, step: int) -> None:
    """Log what has changed since a run was started, which has done `step` steps.

    Raises: ConfigError if that would corrupt it.
    """
    refused, allowed = compare_for_resume(old, new, step)
    if refused:
        changes = "; ".join(f"{key}: {before!r} -> {now!r}" for key, before, now in refused)
        raise ConfigError(
            f"{folder.root} holds a run that differs in what must not change ({changes});"
            " give this one another run.name, fork the run with a stage that begins where it is"
            f" ({installation.typed('fork')}), or start over with --fresh"
        )
    check_skips(old, new, step)
    for key, before, now in allowed:
        _logger.info("%s changed since the last start: %r -> %r", key, before, now)


def check_checkpoints_there(store: CheckpointStore, old: RunConfig, folder: RunFolder) -> None:
    """Raise ConfigError if a run is too far along to have no checkpoint, so it was lost or is not visible.

    A run killed before its first save has no checkpoint either, though that step's record may exist. A run killed
    during that save has the save's folder, and its records end before the second save would have begun, since saves
    never overlap.
    """
    newest = folder.metrics.last()
    step = step_of(newest) if newest else 0
    first_save = min(old.checkpoint.every, old.train.steps or old.checkpoint.every)
    if step <= first_save or store.steps() or store.has_damaged():
        return
    if not store.all_steps() or step >= 2 * first_save:
        raise ConfigError(
            f"{folder.root} has records of {step} steps, but {store.root} has no complete checkpoint, although one is"
            f" due every checkpoint.every={old.checkpoint.every} steps. Is its disk not mounted, was it purged, or did"
            " every save fail (then the log says so)? Put the checkpoints back, or start over with --fresh, which"
            " moves the whole folder aside"
        )


class IndexingLog:
    """Logs at intervals which shards a start is indexing and how far it is; called from several threads.

    Args:
        advance: is called at every sign of progress.
    """

    def __init__(self, advance: Callable[[], None]) -> None:
        self._advance = advance
        self._bytes_read: dict[str, int] = {}
        self._last_line = time.monotonic()

    def __call__(self, shard: str, bytes_read: int) -> None:
        self._advance()
        self._bytes_read[shard] = self._bytes_read.get(shard, 0) + bytes_read
        if time.monotonic() - self._last_line >= _INDEXING_LINE_SECONDS:
            self._last_line = time.monotonic()
            total = sum(self._bytes_read.values())
            _logger.info("indexing: %.2f GB of %d shards read, now %s", total / 1e9, len(self._bytes_read), shard)


def announce(config: RunConfig, topology: Topology) -> None:
    """Log what is about to be trained, and on which devices."""
    model, train, seq_len = config.model, config.train, config.data.seq_len
    stages = config.all_stages
    tokens_per_step = stages[0].tokens_per_step
    if config.optim.batch_size_rule != "none" and len({stage.tokens_per_step for stage in stages}) == 1:
        _logger.warning(
            "optim.batch_size_rule=%s does nothing, since no stage changes the tokens of a step",
            config.optim.batch_size_rule,
        )
    if (
        config.precision == "bf16"
        and topology.device.type == "cpu"
        and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    ):
        _logger.warning(
            "this CPU has no bf16 instructions, and emulating them is many times slower than precision=fp32"
        )
    if config.parallel.zero_stage == 0:
        _logger.info("parallel.zero_stage=0 runs as stage 1: it has the same communication and less memory")
    _logger.info(
        "model: %s parameters%s, %s FLOPs a token; %s tokens a step, %s",
        f"{parameter_count(model):,}",
        f" under adapters of {trained_count(model):,}, which are trained" if model.adapters else "",
        f"{flops_per_token(model, seq_len):.4g}", f"{tokens_per_step:,}",
        f"{config.tokens_until(train.steps):,} in {train.steps} steps" if train.steps else f"{train.epochs} epochs",
    )  # fmt: skip
    _logger.info(
        "layout: %d ranks (%s) on %s, %s, ZeRO-%d, %d micro-steps of %d rows",
        topology.world_size, named_layout(topology.tp_size, topology.sp_size, topology.dp_size),
        topology.device.type, config.precision,
        config.parallel.applied_zero_stage, stages[0].micro_steps(topology.dp_size),
        stages[0].micro_batch_size(topology.dp_size),
    )  # fmt: skip
    if config.metrics.noise_scale and topology.sp_size > 1:
        _logger.info(
            "the gradient noise scale is not measured with parallel.sp_size=%d: a rank's gradient is not that of the"
            " loss of its own tokens", topology.sp_size,
        )  # fmt: skip
    elif config.metrics.noise_scale and any(s.micro_steps(topology.dp_size) * topology.dp_size == 1 for s in stages):
        _logger.info(
            "the gradient noise scale is not measured where a step is one micro-batch on one rank; a smaller"
            " train.micro_batch_size makes several"
        )
    for number, (stage, changes) in enumerate(zip(stages[1:], config.stages, strict=True), 1):
        positions = changes.model.model_dump(mode="json", exclude_none=True)
        _logger.info(
            "stage %d from step %d on: %d rows of %d tokens a step, %d sources%s",
            number, stage.step, stage.global_batch_size, stage.data.seq_len,
            sum(source.weight > 0 for source in stage.data.sources), f", {positions}" if positions else "",
        )  # fmt: skip
    estimates = [memory_per_rank(config.workload(topology.dp_size, stage)) for stage in stages]
    memory = max((estimate for estimate in estimates if estimate), key=lambda m: m.total, default=None)
    if memory:
        _logger.info(
            "memory a rank, estimated: %.2f GB (%s)",
            memory.total / 1e9,
            ", ".join(f"{name} {size / 1e9:.2f}" for name, size in asdict(memory).items() if name != "host"),
        )
        if memory.host:
            _logger.info(
                "host memory a rank, estimated: %.2f GB for parallel.offload=%s",
                memory.host / 1e9, ",".join(config.parallel.offload),
            )  # fmt: skip
    else:
        _logger.info("memory a rank: there is no estimate for model.architecture=%s", model.architecture)
