"""Token documents -> rows. window and evaluation -> packing.

A piece is a stretch of one document within one row. Pieces of a long document overlap by one token: the last token of a
piece, a target there, is the first of the next, where it is only context. So every token after a document's first is a
target exactly once.
"""

from __future__ import annotations

import heapq
import itertools
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from shards.arrays import Ints
from shards.config import MaxOverflow, OverflowTolerance, Packing
from shards.hashing import key_of, permutation

_GATHER_TOKENS = 1 << 20
PACKER_VERSION = 1  # raise it whenever the same documents would give other rows; runs do not resume across versions

Tokens = npt.NDArray[np.uint16] | npt.NDArray[np.int32]


class Rows(NamedTuple):
    """Packed rows without their padding: rows and pieces in CSR form, tokens in the order of pieces."""

    seq_len: int  # a row holds seq_len + 1 tokens
    tokens: Tokens  # [tokens of all pieces], the pieces of row 0 first
    row_pieces: Ints  # [rows + 1]: row r has the pieces row_pieces[r] .. row_pieces[r + 1]
    row_tokens: Ints  # [rows + 1]: row r has the tokens row_tokens[r] .. row_tokens[r + 1]
    documents: npt.NDArray[np.int32]  # [pieces]: the packed document that a piece belongs to
    starts: npt.NDArray[np.int32]  # [pieces]: its first token in the document, BOS counted
    lengths: npt.NDArray[np.int32]  # [pieces]: its number of tokens

    @property
    def num_rows(self) -> int:
        return len(self.row_pieces) - 1

    def fill(self, row: int, tokens: npt.NDArray[np.int32], segment_ids: npt.NDArray[np.int32]) -> list[int]:
        """Write one row into two zeroed int32 [seq_len + 1]; return the lengths of its pieces."""
        lengths = self.lengths[self.row_pieces[row] : self.row_pieces[row + 1]]
        sizes: list[int] = lengths.tolist()
        end = 0
        for number, size in enumerate(sizes, 1):  # few pieces: slices are written faster than numpy repeats numbers
            segment_ids[end : end + size] = number
            end += size
        begin = int(self.row_tokens[row])
        tokens[:end] = self.tokens[begin : begin + end]
        return sizes


class Rest(NamedTuple):
    """What is left to pack of a window, as documents of their own: parts of its documents, or whole ones.

    When a stage with other rows begins amid a window, what the rows hold that were not drawn yet is packed again. A
    part begins with the last target of the piece before, so every token stays a target exactly once.
    """

    tokens: npt.NDArray[np.integer]  # tokens of all parts, concatenated
    lengths: Ints  # [parts]
    documents: Ints  # [parts]: the window's document that each belongs to
    starts: Ints  # [parts]: its first token in that document

    @staticmethod
    def whole(tokens: npt.NDArray[np.integer], lengths: Ints) -> Rest:
        """Return whole documents, none of which has been drawn from."""
        return Rest(tokens, lengths, np.arange(len(lengths)), np.zeros(len(lengths), np.int64))

    def packed(self, seq_len: int, packing: Packing, key: int) -> Rows:
        """Pack what is left; the rows name the window's documents."""
        rows = pack(self.tokens, self.lengths, seq_len, packing, key)
        starts = (self.starts[rows.documents] + rows.starts).astype(np.int32)
        return rows._replace(documents=self.documents[rows.documents].astype(np.int32), starts=starts)

    def without(self, documents: npt.NDArray[np.bool_]) -> Rest:
        """Leave documents out. Args: documents: bool [documents of the window]."""
        kept = ~documents[self.documents]
        return Rest(self.tokens[np.repeat(kept, self.lengths)], *(column[kept] for column in self[1:]))


def rest_of(rows: Rows, drawn: int) -> Rest:
    """Return what a window's rows hold after the first `drawn`, pieces that follow each other in a document as one."""
    first = int(rows.row_pieces[drawn])
    columns = (rows.documents, rows.starts, rows.lengths)
    documents, starts, lengths = (column[first:].astype(np.int64) for column in columns)
    begins = int(rows.row_tokens[drawn]) + _offsets(lengths)[:-1]
    order = np.lexsort((lengths, starts, documents))
    documents, starts, lengths, begins = (column[order] for column in (documents, starts, lengths, begins))
    goes_on = np.zeros(len(order), np.bool_)  # begins with the last token of the piece before, which is not repeated
    goes_on[1:] = (documents[1:] == documents[:-1]) & (starts[1:] == starts[:-1] + lengths[:-1] - 1)
    begins, sizes = begins + goes_on, lengths - goes_on
    ends = _offsets(sizes)
    tokens = rows.tokens[np.arange(ends[-1]) + np.repeat(begins - ends[:-1], sizes)]
    heads = np.flatnonzero(~goes_on)
    return Rest(tokens, np.diff(np.append(ends[heads], ends[-1])), documents[heads], starts[heads])


