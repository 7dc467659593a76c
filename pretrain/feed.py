"""The global batch of a step, on the device, with its totals over all ranks. loader -> feed -> trainer.

Of the ranks that share the same rows only the first has a loader; it passes them on to the others. What the ranks must
know of each other before the first backward pass (the number of valid targets, by which the loss is divided) travels in
one collective, with everything else that they exchange once a step, such as a request to stop.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import xxhash
from torch import Tensor

from pretrain.checkpoint.state import DataState
from pretrain.faults.stragglers import RankSeconds
from pretrain.topology import Topology, copy_to, signed
from shards import Batch, HeadraceError, Loader, Origin, ShardError, Skipped, Stage, merge_states

_EPOCH_UNIT = 10**12  # epochs are sent as integers, like everything else
_SECONDS_UNIT = 1e-6  # seconds are sent as integers too
_NO_SECONDS = RankSeconds()
_EPOCH_DIGITS = 9  # fewer decimals than are sent, so that thirds of an epoch on three ranks add up to 1

# Sums over all ranks in each step, besides the tokens and epochs of each source.
_TOTALS = (
    "stop_requests", "saving", "failures",  # ranks
    "rows", "rows_drawn",  # in the batch; since the run's start
    "ranks_with_data",  # ranks with a lane that has not run dry
    "ending_stage",  # ranks whose next batch is of another stage: all that have a loader, or none
    # As in StepBatch
    "targets", "padding", "squared_lengths", "row_hash", "trained_hash", "forgotten", "skipped", "skipped_so_far",
    "contaminated", "replays",
)  # fmt: skip


@dataclass(frozen=True)
class StepBatch:
    """The rows of one global batch on this rank, and the global batch's totals, which are the same on every rank.

    Attributes:
        tokens: [rows, seq_len + 1] int64 on the device.
        segment_ids: [rows, seq_len + 1] int64 on the host, where the model plans its attention; negative for tokens of
            prompts, which are no targets.
        n_targets: number of tokens predicted in this step.
        n_tokens, n_padding: number of tokens without padding, and of padding.
        squared_lengths: sum of the squares of the pieces' lengths in tokens.
        stage: number of the run's stage that it belongs to.
        row_hash: sum mod 2^64 of the rows' hashes, as they were read.
        trained_hash: the same, as they are trained on; another if documents are forgotten.
        n_forgotten: tokens of forgotten documents, which are no targets and which nothing attends to.
        tokens_per_source: tokens without padding; also under `source/sub-source`, if a source has sub-sources.
        epoch_per_source: passes over each source since the run's start, counted in records.
        skipped: bad records that all ranks skipped on the way to these rows.
        skipped_so_far: number of bad records since the run's start.
        replays: invalid entries of shards on all ranks, which made decoding these rows take longer.
        contaminated: documents that all ranks dropped on the way because they share text with a suite.
        stop_requested: whether any rank was asked to stop.
        saving: whether any rank is still writing its part of a checkpoint.
        rank_seconds: what each rank did in the step before, and how long it has loaded for this one.
    """

    tokens: Tensor
    segment_ids: Tensor
    stage: int
    n_targets: int
    n_tokens: int
    n_padding: int
    squared_lengths: int
    row_hash: int
    trained_hash: int
    n_forgotten: int
    tokens_per_source: dict[str, int]
    epoch_per_source: dict[str, float]
    skipped: list[Skipped]
    skipped_so_far: int
    replays: int
    contaminated: list[Skipped]
    stop_requested: bool
    saving: bool
    rank_seconds: tuple[RankSeconds, ...] = ()


@dataclass
class _SkippedRecords:
    """The records skipped on the way to the next row, however many batches that took.

    Attributes:
        skipped, contaminated: those of this rank.
        n_skipped, n_contaminated, replays: counts over all ranks.
    """

    skipped: list[Skipped] = field(default_factory=list)
    contaminated: list[Skipped] = field(default_factory=list)
    n_skipped: int = 0
    n_contaminated: int = 0
    replays: int = 0

    def add(self, batch: Batch | None, totals: Mapping[str, int]) -> None:
        if batch is not None:
            self.skipped += batch.skipped
            self.contaminated += batch.contaminated
        self.n_skipped += totals["skipped"]
        self.n_contaminated += totals["contaminated"]
        self.replays += totals["replays"]


class FeedLeft(Exception):
    """All ranks have agreed to stop where there were no rows to train on."""


class Feed:
    """Draws one global batch per step.

    Args:
        loader: this dp rank's loader; None on the ranks that do not read rows.
        stages: all stages of the run.
    """

    def __init__(self, loader: Loader | None, stages: Sequence[Stage], topology: Topology) -> None:
        self._loader = loader
        self._topology = topology
        self._stages = stages
        # Rank 0 always has a loader
        begun = (loader.stage, loader.ends_stage) if loader else (0, False)
        self._stage, self._ends_stage = topology.broadcast_object(begun)
        self._cursors = loader.state_dict() if loader else None  # after the last batch returned
        self._batch: Batch | None = None  # the last batch returned
        # Bad records and contaminated documents of all ranks after the last row of the data, once that was reached.
        self.skipped_at_end: tuple[list[Skipped], list[Skipped]] = ([], [])

    def next(
        self, wants_stop: Callable[[], bool], saving: bool = False, seconds: RankSeconds = _NO_SECONDS
    ) -> StepBatch | None:
        """Return the next global batch that has any rows, or None on all ranks once all lanes have run dry.

        Args:
            wants_stop: tells whether this rank wants to stop. It is asked for each batch, of which there may be
                thousands without a row before data.weight_changes bring in sources that have some left.
            saving: whether this rank is still writing its part of a checkpoint.
            seconds: what this rank did in the step before; its loading is added here.
        Raises:
            FeedLeft: on all ranks, if any of them wants to stop before there is a row.
            ShardError: on all ranks, if any of them could not read its data; its own message says why.
        """
        if self._ends_stage:
            self._begin_stage()
        skipped_records = _SkippedRecords()
        while True:
            begun = time.perf_counter()
            batch, failure = self._draw()
            seconds = seconds._replace(loading=seconds.loading + time.perf_counter() - begun)
            own = self._totals_of(batch) | self._slots(seconds)
            own |= {"stop_requests": int(wants_stop()), "saving": int(saving), "failures": int(failure is not None)}
            totals = dict(zip(own, self._topology.sum_int64(list(own.values())), strict=True))
            if totals["failures"]:
                raise failure or ShardError("another rank could not read its data; see its message")
            skipped_records.add(batch, totals)
            if totals["rows"] or not totals["ranks_with_data"]:
                break
            if totals["stop_requests"]:
                raise FeedLeft
            # A batch without a row on any rank is not a step: these lanes have run dry, but others have not.
            if self._loader:
                self._loader.pass_over()
        skipped = self._of_all_ranks(skipped_records.skipped) if skipped_records.n_skipped else []
        contaminated = self._of_all_ranks(skipped_records.contaminated) if skipped_records.n_contaminated else []
        if not totals["rows"]:
            if self._loader:
                self._loader.check_end(totals["rows_drawn"])
            self.skipped_at_end = skipped, contaminated
            return None
        return self._step_batch(batch, totals, skipped_records.replays, skipped, contaminated)

    def _step_batch(
        self,
        batch: Batch | None,
        totals: Mapping[str, int],
        replays: int,
        skipped: list[Skipped],
        contaminated: list[Skipped],
    ) -> StepBatch:
        """Make the step's batch of this rank's rows and what all ranks have agreed on."""
        self._cursors = self._loader.state_dict() if self._loader else None
        self._batch = batch
        self._ends_stage = totals["ending_stage"] > 0
        tokens_per_source = {source: totals[f"tokens/{source}"] for source in self._sources}
        tokens, segment_ids = self._shared(batch)
        return StepBatch(
            tokens=copy_to(self._topology.device, tokens),
            segment_ids=segment_ids,
            stage=self._stage,
            n_targets=totals["targets"],
            n_tokens=sum(tokens_per_source.values()),
            n_padding=totals["padding"],
            squared_lengths=totals["squared_lengths"],
            row_hash=totals["row_hash"],
            trained_hash=totals["trained_hash"],
            n_forgotten=totals["forgotten"],
            tokens_per_source=tokens_per_source | self._sub_sources(batch),
            epoch_per_source={
                source: round(totals[f"epochs/{source}"] / _EPOCH_UNIT, _EPOCH_DIGITS) for source in self._sources
            },
            skipped=skipped,
            skipped_so_far=totals["skipped_so_far"],
            replays=replays,
            contaminated=contaminated,
            stop_requested=totals["stop_requests"] > 0,
            saving=totals["saving"] > 0,
            rank_seconds=self._seconds_of_ranks(totals),
        )

    def _slots(self, seconds: RankSeconds) -> dict[str, int]:
        """Return this rank's seconds at its own places among those of all ranks, which are summed like all the rest."""
        slots = {f"{name}/{rank}": 0 for rank in range(self._topology.world_size) for name in RankSeconds._fields}
        own = {f"{name}/{self._topology.rank}": round(part / _SECONDS_UNIT) for name, part in seconds._asdict().items()}
        return slots | own

    def _seconds_of_ranks(self, totals: Mapping[str, int]) -> tuple[RankSeconds, ...]:
        return tuple(
            RankSeconds(*(signed(totals[f"{name}/{rank}"]) * _SECONDS_UNIT for name in RankSeconds._fields))
            for rank in range(self._topology.world_size)
        )

    @property
    def _sources(self) -> list[str]:
        return [source.name for source in self._stages[self._stage].data.sources]

    def _begin_stage(self) -> None:
        """Tell each loader where the lanes of all ranks stand, from which it deals those of the next stage."""
        states = [state for state in self._topology.gather_objects(self._cursors) if state is not None]
        if self._loader:
            self._loader.load_state_dict(merge_states(states))
        self._stage += 1

    def _draw(self) -> tuple[Batch | None, HeadraceError | None]:
        """Draw this rank's part of a batch, or return the error that all ranks must learn of before this one exits."""
        try:
            return self._loader.next_batch() if self._loader else None, None
        except HeadraceError as error:
            return None, error

    def _totals_of(self, batch: Batch | None) -> dict[str, int]:
        """Return what this rank adds to each sum over all ranks, with the names in the same order on every rank.

        Ranks without a batch add nothing; for ranks without a loader, the rank with their loader counts.
        """
        by_source = [f"{figure}/{source}" for figure in ("tokens", "epochs") for source in self._sources]
        totals = dict.fromkeys([*_TOTALS, *by_source], 0)
        if batch is None or self._loader is None:
            return totals
        totals |= {
            "rows": batch.num_rows,
            "rows_drawn": self._loader.rows_drawn,
            "ranks_with_data": int(not self._loader.ended),
            "targets": batch.n_targets,
            "padding": batch.padding_tokens,
            "squared_lengths": batch.squared_lengths,
            "row_hash": batch.row_hash,
            "trained_hash": batch.trained_hash,
            "forgotten": batch.forgotten_tokens,
            "ending_stage": int(self._loader.ends_stage),
            "skipped": len(batch.skipped),
            "skipped_so_far": batch.skipped_so_far,
            "contaminated": len(batch.contaminated),
            "replays": batch.replays,
        }
        for name, tokens in batch.source_tokens.items():
            totals[f"tokens/{name.partition('/')[0]}"] += tokens  # a sub-source counts towards its source
        for source in self._sources:
            totals[f"epochs/{source}"] = round(batch.epochs.get(source, 0.0) * _EPOCH_UNIT)
        return totals

    def _sub_sources(self, batch: Batch | None) -> dict[str, int]:
        """Count each sub-source's tokens over all ranks; the names are known only once they occur."""
        if not any(source.source_from for source in self._stages[self._stage].data.sources):
            return {}
        own = {name: n for name, n in batch.source_tokens.items() if "/" in name} if batch else {}
        sums: dict[str, int] = {}
        for counts in self._topology.gather_objects(own):
            for name, tokens in counts.items():
                sums[name] = sums.get(name, 0) + tokens
        return dict(sorted(sums.items()))

    def _of_all_ranks(self, own: list[Skipped]) -> list[Skipped]:
        """Gather the records of all ranks, in an order independent of how lanes are dealt to ranks."""
        return sorted(found for part in self._topology.gather_objects(own) for found in part)

    def _shared(self, batch: Batch | None) -> Tensor:
        """Return this dp rank's (tokens, segment_ids) on each of its ranks' hosts: [2, rows, seq_len + 1] int64."""
        if batch is None:
            stage = self._stages[self._stage]
            shape = (2, stage.global_batch_size // self._topology.dp_size, stage.data.seq_len + 1)
            rows = torch.empty(shape, dtype=torch.int32)
        else:
            rows = torch.stack((torch.from_numpy(batch.tokens), torch.from_numpy(batch.segment_ids)))
        return self._topology.share_rows(rows).long()

    def origins(self) -> list[Origin]:
        """Return the origin of every piece of the last global batch, by slot; every rank calls it."""
        own = list(self._batch.origins()) if self._batch else []
        return sorted(origin for origins in self._topology.gather_objects(own) for origin in origins)

    def cursors(self) -> dict[str, object] | None:
        """Return, on rank 0, the cursors of all lanes after the last batch returned; every rank calls it."""
        states = [state for state in self._topology.gather_objects(self._cursors) if state is not None]
        return merge_states(states) if self._topology.is_main else None

    def state(self) -> DataState | None:
        """Return, on rank 0, a checkpoint's data state after that batch; every rank calls it."""
        cursors = self.cursors()
        return DataState(cursors, self._loader.fingerprint) if cursors is not None and self._loader else None


PASSED_OVER = 0  # stands for the rows of a step that nothing was learned from, in the chain of what was trained on


def chain_hash(before: str, row_hash: int) -> str:
    """Hash a step's rows together with every batch before it; 16 hex digits."""
    return xxhash.xxh3_64_hexdigest(f"{before}/{row_hash:016x}".encode())
