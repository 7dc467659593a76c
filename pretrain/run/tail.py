"""Read the records of a growing file, each once, and count what cannot be read. step_log -> tail -> {report, watch}."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import msgspec

_CHUNK_BYTES = 1 << 20


class Damage(NamedTuple):
    """A line that is no record."""

    line: int  # counted from 1
    why: str


class Tail:
    """Follows one of a run's JSONL files, from another process and while the run writes it.

    Attributes:
        path: the file; it need not exist yet.
        damaged: the lines so far that are no records.
        is_torn: whether the file ends within a line: it is being written, or a kill has left it so.
        cuts: how often the file was found shorter or replaced, so that all of it was read again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cuts = 0
        self._start_over()

    def _start_over(self) -> None:
        self.damaged: list[Damage] = []
        self.is_torn = False
        self._end = 0  # offset behind the last complete line that was read
        self._lines = 0  # number of complete lines that were read
        self._last = b""  # the last of them, by which a file that was cut back and has grown again is found out

    def read(self) -> Iterator[dict[str, object]]:
        """Yield the records that are new since the last call; after a cut, which `cuts` counts first, all of them.

        Raises: OSError if the file is there and cannot be read.
        """
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            if self._end:
                self.cuts += 1
                self._start_over()
            return
        with file:
            if not self._continues(file):
                self.cuts += 1
                self._start_over()
            file.seek(self._end)
            yield from self._new_records(file)

    def _continues(self, file: BinaryIO) -> bool:
        return os.pread(file.fileno(), len(self._last), self._end - len(self._last)) == self._last

    def _new_records(self, file: BinaryIO) -> Iterator[dict[str, object]]:
        self.is_torn = False
        while lines := file.readlines(_CHUNK_BYTES):
            for line in lines:
                if not line.endswith(b"\n"):
                    self.is_torn = True
                    return
                self._end += len(line)
                self._lines += 1
                self._last = line
                if (record := self._record(line)) is not None:
                    yield record

    def _record(self, line: bytes) -> dict[str, object] | None:
        try:
            record = msgspec.json.decode(line, type=dict[str, object])
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            self.damaged.append(Damage(self._lines, str(error)))
            return None
        if not isinstance(record.get("step"), int):
            self.damaged.append(Damage(self._lines, "it has no step"))
            return None
        return record
