"""Texts as rows that a model scores: cut into windows, packed, and dealt to the dp ranks. rows -> {eval_set, tasks}.

A window is at most seq_len + 1 tokens, of which the last few are targets. Windows are cut before they are packed, so
what shares a row with a text does not matter, and packed before they are dealt, so neither do the ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from shards.windows.packing import best_fit

_PORTION_TOKENS = 1 << 20  # tokens packed together; more give fuller rows but take more memory briefly

Tokens = npt.NDArray[np.integer]
Hidden = npt.NDArray[np.bool_]


class Window(NamedTuple):
    """A stretch of a text that is scored in one piece."""

    item: int  # number of the text that it is of, such as a document of a suite
    tokens: Tokens  # 2 to seq_len + 1
    targets: int  # how many of the last tokens are predicted, at most all but the first
    hidden: Hidden | None = None  # [tokens]: whether each is passed over all the same, as a prompt is


class Row(NamedTuple):
    """A row of at most seq_len + 1 tokens, without padding."""

    tokens: Tokens  # of all its pieces, concatenated
    lengths: npt.NDArray[np.int32]  # [pieces]: tokens in each, at least 2
    items: npt.NDArray[np.int32]  # [pieces]: number of the text that each is of
    targets: npt.NDArray[np.int32]  # [pieces]: predicted tokens of each, the last ones
    hidden: Hidden | None = None  # [tokens]: whether each is passed over all the same; None = none is


def windows_of(
    item: int, tokens: Tokens, seq_len: int, given: int = 1, hidden: Hidden | None = None
) -> Iterator[Window]:
    """Cut a text into windows, so that every token after the first `given` ones is a target exactly once.

    If all targets fit into one window, it holds as much as fits of what comes before them, the end of it; otherwise the
    windows follow each other and overlap by one token, a window's last target and the next one's only context.

    Args:
        tokens: none if there is nothing to predict.
        given: tokens that are not predicted, at least 1.
        hidden: bool [tokens], which others are not predicted either; None = none.
    """
    targets = len(tokens) - given
    if 0 < targets <= seq_len:
        yield Window(item, tokens[-(seq_len + 1) :], targets, None if hidden is None else hidden[-(seq_len + 1) :])
        return
    # As in training, a text with prompts is cut from its beginning: its first response keeps the prompt before it
    for start in range(given - 1 if hidden is None else 0, len(tokens) - 1, seq_len):
        place = slice(start, start + seq_len + 1)
        part = tokens[place]
        if hidden is not None and hidden[place][1:].all():
            continue
        yield Window(item, part, len(part) - 1, None if hidden is None else hidden[place])


class RowPacker:
    """Packs windows into rows, a portion at a time, and keeps those of one dp rank.

    Attributes:
        rows: every dp_size-th row, starting from this rank's first.
        num_rows: number of rows of all ranks.
    """

    def __init__(self, seq_len: int, dp_rank: int, dp_size: int) -> None:
        self.rows: list[Row] = []
        self.num_rows = 0
        self._seq_len, self._dp_rank, self._dp_size = seq_len, dp_rank, dp_size
        self._windows: list[Window] = []
        self._size = 0

    def add(self, item: int, tokens: Tokens, given: int = 1, hidden: Hidden | None = None) -> None:
        """Add a text; the arguments are those of `windows_of`."""
        self._windows += windows_of(item, tokens, self._seq_len, given, hidden)
        self._size += len(tokens)
        if self._size >= _PORTION_TOKENS:
            self.pack()

    def pack(self) -> None:
        """Pack what was added since the last call into rows."""
        for row in _packed(self._windows, self._seq_len):
            if self.num_rows % self._dp_size == self._dp_rank:
                self.rows.append(row)
            self.num_rows += 1
        self._windows, self._size = [], 0


def _packed(windows: Sequence[Window], seq_len: int) -> Iterator[Row]:
    lengths = np.array([len(window.tokens) for window in windows], np.int64)
    for numbers in best_fit(lengths, seq_len + 1):
        members = [windows[i] for i in numbers]
        masks = [np.zeros(len(w.tokens), np.bool_) if w.hidden is None else w.hidden for w in members]
        yield Row(
            tokens=np.concatenate([w.tokens for w in members]),
            lengths=lengths[numbers].astype(np.int32),
            items=np.array([w.item for w in members], np.int32),
            targets=np.array([w.targets for w in members], np.int32),
            hidden=np.concatenate(masks) if any(w.hidden is not None for w in members) else None,
        )


def dense(
    rows: Sequence[Row], batch_size: int, seq_len: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Lay rows out as a batch.

    Returns:
        tokens, segment ids: int64 [batch_size, seq_len + 1]; a row's pieces count from 1, 0 is padding.
        is_target: bool [batch_size, seq_len], whether the token after each position is a target.
    """
    tokens = np.zeros((batch_size, seq_len + 1), np.int64)
    segment_ids = np.zeros_like(tokens)
    is_target = np.zeros((batch_size, seq_len), bool)
    for i, row in enumerate(rows):
        size = len(row.tokens)
        tokens[i, :size] = row.tokens
        segment_ids[i, :size] = np.repeat(np.arange(1, len(row.lengths) + 1), row.lengths)
        to_end = np.repeat(np.cumsum(row.lengths), row.lengths) - np.arange(size)  # 1 for the last token of a piece
        is_target[i, : size - 1] = (to_end <= np.repeat(row.targets, row.lengths))[1:]
        if row.hidden is not None:
            is_target[i, : size - 1] &= ~row.hidden[1:]
    return tokens, segment_ids, is_target
