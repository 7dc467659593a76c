"""Packing: the promises of every policy, checked token by token."""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from types import FrameType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards import MaxOverflow, OverflowTolerance, Rows
from shards.arrays import Ints
from shards.config import Packing
from shards.windows import packing
from shards.windows.packing import best_fit, pack, rest_of
from tests.examples import examples

LENGTHS = st.lists(st.integers(0, 60), max_size=30)
POLICIES = [
    "best_fit", "concat", "truncate", "pad", OverflowTolerance(overflow_tolerance=5), MaxOverflow(max_overflow=7),
]  # fmt: skip


def documents_of(lengths: list[int]) -> list[np.ndarray]:
    """Make documents whose every token is different: token t of document d is 100 * d + t."""
    return [np.arange(100 * d, 100 * d + n, dtype=np.uint16) for d, n in enumerate(lengths)]


def pack_documents(
    documents: list[np.ndarray], seq_len: int, packing: Packing = "best_fit", key: int | None = None
) -> Rows:
    lengths = np.array([len(document) for document in documents], np.int64)
    return pack(np.concatenate([np.zeros(0, np.uint16), *documents]), lengths, seq_len, packing, key)


def dense(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Fill all rows: (tokens, segment_ids), int32 [rows, seq_len + 1]."""
    tokens = np.zeros((rows.num_rows, rows.seq_len + 1), np.int32)
    segment_ids = np.zeros_like(tokens)
    for row in range(rows.num_rows):
        rows.fill(row, tokens[row], segment_ids[row])
    return tokens, segment_ids


def targets_of(rows: Rows) -> Counter[int]:
    tokens, segment_ids = dense(rows)
    valid = (segment_ids[:, 1:] == segment_ids[:, :-1]) & (segment_ids[:, :-1] > 0)
    # Within a row's segment, tokens follow each other as in their document.
    assert (tokens[:, 1:][valid] == tokens[:, :-1][valid] + 1).all()
    return Counter(tokens[:, 1:][valid].tolist())


def expected_targets(lengths: list[int], seq_len: int, packing: Packing) -> Counter[int]:
    counts: Counter[int] = Counter()
    for d, n in enumerate(lengths):
        last = n
        if packing == "truncate":
            last = min(n, seq_len + 1)
        elif isinstance(packing, OverflowTolerance) and n > seq_len + 1:
            overflow = (n - 1) % seq_len
            last = n - overflow if overflow < packing.overflow_tolerance else n
        elif isinstance(packing, MaxOverflow) and n > seq_len + 1 + packing.max_overflow:
            last = 0
        counts.update(range(100 * d + 1, 100 * d + last))
    return counts


@pytest.mark.parametrize("packing", POLICIES, ids=str)
@given(
    lengths=LENGTHS, seq_lens=st.tuples(st.integers(1, 24), st.integers(1, 24)), key=st.integers(0, 99), data=st.data()
)
def test_rows_that_are_packed_again_have_the_targets_that_were_left(
    packing: Packing, lengths: list[int], seq_lens: tuple[int, int], key: int, data: st.DataObject
) -> None:
    rows = pack_documents(documents_of(lengths), seq_lens[0], packing, key)
    drawn = data.draw(st.integers(0, rows.num_rows))
    rest = rest_of(rows, drawn)
    tokens, segment_ids = dense(rows)
    valid = (segment_ids[:, 1:] == segment_ids[:, :-1]) & (segment_ids[:, :-1] > 0)
    again = rest.packed(seq_lens[1], "best_fit", key)
    assert targets_of(again) == Counter(tokens[drawn:, 1:][valid[drawn:]].tolist())
    for piece, (document, start) in enumerate(zip(again.documents, again.starts, strict=True)):
        assert again.tokens[np.cumsum([0, *again.lengths])[piece]] == 100 * document + start
    # Parts that touch are one, so that what was cut into short pieces can fill long rows
    parts = sorted(zip(rest.documents, rest.starts, rest.lengths, strict=True))
    assert not any(d == e and t == s + n - 1 for (d, s, n), (e, t, _) in itertools.pairwise(parts))


@pytest.mark.parametrize("packing", POLICIES, ids=str)
@given(lengths=LENGTHS, seq_len=st.integers(1, 24), key=st.one_of(st.none(), st.integers(0, 2**64 - 1)))
def test_every_token_is_a_target_exactly_once(packing: Packing, lengths: list[int], seq_len: int, key: int) -> None:
    rows = pack_documents(documents_of(lengths), seq_len, packing, key)
    assert targets_of(rows) == expected_targets(lengths, seq_len, packing)


@pytest.mark.parametrize("packing", POLICIES, ids=str)
@given(lengths=LENGTHS, seq_len=st.integers(1, 24), key=st.integers(0, 2**64 - 1))
def test_pieces_record_where_their_tokens_come_from(
    packing: Packing, lengths: list[int], seq_len: int, key: int
) -> None:
    documents = documents_of(lengths)
    rows = pack_documents(documents, seq_len, packing, key)
    tokens, segment_ids = dense(rows)
    for row in range(rows.num_rows):
        pieces = range(rows.row_pieces[row], rows.row_pieces[row + 1])
        assert 1 <= len(pieces)
        for number, piece in enumerate(pieces, 1):
            start, length = rows.starts[piece], rows.lengths[piece]
            expected = documents[rows.documents[piece]][start : start + length]
            assert tokens[row][segment_ids[row] == number].tolist() == expected.tolist()
        filled = segment_ids[row] > 0
        assert filled.tolist() == sorted(filled.tolist(), reverse=True)  # padding is at the end
        assert not tokens[row][~filled].any()


@given(lengths=LENGTHS, seq_len=st.integers(1, 24), most=st.integers(0, 40))
def test_a_document_that_overflows_by_too_much_is_dropped_and_another_padded(
    lengths: list[int], seq_len: int, most: int
) -> None:
    documents = documents_of(lengths)
    kept = [document if len(document) <= seq_len + 1 + most else document[:0] for document in documents]
    found = pack_documents(documents, seq_len, MaxOverflow(max_overflow=most), 3)
    expected = pack_documents(kept, seq_len, "pad", 3)
    for ours, theirs in zip(dense(found), dense(expected), strict=True):
        assert ours.tolist() == theirs.tolist()


@given(lengths=LENGTHS, seq_len=st.integers(1, 24))
def test_best_fit_cuts_no_document_that_fits_a_row(lengths: list[int], seq_len: int) -> None:
    rows = pack_documents(documents_of(lengths), seq_len, "best_fit", 1)
    pieces = Counter(rows.documents.tolist())
    assert all(pieces[d] == 1 for d, n in enumerate(lengths) if 0 < n <= seq_len + 1)


@given(lengths=LENGTHS, seq_len=st.integers(8, 24))
def test_best_fit_wastes_less_than_a_row_if_all_documents_are_long(lengths: list[int], seq_len: int) -> None:
    long = [seq_len + 2 + n for n in lengths]
    rows = pack_documents(documents_of(long), seq_len, "best_fit", 1)
    room = rows.num_rows * (seq_len + 1) - int(rows.lengths.sum())
    # Holes of one token cannot be filled, since a piece there would only repeat one.
    assert room <= seq_len + 1 + rows.num_rows


@given(lengths=LENGTHS.map(sum), seq_len=st.integers(1, 24))
def test_concat_pads_only_the_last_row(lengths: int, seq_len: int) -> None:
    rows = pack_documents(documents_of([min(lengths, 99)] * 5), seq_len, "concat", 3)
    _, segment_ids = dense(rows)
    padded = (segment_ids == 0).any(axis=1)
    assert padded.sum() <= 1
    assert pack_documents(documents_of([]), seq_len, "concat", 3).num_rows == 0


@given(lengths=st.lists(st.integers(1, 16), max_size=40))
def test_best_fit_equals_a_plain_implementation_of_the_rule(lengths: list[int]) -> None:
    capacity = 16
    room: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, left in enumerate(room) if left >= length]
        if fitting:
            room[min(fitting, key=lambda i: room[i])] -= length
        else:
            room.append(capacity - length)
    rows = best_fit(np.array(lengths, np.int64), capacity)
    assert sorted(capacity - sum(lengths[i] for i in row) for row in rows) == sorted(room)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))


def test_a_key_changes_the_order_and_nothing_else() -> None:
    documents = documents_of([5, 9, 30, 2, 17, 8, 8, 8])
    one, other = (pack_documents(documents, 12, "best_fit", key) for key in (1, 2))
    assert one.tokens.tolist() != other.tokens.tolist()
    assert Counter(one.tokens.tolist()) == Counter(other.tokens.tolist())
    assert pack_documents(documents, 12, "best_fit", 1).tokens.tolist() == one.tokens.tolist()


def closed_rows(
    rows: list[list[int]], pieces: tuple[Ints, Ints, Ints], cut: np.ndarray, capacity: int
) -> tuple[Ints, Ints, Ints]:
    """Run the first version of `_close_rows`, which sorts all rows for each one it spreads; runs rely on its order."""
    documents, starts, lengths = (column.tolist() for column in pieces)
    room = [capacity - sum(lengths[i] for i in row) for row in rows]
    usable = sum(left - 1 for left in room if left > 1)
    emptiest = sorted((row for row in range(len(rows)) if cut[rows[row]].all()), key=lambda row: -room[row])
    closed: set[int] = set()
    for row in emptiest:
        # Each hole but the last costs one repeated token. A row to be spread is no hole itself, but has that much less
        # to spread: every row needs this much, so no later one can be saved either.
        if usable < capacity - 1:
            break
        holes = sorted(
            (r for r in range(len(rows)) if r not in closed and r != row and room[r] > 1), key=lambda r: room[r]
        )
        used = capacity - room[row]
        if sum(room[hole] - 1 for hole in holes) < used:
            continue
        for piece in rows[row]:
            while True:
                hole = holes.pop()
                size = min(room[hole], lengths[piece])
                room[hole] -= size
                rows[hole].append(piece)
                if room[hole] > 1:
                    holes.append(hole)  # only the last hole of a piece has room left, so the rest stay in order
                if size == lengths[piece]:
                    break
                documents.append(documents[piece])
                starts.append(starts[piece] + size - 1)
                lengths.append(lengths[piece] - size + 1)
                lengths[piece], piece = size, len(lengths) - 1
        closed.add(row)
        usable = sum(left - 1 for r, left in enumerate(room) if left > 1 and r not in closed)
    rows[:] = [row for number, row in enumerate(rows) if number not in closed]
    return np.array(documents, np.int64), np.array(starts, np.int64), np.array(lengths, np.int64)


@settings(max_examples=examples(300))
@given(
    seq_len=st.integers(1, 24),
    parts=st.lists(st.tuples(st.floats(0.02, 4), st.integers(1, 25), st.integers(0, 3)), max_size=6),
    key=st.one_of(st.none(), st.integers(0, 2**64 - 1)),
)
def test_rows_are_spread_exactly_as_they_always_were(
    seq_len: int, parts: list[tuple[float, int, int]], key: int | None
) -> None:
    # Groups of documents that each fill about `count` rows; the order could differ for equal lengths and equal room.
    lengths = [int(share * seq_len) + i % (spread + 1) for share, count, spread in parts for i in range(count)]
    documents = [np.arange(n, dtype=np.uint16) for n in lengths]
    found = pack_documents(documents, seq_len, "best_fit", key)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "_close_rows", closed_rows)
        expected = pack_documents(documents, seq_len, "best_fit", key)
    for ours, theirs in zip(found[1:], expected[1:], strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.tolist() == theirs.tolist()


@pytest.mark.parametrize(("shortest", "longest", "count"), [(1000, 1400, 400), (49, 50, 3000)])
def test_packing_many_long_documents_into_short_rows_stays_linear(shortest: int, longest: int, count: int) -> None:
    lengths = [shortest + i % (longest - shortest) for i in range(count)]
    steps = 0

    def count_lines(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal steps
        steps += event == "line"
        return count_lines if frame.f_code.co_filename == packing.__file__ else None

    before = sys.gettrace()
    sys.settrace(count_lines)
    try:
        rows = pack_documents([np.zeros(n, np.uint16) for n in lengths], 32)
    finally:
        sys.settrace(before)
    # A search for room row by row took a minute, the square of this.
    assert steps < 100 * rows.num_rows
    assert rows.num_rows * 33 - int(rows.lengths.sum()) < 0.03 * rows.num_rows * 33
