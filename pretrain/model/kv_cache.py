"""Keys and values of the tokens so far, so that the next token costs one position instead of all.

generate -> transformer -> kv_cache, replacing the attention within a packed row's pieces.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.model.attention import Attend, sdpa


class KVCache:
    """Keys and values of documents that are continued together, layer by layer; grows with each forward pass.

    Args:
        n_layers: number of the model's layers.
        max_length: maximum tokens of a document, prompt and continuation together; allocated at once.
    Attributes:
        length: number of tokens of each document that the model has seen.
        attends: for each layer, the attention that appends to the cache and reads all of it.
    """

    def __init__(self, n_layers: int, max_length: int) -> None:
        self.length = 0
        self.max_length = max_length
        self._memory: list[tuple[Tensor, Tensor] | None] = [None] * n_layers
        self.attends: list[Attend] = [self._attend_in(layer) for layer in range(n_layers)]

    def positions(self, tokens: Tensor) -> Tensor:
        """Return the positions of the next tokens [B, T] in their documents, [B, T] int64."""
        rows, length = tokens.shape
        return torch.arange(self.length, self.length + length, device=tokens.device).expand(rows, length)

    def advance(self, count: int) -> None:
        """Count tokens that every layer has processed."""
        self.length += count

    def _attend_in(self, layer: int) -> Attend:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            start, count = self.length, q.shape[1]
            end = start + count
            assert end <= self.max_length, f"a cache of {self.max_length} tokens cannot hold {end}"
            memory = self._memory[layer]
            if memory is None:
                rows, _, heads, head_dim = k.shape
                shape = (rows, self.max_length, heads, head_dim)
                memory = self._memory[layer] = (k.new_empty(shape), v.new_empty(shape))
            for stored, new in zip(memory, (k, v), strict=True):
                stored[:, start:end] = new
            keys, values = (stored[:, :end] for stored in memory)
            # [T (query), start + T (key)]: a token sees all earlier passes, and this pass up to itself
            mask = torch.ones(count, end, dtype=torch.bool, device=q.device).tril(diagonal=start)
            return sdpa(q, keys, values, mask)

        return attend
