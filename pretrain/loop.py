"""The training loop: from the run's current step to its last. start -> loop -> trainer."""

from __future__ import annotations

from pretrain.trainer import Trainer


def train(trainer: Trainer) -> bool:
    """Train to the last step, or until all ranks agree to stop. Every rank calls it.

    Returns:
        Whether the run is finished: all steps are done, or the data is used up, and the end is saved and evaluated.
        Otherwise the run continues when it is started again, or goes back at once if `trainer.rewind` is set.
    """
    trainer.evaluate_if_due()  # for a resumed step, only if a kill or a signal prevented it
    while not trainer.at_end and not trainer.stopping:
        batch = trainer.next_batch()
        if batch is not None:
            trainer.train_on(batch)
            if trainer.rewind:
                break
        elif trainer.data_is_used_up:
            trainer.end_data()
        else:  # all ranks stop before there was a row
            break
        # First what cannot be recomputed.
        trainer.save_if_due()
        trainer.evaluate_if_due()
    trainer.save_before_stopping()
    trainer.tell_outcome()
    return trainer.finished
