"""The global batch of a step, on the device, with its totals over all ranks. loader -> feed -> loop.

Of each tensor-parallel group only rank 0 has a loader; it hands its rows on to the others. What the ranks must know of
one another before the first backward pass (the number of valid targets, which the loss is divided by) travels in one
collective, and so does everything else that they tell each other once a step, such as that one was asked to stop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import xxhash
from torch import Tensor

from pretrain.topology import Topology
from shards import Batch, Loader, merge_states

_EPOCH_UNIT = 10**9  # epochs travel as integers, like all the rest


@dataclass(frozen=True)
class StepBatch:
    """This rank's rows of one global batch, and the global batch's totals, which are the same on every rank.

    Attributes:
        tokens, segment_ids: [rows, seq_len + 1] int64 on the device.
        n_targets: tokens that are predicted in this step.
        n_tokens, n_padding: tokens that are not padding, and those that are.
        row_hash: sum mod 2^64 of the rows' hashes.
        tokens_per_source: the tokens that are not padding.
        epoch_per_source: how often each source was read through since the run's start.
        stop_requested: whether any rank was asked to stop.
    """

    tokens: Tensor
    segment_ids: Tensor
    n_targets: int
    n_tokens: int
    n_padding: int
    row_hash: int
    tokens_per_source: dict[str, int]
    epoch_per_source: dict[str, float]
    stop_requested: bool


class Feed:
    """Draws a global batch a step.

    Args:
        loader: of this dp rank; None on the other ranks of its tensor-parallel group.
        sources: their names, in the config's order.
        rows, seq_len: of this rank's share of a global batch.
    """

    def __init__(
        self, loader: Loader | None, sources: Sequence[str], rows: int, seq_len: int, topology: Topology
    ) -> None:
        self._loader = loader
        self._sources = list(sources)
        self._shape = (2, rows, seq_len + 1)
        self._topology = topology

    def next(self, stop_requested: bool) -> StepBatch | None:
        """The next global batch; None, on all ranks, once any lane has run out of rows.

        Args:
            stop_requested: whether this process was asked to stop.
        """
        batch = next(self._loader, None) if self._loader else None
        exhausted = self._loader is not None and batch is None
        totals = iter(self._topology.sum_int64([int(stop_requested), int(exhausted), *self._own_totals(batch)]))
        stop, exhausted_ranks = next(totals), next(totals)
        if exhausted_ranks:
            return None
        n_targets, n_padding, row_hash = next(totals), next(totals), next(totals)
        tokens_per_source = {source: next(totals) for source in self._sources}
        dp_size = self._topology.dp_size
        tokens, segment_ids = self._shared(batch)
        return StepBatch(
            tokens=tokens,
            segment_ids=segment_ids,
            n_targets=n_targets,
            n_tokens=sum(tokens_per_source.values()),
            n_padding=n_padding,
            row_hash=row_hash,
            tokens_per_source=tokens_per_source,
            epoch_per_source={source: next(totals) / _EPOCH_UNIT / dp_size for source in self._sources},
            stop_requested=stop > 0,
        )

    def _own_totals(self, batch: Batch | None) -> list[int]:
        if batch is None:  # the dp rank's totals are told by the rank that has its loader
            return [0] * (3 + 2 * len(self._sources))
        counts = [batch.source_tokens.get(source, 0) for source in self._sources]
        epochs = [round(batch.epochs.get(source, 0.0) * _EPOCH_UNIT) for source in self._sources]
        return [batch.n_targets, batch.padding_tokens, batch.row_hash, *counts, *epochs]

    def _shared(self, batch: Batch | None) -> Tensor:
        """(tokens, segment_ids) of this dp rank, on each of its tp ranks: [2, rows, seq_len + 1] int64."""
        device = self._topology.device
        if batch is None:
            rows = torch.empty(self._shape, dtype=torch.int32, device=device)
        else:
            rows = torch.stack((torch.from_numpy(batch.tokens), torch.from_numpy(batch.segment_ids))).to(device)
        return self._topology.broadcast_in_tp(rows).long()

    def cursors(self) -> dict[str, object] | None:
        """Where all lanes stand after the last batch, on rank 0; every rank calls it."""
        own = self._loader.state_dict() if self._loader else None
        states = [state for state in self._topology.gather_objects(own) if state is not None]
        return merge_states(states) if self._topology.is_main else None  # type: ignore[arg-type]


def chain_hash(before: str, row_hash: int) -> str:
    """The batch hash of a step: of its rows and of every batch before it; 16 hex digits."""
    return xxhash.xxh3_64_hexdigest(f"{before}/{row_hash:016x}".encode())
