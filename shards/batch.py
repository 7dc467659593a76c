"""Drawn rows -> the arrays that a step trains on, and where they came from. lane -> batch -> loader."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from shards.lane import Draw, Row
from shards.plan.cursor import LoaderState
from shards.source import Source

_HASH_MODULUS = 1 << 64


class Origin(NamedTuple):
    """The place that a piece of a row comes from."""

    slot: int  # position of the row in the global batch
    source: str
    shard: str  # path
    line: int  # line of the record in the unpacked shard, counted from 1
    start: int  # index of the piece's first token in the document, BOS counted
    stop: int  # one past the last token


class Skipped(NamedTuple):
    """A record that was skipped on the way to the rows of a batch."""

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
        skipped_so_far: int,
        epochs: dict[str, float],
        attention: Literal["document", "row"] = "document",
    ) -> None:
        self._draws, self._slots, self._sources, self._state = draws, slots, sources, state
        self.tokens: npt.NDArray[np.int32] = np.zeros((len(draws), seq_len + 1), np.int32)
        # 0 = padding; a row's pieces count from 1, and a token of a prompt has its piece's number negated. Where tokens
        # attend to the whole row, it is one piece, in which the first tokens of documents are negated too
        self.segment_ids: npt.NDArray[np.int32] = np.zeros_like(self.tokens)
        self.forgotten_tokens = 0  # tokens of documents that data.forget names, in place of which there is padding
        # Sum of the squares of the lengths of what attends to itself, which attention's arithmetic grows with
        self.squared_lengths = 0
        # Sums mod 2^64 of the rows' hashes keyed by slot, to be summed over ranks: of the rows as they were read, and
        # as they are trained on; they differ only where documents are forgotten
        self.row_hash = self.trained_hash = 0
        # These two cover the lanes that this rank reports on; sum them over ranks
        self.skipped_so_far = skipped_so_far  # bad records since the run's start
        self.epochs = epochs  # how often each source has been read through, by its records
        counts: Counter[str] = Counter()
        for i, (row, _) in enumerate(draws):
            if row is None:
                continue
            lengths = row.window.rows.fill(row.number, self.tokens[i], self.segment_ids[i])
            self._mark_prompts(i, row, lengths)
            if attention == "row":
                self._join_pieces(i, lengths)
            read = self._hash(i)
            self.row_hash += read
            if row.window.forgotten.any() and self._forget(i, row, lengths):
                read = self._hash(i)
            self.trained_hash += read
            together = lengths if attention == "document" else _joined(lengths)
            self.squared_lengths += sum(length * length for length in together)
            self._count(counts, row, lengths)
        self.n_targets = int(self.is_target.sum())  # tokens to predict
        self.row_hash %= _HASH_MODULUS
        self.trained_hash %= _HASH_MODULUS
        self.source_tokens: dict[str, int] = dict(counts)  # per source, or per SOURCE/SUB_SOURCE, without padding
        self.padding_tokens = self.tokens.size - counts.total() - self.forgotten_tokens

    def _hash(self, i: int) -> int:
        """Hash one row, keyed by its slot."""
        token_hash = xxhash.xxh3_64_intdigest(self.tokens[i].data, seed=self._slots[i])
        return xxhash.xxh3_64_intdigest(self.segment_ids[i].data, seed=token_hash)

    def _mark_prompts(self, i: int, row: Row, lengths: list[int]) -> None:
        """Negate a row's segment ids, in place, where tokens are read and nothing is learned from them."""
        prompts, rows = row.window.prompts, row.window.rows
        if not len(prompts.documents):
            return
        starts = rows.starts[rows.row_pieces[row.number] : rows.row_pieces[row.number + 1]].tolist()
        end = 0
        for document, start, length in zip(_pieces(row).tolist(), starts, lengths, strict=True):
            begin, end = end, end + length
            prompts.mark(document, start, self.segment_ids[i, begin:end])

    def _join_pieces(self, i: int, lengths: list[int]) -> None:
        """Make a row a single piece, in place, in which the same tokens are learned as before."""
        ids = self.segment_ids[i]
        np.sign(ids, out=ids)
        starts = np.cumsum([0, *lengths[:-1]])
        ids[starts] = -1

    def _forget(self, i: int, row: Row, lengths: list[int]) -> bool:
        """Turn a row's forgotten pieces into padding in place, and set their lengths to 0; return whether it has any.

        Nothing attends to padding or predicts it, and all other tokens stay where they were.
        """
        forgotten = row.window.forgotten[_pieces(row)].tolist()
        end = 0
        for piece, length in enumerate(lengths):
            start, end = end, end + length
            if forgotten[piece]:
                self.tokens[i, start:end] = 0
                self.segment_ids[i, start:end] = 0
                self.forgotten_tokens += length
                lengths[piece] = 0
        return any(forgotten)

    def _count(self, counts: Counter[str], row: Row, lengths: list[int]) -> None:
        name, window = self._sources[row.name.source].config.name, row.window
        if not window.sub_sources:
            counts[name] += sum(lengths)
            return
        for number, length in zip(window.sub_source_of[_pieces(row)].tolist(), lengths, strict=True):
            counts[name if number < 0 else f"{name}/{window.sub_sources[number]}"] += length

    @property
    def is_target(self) -> npt.NDArray[np.bool_]:
        """Mark the next tokens to predict, bool [rows, seq_len]: not those of prompts, nor any piece's first."""
        pieces = np.abs(self.segment_ids)
        is_target: npt.NDArray[np.bool_] = (self.segment_ids[:, 1:] > 0) & (pieces[:, 1:] == pieces[:, :-1])
        return is_target

    @property
    def pieces(self) -> npt.NDArray[np.int32]:
        """Return the number of each token's piece in its row, from 1, 0 for padding; int32 [rows, seq_len + 1].

        It is that in `origins`, where segment ids may join pieces; of a forgotten document it is 0.
        """
        numbers = np.zeros_like(self.segment_ids)
        for i, (row, _) in enumerate(self._draws):
            if row is not None:
                begin, end = row.window.rows.row_pieces[row.number : row.number + 2]
                lengths = row.window.rows.lengths[begin:end]
                numbers[i, : lengths.sum()] = np.repeat(np.arange(1, end - begin + 1), lengths)
        return numbers * (self.segment_ids != 0)

    @property
    def num_rows(self) -> int:
        """Return the number of rows that hold tokens; an exhausted lane yields empty rows."""
        return sum(draw.row is not None for draw in self._draws)

    @property
    def state(self) -> dict[str, object]:
        """Return the loader's state after this batch, to be saved once the batch has been trained on."""
        return self._state.to_dict()

    @property
    def replays(self) -> int:
        """Return the number of entries that proved invalid while reading the windows that begin in these rows."""
        return sum(draw.row.window.replays for draw in self._draws if draw.row and draw.row.number == 0)

    @property
    def skipped(self) -> list[Skipped]:
        """Return the bad records of the windows that were entered to draw these rows."""
        return self._passed_over(contaminated=False)

    @property
    def contaminated(self) -> list[Skipped]:
        """Return the documents of these windows that were dropped for sharing text with an evaluation suite."""
        return self._passed_over(contaminated=True)

    def _passed_over(self, contaminated: bool) -> list[Skipped]:
        return [
            Skipped(self._sources[source].config.name, self._shard(source, record.shard), record.line, record.reason)
            for draw in self._draws
            for source, record in draw.skipped
            if record.contaminated == contaminated
        ]

    def origins(self) -> Iterator[Origin]:
        """Yield where each piece of each row comes from, in the order of rows and pieces."""
        for slot, (row, _) in zip(self._slots, self._draws, strict=True):
            if row is None:
                continue
            rows, window, source = row.window.rows, row.window, row.name.source
            for piece in range(int(rows.row_pieces[row.number]), int(rows.row_pieces[row.number + 1])):
                start, document = int(rows.starts[piece]), rows.documents[piece]
                yield Origin(
                    slot=slot,
                    source=self._sources[source].config.name,
                    shard=self._shard(source, int(window.shards[document])),
                    line=int(window.lines[document]),
                    start=start,
                    stop=start + int(rows.lengths[piece]),
                )

    def _shard(self, source: int, shard: int) -> str:
        return self._sources[source].shards[shard].path


def _joined(lengths: Sequence[int]) -> list[int]:
    """Return the lengths of a row's stretches without padding, given those of its pieces, 0 for forgotten ones."""
    stretches = [0]
    for length in lengths:
        if length:
            stretches[-1] += length
        else:
            stretches.append(0)
    return stretches


def _pieces(row: Row) -> npt.NDArray[np.int32]:
    """Return the number, in its window, of the document of each piece of a row."""
    rows = row.window.rows
    return rows.documents[rows.row_pieces[row.number] : rows.row_pieces[row.number + 1]]
