"""The folder of one run: its layout, files that survive a kill at any byte, and who may open it.

Only rank 0 writes here, except for the engine's files in a checkpoint. start -> run_folder -> {config, metrics, ...}.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import msgspec
import zstandard

from shards import ConfigError, HeadraceError
from shards.durable import fsync_folder, write_atomically

_logger = logging.getLogger(__name__)
_CHUNK_BYTES = 1 << 16


class _Stamped(msgspec.Struct):
    """The one field by which a resume decides whether to keep a record; msgspec skips the others unparsed."""

    step: int


def _step_of(line: bytes) -> int | None:
    """The optimizer step of a JSON record; None for one that was torn or is none."""
    try:
        return msgspec.json.decode(line, type=_Stamped).step
    except msgspec.DecodeError:
        return None


class StepLog:
    """A file of records, one or more for a step, that is only ever appended to, or cut back to a step.

    A record is one JSON line, or where the name ends in `.zst` one zstd frame with one JSON line. What is appended goes
    out in a single write, so that a kill tears at most the last one, and readers pass over what is torn. Numbers that
    are not finite become null, since JSON has none.
    """

    def __init__(self, path: Path):
        self.path = path
        self._compressed = path.suffix == ".zst"

    def append(self, *records: Mapping[str, object]) -> None:
        """Adds records in a single write: a kill between the lines of one evaluation would have them written twice."""
        lines = [msgspec.json.encode(record) + b"\n" for record in records]
        if self._compressed:
            lines = [zstandard.ZstdCompressor(level=6, write_checksum=True).compress(line) for line in lines]
        content = b"".join(lines)
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            written = os.write(descriptor, content)
            if written != len(content):  # a full disk: the torn record would hide the next one on its line
                os.ftruncate(descriptor, os.fstat(descriptor).st_size - written)
                raise HeadraceError(f"{self.path}: cannot append {len(content)} bytes; is the disk full?")
        finally:
            os.close(descriptor)

    def sync(self) -> None:
        """Makes all records durable against a loss of power; a kill alone loses none."""
        if self.path.exists():
            with self.path.open("rb") as file:
                os.fsync(file.fileno())

    def read(self, after: int = -1) -> Iterator[dict[str, object]]:
        """The records of all steps past `after`, in the order in which they were appended."""
        for line, _ in self._lines():
            step = _step_of(line)
            if step is not None and step > after:
                yield msgspec.json.decode(line, type=dict[str, object])

    def last(self, step: int | None = None) -> dict[str, object] | None:
        """The last record of a step up to `step`, or of all; None if there is none. Records stand in order of steps."""
        newest = None
        for line, _ in self._lines():
            found = _step_of(line)
            if found is not None and step is not None and found > step:
                break
            newest = line if found is not None else newest
        return None if newest is None else msgspec.json.decode(newest, type=dict[str, object])

    def cut_back(self, step: int) -> int:
        """Drops the records past a step, and a torn end, so that a resumed run writes each step once.

        Args:
            step: the last step to keep.
        Returns:
            How many bytes were dropped.
        """
        if not self.path.exists():
            return 0
        kept = 0  # where the last record to keep ends, of those before the first to drop
        later: list[bytes] = []  # records to keep that stand after it: of old checkpoints that were evaluated later
        dropping = False
        for line, end in self._lines():
            found = _step_of(line)
            dropping |= found is not None and found > step
            if found is not None and found <= step:
                kept = kept if dropping else end
                later += [line] if dropping else []
        size = self.path.stat().st_size
        if later:
            assert not self._compressed, "only evaluations are written out of order"
            head = self.path.read_bytes()[:kept]
            write_atomically(self.path, head + b"".join(later))
        elif kept < size:
            with self.path.open("rb+") as file:  # one truncation: done whole or not at all
                file.truncate(kept)
                os.fsync(file.fileno())
        return size - kept - sum(map(len, later))

    def _lines(self) -> Iterator[tuple[bytes, int]]:
        """Each complete record, as JSON, and the offset in the file at which it ends."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            if self._compressed:
                yield from _frames(file)
                return
            end = 0
            for line in file:
                end += len(line)
                if line.endswith(b"\n"):
                    yield line, end


