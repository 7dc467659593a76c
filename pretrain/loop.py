"""The training loop: from where the run stands to its last step. start -> loop -> trainer."""

from __future__ import annotations

from pretrain.trainer import Trainer


def train(trainer: Trainer) -> bool:
    """Train to the last step, or until all ranks agree to stop. Every rank calls it.

    Returns:
        Whether the run is finished: all steps are done, or the data is used up, and the end is saved and evaluated.
        Otherwise the run goes on when it is started again.
    """
    trainer.evaluate_if_due()  # of a resumed step only what a kill or a signal prevented
    while not trainer.at_end and not trainer.stopping:
        batch = trainer.next_batch()
        if batch is None:
            trainer.end_data()
        else:
            trainer.train_on(batch)
        # First what cannot be computed again
        trainer.save_if_due()
        trainer.evaluate_if_due()
    trainer.save_before_stopping()
    return trainer.finished
