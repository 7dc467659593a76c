"""Packing: what every policy promises, checked token by token."""

import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards import OverflowTolerance, Rows, pack_documents
from shards.config import Packing
from shards.packing import best_fit

LENGTHS = st.lists(st.integers(0, 60), max_size=30)
POLICIES = ["best_fit", "concat", "truncate", "pad", OverflowTolerance(overflow_tolerance=5)]


def documents_of(lengths: list[int]) -> list[np.ndarray]:
    """Documents whose every token is different: token t of document d is 100 * d + t."""
    return [np.arange(100 * d, 100 * d + n, dtype=np.uint16) for d, n in enumerate(lengths)]


def targets_of(rows: Rows) -> Counter[int]:
    tokens, segment_ids = rows.dense()
    valid = (segment_ids[:, 1:] == segment_ids[:, :-1]) & (segment_ids[:, :-1] > 0)
    # Within a row's segment tokens follow each other as they do in their document.
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
        counts.update(range(100 * d + 1, 100 * d + last))
    return counts


@pytest.mark.parametrize("packing", POLICIES, ids=str)
@given(lengths=LENGTHS, seq_len=st.integers(1, 24), key=st.one_of(st.none(), st.integers(0, 2**64 - 1)))
def test_every_token_is_a_target_exactly_once(packing: Packing, lengths: list[int], seq_len: int, key: int) -> None:
    rows = pack_documents(documents_of(lengths), seq_len, packing, key)
    assert targets_of(rows) == expected_targets(lengths, seq_len, packing)


@pytest.mark.parametrize("packing", POLICIES, ids=str)
@given(lengths=LENGTHS, seq_len=st.integers(1, 24), key=st.integers(0, 2**64 - 1))
def test_pieces_say_where_their_tokens_come_from(packing: Packing, lengths: list[int], seq_len: int, key: int) -> None:
    documents = documents_of(lengths)
    rows = pack_documents(documents, seq_len, packing, key)
    tokens, segment_ids = rows.dense()
    for row in range(rows.num_rows):
        pieces = range(rows.row_pieces[row], rows.row_pieces[row + 1])
        assert 1 <= len(pieces)
        for number, piece in enumerate(pieces, 1):
            start, length = rows.starts[piece], rows.lengths[piece]
            expected = documents[rows.documents[piece]][start : start + length]
            assert tokens[row][segment_ids[row] == number].tolist() == expected.tolist()
        filled = segment_ids[row] > 0
        assert filled.tolist() == sorted(filled.tolist(), reverse=True)  # padding stands at the end
        assert not tokens[row][~filled].any()


@given(lengths=LENGTHS, seq_len=st.integers(1, 24))
def test_best_fit_cuts_no_document_that_fits_a_row(lengths: list[int], seq_len: int) -> None:
    rows = pack_documents(documents_of(lengths), seq_len, "best_fit", 1)
    pieces = Counter(rows.documents.tolist())
    assert all(pieces[d] == 1 for d, n in enumerate(lengths) if 0 < n <= seq_len + 1)


@given(lengths=LENGTHS, seq_len=st.integers(8, 24))
def test_best_fit_wastes_less_than_a_row_where_all_documents_are_long(lengths: list[int], seq_len: int) -> None:
    long = [seq_len + 2 + n for n in lengths]
    rows = pack_documents(documents_of(long), seq_len, "best_fit", 1)
    room = rows.num_rows * (seq_len + 1) - int(rows.lengths.sum())
    # Holes of one token cannot be filled: a piece there would only repeat one.
    assert room <= seq_len + 1 + rows.num_rows


@given(lengths=LENGTHS.map(sum), seq_len=st.integers(1, 24))
def test_concat_pads_only_the_last_row(lengths: int, seq_len: int) -> None:
    rows = pack_documents(documents_of([min(lengths, 99)] * 5), seq_len, "concat", 3)
    _, segment_ids = rows.dense()
    padded = (segment_ids == 0).any(axis=1)
    assert padded.sum() <= 1
    assert pack_documents(documents_of([]), seq_len, "concat", 3).num_rows == 0


@given(lengths=st.lists(st.integers(1, 16), max_size=40))
def test_best_fit_equals_a_plain_rendering_of_the_rule(lengths: list[int]) -> None:
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


def test_many_long_documents_in_short_rows_pack_in_no_time() -> None:
    lengths = [1000 + i for i in range(400)]
    begin = time.process_time()
    rows = pack_documents([np.zeros(n, np.uint16) for n in lengths], 32)
    assert time.process_time() - begin < 5  # seconds; looking for room row by row took a minute
    assert rows.num_rows * 33 - int(rows.lengths.sum()) < 0.03 * rows.num_rows * 33