def _frames(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """The content of each whole zstd frame and the offset at which it ends; stops at the first that is not whole."""
    end = 0
    pending = b""
    while True:
        decoder = zstandard.ZstdDecompressor().decompressobj()
        content = []
        while not decoder.eof:
            chunk = pending or file.read(_CHUNK_BYTES)
            if not chunk:
                return
            try:
                content.append(decoder.decompress(chunk))
            except zstandard.ZstdError:
                return
            pending = decoder.unused_data
            end += len(chunk) - len(pending)
        yield b"".join(content), end


@dataclass(frozen=True)
class RunFolder:
    """Where everything of a run lies. Making one touches nothing on disk."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def metrics(self) -> StepLog:
        return StepLog(self.root / "metrics.jsonl")

    @property
    def evals(self) -> StepLog:
        return StepLog(self.root / "evals.jsonl")

    def document_scores(self, step: int, suite: str) -> Path:
        """The sums of each document of a suite at a step, which comparisons are made from."""
        return self.root / "evals" / suite / f"step_{step:08d}.npz"

    @property
    def bad_records(self) -> StepLog:
        return StepLog(self.root / "bad_records.jsonl")

    def nonfinite(self, step: int) -> Path:
        """The documents of a step whose loss or gradient was no number, tab-separated."""
        return self.root / "nonfinite" / f"step_{step:08d}.tsv"

    @property
    def contaminated(self) -> StepLog:
        """The documents that data.decontaminate kept out."""
        return StepLog(self.root / "contaminated.jsonl")

    @property
    def cursors(self) -> StepLog:
        return StepLog(self.root / "cursors.jsonl.zst")

    @property
    def lease(self) -> Path:
        return self.root / "lease"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def wandb(self) -> Path:
        """wandb makes its own folder `wandb/` in the one that it is given, so this is the root's."""
        return self.root / "wandb"

    @property
    def _data_end(self) -> Path:
        return self.root / "data_end"

    def data_end(self) -> int | None:
        """The run's last step, where it has come to the end of its data; None as long as it has not."""
        try:
            return int(self._data_end.read_text())
        except FileNotFoundError:
            return None

    def note_data_end(self, step: int) -> None:
        """Notes that the data ends with this step: that is so however often these steps are trained."""
        write_atomically(self._data_end, str(step))

    def run_id(self) -> str:
        """The id of the run's wandb run, drawn when it is first asked for; the same for the life of the run."""
        path = self.wandb / "run_id"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            write_atomically(path, secrets.token_hex(4))
        return path.read_text()

    def check_there(self) -> None:
        """Raises: ConfigError naming the runs that there are, if this is none."""
        if not self.config.exists():
            runs = sorted(str(path.parent) for path in self.root.parent.glob("*/config.yaml"))
            there = f"runs beside it: {', '.join(runs)}" if runs else "name a run's folder, e.g. runs/quickstart"
            raise ConfigError(f"--run {self.root}: no run there (it has no config.yaml); {there}")

    def has_begun(self) -> bool:
        """Whether there is anything of a run here that another config could corrupt."""
        return any(True for _ in self.metrics.read()) or any(self.checkpoints.glob("step_*"))

    def create(self) -> None:
        """Makes the folder and those in it, where they are missing, and tries whether it can be written to.

        Raises:
            ConfigError: if it cannot.
        """
        try:
            for folder in (self.root, self.checkpoints):
                folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.root, prefix=".probe-") as probe:
                probe.write(b"?")
                probe.flush()
        except OSError as error:
            raise ConfigError(
                f"cannot write to the run folder {self.root}: {error.strerror}; "
                "set run.dir to a folder that you may write to, on a disk with room"
            ) from error

    def cut_back(self, step: int) -> None:
        """Takes back what a killed process wrote of the steps past a checkpoint's."""
        for log in (self.metrics, self.evals, self.bad_records, self.contaminated, self.cursors):
            if dropped := log.cut_back(step):
                _logger.info("%s: dropped %d bytes past step %d, to be written again", log.path, dropped, step)

    def sync(self) -> None:
        """Makes all records durable: to be called before a checkpoint is declared complete."""
        for log in (self.metrics, self.evals, self.bad_records, self.contaminated, self.cursors):
            log.sync()
        fsync_folder(self.root)  # one of them may be new

    def move_aside(self) -> Path:
        """Frees the run's name for a fresh start by renaming the folder to `<name>.<n>`; deletes nothing.

        The caller holds the lease, which is gone with the folder. Returns where that went.
        """
        numbered = re.compile(re.escape(self.root.name) + r"\.(\d+)")
        taken = [int(m[1]) for path in self.root.parent.iterdir() if (m := numbered.fullmatch(path.name))]
        aside = self.root.with_name(f"{self.root.name}.{max(taken, default=0) + 1}")
        self.root.rename(aside)
        (aside / "lease").unlink(missing_ok=True)
        fsync_folder(self.root.parent)
        return aside
