"""Drawn rows -> the arrays that a step trains on, with what there is to say about them. lane -> batch -> loader."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from shards.cursor import LoaderState
from shards.lane import Draw
from shards.pool import WindowId
from shards.sources import Source

HASH_MODULUS = 1 << 64


class Origin(NamedTuple):
    """Where a piece of a row comes from."""

    slot: int  # of the row in the global batch
    source: str
    shard: str  # path
    line: int  # of the record in the unpacked shard, counted from 1
    start: int  # first token of the document that is in the piece, BOS counted
    stop: int  # one past the last


class Skipped(NamedTuple):
    """A record that was passed over to get to the rows of a batch."""

    source: str
    shard: str  # path
    line: int  # counted from 1
    reason: str


class Batch:
    """All rows of one optimizer step that belong to one data-parallel rank, in the order of their slots."""

    def __init__(
        self,
        draws: Sequence[Draw],
        slots: Sequence[int],
        sources: Sequence[Source],
        seq_len: int,
        state: LoaderState,
        epochs: dict[str, float],
    ) -> None:
        self._draws, self._slots, self._sources, self._state = draws, slots, sources, state
        self.tokens: npt.NDArray[np.int32] = np.zeros((len(draws), seq_len + 1), np.int32)
        self.segment_ids: npt.NDArray[np.int32] = np.zeros_like(self.tokens)  # 0 = padding, pieces of a row from 1
        self.n_targets = 0  # tokens that are to be predicted: all but the first of each piece
        self.row_hash = 0  # sum mod 2^64 of the rows' hashes keyed by slot: sum it over ranks
        # Bad records since the run's start, of this rank's lanes: sum it over ranks
        self.skipped_so_far = state.skipped
        self.epochs = epochs  # passes over each source so far, from this rank's lanes: average it over ranks
        counts: Counter[str] = Counter()
        for i, (name, window, row, _) in enumerate(draws):
            lengths = window.rows.fill(row, int(window.token_offsets[row]), self.tokens[i], self.segment_ids[i])
            self.n_targets += sum(lengths) - len(lengths)
            self._count(counts, name.source, draws[i], lengths)
            token_hash = xxhash.xxh3_64_intdigest(self.tokens[i].data, seed=slots[i])
            self.row_hash += xxhash.xxh3_64_intdigest(self.segment_ids[i].data, seed=token_hash)
        self.row_hash %= HASH_MODULUS
        self.source_tokens: dict[str, int] = dict(counts)  # per source, or per SOURCE/SUB_SOURCE; padding apart
        self.padding_tokens = self.tokens.size - counts.total()

    def _count(self, counts: Counter[str], source: int, draw: Draw, lengths: list[int]) -> None:
        name, window = self._sources[source].config.name, draw.window
        if not window.sub_sources:
            counts[name] += sum(lengths)
            return
        rows = window.rows
        documents = rows.documents[rows.row_pieces[draw.row] : rows.row_pieces[draw.row + 1]]
        for number, length in zip(window.sub_source_of[documents].tolist(), lengths, strict=True):
            counts[name if number < 0 else f"{name}/{window.sub_sources[number]}"] += length

    @property
    def state(self) -> dict[str, object]:
        """The loader's state after this batch; what to save once it was trained on."""
        return self._state.to_dict()

    @property
    def replays(self) -> int:
        """Entries that did not hold when the windows were read that these rows begin."""
        return sum(draw.window.replays for draw in self._draws if draw.row == 0)

    @property
    def skipped(self) -> list[Skipped]:
        """The bad records of the windows that were entered to get to these rows."""
        return self._passed_over(contaminated=False)

    @property
    def contaminated(self) -> list[Skipped]:
        """The documents of these windows that were dropped for sharing text with an evaluation suite."""
        return self._passed_over(contaminated=True)

    def _passed_over(self, contaminated: bool) -> list[Skipped]:
        return [
            Skipped(self._sources[name.source].config.name, self._shard(name), bad.line, bad.reason)
            for draw in self._draws
            for name, bad in draw.skipped
            if bad.contaminated == contaminated
        ]

    def origins(self) -> Iterator[Origin]:
        """Where each piece of each row comes from, in the order of rows and pieces."""
        for slot, (name, window, row, _) in zip(self._slots, self._draws, strict=True):
            rows = window.rows
            for piece in range(int(rows.row_pieces[row]), int(rows.row_pieces[row + 1])):
                start = int(rows.starts[piece])
                yield Origin(
                    slot=slot,
                    source=self._sources[name.source].config.name,
                    shard=self._shard(name),
                    line=int(window.lines[rows.documents[piece]]),
                    start=start,
                    stop=start + int(rows.lengths[piece]),
                )

    def _shard(self, name: WindowId) -> str:
        source = self._sources[name.source]
        return source.shards[source.windows(name.lane, name.segment)[name.window].shard].path
