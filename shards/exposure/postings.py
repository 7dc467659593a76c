"""Tables in a file, from 64-bit hashes to the records that have them. postings -> text_index.

A table is sorted by hash. Its first bits number a *bucket* of 8 to 16 entries; an entry holds the next 32 bits and the
record's number, 8 bytes. So N entries keep 28 + log2(N) bits of a hash or more, and a record that is found may lack it:
whoever asks reads the record.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from shards.arrays import Hashes, Ints
from shards.index.paths import writing

Entries = npt.NDArray[np.uint32]

_RUN_ENTRIES = 1 << 22  # entries sorted together in memory, at 12 bytes each
_BUCKET_BITS = 4  # a bucket has up to two to this power of entries on average
_HASH_BITS, _KEPT_BITS = 64, 32
_ENTRY_BYTES, _START_BYTES = 8, 4


class Shape(NamedTuple):
    """All that must be known to read a table."""

    bits: int  # bits of a bucket's number
    num_entries: int

    @property
    def num_bytes(self) -> int:
        return _ENTRY_BYTES * self.num_entries + _START_BYTES * ((1 << self.bits) + 1)


class PostingsWriter:
    """A table in the making; beyond some entries they wait, in sorted runs, in a file without name."""

    def __init__(self, path: Path) -> None:
        """Begin an empty table of the file `path`. Raises: ShardError if its folder is not writable."""
        self._path = path
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._scratch = tempfile.TemporaryFile(dir=path.parent)  # noqa: SIM115 - closed when the table is written
        self._hashes: list[Hashes] = []  # of the open run
        self._records: list[Entries] = []
        self._runs: list[tuple[Hashes, Entries]] = []
        self._size = 0  # of the open run

    def add(self, hashes: Hashes, records: Ints) -> None:
        """Add hashes, each with its record, which never falls. Raises: ShardError if the disk is full."""
        self._hashes.append(hashes)
        self._records.append(records.astype(np.uint32))
        self._size += len(hashes)
        if self._size >= _RUN_ENTRIES:
            with writing(self._path):
                self._runs.append(self._spilled(*self._close_run()))

    def _close_run(self) -> tuple[Hashes, Entries]:
        """Sort the open run, and drop what a record has twice."""
        hashes = np.concatenate([np.zeros(0, np.uint64), *self._hashes])
        records = np.concatenate([np.zeros(0, np.uint32), *self._records])
        self._hashes, self._records, self._size = [], [], 0
        order = np.argsort(hashes, kind="stable")
        hashes, records = hashes[order], records[order]
        first = np.append(True, (hashes[1:] != hashes[:-1]) | (records[1:] != records[:-1]))[: len(hashes)]
        return hashes[first], records[first]

    def _spilled(self, *run: npt.NDArray[np.unsignedinteger]) -> tuple[Hashes, Entries]:
        """Write a run to the scratch file, and map it."""
        mapped = []
        for column in run:
            offset = self._scratch.tell()
            self._scratch.write(column.data)
            self._scratch.flush()
            mapped.append(np.memmap(self._scratch, column.dtype, "r", offset, column.shape))
            self._scratch.seek(0, 2)
        return mapped[0], mapped[1]

    def write(self, file: BinaryIO) -> Shape:
        """Write the table at a file's position, part by part of the hashes' range."""
        self._runs.append(self._close_run())
        size = sum(len(hashes) for hashes, _ in self._runs)
        assert size < 1 << 32, "a shard of some 700 GB"
        bits = max(1, size.bit_length() - _BUCKET_BITS)
        part_bits = min(bits, (size // _RUN_ENTRIES).bit_length())
        bounds = [np.uint64(part << (_HASH_BITS - part_bits)) for part in range(1, 1 << part_bits)]
        cuts = [[0, *np.searchsorted(hashes, bounds).tolist(), len(hashes)] for hashes, _ in self._runs]
        counts = []
        for part in range(1 << part_bits):
            pieces = [(run, slice(cut[part], cut[part + 1])) for run, cut in zip(self._runs, cuts, strict=True)]
            hashes, records = (np.concatenate([run[column][piece] for run, piece in pieces]) for column in (0, 1))
            order = np.argsort(hashes, kind="stable")
            hashes = hashes[order]
            kept = (hashes >> np.uint64(_HASH_BITS - _KEPT_BITS - bits)).astype(np.uint32)
            file.write(np.stack([kept, records[order]], axis=1).data)
            buckets = (hashes >> np.uint64(_HASH_BITS - bits)).astype(np.int64) - (part << (bits - part_bits))
            counts.append(np.bincount(buckets, minlength=1 << (bits - part_bits)))
        file.write(np.concatenate([[0], np.cumsum(np.concatenate(counts))]).astype("<u4").data)
        self._scratch.close()
        return Shape(bits, size)


class Postings:
    """A table, mapped into memory."""

    def __init__(self, path: Path, offset: int, shape: Shape) -> None:
        self._bits = shape.bits
        self._entries: Entries = np.zeros((0, 2), np.uint32)
        if shape.num_entries:
            self._entries = np.memmap(path, "<u4", "r", offset, (shape.num_entries, 2))
        offset += _ENTRY_BYTES * shape.num_entries
        self._starts: Entries = np.memmap(path, "<u4", "r", offset, ((1 << shape.bits) + 1,))

    def find(self, hashes: Hashes) -> tuple[Ints, Ints]:
        """Look up hashes.

        Returns: (numbers of those hashes, records that have them or may seem to), one pair for each record found.
        """
        buckets = (hashes >> np.uint64(_HASH_BITS - self._bits)).astype(np.int64)
        starts = self._starts[buckets].astype(np.int64)
        counts = self._starts[buckets + 1] - starts
        which = np.repeat(np.arange(len(hashes)), counts)
        places = np.arange(len(which)) + np.repeat(starts - (np.cumsum(counts) - counts), counts)
        kept = (hashes >> np.uint64(_HASH_BITS - _KEPT_BITS - self._bits)).astype(np.uint32)
        equal = self._entries[places, 0] == kept[which]
        return which[equal], self._entries[places[equal], 1].astype(np.int64)
