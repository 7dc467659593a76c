"""Store a run's checkpoints: open, verify and remove them. A folder without a valid COMPLETE is no checkpoint.

checkpoints/step_00001000/
    engine/      every rank's DeepSpeed files
    data.json    the loader's state             state.json   the run's state
    COMPLETE     written last: names, sizes and hashes of all the others
"""

from __future__ import annotations

import itertools
import logging
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec
import xxhash
from pydantic import Field

from pretrain.run.eval_figure import EVAL_FIGURE, best_step
from shards import CheckpointError, Config, ConfigError
from shards.storage.atomic import fsync_folder, is_there, names_in, write_atomically
from shards.storage.content_hash import hash_file

_logger = logging.getLogger(__name__)

COMPLETE = "COMPLETE"
_FOLDER = re.compile(r"step_(\d{8,})")


WantedStep = int | Literal["best"] | None  # of a checkpoint; None: the newest


def wanted_step(word: str) -> WantedStep:
    """Read a command's --step. Raises ValueError, which argparse reports, if it is neither a step nor `best`."""
    return "best" if word == "best" else int(word)


class CheckpointConfig(Config):
    """When to save, and what to keep. The last step is always saved."""

    every: int = Field(1000, ge=1)  # optimizer steps
    keep: int = Field(2, ge=1)  # number of newest checkpoints to keep
    keep_every: int | None = Field(None, ge=1)  # also keep, forever, those of steps divisible by this
    # Also keep the checkpoint whose evaluation is the best by this figure, eval/DOMAIN/FIGURE as in wandb, such as
    # eval/macro/bits_per_byte; `--step best` then names it. None: none is kept for that
    best: str | None = Field(None, pattern=EVAL_FIGURE)
    # Write while training continues, from a copy in host memory as large as what a rank saves
    asynchronous: bool = True
    max_failed_saves: int = Field(10, ge=1)  # failed saves in a row that end the run
    reserve_bytes: int = Field(1 << 28, ge=0)  # disk space that checkpoints leave free for logs and other files

    def due(self, step: int) -> bool:
        return step % self.every == 0


class CheckpointFile(msgspec.Struct, frozen=True):
    """A file of a checkpoint, as listed in COMPLETE."""

    name: str  # relative to the checkpoint's folder, with forward slashes
    size: int  # bytes
    hash: str  # xxh3-128 of the content, 32 hex digits


class CompleteFile(msgspec.Struct, frozen=True):
    """The content of COMPLETE."""

    files: list[CheckpointFile]
    seconds: float  # from the start of the save to the writing of this file
    hash: str = ""  # xxh3-128 of the rest as JSON, 32 hex digits

    def signed(self) -> CompleteFile:
        """Return the same content with its correct hash."""
        rest = msgspec.structs.replace(self, hash="")
        return msgspec.structs.replace(self, hash=xxhash.xxh3_128_hexdigest(msgspec.json.encode(rest)))


@dataclass(frozen=True)
class Checkpoint:
    """One complete checkpoint; its files may still be damaged."""

    folder: Path
    step: int
    files: list[CheckpointFile]
    seconds: float  # duration of the save

    def broken_files(self, part: int = 0, parts: int = 1) -> list[str]:
        """Describe the damage in one of `parts` parts of the files, one sentence per file; empty if there is none."""
        return [found for file in self.files[part::parts] if (found := _damage(self.folder, file))]


def _damage(folder: Path, file: CheckpointFile) -> str | None:
    path = folder / file.name
    try:
        size = path.stat().st_size
        if size != file.size:
            return f"{path} has {size} bytes instead of {file.size}"
        if hash_file(path) != file.hash:
            return f"{path} differs from what was saved"
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    return None


def write_complete(folder: Path, files: list[CheckpointFile], seconds: float) -> None:
    """Mark a folder as complete."""
    content = CompleteFile(sorted(files, key=lambda file: file.name), round(seconds, 3)).signed()
    write_atomically(folder / COMPLETE, msgspec.json.format(msgspec.json.encode(content)))


