"""A bounded sample of the texts of shards, to train a tokenizer on. texts -> training_sample -> training.

Texts are cut into stretches, and the sample is those with the lowest hashes: each has the same chance, wherever it
stands. Which ones are taken depends on nothing but the texts, so it is the same on every machine, whatever the shards
are called, how they are compressed and in what order they are read.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import Literal

import xxhash

from shards.config import SourceConfig
from shards.records.json_lines import bad_record_error
from shards.records.texts import records_of_shard

STRETCH_CHARACTERS = 2000  # so few words are cut that it cannot be seen in a vocabulary
MAX_STRETCH_BYTES = 4 * STRETCH_CHARACTERS  # in UTF-8
_ADVICE = "correct the record, or pass --on-bad-record skip"


class TrainingSample:
    """The stretches with the lowest hashes of all that were read.

    Attributes:
        num_bytes: bytes of the sample, in UTF-8.
        read_bytes: bytes of all texts that were read.
        num_documents: documents that were read.
        num_bad: bad records that were passed over.
        first_bad: where the first of them is, and what is wrong with it.
    """

    def __init__(self, max_bytes: int) -> None:
        """Begin an empty sample.

        Args:
            max_bytes: limit on its size in UTF-8; at least MAX_STRETCH_BYTES, so that one stretch fits.
        """
        self._max_bytes = max_bytes
        self._heap: list[tuple[int, bytes]] = []  # (-hash, stretch), the highest hash first
        self._ceiling = 1 << 64  # the lowest hash of a stretch that did not fit; those from there on never will
        self.num_bytes = self.read_bytes = self.num_documents = self.num_bad = 0
        self.first_bad = ""

    def add_shard(self, shard: str, source: SourceConfig, on_bad_record: Literal["fail", "skip"]) -> None:
        """Read a shard, which may be a column of a Parquet file.

        Args:
            source: the source with the keys to read.
            on_bad_record: end with an error at a bad record, or count it.
        Raises: ShardError if the shard is missing or damaged or, with "fail", holds a bad record.
        """
        for records in records_of_shard(shard, source):
            if records.bad:
                error = bad_record_error(shard, records.bad[0], _ADVICE)
                if on_bad_record == "fail":
                    raise error
                self.num_bad += len(records.bad)
                self.first_bad = self.first_bad or str(error).removesuffix(f"; {_ADVICE}")
            for text in records.texts:
                self.add(text)

    def add(self, text: str) -> None:
        """Take in a document."""
        self.num_documents += 1
        for start in range(0, len(text), STRETCH_CHARACTERS):
            stretch = text[start : start + STRETCH_CHARACTERS].encode()
            self.read_bytes += len(stretch)
            key = xxhash.xxh3_64_intdigest(stretch)
            if key < self._ceiling:
                heapq.heappush(self._heap, (-key, stretch))
                self.num_bytes += len(stretch)
                self._shrink()

    def _shrink(self) -> None:
        while self.num_bytes > self._max_bytes:
            key, stretch = heapq.heappop(self._heap)
            self.num_bytes -= len(stretch)
            self._ceiling = -key

    def drain(self) -> Iterator[str]:
        """Yield the stretches in the order of their hashes, and let go of each, so that it is not held twice."""
        self._heap.sort()
        while self._heap:
            yield self._heap.pop()[1].decode()
