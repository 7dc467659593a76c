"""Keys and values of the tokens so far, so that the next token costs one position instead of all.

prefill -> transformer -> kv_cache, replacing the attention within a packed row's pieces.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.model.attention import Attend
from pretrain.model.cached_attention import cached_attention


class KVCache:
    """Keys and values of documents that are continued together, layer by layer; grows with each forward pass.

    A tp rank's holds those of its own heads.

    Args:
        n_layers: number of the model's layers.
        max_length: maximum tokens of a document, prompt and continuation together; allocated at once.
        dtype: type to keep them in, and so to attend to, those of new tokens too: what a token sees does not depend on
            which pass it came in. None: the type that they are computed in.
    Attributes:
        length: number of tokens of each document that the model has seen.
        attends: for each layer, the attention that appends to the cache and reads all of it.
    """

    def __init__(self, n_layers: int, max_length: int, dtype: torch.dtype | None = None) -> None:
        self.length = 0
        self.max_length = max_length
        self._dtype = dtype
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
            start, end = self.length, self.length + q.shape[1]
            assert end <= self.max_length, f"a cache of {self.max_length} tokens cannot hold {end}"
            memory = self._memory[layer]
            if memory is None:
                rows, _, heads, head_dim = k.shape
                shape = (rows, heads, self.max_length, head_dim)  # a head's tokens side by side, as they are read
                dtype = self._dtype or k.dtype
                memory = self._memory[layer] = (k.new_empty(shape, dtype=dtype), v.new_empty(shape, dtype=dtype))
            for stored, new in zip(memory, (k, v), strict=True):
                stored[:, :, start:end] = new.transpose(1, 2)
            keys, values = (stored[:, :, :end] for stored in memory)
            return cached_attention(q, keys, values)

        return attend
