"""Train, save and evaluate, one call of the loop at a time. loop -> trainer -> {engine, feed, journal, ...}."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from msgspec import to_builtins

from pretrain import data_end
from pretrain.checkpoint.save import Saver
from pretrain.checkpoint.state import RunState
from pretrain.config import RunConfig
from pretrain.engine import Engine
from pretrain.evaluation.plausibility import doubts
from pretrain.faults.spikes import SpikeWatch, spike_event
from pretrain.faults.stop import StopPolicy
from pretrain.faults.stragglers import StragglerWatch
from pretrain.faults.tripwires import Tripwires
from pretrain.faults.unapplied_steps import UnappliedSteps
from pretrain.faults.watchdog import Watchdog
from pretrain.feed import Feed, FeedLeft, StepBatch
from pretrain.held_out import EvaluationLeft, HeldOut
from pretrain.journal import Journal
from pretrain.profiling import StepProfiler
from pretrain.recorder import StepRecorder
from pretrain.rewind import Rewinder
from pretrain.run.eval_figure import AVERAGED
from pretrain.run.events import Event, log_event
from pretrain.run.run_folder import Rewind
from pretrain.standing import Standing
from pretrain.stepper import Step, Stepper
from pretrain.topology import Topology
from shards import CheckpointError

_logger = logging.getLogger(__name__)

_CURSORS_EVERY = 50  # optimizer steps between records of cursors.jsonl.zst; provenance computes from the nearest


@dataclass(frozen=True)
class Parts:
    """The parts of a training on one rank, as `assembly` puts them together."""

    engine: Engine
    feed: Feed
    journal: Journal
    recorder: StepRecorder
    saver: Saver
    held_out: HeldOut | None  # None if neither a suite nor tasks are set
    stop: StopPolicy
    watchdog: Watchdog
    unapplied: UnappliedSteps
    spikes: SpikeWatch
    rewinder: Rewinder
    standing: Standing
    stragglers: StragglerWatch
    tripwires: Tripwires
    profiler: StepProfiler


class Trainer:
    """Trains, saves and evaluates step by step. Every rank has one and calls the same methods in the same order.

    Args:
        steps: length of the whole run, forecast if its data ends it; the schedule has this length.
        state: the run's state.
    Attributes:
        rewind: set if the run is to go back before the step that it has just made.
        data_is_used_up: whether no rank has a row left.
    """

    def __init__(self, config: RunConfig, parts: Parts, topology: Topology, steps: int, state: RunState) -> None:
        self.state = state
        self._config = config
        self._parts = parts
        self._topology = topology
        self._steps = steps
        self._stepper = Stepper(config, parts.engine, steps, state.step, parts.spikes)
        self.rewind: Rewind | None = None
        self.data_is_used_up = False
        self._passed_over = False  # whether the last step was
        if state.step == 0:
            self._log_cursors()

    @property
    def engine(self) -> Engine:
        """Return the model with its optimizer."""
        return self._parts.engine

    @property
    def at_end(self) -> bool:
        """Return whether there is no further step to train."""
        return self.data_is_used_up or self._is_last(self.state.step) or self.ending is not None

    @property
    def ending(self) -> Event | None:
        """Return why the run ends before its last step; None if it does not."""
        return self._parts.standing.ending

    @property
    def stopping(self) -> bool:
        """Return whether all ranks have agreed to stop early."""
        return self._parts.stop.agreed

    @property
    def finished(self) -> bool:
        """Return whether the run has ended and its end has been evaluated."""
        return self.at_end and not self._is_evaluation_due() and self.rewind is None

    def next_batch(self) -> StepBatch | None:
        """Return the next global batch, or None on all ranks: the data is used up, or they stop before there are rows.

        With it the ranks agree whether to stop, and learn whether all have written their checkpoint.
        """
        parts = self._parts
        parts.profiler.begin_step(self.state.step + 1)
        parts.watchdog.begin("step", f"step {self.state.step + 1}", self.state.step)
        parts.recorder.meter.start_step()
        parts.stop.note_save(parts.saver.seconds)
        try:
            with parts.recorder.meter.part("data_wait"):
                batch = parts.feed.next(self._is_stop_wanted, parts.saver.busy, parts.recorder.seconds)
        except FeedLeft:
            parts.stop.agree(True)
            parts.watchdog.end()
            return None
        if batch is None:
            self.data_is_used_up = True
            parts.watchdog.end()
            return None
        parts.stop.agree(batch.stop_requested)
        parts.saver.settle(batch.saving)
        return batch

    def _is_stop_wanted(self) -> bool:
        """Return whether this rank wants to stop, when a batch was drawn; even one without a row is progress."""
        self._parts.watchdog.renew()
        return self._parts.stop.wanted()

    def train_on(self, batch: StepBatch) -> None:
        """Make one optimizer step and record it."""
        parts = self._parts
        measured = self._config.metrics.measures_layers(self.state.step + 1)
        made = self._stepper.step_on(batch, self.state, parts.recorder.meter, measured)
        parts.saver.check_lease()  # before anything is written
        if not made.passed_over:
            parts.unapplied.note(made.state.step, made.stats, batch.n_targets, parts.feed.origins)
        self.state = made.state
        if made.spike_begins:
            self._answer_spike(made)
        hashes = parts.engine.state_hash() if self._is_hash_due() else None
        # The batch came with the seconds of the step before.
        slow = None if self._passed_over else parts.stragglers.note(made.state.step, batch.rank_seconds)
        self._passed_over = made.passed_over
        record = parts.recorder.record(made, batch, parts.saver.failed, parts.stragglers.straggler, hashes)
        parts.stop.note_step(record.step_seconds)
        parts.journal.log_skipped(self.state.step, batch.skipped, batch.contaminated)
        layers = made.stats.layers.as_record(made.state.step) if made.stats.layers else None
        parts.journal.log_step(record, layers, evals_follow=self._is_evaluation_due())  # possibly at the next start
        for event in [*([slow] if slow else []), *parts.tripwires.note(record)]:
            parts.journal.tell(event)
        if self.state.step % _CURSORS_EVERY == 0:
            self._log_cursors()
        parts.watchdog.end()
        parts.profiler.end_step(self.state.step)

    def _answer_spike(self, made: Step) -> None:
        """Tell of a step that stands out, and go back before it if the config says so."""
        step, action = made.state.step, "its update was not made" if made.stats.refused else "training goes on"
        if self._config.train.on_spike == "rewind":
            self._parts.watchdog.end()  # to wait for a save and to verify a checkpoint is no step
            self._parts.saver.end_current()
            decision = self._parts.rewinder.decide(step)
            if isinstance(decision, Rewind):
                self.rewind = decision
                first, last = decision.passed_over
                action = f"the run goes back to step {decision.step} and passes steps {first} to {last} over"
            else:
                action = decision
        self._parts.journal.tell(spike_event(step, made.stats, made.limits, self._config.folder, action))
        if self.rewind:  # once more at the step gone back to, where no going back removes it
            text = f"step {step} stood out: {action} (train.on_spike=rewind)"
            self._parts.journal.tell(Event(self.rewind.step, "rewind", text, to_builtins(self.rewind)))

    def end_data(self) -> None:
        """Record that the data, and with it the run, has ended."""
        # These were skipped on the way to a step that never came.
        self._parts.journal.log_skipped(self.state.step + 1, *self._parts.feed.skipped_at_end)
        self._parts.journal.log_data_end(self.state.step)
        if self._topology.is_main:
            data_end.log_end(self.state.step, self._config.train.steps, self._steps, self._config.schedule)

    def save_if_due(self) -> None:
        """Start saving the current state if a save is due; at the run's end, wait for it.

        Raises:
            CheckpointError: on all ranks, if the run's end could not be saved, which leaves it unfinished.
        """
        if self.at_end or self._config.checkpoint.due(self.state.step):
            self._save()
        if self.at_end:
            self._parts.saver.finish()

    def save_before_stopping(self) -> None:
        """Save a run that stops early, unless it is saved already, goes back, or nothing has been trained.

        If that fails, the error is in the log, and the run resumes from its previous checkpoint.
        """
        if self.at_end or self.rewind or self.state.step == 0:
            return
        self._save()
        with suppress(CheckpointError):
            self._parts.saver.finish()

    def tell_outcome(self) -> None:
        """Tell how this start ends; if it goes back, it does not."""
        step, journal = self.state.step, self._parts.journal
        self._parts.saver.check_lease()
        if self.rewind and not self.stopping:
            return
        if not self.finished:
            where = f"goes back to step {self.rewind.step}" if self.rewind else "continues from there"
            text = f"stopped after step {step}; the same command {where}"
            journal.tell(Event(step, "stopped", text, {}))
        elif not journal.has_told(step, "finished"):  # a finished run may be started again
            journal.tell(Event(step, "finished", f"the run is finished, at step {step}", {}))
        if self.finished and self.ending:
            log_event(self.ending)  # last, and again at every start, which does not go on

    def evaluate_if_due(self) -> None:
        """Score the suite and the tasks and record the results, if an evaluation is due.

        If all ranks agree to stop before it is done, nothing of it is recorded, and the next start makes it.
        """
        held_out, step = self._parts.held_out, self.state.step
        if held_out is None or not self._is_evaluation_due():
            return
        try:
            scores = held_out.score(step, self._before_evaluation_batch, self.state.average_total > 0)
        except EvaluationLeft:
            _logger.info("the evaluation of step %d was not finished; the next start makes it", step)
            return
        finally:
            self._parts.watchdog.end()
        records = self._parts.journal.log_evals(step, scores)
        held_out.note_done(step)
        # On rank 0; nothing is left where only the average was missing.
        if of_weights := [r for r in records if not str(r["domain"]).startswith(AVERAGED)]:
            self._tell_doubts(of_weights)
        self._parts.standing.note(records)
        if self.ending:
            self._parts.journal.tell(self.ending)
            self.save_if_due()  # which it was not while the run seemed to go on

    def _tell_doubts(self, records: Sequence[Mapping[str, object]]) -> None:
        """Tell what cannot be right in an evaluation; on rank 0."""
        config, journal, step = self._config, self._parts.journal, self.state.step
        drawn = step == 0 and config.init_from is None
        before, training_loss = journal.earlier_evals(records), self._parts.spikes.median_loss()
        for doubt in doubts(records, config.model, drawn, training_loss, before):
            journal.tell(Event(step, "doubt", doubt, {}))

    def _before_evaluation_batch(self) -> None:
        """Let all ranks abandon the evaluation together, and complete a save that was started just before it."""
        parts = self._parts
        step = self.state.step
        parts.watchdog.begin("evaluation", f"a batch of the evaluation of step {step}", step)
        parts.stop.note_save(parts.saver.seconds)
        parts.stop.agree(self._topology.any(parts.stop.wanted()))
        if parts.stop.agreed:
            raise EvaluationLeft
        parts.saver.pulse()

    def _is_last(self, step: int) -> bool:
        last = self._config.train.steps  # None: as many as the data has
        return last is not None and step >= last

    def _is_hash_due(self) -> bool:
        """Return whether the current step's weights are hashed: at intervals, and where a save is about to follow.

        What is decided after a step was recorded comes too late: the end of the data, a stop within an evaluation or
        within a gap of the data, where there is no batch with which to agree on it.
        """
        every, step = self._config.train.weight_hash_every, self.state.step
        is_saved = self.at_end or self.stopping or self._config.checkpoint.due(step)
        return every is not None and (is_saved or step % every == 0)

    def _is_evaluation_due(self) -> bool:
        """Return whether the current step is due for evaluation and has not been evaluated."""
        held_out, step = self._parts.held_out, self.state.step
        if held_out is None or held_out.is_done(step):
            return False
        return step == 0 or self.at_end or self._config.evaluation.due(step)

    def _save(self) -> None:
        """Start saving the current state."""
        seconds = self._parts.saver.save(self.state, self._parts.feed.state())
        self._parts.recorder.note_save(seconds)

    def _log_cursors(self) -> None:
        self._parts.journal.log_cursors(self.state.step, self._parts.feed.cursors())
