"""Random rows for measurements of training steps, with documents of one length."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """A batch of random tokens, in the forms that different models take. B rows of T tokens and one more.

    Attributes:
        tokens, segment_ids: [B, T + 1] int64.
        targets: [B, T] int64: the next token, or -100 if it belongs to another document.
        positions: [B, T] int64, within each document.
    """

    tokens: Tensor
    segment_ids: Tensor
    targets: Tensor
    positions: Tensor

    @classmethod
    def draw(cls, rows: int, seq_len: int, vocab_size: int, document_tokens: int | None, seed: int = 0) -> Rows:
        """Draw rows.

        Args:
            document_tokens: length of all documents, which are cut where a row ends; None: every row is one document.
            seed: decides the tokens.
        """
        shape = (rows, seq_len + 1)
        tokens = torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))
        documents = torch.arange(tokens.numel()).view(shape) // (document_tokens or shape[1])
        segment_ids = documents - documents[:, :1] + 1
        same = segment_ids[:, 1:] == segment_ids[:, :-1]
        targets = torch.where(same, tokens[:, 1:], -100)
        column = torch.arange(seq_len).expand(rows, -1)
        begins = torch.cat((torch.ones(rows, 1, dtype=torch.bool), ~same[:, :-1]), dim=1)
        positions = column - torch.where(begins, column, 0).cummax(dim=1).values
        return cls(tokens, segment_ids, targets, positions)

    def visible(self) -> Tensor:
        """Return [B, 1, T (query), T (key)] bool: whether a query may see a key."""
        ids = self.segment_ids[:, :-1]
        length = ids.shape[1]
        return ((ids.unsqueeze(2) == ids.unsqueeze(1)) & torch.ones(length, length).tril().bool()).unsqueeze(1)

    @property
    def n_targets(self) -> int:
        return int((self.targets >= 0).sum())

    @property
    def context(self) -> int:
        """The length of documents, one a row, whose attention takes as many operations a token as that of these."""
        return round(2 * float((self.positions + 1).double().mean()) - 1)
