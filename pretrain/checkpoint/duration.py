"""How long a save takes, and how much time the last one needs before a process ends."""

from __future__ import annotations

from dataclasses import dataclass

from pretrain.checkpoint.store import CheckpointStore

# Assumed of a run that has saved nothing yet: what a node writes to the disk that all share, often between 0.2 and 10e9
_BYTES_PER_SECOND = 0.5e9
_SAVES = 2.5  # a periodic save may begin just before the last one, which waits for it; and both may meet a busier disk


@dataclass(frozen=True)
class SaveTime:
    """How long a save takes, in seconds."""

    seconds: float
    measured: bool


def save_time(store: CheckpointStore, nodes: int) -> SaveTime:
    """Return how long the run's newest checkpoint took to save; without one, guess from its expected size."""
    if steps := store.steps():
        return SaveTime(store.open(steps[-1]).seconds, measured=True)
    return SaveTime(store.expected_bytes / (nodes * _BYTES_PER_SECOND), measured=False)


def time_for_last_save(save_seconds: float) -> float:
    """Return the seconds to set aside for the last save of a process."""
    return _SAVES * save_seconds
