"""The parts of a training, put together once, and what the loop does with them. loop -> trainer -> {engine, feed}."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import subprocess
from collections import Counter
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from pretrain import data_end
from pretrain.checkpoint.duration import save_time, time_for_last_save
from pretrain.checkpoint.resume import Choice, Restorer, choose
from pretrain.checkpoint.save import Saver
from pretrain.checkpoint.state import DataState, Layout, RunState
from pretrain.checkpoint.store import Checkpoint, CheckpointStore
from pretrain.config import RunConfig, load_config
from pretrain.engine import Engine, StepStats
from pretrain.evaluation.eval_set import load_suite, warn_of_training_shards
from pretrain.evaluation.plausibility import warn_of_doubts
from pretrain.evaluation.scores import eval_records
from pretrain.evaluation.scoring import evaluate
from pretrain.exchange.folder import content_hash, file_hashes, open_model
from pretrain.faults.deadline import Deadline, job_end
from pretrain.faults.interrupt import LAUNCHER_GRACE_SECONDS, Interrupt
from pretrain.faults.unapplied_steps import UnappliedSteps
from pretrain.faults.watchdog import Watchdog
from pretrain.feed import Feed, StepBatch, chain_hash
from pretrain.journal import Journal
from pretrain.model.size import checkpoint_bytes, flops_per_token
from pretrain.optim import learning_rate_at
from pretrain.run.lease import Lease
from pretrain.run.metrics import Meter, StepRecord, mfu, peak_flops_of, peak_memory_bytes
from pretrain.run.run_folder import RunFolder
from pretrain.run.wandb_tracker import Tracker
from pretrain.topology import Topology
from shards import Loader, Prepared, Tokenizer, check_fingerprint

_logger = logging.getLogger(__name__)

CURSORS_EVERY = 50  # optimizer steps between two records of cursors.jsonl.zst; provenance computes on from the nearest


class _Left(Exception):
    """All ranks leave an evaluation."""


class Trainer:
    """Every part of one process of a run, resumed from the newest valid checkpoint if there is one.

    Args:
        lease: on the folder, which rank 0 holds; checked before anything is written there.
        prepared: the shards' manifests, as rank 0 left them.
        interrupt: is told what all ranks agree on.
        stack: closes the loader's workers and the journal when the caller leaves it.
    Attributes:
        state: where the run stands.
        engine: the model and its optimizer.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: RunFolder,
        lease: Lease | None,
        prepared: Prepared | None,
        tokenizer: Tokenizer,
        topology: Topology,
        interrupt: Interrupt,
        stack: ExitStack,
    ) -> None:
        self._config = config
        self._interrupt = interrupt
        self._watchdog = stack.enter_context(Watchdog(config.train.stall_timeout, topology.rank))
        self._deadline = Deadline(job_end(os.environ) if topology.is_main else None)
        self._slowest_step = 0.0  # seconds, of the last few
        self._topology = topology
        self._lease = lease
        self._loader: Loader | None = None
        if topology.tp_rank == 0:
            sizes = (config.train.global_batch_size, config.run.seed, topology.dp_rank, topology.dp_size)
            self._loader = stack.enter_context(Loader(config.data, *sizes, prepared=prepared))
        data = topology.broadcast_object(self._loader.fingerprint if self._loader else None)
        if self._loader and data is not None:
            check_fingerprint(data, self._loader.fingerprint)  # two nodes may see other files under the same names
        self.engine = _engine(config, topology)
        expected_bytes = checkpoint_bytes(config.model, config.bytes_per_weight)
        self._store = CheckpointStore(folder.checkpoints, config.checkpoint, expected_bytes)
        choice = choose(self._store, topology)
        self.state = self._resume(choice.checkpoint)
        self._save_seconds = save_time(self._store, nodes=1).seconds  # of the newest save
        own = (topology.dp_rank, topology.dp_size)
        self._eval_set = load_suite(config.evaluation, tokenizer, config.data.seq_len, config.precision, *own)
        suite = self._eval_set.suite if self._eval_set else ""
        self._folder = folder
        self._steps = data_end.foresee(self._loader, config.train.steps, topology)
        self._begin(choice)
        tracker = None
        if topology.is_main:
            assert self._loader is not None
            warn_of_training_shards(config.evaluation, self._loader.fingerprint)
            described = describe(config, self._loader, self.state.init_hash)
            tracker = Tracker(config.wandb, folder, config.run.name, folder.run_id(config.run.name), described, suite)
        self._journal = stack.enter_context(Journal(folder, tracker, config.metrics, self._steps))
        rows = config.train.global_batch_size // topology.dp_size
        self._feed = Feed(self._loader, config.data, rows, topology)
        self._evaluated = topology.broadcast_object(self._journal.last_evaluated(suite))
        self._meter = Meter(synchronize=torch.cuda.synchronize if topology.device.type == "cuda" else None)
        self._saver = stack.enter_context(Saver(self._store, self.engine, topology, folder, lease))
        self._saving_seconds: float | None = None  # since the last step
        limits = (config.train.max_nonfinite, config.train.nonfinite_limit)
        self._unapplied = UnappliedSteps(*limits, folder, topology)
        if self.state.step == 0:
            self._journal.log_cursors(0, self._feed.cursors())

    def _begin(self, choice: Choice) -> None:
        """Make the run folder this start's, now that nothing is left to refuse it; every rank calls it."""
        if self._topology.is_main:
            for step, sentences in choice.damaged.items():
                aside = self._store.set_aside(step)
                _logger.warning("checkpoint of step %d is damaged, now in %s: %s", step, aside, sentences)
            self._store.discard_incomplete()
            self._say_new_rate()
            self._folder.begin(self._config.run.name, self._config.to_yaml(), self.state.step or -1)
        self._topology.barrier()

    def _say_new_rate(self) -> None:
        """Warn if the next step's learning rate is not the one that the run's config had for it until now."""
        step, now = self.state.step, self._config
        if step == 0 or step >= self._steps:
            return
        old = load_config(self._folder.config, begun=True)
        before = learning_rate_at(step, old.optim, old.train.steps or self._steps)
        after = learning_rate_at(step, now.optim, self._steps)
        if not math.isclose(before, after, rel_tol=1e-3):
            _logger.warning(
                "the learning rate of step %d is %.4g, where the run's schedule had %.4g for it: optim or train.steps"
                " has changed",
                step + 1, after, before,
            )  # fmt: skip

    def _resume(self, checkpoint: Checkpoint | None) -> RunState:
        """Takes up a checkpoint; without one, the state before the first step."""
        config, topology = self._config, self._topology
        layout = Layout(topology.tp_size, topology.dp_size, config.parallel.applied_zero_stage)
        if checkpoint is None:
            return RunState(
                step=0, tokens=0, tokens_per_source={}, batch_hash="", restarts=0,
                config_hash=config.hash(), init_hash=self._begin_with(config.init_from), **dataclasses.asdict(layout),
            )  # fmt: skip
        restorer = Restorer(self._store, layout, topology, self._interrupt.starting())
        state = restorer.restore(checkpoint, self.engine, self._loader)
        return msgspec.structs.replace(state, config_hash=config.hash())

    def _begin_with(self, source: Path | None) -> str:
        """Gives the engine the weights of another model, if one is named; returns the hash of its files."""
        if source is None:
            return ""
        topology = self._topology
        self.engine.take(open_model(source, self._config.model))
        shares = topology.gather_objects(file_hashes(source, topology.rank, topology.world_size))
        found = content_hash([line for share in shares for line in share])
        _logger.info("begun with the weights in %s (files' hash %s)", source, found)
        return found

    def next_batch(self) -> StepBatch | None:
        """The next global batch, and with it what all ranks agree on; None on all of them when the data is used up."""
        self._watchdog.begin("step", f"step {self.state.step + 1}")
        self._meter.start_step()
        with self._meter.part("data_wait"):
            batch = self._feed.next(self._wants_to_stop(), self._saver.busy)
        if batch is None:
            self._watchdog.end()
            return None
        self._interrupt.agree(batch.stop_requested)
        self._saver.settle(batch.saving)
        return batch

    def _wants_to_stop(self) -> bool:
        """Whether this rank was asked to, or is the one that looks at the clock, and time is up."""
        measured = self._saver.seconds
        if measured is not None and measured != self._save_seconds:
            self._save_seconds = measured
            needed = time_for_last_save(measured) + self._slowest_step
            if self._interrupt.has_launcher and needed > LAUNCHER_GRACE_SECONDS:
                _logger.warning(
                    "a step takes up to %.0f s and a save, which may have to wait for another, %.0f s, but the"
                    " deepspeed launcher kills its processes %.0f s after it was told to stop: a stopped run may go on"
                    " from an older checkpoint; start it with torchrun or srun",
                    self._slowest_step, measured, LAUNCHER_GRACE_SECONDS,
                )  # fmt: skip
        return self._deadline.reached(self._slowest_step, self._save_seconds) or bool(self._interrupt.requested)

    def train_on(self, batch: StepBatch, evals_follow: bool) -> None:
        """One optimizer step, written down.

        Args:
            evals_follow: the same step is evaluated next, and wandb shows both in one row.
        """
        config, step = self._config, self.state.step
        learning_rate = learning_rate_at(step, config.optim, self._steps)
        stats = self.engine.train_step(
            batch.tokens, batch.segment_ids, batch.n_targets, step, learning_rate, self._meter
        )
        self._check_lease()
        self._unapplied.note(step + 1, stats, batch.n_targets, self._feed.origins)
        self.state = after(self.state, batch)
        record = self._record(batch, stats, learning_rate)
        self._slowest_step = max(record.step_seconds, 0.9 * self._slowest_step)
        self._saving_seconds = None
        self._journal.log_skipped(self.state.step, batch.skipped, batch.contaminated)
        self._journal.log_step(record, evals_follow and self._eval_set is not None)
        if self.state.step % CURSORS_EVERY == 0:
            self._journal.log_cursors(self.state.step, self._feed.cursors())
        self._watchdog.end()

    def _contaminated(self, batch: StepBatch) -> dict[str, int]:
        counts = Counter(record.source for record in batch.contaminated)
        return {source.name: counts[source.name] for source in self._config.data.sources}

    def _record(self, batch: StepBatch, stats: StepStats, learning_rate: float) -> StepRecord:
        """What metrics.jsonl says of the step that led to `state`."""
        config, topology, state = self._config, self._topology, self.state
        seconds = self._meter.end_step()
        tokens_per_second = batch.n_tokens / seconds["step"]
        peak = config.metrics.peak_flops
        if peak is None and topology.device.type == "cuda":
            peak = peak_flops_of(torch.cuda.get_device_name())
        return StepRecord(
            step=state.step,
            loss=stats.loss,
            nonfinite=True if batch.n_targets and not stats.applied else None,
            without_targets=None if batch.n_targets else True,
            failed_saves=self._saver.failed or None,
            checkpoint_seconds=self._saving_seconds,
            z_loss=stats.z_loss if config.optim.z_loss else None,
            grad_norm=stats.grad_norm,
            learning_rate=learning_rate,
            tokens=state.tokens,
            tokens_per_second=tokens_per_second,
            batch_hash=state.batch_hash,
            step_seconds=seconds["step"],
            data_wait_seconds=seconds["data_wait"],
            forward_backward_seconds=seconds.get("forward_backward", 0.0),
            optimizer_seconds=seconds.get("optimizer", 0.0),
            peak_memory_bytes=peak_memory_bytes(topology.device),
            padding_share=batch.n_padding / (batch.n_padding + batch.n_tokens),
            tokens_per_source=batch.tokens_per_source,
            epoch_per_source=batch.epoch_per_source,
            skipped_records=batch.skipped_so_far,
            replayed_entries=batch.replays,
            contaminated_per_source=self._contaminated(batch) if config.data.decontaminate else None,
            mfu=mfu(
                flops_per_token(config.model, config.data.seq_len),
                tokens_per_second,
                peak * topology.world_size if peak else None,
            ),
        )

    def evaluate(self) -> bool:
        """Scores the suite and writes the figures down, unless those of this step stand there already.

        Returns:
            False, on all ranks, if they agreed to stop before it was done: then nothing of it is written.
        """
        step = self.state.step
        if self._eval_set is None or self._evaluated == step:
            return True
        batch_size = self._config.evaluation.batch_size or self.engine.micro_batch_size
        try:
            scores = evaluate(self._logits, self._eval_set, self._topology, batch_size)
        except _Left:
            _logger.info("the evaluation of step %d is left undone; the next start makes it", step)
            return False
        finally:
            self._watchdog.end()
        self._journal.log_evals(step, scores)
        if self._topology.is_main:
            drawn = step == 0 and self._config.init_from is None
            warn_of_doubts(eval_records(step, scores), self._config.model, drawn)
        self._evaluated = step
        return True

    def _logits(self, tokens: Tensor, segment_ids: Tensor) -> Tensor:
        """The engine's, for an evaluation; which all ranks may leave, together, before each batch."""
        self._watchdog.begin("evaluation", f"a batch of the evaluation of step {self.state.step}")
        self._interrupt.agree(self._topology.any(self._wants_to_stop()))
        if self._interrupt.pending():
            raise _Left
        self._saver.pulse()  # completes a save that was begun just before
        return self.engine.logits(tokens, segment_ids)

    def _check_lease(self) -> None:
        if self._lease:
            self._lease.check()

    def save(self) -> None:
        """Begins to save a checkpoint of where the run stands."""
        cursors = self._feed.cursors()
        data = None
        if cursors is not None and self._loader is not None:
            data = DataState(cursors, self._loader.fingerprint)
        self._saving_seconds = self._saver.save(self.state, data)

    def note_data_end(self) -> None:
        """Says and notes that the data has come to its end, and with it the run."""
        self._journal.log_skipped(self.state.step + 1, *self._feed.passed_over)  # on the way to a step that never came
        if self._topology.is_main:
            self._folder.note_data_end(self.state.step)
            data_end.tell(self.state.step, self._config.train.steps, self._steps, self._config.optim)

    def finish_saving(self) -> None:
        """Waits for the newest checkpoint to be complete. Raises CheckpointError if it could not be saved."""
        self._saver.finish()


