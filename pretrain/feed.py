"""The global batch of a step, on the device, with its totals over all ranks. loader -> feed -> loop.

Of each tensor-parallel group only rank 0 has a loader; it hands its rows on to the others. What the ranks must know of
one another before the first backward pass (the number of valid targets, which the loss is divided by) travels in one
collective, and so does everything else that they tell each other once a step, such as that one was asked to stop.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

import torch
import xxhash
from torch import Tensor

from pretrain.topology import Topology
from shards import Batch, DataConfig, HeadraceError, Loader, Origin, ShardError, Skipped, check_not_empty, merge_states

_EPOCH_UNIT = 10**12  # epochs travel as integers, like all the rest
_EPOCH_DIGITS = 9  # behind the point, fewer than are sent: thirds of an epoch on three ranks add up to 1


@dataclass(frozen=True)
class StepBatch:
    """This rank's rows of one global batch, and the global batch's totals, which are the same on every rank.

    Attributes:
        tokens, segment_ids: [rows, seq_len + 1] int64 on the device.
        n_targets: tokens that are predicted in this step.
        n_tokens, n_padding: tokens that are not padding, and those that are.
        row_hash: sum mod 2^64 of the rows' hashes.
        tokens_per_source: the tokens that are not padding; under `source/sub-source` too, where a source has them.
        epoch_per_source: how often each source was read through since the run's start, by its records.
        skipped: the bad records that were passed over to get to these rows, of all ranks.
        skipped_so_far: how many there were since the run's start.
        replays: entries of shards that did not hold, so that decoding took longer to reach these rows, of all ranks.
        contaminated: the documents that were dropped on the way, for sharing text with a suite, of all ranks.
        stop_requested: whether any rank was asked to stop.
        saving: whether any rank is still writing its part of a checkpoint.
    """

    tokens: Tensor
    segment_ids: Tensor
    n_targets: int
    n_tokens: int
    n_padding: int
    row_hash: int
    tokens_per_source: dict[str, int]
    epoch_per_source: dict[str, float]
    skipped: list[Skipped]
    skipped_so_far: int
    replays: int
    contaminated: list[Skipped]
    stop_requested: bool
    saving: bool


class Feed:
    """Draws a global batch a step.

    Args:
        loader: of this dp rank; None on the other ranks of its tensor-parallel group.
        data: the config's part; names the sources.
        rows: of this rank's share of a global batch.
    """

    def __init__(self, loader: Loader | None, data: DataConfig, rows: int, topology: Topology) -> None:
        self._loader = loader
        self._cursors = loader.state_dict() if loader else None  # after the last batch that was given out
        self._sources = [source.name for source in data.sources]
        self._has_sub_sources = any(source.source_from for source in data.sources)
        self._shape = (2, rows, data.seq_len + 1)
        self._topology = topology
        self._batch: Batch | None = None  # the last that was given out
        # Bad records and contaminated documents of all ranks after the last row of the data, once it was reached
        self.passed_over: tuple[list[Skipped], list[Skipped]] = ([], [])

    def next(self, stop_requested: bool, saving: bool = False) -> StepBatch | None:
        """The next global batch that holds a row; None, on all ranks, once all lanes have run dry.

        Args:
            stop_requested: whether this process was asked to stop.
            saving: whether it is still writing its part of a checkpoint.
        Raises:
            ShardError: on all ranks, if any of them could not read its data; its own message says why.
        """
        skipped: list[Skipped] = []  # of this rank, on the way to the next row, however many batches that takes
        dropped: list[Skipped] = []
        n_skipped = n_dropped = replays = 0
        while True:
            batch, failure, rows, ever, going = None, None, 0, 0, 0
            if self._loader:
                try:
                    batch = self._loader.next_batch()
                    skipped, dropped = skipped + batch.skipped, dropped + batch.contaminated
                    rows, ever, going = batch.num_rows, self._loader.rows_drawn, int(not self._loader.ended)
                except HeadraceError as error:  # the other ranks have to hear of it before this one leaves
                    failure = error
            flags = [int(stop_requested), int(saving), int(failure is not None), rows, ever, going]
            totals = iter(self._topology.sum_int64([*flags, *self._own_totals(batch)]))
            stop, writing, failures, all_rows, all_ever, going_ranks = (next(totals) for _ in flags)
            if failures:
                raise failure or ShardError("another rank could not read its data; see its message")
            n_targets, n_padding, row_hash, new_skipped, skipped_so_far, new_dropped, new_replays = islice(totals, 7)
            n_skipped, n_dropped, replays = n_skipped + new_skipped, n_dropped + new_dropped, replays + new_replays
            if all_rows or not going_ranks:
                break
            # A batch without a row anywhere is no step: these lanes have run dry, and others have not
        skipped = self._of_all_ranks(skipped) if n_skipped else []
        dropped = self._of_all_ranks(dropped) if n_dropped else []
        if not all_rows:
            check_not_empty(all_ever, self._sources)
            self.passed_over = skipped, dropped
            return None
        self._cursors = self._loader.state_dict() if self._loader else None
        self._batch = batch
        tokens_per_source = {source: next(totals) for source in self._sources}
        epochs = {source: round(next(totals) / _EPOCH_UNIT, _EPOCH_DIGITS) for source in self._sources}
        tokens, segment_ids = self._shared(batch)
        return StepBatch(
            tokens=tokens,
            segment_ids=segment_ids,
            n_targets=n_targets,
            n_tokens=sum(tokens_per_source.values()),
            n_padding=n_padding,
            row_hash=row_hash,
            tokens_per_source=tokens_per_source | self._sub_sources(batch),
            epoch_per_source=epochs,
            skipped=skipped,
            skipped_so_far=skipped_so_far,
            replays=replays,
            contaminated=dropped,
            stop_requested=stop > 0,
            saving=writing > 0,
        )

    def _own_totals(self, batch: Batch | None) -> list[int]:
        if batch is None:  # the dp rank's totals are told by the rank that has its loader
            return [0] * (7 + 2 * len(self._sources))
        counts = dict.fromkeys(self._sources, 0)
        for name, tokens in batch.source_tokens.items():
            counts[name.partition("/")[0]] += tokens  # a sub-source counts to its source
        epochs = [round(batch.epochs.get(source, 0.0) * _EPOCH_UNIT) for source in self._sources]
        skipped = [len(batch.skipped), batch.skipped_so_far, len(batch.contaminated), batch.replays]
        return [batch.n_targets, batch.padding_tokens, batch.row_hash, *skipped, *counts.values(), *epochs]

    def _sub_sources(self, batch: Batch | None) -> dict[str, int]:
        """Tokens of each sub-source over all ranks; their names are known only once they are met."""
        if not self._has_sub_sources:
            return {}
        own = {name: n for name, n in batch.source_tokens.items() if "/" in name} if batch else {}
        sums: dict[str, int] = {}
        for counts in self._topology.gather_objects(own):
            for name, tokens in counts.items():
                sums[name] = sums.get(name, 0) + tokens
        return dict(sorted(sums.items()))

    def _of_all_ranks(self, own: list[Skipped]) -> list[Skipped]:
        """The records of all ranks, in an order that does not depend on how the lanes are dealt to them."""
        return sorted(found for part in self._topology.gather_objects(own) for found in part)

    def _shared(self, batch: Batch | None) -> Tensor:
        """(tokens, segment_ids) of this dp rank, on each of its tp ranks: [2, rows, seq_len + 1] int64."""
        device = self._topology.device
        if batch is None:
            rows = torch.empty(self._shape, dtype=torch.int32, device=device)
        else:
            rows = torch.stack((torch.from_numpy(batch.tokens), torch.from_numpy(batch.segment_ids))).to(device)
        return self._topology.broadcast_in_tp(rows).long()

    def origins(self) -> list[Origin]:
        """Where every piece of the last global batch comes from, by slot; every rank calls it."""
        own = list(self._batch.origins()) if self._batch else []
        return sorted(origin for origins in self._topology.gather_objects(own) for origin in origins)

    def cursors(self) -> dict[str, object] | None:
        """Where all lanes stand after the last batch that was given out, on rank 0; every rank calls it."""
        states = [state for state in self._topology.gather_objects(self._cursors) if state is not None]
        return merge_states(states) if self._topology.is_main else None


def chain_hash(before: str, row_hash: int) -> str:
    """The batch hash of a step: of its rows and of every batch before it; 16 hex digits."""
    return xxhash.xxh3_64_hexdigest(f"{before}/{row_hash:016x}".encode())
