"""Where the pieces of packed rows lie. segment ids, on the host -> pieces -> {attention, rotary positions, loss}.

Everything is computed on the host, where the loader left the segment ids, so nothing waits for the device. Every tensor
has a shape that depends on B and T alone, so that compiled code is compiled once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.topology import copy_to

# Tokens of a piece of padding: nobody reads what attention makes of them, and it costs the square of a piece's length.
# FlashAttention computes as many at a time as these, so on GPUs nothing would be gained by fewer.
PADDING = 128


@dataclass(frozen=True)
class Pieces:
    """The pieces of B rows of T tokens, in the order of the B * T flattened tokens; padding is some pieces too.

    Attributes:
        positions: [B, T] int64 on the device: each token's position within its piece, from 0.
        numbers: [B, T] int32 on the device: the number of each token's piece, from 0, different in every row.
        bounds: [B * T + 1] int32 on the device: where each piece begins, then B * T where the last one ends and in all
            places after it; the cu_seqlens of FlashAttention.
        extent: [2] int64 on the host: the number of pieces, and the length of the longest in tokens. A tensor, since
            compiled code would be compiled again for each new integer.
    """

    positions: Tensor
    numbers: Tensor
    bounds: Tensor
    extent: Tensor


def pieces_of(segment_ids: Tensor, device: torch.device) -> Pieces:
    """Find the pieces of rows.

    Args:
        segment_ids: [B, T] on the host; neighbours in a row that are equal but for their sign belong to one piece, and
            of padding, 0, no more than PADDING tokens.
        device: the device on which the model computes.
    """
    segment_ids = segment_ids.abs()
    starts = torch.ones_like(segment_ids, dtype=torch.bool)
    starts[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    starts[:, ::PADDING] |= segment_ids[:, ::PADDING] == 0
    starts = starts.flatten()
    begins = starts.nonzero().flatten()
    n_tokens, n_pieces = len(starts), len(begins)
    bounds = torch.full((n_tokens + 1,), n_tokens, dtype=torch.int32)
    bounds[:n_pieces] = begins
    numbers = starts.cumsum(0) - 1
    positions = torch.arange(n_tokens) - begins[numbers]
    return Pieces(
        positions=copy_to(device, positions.view_as(segment_ids)),
        numbers=copy_to(device, numbers.view_as(segment_ids).int()),
        bounds=copy_to(device, bounds),
        extent=torch.tensor([n_pieces, int(positions.max()) + 1]),
    )


def valid_targets(segment_ids: Tensor) -> Tensor:
    """Mark the next tokens that are targets: those of the same piece, without prompts, whose segment ids are negative.

    segment_ids [B, T + 1] -> [B, T] bool.
    """
    pieces = segment_ids.abs()
    return (pieces[:, 1:] == pieces[:, :-1]) & (segment_ids[:, 1:] > 0)
