"""An optimizer step of a run: its stage's batches, its learning rate, or none. {feed, engine} -> stepper -> trainer."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import msgspec

from pretrain.checkpoint.state import RunState
from pretrain.config import RunConfig
from pretrain.engine import Engine
from pretrain.faults.spikes import SpikeWatch
from pretrain.feed import PASSED_OVER, StepBatch, chain_hash
from pretrain.optim import learning_rate_of_run
from pretrain.run.metrics import Meter
from pretrain.stages import RunStage
from pretrain.step_stats import NO_LIMITS, Limits, StepStats

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Step:
    """A step that has been made.

    Attributes:
        state: the run's state after it.
        passed_over: whether data.skip_steps names it, so that its batch was read and nothing changed.
        limits: those above which it stands out against the steps before.
        spike, spike_begins: whether it does, and the step before did not.
    """

    state: RunState
    stats: StepStats
    learning_rate: float
    passed_over: bool
    limits: Limits = NO_LIMITS
    spike: bool = False
    spike_begins: bool = False


class Stepper:
    """Makes a run's steps, in order.

    Args:
        engine: made for the stage of the last step done.
        steps: length of the whole run, on which schedules are based.
        step: optimizer steps done.
        spikes: knows the last of them.
    """

    def __init__(self, config: RunConfig, engine: Engine, steps: int, step: int, spikes: SpikeWatch) -> None:
        self._engine, self._steps = engine, steps
        self._stages, self._schedule = config.all_stages, config.schedule
        self._skipped, self._ema = config.data.skip_steps, config.train.ema
        self._spikes, self._refuses = spikes, config.train.on_spike == "skip"
        self._stage = self._stages.index(config.stage_of(step))

    def step_on(self, batch: StepBatch, state: RunState, meter: Meter, measured: bool = False) -> Step:
        """Make one optimizer step.

        Args:
            state: the run's state before it.
            measured: whether to measure the layers' figures, unless the step is passed over.
        """
        if batch.stage != self._stage:
            state = self._begin_stage(batch.stage, state)
        rate = learning_rate_of_run(state.step, self._schedule, self._steps)
        passed_over = any(first <= state.step + 1 <= last for first, last in self._skipped)
        limits = self._spikes.limits(batch.stage)
        if passed_over:
            stats = StepStats(math.nan, math.nan, math.nan, applied=False)
        else:
            refused_above = limits if self._refuses else NO_LIMITS
            stats = self._engine.train_step(
                batch.tokens, batch.segment_ids, batch.n_targets, state.step, rate, meter, measured, refused_above
            )
        begins = self._spikes.note(batch.stage, stats, limits, passed_over)
        total = self._average(state, batch.n_tokens, meter) if stats.applied else state.average_total
        made = msgspec.structs.replace(after(state, batch, passed_over), average_total=total)
        return Step(made, stats, rate, passed_over, limits, stats.exceeds(limits), begins)

    def _begin_stage(self, number: int, state: RunState) -> RunState:
        """Let the engine make the steps of a stage; return the state, without an average of other positions.

        It is not done before, since what is evaluated where a stage begins is what the stage before has left.
        """
        before, stage = self._stages[self._stage], self._stages[number]
        self._stage, is_main = number, self._engine.topology.is_main
        enter(self._engine, stage)
        moves = stage.model != before.model
        if is_main:
            drawn = {source.name: source.weight for source in stage.data.sources if source.weight}
            _logger.info(
                "stage %d begins after step %d: %d rows of %d tokens a step from %s%s",
                number, state.step, stage.global_batch_size, stage.data.seq_len, drawn,
                f"; from now on {stage.model.positions}" if moves else "",
            )  # fmt: skip
        if not (moves and state.average_total):
            return state
        self._engine.average.drop()  # its weights have learned to attend by other positions
        if is_main:
            _logger.warning("positions change: the average of the weights up to step %d is dropped", state.step)
        return msgspec.structs.replace(state, average_total=0.0)

    def _average(self, state: RunState, n_tokens: int, meter: Meter) -> float:
        """Take the weights into their moving average; return the sum of the weights of the steps in it."""
        average, is_main, before = self._engine.average, self._engine.topology.is_main, state.average_total
        if self._ema is None:
            if before:
                average.drop()
                if is_main:
                    _logger.warning(
                        "train.ema is null: the average of the weights up to step %d is dropped", state.step
                    )
            return 0.0
        if not before and state.step and is_main:
            _logger.info("train.ema: the average of the weights begins with step %d", state.step + 1)
        total = self._ema.total_after(before, n_tokens)
        with meter.device_part("optimizer"):
            average.update(1 / total)
        return total


def enter(engine: Engine, stage: RunStage) -> None:
    """Let an engine compute positions and divide batches as a stage does, between two steps."""
    dp_size = engine.topology.dp_size
    engine.adopt(stage.model)
    engine.set_batches(stage.micro_batch_size(dp_size), stage.micro_steps(dp_size))


def after(state: RunState, batch: StepBatch, passed_over: bool = False) -> RunState:
    """Return the run's state after training on a batch, or after passing it over."""
    read, trained_before = chain_hash(state.batch_hash, batch.row_hash), state.trained_hash or state.batch_hash
    trained = chain_hash(trained_before, PASSED_OVER if passed_over else batch.trained_hash)
    hashes = {"batch_hash": read, "trained_hash": trained if state.trained_hash or trained != read else ""}
    if passed_over:
        return msgspec.structs.replace(state, step=state.step + 1, **hashes)
    seen = state.tokens_per_source
    return msgspec.structs.replace(
        state,
        step=state.step + 1,
        tokens=state.tokens + batch.n_tokens,
        # A batch names only the sub-sources that it holds; the others keep their counts.
        tokens_per_source=seen | {name: seen.get(name, 0) + n for name, n in batch.tokens_per_source.items()},
        **hashes,
    )
