"""The training loop: from the newest checkpoint, or from nothing, to the last step. start -> loop -> trainer."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import dataclass

from pretrain.config import RunConfig
from pretrain.engine import Engine
from pretrain.interrupt import Interrupt
from pretrain.lease import Lease
from pretrain.run_folder import RunFolder
from pretrain.topology import Topology
from pretrain.trainer import Trainer
from shards import CheckpointError, Prepared, Tokenizer

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """How a call of `train` ended.

    Attributes:
        finished: all steps are done, or the data is; otherwise the run goes on when it is started again.
        step: optimizer steps done.
        engine: with the weights as they are now.
    """

    finished: bool
    step: int
    engine: Engine


def train(
    config: RunConfig,
    folder: RunFolder,
    lease: Lease | None,
    run_id: str,
    prepared: tuple[Prepared, ...],
    tokenizer: Tokenizer,
    topology: Topology,
    interrupt: Interrupt,
) -> Outcome:
    """Trains to the last step, or until all ranks agree to stop. Every rank calls it; rank 0 holds the lease."""
    with ExitStack() as stack:
        trainer = Trainer(config, folder, lease, run_id, prepared, tokenizer, topology, stack)
        state = trainer.state
        finished = state.step >= config.train.steps
        evaluation_due = state.step == 0 or finished or config.evaluation.due(state.step)
        if evaluation_due:
            trainer.evaluate(state)  # of a resumed step only what a kill prevented
        while not finished and not interrupt.pending():
            batch = trainer.next_batch(bool(interrupt.requested))
            if batch is None:
                _logger.info("the data ends before step %d, and with it the run", state.step + 1)
                finished = evaluation_due = True
            else:
                interrupt.agree(batch.stop_requested)
                finished = state.step + 1 >= config.train.steps
                evaluation_due = finished or (config.evaluation.due(state.step + 1) and not interrupt.pending())
                state = trainer.train_on(batch, state, evals_follow=evaluation_due)
            # First what cannot be computed again
            if finished or config.checkpoint.due(state.step) or interrupt.pending():
                trainer.save(state)
            if finished or interrupt.pending():
                _finish_saving(trainer, finished)
            if evaluation_due:
                trainer.evaluate(state)
        return Outcome(finished, state.step, trainer.engine)


def _finish_saving(trainer: Trainer, finished: bool) -> None:
    try:
        trainer.finish_saving()
    except CheckpointError:
        if finished:
            raise  # without its last weights the run is not done
        # A run that was asked to stop goes on from the checkpoint before; the error is in the log
