"""Score a part of an evaluation with a model, on all ranks together. {engine, EvalSet, TaskSet} -> scoring -> scores.

Rows are dealt to the dp ranks in turn, so each window is scored by exactly one; the sums of each text are added up over
the ranks at the end, in float64. Neither training data nor any random state is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pretrain.evaluation.contexts import ContextSums
from pretrain.evaluation.rows import Row, dense
from pretrain.evaluation.scores import Totals
from pretrain.model.loss import Scores, Targets
from pretrain.model.sequence import own_part, own_tokens
from pretrain.topology import Topology, copy_to

# tokens [B, T] on the device, segment ids [B, T] on the host, targets of this rank's positions -> their scores, the
# same on every tp rank
Score = Callable[[Tensor, Tensor, Targets], Scores]

Result = TypeVar("Result", covariant=True)


class Part(Protocol[Result]):
    """A suite or a task to be scored, as one dp rank holds it.

    Attributes:
        label: what its results are called in evals.jsonl.
        targets: [items], predicted tokens of each of its texts.
        group: [items], the group of each text whose losses are also added up by context; empty if there are no groups.
        rows: every dp_size-th row, starting from this rank's first.
        num_rows: number of rows of all ranks.
        times: how many times as long as the run's rows these are.
    """

    @property
    def label(self) -> str: ...
    @property
    def seq_len(self) -> int: ...
    @property
    def targets(self) -> npt.NDArray[np.int64]: ...
    @property
    def group(self) -> npt.NDArray[np.int32]: ...
    @property
    def rows(self) -> Sequence[Row]: ...
    @property
    def num_rows(self) -> int: ...
    @property
    def times(self) -> int: ...

    def scores_of(self, totals: Totals) -> Result:
        """Return its scores, given the sums over all ranks."""


def evaluate(score: Score, part: Part[Result], topology: Topology, batch_size: int) -> Result:
    """Score a part. Every rank must call it, and each returns the complete result.

    Args:
        batch_size: rows of the run's length that a rank scores at once; of longer ones no more tokens, but one row.
    """
    num_items, rows_at_once = len(part.targets), max(1, batch_size // part.times)
    totals = sums_over(score, part.rows, part.num_rows, num_items, part.seq_len, topology, rows_at_once, part.group)
    assert np.array_equal(totals.items[:, 1], part.targets), "each target is counted exactly once"
    return part.scores_of(totals)


@torch.no_grad()
def sums_over(
    score: Score,
    rows: Sequence[Row],
    num_rows: int,
    num_items: int,
    seq_len: int,
    topology: Topology,
    batch_size: int,
    group: npt.NDArray[np.int32],
) -> Totals:
    """Score the rows of all ranks, and add up what belongs to each text, and to each group. Every rank must call it.

    Args:
        rows: those of this dp rank: every dp_size-th of all.
        num_rows: number of rows of all ranks.
        group: [num_items], the group of each text whose losses are also added up by context; empty if there are none.
    """
    sums, contexts = np.zeros((num_items, 3)), ContextSums(group, seq_len)
    for row, figures in _scored_rows(score, rows, num_rows, seq_len, topology, batch_size):
        starts = np.cumsum(row.lengths) - row.lengths
        # A piece's targets end one before the next piece starts; the masked position between adds nothing. The sum is
        # in float64, since a float32 sum would drift in a long document.
        of_pieces = np.add.reduceat(figures.astype(np.float64), starts, axis=1)
        np.add.at(sums, row.items, of_pieces.T)
        contexts.add(row, figures)
    flat = torch.from_numpy(np.concatenate([sums.ravel(), contexts.sums.ravel()])).to(topology.device)
    whole = topology.sum_over_zero(flat).cpu().numpy()  # in one collective
    return Totals(whole[: sums.size].reshape(sums.shape), whole[sums.size :].reshape(contexts.sums.shape))


def _scored_rows(
    score: Score, rows: Sequence[Row], num_rows: int, seq_len: int, topology: Topology, batch_size: int
) -> Iterator[tuple[Row, npt.NDArray[np.float32]]]:
    """Score a rank's rows, batch by batch. All ranks must iterate to the end, together.

    Yields:
        Each row, with float32 [3, seq_len]: for each next token its negative log-likelihood, 1, and whether it was the
        most likely one; 0 where there is no target, or another rank has the position.
    """
    own = own_tokens(seq_len)
    # Every rank makes as many forward passes as every other (ZeRO-3 gathers weights in each); the last may be empty.
    passes = -(-num_rows // (topology.dp_size * batch_size))
    for start in range(0, passes * batch_size, batch_size):
        batch = rows[start : start + batch_size]
        tokens, segment_ids, is_target = dense(batch, batch_size, seq_len)
        ids, segments = copy_to(topology.device, torch.from_numpy(tokens)), torch.from_numpy(segment_ids)
        positions = copy_to(topology.device, torch.from_numpy(np.flatnonzero(is_target[:, own])))
        targets = Targets(positions, own_part(ids[:, 1:]).flatten()[positions])
        scores = score(ids[:, :-1], segments[:, :-1], targets)
        figures = torch.zeros(3, batch_size, seq_len, device=topology.device)
        found = torch.stack((scores.nll, torch.ones_like(scores.nll), scores.correct.float()))
        own_figures = torch.zeros_like(figures[:, :, own]).flatten(1)
        own_figures[:, targets.positions] = found
        figures[:, :, own] = own_figures.view(3, batch_size, -1)
        by_row = figures.swapaxes(0, 1).cpu().numpy()
        yield from zip(batch, by_row, strict=False)  # the last batch is not full
