"""Estimate how long a save takes, and how much time the last save needs before a process ends."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

from pretrain.checkpoint.store import CheckpointStore
from shards import CheckpointError

# Assumed write speed of a node to the shared disk until the run has saved; real disks reach 0.2e9 to 10e9
_BYTES_PER_SECOND = 0.5e9
_SAVES = 2.5  # a periodic save may begin just before the last one, which waits for it, and the disk may be busier


@dataclass(frozen=True)
class SaveTime:
    """The duration of a save in seconds, and whether it was measured or guessed."""

    seconds: float
    measured: bool


def save_time(store: CheckpointStore, nodes: int) -> SaveTime:
    """Return how long the run's newest checkpoint took to save, or a guess from its expected size if there is none."""
    for step in reversed(store.steps()):
        with suppress(CheckpointError):  # a damaged COMPLETE is handled elsewhere, at the start
            return SaveTime(store.open(step).seconds, measured=True)
    return SaveTime(store.expected_bytes / (nodes * _BYTES_PER_SECOND), measured=False)


def time_for_last_save(save_seconds: float) -> float:
    """Return the seconds to reserve for a process's last save."""
    return _SAVES * save_seconds
