"""Which records of a source are its documents: by number, a hash of what they hold, or tokens. json_lines -> selection.

{source, window, suite} ask here, so that a run and a suite which divide a file between them mean the same by it. The
number of a document's tokens is known only once they are made, so it is asked about last.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import xxhash

from shards.arrays import Ints
from shards.config import SourceConfig
from shards.config_base import HashRange
from shards.errors import ShardError
from shards.records.json_lines import Records

SELECTION_VERSION = 1  # raise it whenever the same document would have another hash
_SEED = 0x6B6565705F736571  # no other hash of texts has it, so that no other choice by hash goes along with this one
_HASHES = 1 << 64


def taken_of(source: SourceConfig, counts: Sequence[int]) -> list[tuple[int, int]]:
    """Return which records a source takes of each of its shards: the first, and one past the last.

    Args:
        counts: number of records of each shard, in order.
    Raises: ShardError if `take` reaches beyond them.
    """
    first, end = source.take or (0, None)
    check_take(source, sum(counts))
    found, before = [], 0
    for count in counts:
        stop = count if end is None else min(max(end - before, 0), count)
        found.append((min(max(first - before, 0), stop), stop))
        before += count
    return found


def check_take(source: SourceConfig, num_records: int) -> None:
    """Check that a source has the records that it takes. Raises: ShardError saying how many it has."""
    if source.take is None:
        return
    first, end = source.take
    if first >= num_records or (end is not None and end > num_records):
        raise ShardError(
            f"source {source.name!r}: take: [{first}, {'null' if end is None else end}] reaches beyond the end of its "
            f"{num_records:,} records, blank lines counted; they have the numbers 0 to {num_records - 1}"
        )


def chosen(records: Records, source: SourceConfig) -> Records:
    """Return the records whose documents are the source's, judged by `hash_range`; bad records stay.

    `of_length` judges by the number of their tokens.
    """
    if source.hash_range is None:
        return records
    ids = records.token_ids
    contents = [text.encode() for text in records.texts] if ids is None else [bytes_of(one) for one in ids]
    return records.only(_in_range(contents, source.hash_range))


def of_length(lengths: Ints, source: SourceConfig) -> npt.NDArray[np.bool_]:
    """Return bool [documents]: whether each has as many tokens as `min_tokens` and `max_tokens` of its source say.

    Args:
        lengths: int64 [documents], tokens of each, BOS and EOS counted.
    """
    most = np.iinfo(np.int64).max if source.max_tokens is None else source.max_tokens
    kept: npt.NDArray[np.bool_] = (lengths >= (source.min_tokens or 0)) & (lengths <= most)
    return kept


def bytes_of(ids: Ints) -> bytes:
    """Return token ids as bytes, to be hashed."""
    return np.ascontiguousarray(ids, "<i8").tobytes()


def _in_range(contents: Iterable[bytes], bounds: HashRange) -> list[int]:
    """Return the positions of the contents with a hash, divided by 2^64, in a range."""
    # As decimals, so that two ranges with a common bound share no hash and leave none out
    low, high = (math.ceil(Fraction(str(bound)) * _HASHES) for bound in bounds)
    hashes = (xxhash.xxh3_64_intdigest(content, _SEED) for content in contents)
    return [number for number, digest in enumerate(hashes) if low <= digest < high]


def are_disjoint(one: Sequence[float | None], other: Sequence[float | None]) -> bool:
    """Return whether two ranges of numbers, or of hashes, have nothing in common; None as the end: no bound."""
    firsts = (bounds[0] or 0 for bounds in (one, other))
    ends = (math.inf if bounds[1] is None else bounds[1] for bounds in (one, other))
    return max(firsts) >= min(ends)