def describe(config: RunConfig, loader: Loader, init_hash: str) -> dict[str, object]:
    """What the wandb run says of itself: the config, and what it was trained with and on."""
    packages = ("torch", "deepspeed", "fairscale", "sentencepiece", "zstandard")
    return {
        **config.model_dump(mode="json"),
        "provenance": {
            "git_commit": git_commit(),
            "config_hash": config.hash(),
            "data": loader.fingerprint,
            "init_hash": init_hash,
            "packages": {name: version(name) for name in packages},
        },
    }


def git_commit() -> str:
    """The commit that this program was started from, with "+" where files differ from it; empty outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], check=False).returncode
    except (OSError, subprocess.CalledProcessError):
        return ""
    return commit + "+" * bool(changed)


def after(state: RunState, batch: StepBatch) -> RunState:
    """Where the run stands once it has trained on a batch."""
    seen = state.tokens_per_source
    return msgspec.structs.replace(
        state,
        step=state.step + 1,
        tokens=state.tokens + batch.n_tokens,
        # A batch names only those sub-sources that it holds; the others keep their count
        tokens_per_source=seen | {name: seen.get(name, 0) + n for name, n in batch.tokens_per_source.items()},
        batch_hash=chain_hash(state.batch_hash, batch.row_hash),
    )


def _engine(config: RunConfig, topology: Topology) -> Engine:
    derived = config.deepspeed_config(topology.dp_size)
    return Engine(config.model, config.optim, config.parallel, config.precision, derived, topology, config.run.seed)
