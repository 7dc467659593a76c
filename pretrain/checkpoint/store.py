"""Keeps a run's checkpoints: opens, verifies and removes them. A folder without a valid COMPLETE is no checkpoint.

checkpoints/step_00001000/
    engine/      DeepSpeed's files, of every rank
    data.json    where the loader stood            state.json   where the run stood
    COMPLETE     written last: names, sizes and hashes of all the others
"""

from __future__ import annotations

import itertools
import logging
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import msgspec
import xxhash
from pydantic import Field

from shards import CheckpointError, Config, ConfigError
from shards.storage.atomic import fsync_folder, is_there, names_in, write_atomically
from shards.storage.content_hash import hash_file

_logger = logging.getLogger(__name__)

COMPLETE = "COMPLETE"
_FOLDER = re.compile(r"step_(\d{8,})")


class CheckpointConfig(Config):
    """When to save, and what to keep. The last step is always saved."""

    every: int = Field(1000, ge=1)  # optimizer steps
    keep: int = Field(2, ge=1)  # how many of the newest stay
    keep_every: int | None = Field(None, ge=1)  # steps divisible by this stay for good, besides
    # Write while training goes on, from a copy in host memory as large as what a rank saves
    asynchronous: bool = True
    max_failed_saves: int = Field(10, ge=1)  # saves in a row that fail, at which the run ends
    reserve_bytes: int = Field(1 << 28, ge=0)  # of the disk, which a checkpoint leaves free for logs and other things

    def due(self, step: int) -> bool:
        return step % self.every == 0


class FileEntry(msgspec.Struct, frozen=True):
    """One file of a checkpoint, as COMPLETE names it."""

    name: str  # relative to the checkpoint's folder, with forward slashes
    size: int  # bytes
    hash: str  # xxh3-128 of the content, 32 hex digits


class CompleteFile(msgspec.Struct, frozen=True):
    """The content of COMPLETE."""

    files: list[FileEntry]
    seconds: float  # that the save took, from its beginning to this file
    hash: str = ""  # xxh3-128 of the rest as JSON, 32 hex digits

    def signed(self) -> CompleteFile:
        """Return the same content with the hash that it ought to have."""
        rest = msgspec.structs.replace(self, hash="")
        return msgspec.structs.replace(self, hash=xxhash.xxh3_128_hexdigest(msgspec.json.encode(rest)))


@dataclass(frozen=True)
class Checkpoint:
    """One complete checkpoint; its files may still turn out to be damaged."""

    folder: Path
    step: int
    files: list[FileEntry]
    seconds: float  # that the save took

    def broken_files(self, share: int = 0, shares: int = 1) -> list[str]:
        """Say what is wrong with the files of one share of `shares`, a sentence each; empty if nothing is."""
        return [found for entry in self.files[share::shares] if (found := _damage(self.folder, entry))]


def _damage(folder: Path, entry: FileEntry) -> str | None:
    path = folder / entry.name
    try:
        size = path.stat().st_size
        if size != entry.size:
            return f"{path} has {size} bytes instead of {entry.size}"
        if hash_file(path) != entry.hash:
            return f"{path} differs from what was saved"
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    return None


def write_complete(folder: Path, files: list[FileEntry], seconds: float) -> None:
    """Declare a folder complete."""
    content = CompleteFile(sorted(files, key=lambda entry: entry.name), round(seconds, 3)).signed()
    write_atomically(folder / COMPLETE, msgspec.json.format(msgspec.json.encode(content)))


def read_complete(folder: Path, step: int) -> Checkpoint:
    """Open a folder that was declared complete. Raises CheckpointError if it was not, or COMPLETE itself is damaged."""
    try:
        content = msgspec.json.decode((folder / COMPLETE).read_bytes(), type=CompleteFile)
    except (OSError, ValueError, msgspec.MsgspecError) as error:  # ValueError: no UTF-8
        raise CheckpointError(f"{folder / COMPLETE} cannot be read: {error}") from error
    if content != content.signed():
        raise CheckpointError(f"{folder / COMPLETE} differs from what was saved")
    return Checkpoint(folder, step, content.files, content.seconds)


