"""Options that are meant for one start, though a launch that is restarted repeats its command. start -> once -> file.

A job that is requeued, and workers that torchrun restarts, are started with the same words as the first time. Whether
the first start has carried an option out or was ended before is known only to the run's folder.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from shards.storage.atomic import write_atomically


def is_restarted() -> bool:
    """Return whether this process belongs to a launch that has started it before."""
    return any(os.environ.get(name, "0") != "0" for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"))


class Once:
    """An option that a launch carries out once.

    Args:
        folder: the run's folder.
        option: the option with its value.
    """

    def __init__(self, folder: Path, option: str) -> None:
        self._path, self._option = folder / "once.json", option

    def is_due(self) -> bool:
        """Return whether it is to be carried out: at the first start of a launch, or if no start before has done it."""
        done = self._read()
        if is_restarted():
            return done.get(self._option) != _launch()
        if done.pop(self._option, None) is not None:
            self._write(done)  # by an earlier launch, which may have had the same name
        return True

    def note_done(self) -> None:
        """Record that this launch has carried it out."""
        self._write(self._read() | {self._option: _launch()})

    def _read(self) -> dict[str, str]:
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=dict[str, str])
        except FileNotFoundError:
            return {}

    def _write(self, done: dict[str, str]) -> None:
        write_atomically(self._path, msgspec.json.encode(done))


def _launch() -> str:
    return os.environ.get("SLURM_JOB_ID") or os.environ.get("TORCHELASTIC_RUN_ID") or ""
