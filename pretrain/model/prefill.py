"""The next token's logits after a text of any length: {engine, forward_model} -> prefill -> a model with a cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pretrain.model.architecture import Cache
from pretrain.model.loss import last_logits

CHUNK_TOKENS = 2048  # tokens of a row per forward pass: enough to keep a device busy, and few beside a long text


def next_logits(forward: Callable[..., Any], tokens: Tensor, cache: Cache) -> Tensor:
    """Return this rank's slice [B, vocab_size / tp_size] of the logits after tokens [B, T] that follow a cache's.

    The tokens go through the model in chunks, so that beside the cache only a chunk's activations take memory.

    Args:
        forward: a model's `forward`, or what calls it.
        cache: receives the tokens.
    """
    *earlier, last = torch.split(tokens, CHUNK_TOKENS, dim=1)
    for chunk in earlier:
        forward(chunk, head=_hidden, cache=cache)
    logits: Tensor = forward(last, head=last_logits, cache=cache)
    return logits


def _hidden(hidden: Tensor, _weight: Tensor) -> Tensor:
    """Return the hidden states as they are: there is nothing to predict before the last token."""
    return hidden
