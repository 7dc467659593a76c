"""What a run's data is like: its documents' lengths, its sources' tokens, and what each packing would do to it.

source, window -> description -> the index command. Large data is described by a sample of windows, spread evenly over
each source.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from shards import preparation
from shards.arrays import Ints
from shards.config import DataConfig, Packing
from shards.plan.segments import WindowId
from shards.source import DealRule, Source
from shards.tokenize.tokenizer import Tokenizer
from shards.windows.packing import pack
from shards.windows.recipe import Tools
from shards.windows.window import WindowMaker


class SourceDescription(NamedTuple):
    """A source, and the documents of it that were looked at.

    Attributes:
        num_shards, num_documents, raw_bytes: of all that the source takes; the bytes also of what its hash_range and
            length bounds leave out, and the documents estimated where a sample must tell how many it keeps.
        selection: the keys that choose a part of its records.
        is_sample: whether only some of its documents were looked at.
        read_bytes: raw bytes that were looked at, about.
        lengths: int64 [documents looked at], tokens of each, BOS and EOS counted.
        num_skipped: bad records among those looked at.
        left_out: int64 [documents], tokens of each that was looked at and that min_tokens or max_tokens leaves out.
    """

    name: str
    weight: float
    selection: tuple[str, ...]
    num_shards: int
    num_documents: int
    raw_bytes: int
    is_sample: bool
    read_bytes: int
    lengths: Ints
    num_skipped: int
    left_out: Ints

    @property
    def tokens(self) -> int:
        """Return the source's tokens, those of a sample raised by the bytes that it leaves out."""
        found = int(self.lengths.sum())
        return _of_all(found, self.raw_bytes, self.read_bytes) if self.is_sample else found


class PackingDescription(NamedTuple):
    """What a packing does to the documents.

    Attributes:
        rows: rows that they fill.
        padding: share of the rows' places that no token has.
        cut: share of the documents that are cut although they would have fitted a row.
        dropped: share of the tokens that are in no row.
    """

    name: str
    rows: int
    padding: float
    cut: float
    dropped: float


class Description(NamedTuple):
    """Sources, and packings of what was looked at of all of them together."""

    sources: tuple[SourceDescription, ...]
    packings: tuple[PackingDescription, ...]


def describe(config: DataConfig, max_bytes: int) -> Description:
    """Describe the data of a config, whose shards are indexed.

    Args:
        max_bytes: raw bytes to look at, shared evenly by the sources.
    Raises: ConfigError, ShardError if a shard, its index or the tokenizer is missing or damaged.
    """
    packings = _packings(config.packing)
    counts = {name: np.zeros(5, np.int64) for name in packings}
    maker = WindowMaker([config], Tools(Tokenizer.of(config)))
    try:
        budget = max_bytes // len(config.sources)
        found = tuple(_source(config, number, budget, maker, counts) for number in range(len(config.sources)))
    finally:
        maker.close()
    tokens = max(1, sum(int(each.lengths.sum()) for each in found))
    documents = max(1, sum(len(each.lengths) for each in found))
    return Description(
        found,
        tuple(
            PackingDescription(name, int(rows), padding / max(1, places), cut / documents, dropped / tokens)
            for name, (rows, places, padding, cut, dropped) in ((key, of_it.tolist()) for key, of_it in counts.items())
        ),
    )


def _source(
    config: DataConfig, number: int, budget: int, maker: WindowMaker, counts: dict[str, Ints]
) -> SourceDescription:
    """Describe a source, and add what each packing does to its windows to the counts, as `_counts` returns them."""
    own = config.sources[number]
    shards = preparation.source_shards(config, own)
    source = Source(config, number, shards, 0, {0: DealRule(1, 1)})
    packings = _packings(config.packing)
    lengths, left_out, size, skipped = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], 0, 0
    for name in _windows(source, budget):
        task = source.task(name)
        documents = maker.documents(task, skip_bad=True)
        lengths.append(documents.lengths)
        left_out.append(documents.left_out)
        size += task.raw_bytes
        skipped += len(documents.skipped)
        for packing, of_it in counts.items():
            of_it += _counts(documents.lengths, config.seq_len, packings[packing], task.key)
    raw_bytes = source.plan.raw_bytes
    num_documents = sum(shard.index.num_documents for shard in shards)
    is_sample = raw_bytes > budget
    if own.selection:
        num_documents = sum(map(len, lengths)) + skipped
        num_documents = _of_all(num_documents, raw_bytes, size) if is_sample else num_documents
    return SourceDescription(
        name=own.name,
        weight=own.weight,
        selection=tuple(own.selection),
        num_shards=sum(stop > first for first, stop in source.taken),
        num_documents=num_documents,
        raw_bytes=raw_bytes,
        is_sample=is_sample,
        read_bytes=size,
        lengths=np.concatenate(lengths),
        num_skipped=skipped,
        left_out=np.concatenate(left_out),
    )


def _of_all(found: int, raw_bytes: int, read_bytes: int) -> int:
    """Raise what was found in a part of a source to all of it."""
    return round(found * raw_bytes / max(1, read_bytes))


def _packings(own: Packing) -> dict[str, Packing]:
    """Return the packings to compare: those without a setting, and the config's."""
    found: dict[str, Packing] = {"best_fit": "best_fit", "concat": "concat", "truncate": "truncate", "pad": "pad"}
    if not isinstance(own, str):
        ((key, tokens),) = own.model_dump().items()
        found[f"{key}: {tokens}"] = own
    return found


def _windows(source: Source, budget: int) -> Iterator[WindowId]:
    """Yield windows of one epoch, about `budget` raw bytes of them, as far apart as each other; the first always."""
    share = max(1.0, source.plan.raw_bytes / max(1, budget))  # of the windows, one in so many
    number = segment = 0
    while segment < source.plan.num_segments:
        deal = source.deal(0, segment)
        for window in range(len(deal.windows)):
            if math.floor(number / share) > math.floor((number - 1) / share):
                yield WindowId(source.number, 0, segment, window)
            number += 1
        segment = deal.next


def _counts(lengths: Ints, seq_len: int, packing: Packing, key: int) -> Ints:
    """Count what a packing does to a window: [rows, places in them, padding, documents cut, tokens dropped]."""
    packed = pack(np.zeros(int(lengths.sum()), np.uint16), lengths, seq_len, packing, key)
    pieces = np.bincount(packed.documents, minlength=len(lengths))
    places = packed.num_rows * (seq_len + 1)
    kept = int(packed.lengths.sum())
    cut = int(((pieces > 1) & (lengths <= seq_len + 1)).sum())
    # A piece after a document's first repeats one token; of "concat" rows do, and it never drops any
    dropped = 0 if packing == "concat" else int(lengths.sum()) - kept + int((packed.starts > 0).sum())
    return np.array([packed.num_rows, places, places - kept, cut, dropped], np.int64)