def read_complete(folder: Path, step: int) -> Checkpoint:
    """Open a complete folder. Raises CheckpointError if it is not complete, or COMPLETE itself is damaged."""
    try:
        content = msgspec.json.decode((folder / COMPLETE).read_bytes(), type=CompleteFile)
    except (OSError, ValueError, msgspec.MsgspecError) as error:  # ValueError: not UTF-8
        raise CheckpointError(f"{folder / COMPLETE} cannot be read: {error}") from error
    if content != content.signed():
        raise CheckpointError(f"{folder / COMPLETE} differs from what was saved")
    return Checkpoint(folder, step, content.files, content.seconds)


class NoCheckpointError(CheckpointError):
    """There is no checkpoint of the step that was asked for."""

    exit_code = 2


class CheckpointStore:
    """The checkpoints in one folder. Any rank may read them; only rank 0 changes anything.

    Args:
        root: the folder that holds them.
        config: when to save and what to keep.
        expected_bytes: assumed size of a checkpoint until one exists to measure; only needed for saving.
        reach: of the checkpoints that are so many steps older than the newest, the newest is kept too, since the run
            may go back to it, or else the oldest of all, which will be that old; None: the run does not go back.
    """

    def __init__(self, root: Path, config: CheckpointConfig, expected_bytes: int = 0, reach: int | None = None) -> None:
        self.root = root
        self.config = config
        self.expected_bytes = expected_bytes
        self._reach = reach
        self._costs: dict[int, float] = {}  # of `config.best`, at each evaluated step

    def folder_of(self, step: int) -> Path:
        return self.root / f"step_{step:08d}"

    def complete(self, step: int, files: list[CheckpointFile], seconds: float) -> None:
        """Mark a checkpoint as complete; its files and their names must be durable already.

        Args:
            seconds: duration of the save so far.
        """
        write_complete(self.folder_of(step), files, seconds)

    def learn(self, costs: Mapping[int, float]) -> None:
        """Take in what the evaluations of steps cost by `config.best`; the lowest is the best."""
        self._costs |= costs

    def best(self, steps: Sequence[int]) -> int | None:
        """Return the best of some steps that have a checkpoint; None if none was evaluated, or no best is asked for."""
        return best_step(self._costs, steps)

    def is_complete(self, step: int) -> bool:
        """Return whether a step's checkpoint was completed; its files may have been damaged since.

        Raises:
            OSError: if the disk cannot be read; a checkpoint that is only invisible at the moment must not be removed.
        """
        return is_there(self.folder_of(step) / COMPLETE)

    def steps(self) -> list[int]:
        """Return the steps with a complete checkpoint, oldest first."""
        return [step for step in self.all_steps() if self.is_complete(step)]

    def all_steps(self) -> list[int]:
        """Return the steps that have a folder, complete or not, oldest first."""
        found = (_FOLDER.fullmatch(name) for name in names_in(self.root))
        return sorted(int(match[1]) for match in found if match)

    def has_damaged(self) -> bool:
        """Return whether any checkpoint has been set aside."""
        return any(name.endswith(".damaged") for name in names_in(self.root))

    def open(self, step: int) -> Checkpoint:
        """Open the checkpoint of a step.

        Raises:
            CheckpointError: if it is not complete, or COMPLETE itself is damaged.
        """
        return read_complete(self.folder_of(step), step)

    def universal_folder(self, step: int, tp_size: int) -> Path:
        """Return the folder for a checkpoint's conversion; it is removed once a newer checkpoint is complete."""
        return self.folder_of(step).with_suffix(f".universal-tp{tp_size}")

    def discard_universal(self, step: int | None = None) -> None:
        """Remove the conversions of a step's checkpoint, or of all checkpoints; COMPLETE first."""
        name = "step_*" if step is None else self.folder_of(step).name
        for folder in self.root.glob(f"{name}.universal-tp*"):
            (folder / COMPLETE).unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)

    def find(self, step: WantedStep = None) -> Checkpoint:
        """Open the checkpoint of a step, the best or, by default, the newest one.

        Raises:
            NoCheckpointError: if there is none; the message lists the steps that have one.
            ConfigError: if the best is wanted, but the run's config does not say by which figure.
        """
        steps = self.steps()
        if not steps:
            raise NoCheckpointError(f"{self.root} has no complete checkpoint")
        if step == "best":
            step = self._best_of(steps)
        if step is not None and step not in steps:
            raise NoCheckpointError(f"{self.root} has no complete checkpoint of step {step}; it has {steps}")
        return self.open(steps[-1] if step is None else step)

    def _best_of(self, steps: list[int]) -> int:
        if self.config.best is None:
            raise ConfigError("--step best: checkpoint.best of the run's config names no figure to judge by")
        if (found := self.best(steps)) is None:
            raise NoCheckpointError(f"{self.root}: none of its checkpoints {steps} was evaluated by the training")
        return found

    def prepare(self, step: int) -> Path:
        """Create an empty folder for a new checkpoint, replacing what a killed save may have left there."""
        folder = self.folder_of(step)
        assert not self.is_complete(step), f"{folder} is complete and must not be overwritten"
        self.discard_universal(step)  # it came from a damaged checkpoint of this step
        if is_there(folder):
            shutil.rmtree(folder)
        (folder / "engine").mkdir(parents=True)
        fsync_folder(folder)
        fsync_folder(self.root)
        return folder

    def discard(self, step: int) -> None:
        """Remove a checkpoint, complete or not.

        Raises:
            OSError: if part of it could not be removed; it no longer counts as a checkpoint.
        """
        folder = self.folder_of(step)
        # COMPLETE first: a half-removed checkpoint must not look complete
        (folder / COMPLETE).unlink(missing_ok=True)
        fsync_folder(folder)
        shutil.rmtree(folder)

    def discard_incomplete(self) -> None:
        """Remove what killed saves left behind, to free its space; no save may be in progress."""
        for step in self.all_steps():
            if not self.is_complete(step):
                self.try_to_discard(step)

    def set_aside(self, step: int) -> Path:
        """Rename a damaged checkpoint, which frees its name for a new one and keeps its remains."""
        return self._aside(step, "damaged")

    def _aside(self, step: int, why: str) -> Path:
        folder = self.folder_of(step)
        names = itertools.chain([f"{folder.name}.{why}"], (f"{folder.name}.{n}.{why}" for n in itertools.count(2)))
        aside = next(path for name in names if not is_there(path := folder.with_name(name)))
        folder.rename(aside)
        fsync_folder(self.root)
        return aside

    def retract_after(self, step: int) -> None:
        """Rename the checkpoints past a step that a run goes back to, so that none of them is resumed from."""
        for later in reversed(self.all_steps()):  # the newest first, so that a kill leaves none that is resumed from
            if later > step:
                aside = self._aside(later, "retracted")
                _logger.info("the checkpoint of step %d is retracted; it is in %s until you remove it", later, aside)
        self.discard_universal()

    def prune(self) -> None:
        """Remove checkpoints that the config does not keep and remains of killed saves; failures are only logged."""
        try:
            steps, folders = self.steps(), self.all_steps()
        except OSError as error:
            _logger.warning("old checkpoints in %s could not be listed: %s", self.root, error)
            return
        kept = {*steps[-self.config.keep :], *self._kept_for_good(steps)}
        for step in folders:
            if step not in kept and step < steps[-1]:
                self.try_to_discard(step)
        self.discard_universal()  # the newest checkpoint has the current layout

    def check_room_for_universal(self, needed: int) -> None:
        """Check that the disk has room for a conversion and the next checkpoint.

        Args:
            needed: size of the conversion in bytes.
        Raises:
            ConfigError: if it does not, with the sizes and a remedy.
        """
        free = shutil.disk_usage(self.root).free
        if free < 2 * needed + self.config.reserve_bytes:
            raise ConfigError(
                f"the newest checkpoint must be converted to another layout, which takes {needed / 1e9:.2f} GB in"
                f" {self.root}, and the next checkpoint as much again; {free / 1e9:.2f} GB are free, of which"
                f" checkpoint.reserve_bytes keeps {self.config.reserve_bytes / 1e9:.2f} GB; free"
                f" {(2 * needed + self.config.reserve_bytes - free) / 1e9:.2f} GB, or start the layout that saved it"
            )

    def check_room(self) -> None:
        """Check, without removing anything, that the next checkpoint will fit once incomplete ones are removed.

        Raises:
            ConfigError: if it will not, with the sizes and a remedy.
        """
        left_behind = sum(self._size_of(step) for step in self.all_steps() if not self.is_complete(step))
        self._to_remove(left_behind)

    def make_room(self) -> list[int]:
        """Make room for the next checkpoint by removing the oldest ones if the disk is short of space.

        The newest checkpoint and those that `_kept_for_good` names stay; if that cannot free enough, nothing is
        removed.

        Returns:
            The steps of the checkpoints that had to go.
        Raises:
            ConfigError: if it does not fit, with the sizes and a remedy.
        """
        removed = self._to_remove()
        for step in removed:
            self.try_to_discard(step)
        return removed

    def _to_remove(self, left_behind: int = 0) -> list[int]:
        """Return the fewest of the oldest checkpoints whose removal lets the next one fit.

        Args:
            left_behind: bytes of other files that will be freed anyway.
        """
        steps = self.steps()
        sizes = {step: self._size_of(step) for step in steps}
        needed = sizes[steps[-1]] if steps else self.expected_bytes
        free = shutil.disk_usage(self.root).free + left_behind
        removed = []
        for step in [s for s in steps[:-1] if s not in self._kept_for_good(steps)]:
            if free >= needed + self.config.reserve_bytes:
                break
            free += sizes[step]
            removed.append(step)
        if free >= needed + self.config.reserve_bytes:
            return removed
        raise ConfigError(
            f"the next checkpoint does not fit on the disk of {self.root}: it takes {needed / 1e9:.2f} GB,"
            f" checkpoint.reserve_bytes keeps {self.config.reserve_bytes / 1e9:.2f} GB free, and"
            f" {free / 1e9:.2f} GB are available, counting old checkpoints that may be removed;"
            f" free {(needed + self.config.reserve_bytes - free) / 1e9:.2f} GB"
            f" ({len(steps)} checkpoints hold {sum(sizes.values()) / 1e9:.2f} GB), or move run.dir to a larger disk"
        )

    def _size_of(self, step: int) -> int:
        """Return a checkpoint's size in bytes from COMPLETE, since a large run has thousands of files."""
        try:
            return sum(file.size for file in self.open(step).files)
        except CheckpointError:  # it is removed like any other
            return sum(path.stat().st_size for path in self.folder_of(step).rglob("*") if path.is_file())

    def _kept_for_good(self, steps: list[int]) -> set[int]:
        """Return the steps that `keep_every` keeps, the best, and the one to which the run may go back."""
        every, best = self.config.keep_every, self.best(steps)
        back = None
        if self._reach is not None and steps:
            back = max((step for step in steps if step <= steps[-1] - self._reach), default=steps[0])
        return {step for step in steps if (every and step % every == 0) or step in (best, back)}

    def try_to_discard(self, step: int) -> None:
        """Do what `discard` does, but only log a failure, which does no harm."""
        try:
            self.discard(step)
        except OSError as error:
            _logger.warning("the old checkpoint %s could not be removed: %s", self.folder_of(step), error)