def pack(
    tokens: npt.NDArray[np.integer], lengths: Ints, seq_len: int, packing: Packing, key: int | None = None
) -> Rows:
    """Pack documents into rows of seq_len + 1 tokens.

    Args:
        tokens: tokens of all documents, concatenated, BOS and EOS included.
        lengths: int64 [documents], tokens of each.
        key: key of the shuffle of documents and rows; None keeps both in order.
    """
    order = np.arange(len(lengths)) if key is None else permutation(key_of("documents", key), len(lengths))
    if packing == "concat":
        pieces, rows = _cut_stream(lengths, order, seq_len)
    else:
        pieces = _cut_documents(lengths, order, seq_len, packing)
        rows = [[i] for i in range(len(pieces[0]))]  # each piece gets its own row, except with best_fit
    if packing == "best_fit":
        rows = best_fit(pieces[2], seq_len + 1)
        pieces = _close_rows(rows, pieces, lengths[pieces[0]] > seq_len + 1, seq_len + 1)
    if key is not None:
        rows = [rows[i] for i in permutation(key_of("rows", key), len(rows))]
    chosen = np.array([i for row in rows for i in row], np.int64)
    documents, starts, sizes = (column[chosen] for column in pieces)
    begin = _offsets(lengths)[:-1][documents] + starts
    # Token t of the output is token t of its piece. A bounded number is gathered at a time, since their indices take
    # more memory than the tokens do.
    offsets = _offsets(sizes)
    gathered = np.empty(int(offsets[-1]), tokens.dtype)
    marks = np.searchsorted(offsets, np.arange(0, len(gathered), _GATHER_TOKENS)).tolist()
    for a, b in itertools.pairwise([*marks, len(sizes)]):
        places = np.arange(offsets[a], offsets[b]) + np.repeat(begin[a:b] - offsets[a:b], sizes[a:b])
        gathered[offsets[a] : offsets[b]] = tokens[places]
    row_pieces = _offsets(np.array([len(row) for row in rows], np.int64))
    return Rows(
        seq_len=seq_len,
        tokens=gathered,
        row_pieces=row_pieces,
        row_tokens=offsets[row_pieces],
        documents=documents.astype(np.int32),
        starts=starts.astype(np.int32),
        lengths=sizes.astype(np.int32),
    )


def best_fit(lengths: Ints, capacity: int) -> list[list[int]]:
    """Assign pieces to rows, longest first, each to the fullest row that still has room.

    Args:
        lengths: int64 [pieces], tokens, each in [1, capacity]. Equal lengths are placed in order.
        capacity: tokens per row.
    Returns: for each row, the indices of its pieces in the order placed.
    Source: Best-Fit-Decreasing; Ding et al. 2024, arXiv 2404.10830, section 3.
    """
    rows: list[list[int]] = []
    rows_with: list[list[int]] = [[] for _ in range(capacity + 1)]  # rows by tokens of room left
    has_room = 0  # bit r is set if rows_with[r] is not empty: the lowest set bit at or above a length is the best fit
    order = np.argsort(-lengths, kind="stable")
    for piece, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        fits = has_room >> length
        if fits:
            room = length + (fits & -fits).bit_length() - 1
            row = rows_with[room].pop()
            if not rows_with[room]:
                has_room ^= 1 << room
            rows[row].append(piece)
        else:
            room, row = capacity, len(rows)
            rows.append([piece])
        left = room - length
        if left:
            rows_with[left].append(row)
            has_room |= 1 << left
    return rows


