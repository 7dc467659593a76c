"""The training loop: from where the run stands to its last step. start -> loop -> trainer."""

from __future__ import annotations

import logging

from pretrain.config import RunConfig
from pretrain.faults.interrupt import Interrupt
from pretrain.trainer import Trainer
from shards import CheckpointError

_logger = logging.getLogger(__name__)


def train(trainer: Trainer, config: RunConfig, interrupt: Interrupt) -> bool:
    """Trains to the last step, or until all ranks agree to stop. Every rank calls it.

    Returns:
        Whether the run is finished: all steps are done, or the data is. Otherwise it goes on when it is started again.
    """
    step, last = trainer.state.step, config.train.steps  # None: all steps that the data has
    finished = last is not None and step >= last
    evaluated = True  # as far as is due
    if step == 0 or finished or config.evaluation.due(step):
        evaluated = trainer.evaluate()  # of a resumed step only what a kill or a signal prevented
    while not finished and not interrupt.pending():
        batch = trainer.next_batch()
        if batch is None:
            trainer.note_data_end()
            finished = evaluation_due = True
        else:
            step += 1
            finished = last is not None and step >= last
            due = finished or config.evaluation.due(step)
            trainer.train_on(batch, evals_follow=due)  # by the next start, if this one is to stop
            evaluation_due = finished or (due and not interrupt.pending())
        # First what cannot be computed again
        if finished or config.checkpoint.due(step) or interrupt.pending():
            trainer.save()
        if finished or interrupt.pending():
            _finish_saving(trainer, finished)
        if evaluation_due:
            evaluated = trainer.evaluate()
    if not evaluated and not finished and step > 0:
        trainer.save()  # where an evaluation was left; nothing if that step is saved already
        _finish_saving(trainer, finished)
    return finished and evaluated


def _finish_saving(trainer: Trainer, finished: bool) -> None:
    try:
        trainer.finish_saving()
    except CheckpointError:
        if finished:
            raise  # without its last weights the run is not done
        # A run that was asked to stop goes on from the checkpoint before; the error is in the log