class CheckpointStore:
    """The checkpoints in one folder. Any rank may read them; only rank 0 changes anything.

    Args:
        root: the folder.
        config: when to save and what to keep.
        expected_bytes: size of a checkpoint, which counts until there is one to measure; only saving needs it.
    """

    def __init__(self, root: Path, config: CheckpointConfig, expected_bytes: int = 0) -> None:
        self.root = root
        self.config = config
        self.expected_bytes = expected_bytes

    def folder_of(self, step: int) -> Path:
        return self.root / f"step_{step:08d}"

    def complete(self, step: int, files: list[FileEntry], seconds: float) -> None:
        """Declare a checkpoint complete; its files and their names are durable already.

        Args:
            seconds: that the save has taken so far.
        """
        write_complete(self.folder_of(step), files, seconds)

    def is_complete(self, step: int) -> bool:
        """Return whether a step's checkpoint was completed; its files may have been damaged since.

        Raises:
            OSError: if the disk does not say; a checkpoint that it does not show at the moment must not be removed.
        """
        return is_there(self.folder_of(step) / COMPLETE)

    def steps(self) -> list[int]:
        """Return the steps whose checkpoints were completed, oldest first."""
        return [step for step in self.all_steps() if self.is_complete(step)]

    def all_steps(self) -> list[int]:
        """Return the steps that have a folder, oldest first, whether or not it was completed."""
        found = (_FOLDER.fullmatch(name) for name in names_in(self.root))
        return sorted(int(match[1]) for match in found if match)

    def has_damaged(self) -> bool:
        """Return whether any checkpoint was set aside."""
        return any(name.endswith(".damaged") for name in names_in(self.root))

    def open(self, step: int) -> Checkpoint:
        """Open the checkpoint of a step.

        Raises:
            CheckpointError: if it is not complete, or COMPLETE itself is damaged.
        """
        return read_complete(self.folder_of(step), step)

    def universal_folder(self, step: int, tp_size: int) -> Path:
        """Return the folder for a checkpoint's conversion, which is removed when a newer checkpoint is complete."""
        return self.folder_of(step).with_suffix(f".universal-tp{tp_size}")

    def discard_universal(self, step: int | None = None) -> None:
        """Remove the conversions of a step's checkpoint, or of all checkpoints; COMPLETE first."""
        name = "step_*" if step is None else self.folder_of(step).name
        for folder in self.root.glob(f"{name}.universal-tp*"):
            (folder / COMPLETE).unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)

    def find(self, step: int | None = None) -> Checkpoint:
        """Open the checkpoint of a step, by default the newest.

        Raises:
            CheckpointError: if there is none; the message lists those that there are.
        """
        steps = self.steps()
        if not steps:
            raise CheckpointError(f"{self.root} has no complete checkpoint")
        if step is not None and step not in steps:
            raise CheckpointError(f"{self.root} has no complete checkpoint of step {step}; there are {steps}")
        return self.open(steps[-1] if step is None else step)

    def prepare(self, step: int) -> Path:
        """Make an empty folder for a new checkpoint, in place of what a killed save may have left there."""
        folder = self.folder_of(step)
        assert not self.is_complete(step), f"{folder} is complete and is not written over"
        self.discard_universal(step)  # it belongs to a checkpoint of this step that was damaged and set aside
        if is_there(folder):
            shutil.rmtree(folder)
        (folder / "engine").mkdir(parents=True)
        fsync_folder(folder)
        fsync_folder(self.root)
        return folder

    def discard(self, step: int) -> None:
        """Remove a checkpoint, or what there is of it.

        Raises:
            OSError: if something of it is left, which is no checkpoint any more.
        """
        folder = self.folder_of(step)
        # COMPLETE first: a half-removed checkpoint must not look whole
        (folder / COMPLETE).unlink(missing_ok=True)
        fsync_folder(folder)
        shutil.rmtree(folder)

    def discard_incomplete(self) -> None:
        """Remove what killed saves left behind, which would take up room; no save may be in progress."""
        for step in self.all_steps():
            if not self.is_complete(step):
                self.try_to_discard(step)

    def set_aside(self, step: int) -> Path:
        """Rename a damaged checkpoint, which frees its name for a new one and keeps what is left of it."""
        folder = self.folder_of(step)
        names = itertools.chain([f"{folder.name}.damaged"], (f"{folder.name}.{n}.damaged" for n in itertools.count(2)))
        aside = next(path for name in names if not is_there(path := folder.with_name(name)))
        folder.rename(aside)
        fsync_folder(self.root)
        return aside

    def prune(self) -> None:
        """Remove what the config does not keep and what killed saves left behind; a failure is only logged."""
        try:
            steps, folders = self.steps(), self.all_steps()
        except OSError as error:
            _logger.warning("old checkpoints in %s could not be looked for: %s", self.root, error)
            return
        kept = {*steps[-self.config.keep :], *self._kept_for_good(steps)}
        for step in folders:
            if step not in kept and step < steps[-1]:
                self.try_to_discard(step)
        self.discard_universal()  # the newest checkpoint was saved in the layout that trains

    def check_room_for_universal(self, needed: int) -> None:
        """Check that a conversion fits on the disk, and the next checkpoint beside it.

        Args:
            needed: bytes of the conversion.
        Raises:
            ConfigError: with sizes, and what to do.
        """
        free = shutil.disk_usage(self.root).free
        if free < 2 * needed + self.config.reserve_bytes:
            raise ConfigError(
                f"the newest checkpoint is to be converted for another layout, which takes {needed / 1e9:.2f} GB in"
                f" {self.root}, and the next checkpoint as much again; {free / 1e9:.2f} GB are free, of which"
                f" checkpoint.reserve_bytes keeps {self.config.reserve_bytes / 1e9:.2f} GB; free"
                f" {(2 * needed + self.config.reserve_bytes - free) / 1e9:.2f} GB, or start the layout that saved it"
            )

    def check_room(self) -> None:
        """Check, without removing anything, that the next checkpoint will fit once incomplete ones are gone.

        Raises:
            ConfigError: if it will not, with sizes and what to do.
        """
        left_behind = sum(self._size_of(step) for step in self.all_steps() if not self.is_complete(step))
        self._to_remove(left_behind)

    def make_room(self) -> None:
        """Make the next checkpoint fit, by removing the oldest ones where the disk is short.

        The newest checkpoint stays, and so do those that `keep_every` keeps; if that is not enough, everything stays.

        Raises:
            ConfigError: if it does not fit, with sizes, and what to do.
        """
        for step in self._to_remove():
            _logger.warning("the disk is short of room for the next checkpoint: the one of step %d goes", step)
            self.try_to_discard(step)

    def _to_remove(self, left_behind: int = 0) -> list[int]:
        """Return the fewest of the oldest checkpoints whose removal lets the next one fit.

        Args:
            left_behind: bytes that will be freed in any case.
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
            f" {free / 1e9:.2f} GB are there, counting the old checkpoints that may go;"
            f" free {(needed + self.config.reserve_bytes - free) / 1e9:.2f} GB there"
            f" ({len(steps)} checkpoints hold {sum(sizes.values()) / 1e9:.2f} GB), or move run.dir to a larger disk"
        )

    def _size_of(self, step: int) -> int:
        """Return the bytes of a checkpoint, as COMPLETE counts them: a large run has thousands of files."""
        try:
            return sum(entry.size for entry in self.open(step).files)
        except CheckpointError:  # it may be removed like any other
            return sum(path.stat().st_size for path in self.folder_of(step).rglob("*") if path.is_file())

    def _kept_for_good(self, steps: list[int]) -> set[int]:
        every = self.config.keep_every
        return {step for step in steps if every and step % every == 0}

    def try_to_discard(self, step: int) -> None:
        """Do as `discard` does; a failure is only logged, and does no harm."""
        try:
            self.discard(step)
        except OSError as error:
            _logger.warning("the old checkpoint %s could not be removed: %s", self.folder_of(step), error)
