"""Open the run that a command names by its folder. run folder -> begun_run -> {evaluate, export, generate, ...}."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pretrain.checkpoint.store import CheckpointStore
from pretrain.config import RunConfig, load_config
from pretrain.run.run_folder import RunFolder
from pretrain.standing import learn_from_records


class BegunRun(NamedTuple):
    """A run that has been started at least once.

    Attributes:
        folder: where it lies now, which may not be where its config says: a run may be moved or copied.
        config: the config of its newest start, with the command's overrides.
        checkpoints: those in the folder.
    """

    folder: RunFolder
    config: RunConfig
    checkpoints: CheckpointStore


def open_run(root: Path, overrides: Sequence[str] = ()) -> BegunRun:
    """Open the run in a folder. Raises ConfigError if there is none, or an override is wrong."""
    folder = RunFolder(root)
    folder.check_there()
    config = load_config(folder.config, overrides, begun=True)
    store = CheckpointStore(folder.checkpoints, config.checkpoint)
    learn_from_records(store, folder)
    return BegunRun(folder, config, store)