def _close_rows(
    rows: list[list[int]], pieces: tuple[Ints, Ints, Ints], cut: npt.NDArray[np.bool_], capacity: int
) -> tuple[Ints, Ints, Ints]:
    """Spread rows that hold only pieces of cut documents over the room in other rows, as long as that saves rows.

    If most documents are long, there are no short ones to fill the rows. Cutting a long document once more loses less
    than padding does; a document that fits a row is never cut.

    Args:
        rows: as returned by `best_fit`; changed in place.
        pieces: (documents, starts, lengths), int64 [pieces] each.
        cut: bool [pieces]: True for a piece of a document that does not fit a row.
    Returns: the pieces; those cut again are shorter, and their remainders are at the end.
    """
    documents, starts, lengths = (column.tolist() for column in pieces)
    room = [capacity - sum(lengths[i] for i in row) for row in rows]
    usable = sum(left - 1 for left in room if left > 1)
    # A heap: the emptiest row comes first, and the last of equally empty ones.
    holes = [(-left, -row) for row, left in enumerate(room) if left > 1]
    heapq.heapify(holes)
    emptiest = sorted((row for row in range(len(rows)) if cut[rows[row]].all()), key=lambda row: -room[row])
    closed: set[int] = set()
    for row in emptiest:
        # Each hole but the last costs one repeated token. A row to be spread is no hole itself, but has that much less
        # to spread: every row needs this much, so no later one can be saved either.
        if usable < capacity - 1:
            break
        elsewhere = usable - max(0, room[row] - 1)
        if elsewhere < capacity - room[row]:
            continue
        usable = elsewhere
        closed.add(row)
        hole = row  # where the last piece went; its remaining room is filled next
        for piece in rows[row]:
            while True:
                while hole in closed or room[hole] < 2:
                    hole = -heapq.heappop(holes)[1]
                size = min(room[hole], lengths[piece])
                room[hole] -= size
                usable -= min(size, room[hole] + size - 1)
                rows[hole].append(piece)
                if size == lengths[piece]:
                    break
                documents.append(documents[piece])
                starts.append(starts[piece] + size - 1)
                lengths.append(lengths[piece] - size + 1)
                lengths[piece], piece = size, len(lengths) - 1
        if room[hole] > 1:
            heapq.heappush(holes, (-room[hole], -hole))
    rows[:] = [row for number, row in enumerate(rows) if number not in closed]
    return np.array(documents, np.int64), np.array(starts, np.int64), np.array(lengths, np.int64)


def _cut_documents(lengths: Ints, order: Ints, seq_len: int, packing: Packing) -> tuple[Ints, Ints, Ints]:
    """Return (documents, starts, lengths) of pieces of at most seq_len + 1 tokens that overlap by one."""
    ordered = lengths[order]
    counts = np.where(ordered > 0, np.maximum(1, -(-(ordered - 1) // seq_len)), 0)
    if packing == "truncate":
        counts = np.minimum(counts, 1)
    elif isinstance(packing, OverflowTolerance):
        # Tokens of the last piece that are in no earlier piece; a piece that fills its row overflows nothing.
        overflow = ordered - 1 - (counts - 1) * seq_len
        counts -= (counts > 1) & (overflow < min(packing.overflow_tolerance, seq_len))
    elif isinstance(packing, MaxOverflow):
        counts[ordered - (seq_len + 1) > packing.max_overflow] = 0
    documents = np.repeat(order, counts)
    starts = (np.arange(len(documents)) - np.repeat(_offsets(counts)[:-1], counts)) * seq_len
    return documents, starts, np.minimum(lengths[documents] - starts, seq_len + 1)


def _cut_stream(lengths: Ints, order: Ints, seq_len: int) -> tuple[tuple[Ints, Ints, Ints], list[list[int]]]:
    """Cut one stream of all documents every seq_len tokens; return pieces as `_cut_documents` does, and rows.

    Each row repeats the last token of the row before.
    """
    order = order[lengths[order] > 0]
    begins = _offsets(lengths[order])
    total = int(begins[-1])
    num_rows = max(1, -(-(total - 1) // seq_len)) if total else 0
    row_begins = np.arange(num_rows) * seq_len
    row_ends = np.minimum(row_begins + seq_len + 1, total)
    first = np.searchsorted(begins, row_begins, side="right") - 1
    last = np.searchsorted(begins, row_ends - 1, side="right") - 1
    counts = last - first + 1
    offsets = _offsets(counts)
    places = np.arange(int(offsets[-1])) - np.repeat(offsets[:-1] - first, counts)  # in `order`
    begin = np.maximum(begins[places], np.repeat(row_begins, counts))
    end = np.minimum(begins[places + 1], np.repeat(row_ends, counts))
    rows = [list(range(a, b)) for a, b in zip(offsets.tolist(), offsets[1:].tolist(), strict=False)]
    return (order[places], begin - begins[places], end - begin), rows


def _offsets(sizes: npt.NDArray[np.integer]) -> Ints:
    """Return int64 [n + 1]: where each of n stretches of these sizes begins and where the last ends."""
    offsets = np.zeros(len(sizes) + 1, np.int64)
    np.cumsum(sizes, out=offsets[1:])
    return offsets
