"""Append records to files that survive a kill at any byte and hold each step once. run_folder -> step_log."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import msgspec
import zstandard

from shards import HeadraceError
from shards.storage.atomic import fsync_folder, is_there, write_atomically

_CHUNK_BYTES = 1 << 16


class _Stamped(msgspec.Struct):
    """The field by which a resume decides whether to keep a record; msgspec skips the others unparsed."""

    step: int


def _step_in(line: bytes) -> int | None:
    """Return the optimizer step of a JSON record; None if it is torn or not a record."""
    try:
        return msgspec.json.decode(line, type=_Stamped).step
    except msgspec.DecodeError:
        return None


def step_of(record: Mapping[str, object]) -> int:
    """Return the optimizer step of a record that was read."""
    return int(str(record["step"]))


class StepLog:
    """A file of records, one or more per step, that is only appended to or cut back to a step.

    A record is one JSON line or, if the name ends in `.zst`, one zstd frame with one JSON line. Each append is a single
    write, so that a kill tears at most the last record, and readers skip torn ones. Numbers that are not finite become
    null, since JSON has none.
    """

    def __init__(self, path: Path):
        self.path = path
        self._compressed = path.suffix == ".zst"

    def append(self, *records: Mapping[str, object]) -> None:
        """Append records in a single write, so that a kill cannot separate an evaluation's records."""
        lines = [msgspec.json.encode(record) + b"\n" for record in records]
        if self._compressed:
            lines = [_frame(line) for line in lines]
        content = b"".join(lines)
        descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            if not self._compressed and _is_torn(descriptor):
                content = b"\n" + content  # otherwise a reader would take both for one line and skip it
            written = os.write(descriptor, content)
            if written != len(content):  # the disk is full, and the torn record would hide the next one on its line
                os.ftruncate(descriptor, os.fstat(descriptor).st_size - written)
                raise HeadraceError(f"{self.path}: cannot append {len(content)} bytes; is the disk full?")
        finally:
            os.close(descriptor)

    def sync(self) -> None:
        """Make all records durable against a power failure; a kill alone loses none."""
        with suppress(FileNotFoundError), self.path.open("rb") as file:
            os.fsync(file.fileno())

    def read(self, after: int = -1, until: float = math.inf) -> Iterator[dict[str, object]]:
        """Read the records of all steps past `after`, up to `until`, in the order in which they were appended."""
        for line, _ in self._lines():
            step = _step_in(line)
            if step is not None and after < step <= until:
                yield msgspec.json.decode(line, type=dict[str, object])

    def last(self, step: int | None = None) -> dict[str, object] | None:
        """Read the last record of the steps up to `step`, or of all; None if there is none. Steps must be in order."""
        newest = None
        for line, _ in self._lines():
            found = _step_in(line)
            if found is not None and step is not None and found > step:
                break
            newest = line if found is not None else newest
        return None if newest is None else msgspec.json.decode(newest, type=dict[str, object])

    def copy_until(self, step: int, target: Path) -> None:
        """Write a copy of the file that ends with the last record of the steps up to one; make it durable."""
        with target.open("xb") as file:
            for line, _ in self._lines():
                found = _step_in(line)
                if found is not None and found <= step:
                    file.write(_frame(line) if self._compressed else line)
            file.flush()
            os.fsync(file.fileno())

    def cut_back(self, step: int, aside: Path, reason: str) -> int:
        """Move the records past a step to another file, and drop a torn end, so that each step is recorded once.

        Args:
            step: the last step to keep.
            aside: file to which the records are durably appended before they are cut off.
            reason: stands in each of them as `retracted`.
        Returns:
            The number of records cut off.
        """
        kept = 0  # end of the last record to keep before the first to cut off
        later: list[bytes] = []  # records to keep after it, from late evaluations of old checkpoints
        cut = 0
        with _Aside(aside, self._compressed) as cut_off:
            for line, end in self._lines():
                found = _step_in(line)
                if found is not None and found > step:
                    cut += 1
                    record = msgspec.json.decode(line, type=dict[str, object])
                    cut_off.add(msgspec.json.encode(record | {"retracted": reason}) + b"\n")
                elif found is not None:
                    kept = kept if cut else end
                    later += [line] if cut else []
        if later:
            assert not self._compressed, "only evaluations are written out of order"
            with self.path.open("rb") as file:
                head = file.read(kept)
            write_atomically(self.path, head + b"".join(later))
        elif kept < self._size():
            with self.path.open("rb+") as file:  # a single truncation happens entirely or not at all
                file.truncate(kept)
                os.fsync(file.fileno())
        return cut

    def _size(self) -> int:
        return self.path.stat().st_size if is_there(self.path) else 0

    def _lines(self) -> Iterator[tuple[bytes, int]]:
        """Read each complete record as JSON, with the offset in the file at which it ends."""
        if not is_there(self.path):
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


class _Aside:
    """A file for the records cut off from another; it is created with the first of them."""

    def __init__(self, path: Path, compressed: bool) -> None:
        self._path, self._compressed = path, compressed
        self._file: BinaryIO | None = None

    def __enter__(self) -> _Aside:
        return self

    def add(self, line: bytes) -> None:
        if self._file is None:
            self._path.parent.mkdir(exist_ok=True)
            self._file = self._path.open("ab")
        self._file.write(_frame(line) if self._compressed else line)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            with self._file:
                self._file.flush()
                os.fsync(self._file.fileno())
            fsync_folder(self._path.parent)


def _frame(line: bytes) -> bytes:
    """Compress a record into its own frame."""
    return zstandard.ZstdCompressor(level=6, write_checksum=True).compress(line)


def _is_torn(descriptor: int) -> bool:
    """Return whether an open file ends within a line, as a kill or a power failure may leave it."""
    size = os.fstat(descriptor).st_size
    return size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"


def _frames(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """Read the content of each complete zstd frame and the offset at which it ends, up to the first incomplete one."""
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
