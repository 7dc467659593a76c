"""Score an EvalSet with a model, on all ranks together. engine, EvalSet -> scoring -> DocumentScores.

Rows are dealt to the dp ranks in turn, so each window is scored by exactly one; the sums of each document are added up
over the ranks at the end, in float64. Neither training data nor any random state is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pretrain.evaluation.eval_set import EvalSet, Row
from pretrain.evaluation.scores import DocumentScores
from pretrain.model.loss import Scores, Targets, next_token_targets
from pretrain.topology import Topology, copy_to

# tokens [B, T] on the device, segment ids [B, T] on the host, targets -> their scores, the same on every tp rank
Score = Callable[[Tensor, Tensor, Targets], Scores]


def evaluate(score: Score, eval_set: EvalSet, topology: Topology, batch_size: int) -> DocumentScores:
    """Score every document. Every rank must call it, and each returns the complete result.

    Args:
        batch_size: rows that a rank scores at once.
    """
    sums = np.zeros((len(eval_set.document_domain), 3))  # each document's nll, targets and correct targets
    for row, figures in scored_rows(score, eval_set.rows, eval_set.num_rows, eval_set.seq_len, topology, batch_size):
        starts = np.cumsum(row.lengths) - row.lengths
        # A piece's targets end one before the next piece starts; the masked position between adds nothing. The sum is
        # in float64, since a float32 sum would drift in a long document.
        of_pieces = np.add.reduceat(figures.astype(np.float64), starts, axis=1)
        np.add.at(sums, row.documents, of_pieces.T)
    totals = topology.sum_over_dp(torch.from_numpy(sums).to(topology.device)).cpu().numpy()
    assert np.array_equal(totals[:, 1], eval_set.document_targets), "each target is counted exactly once"
    return DocumentScores(
        suite=eval_set.suite,
        domains=eval_set.domains,
        sources=eval_set.sources,
        domain=eval_set.document_domain,
        key=eval_set.document_key,
        nll=totals[:, 0],
        tokens=eval_set.document_targets,
        correct=totals[:, 2].astype(np.int64),
        text_bytes=eval_set.document_bytes,
    )


@torch.no_grad()
def scored_rows(
    score: Score, rows: Sequence[Row], num_rows: int, seq_len: int, topology: Topology, batch_size: int
) -> Iterator[tuple[Row, npt.NDArray[np.float32]]]:
    """Score a rank's rows, batch by batch. All ranks must iterate to the end, together.

    Args:
        rows: rows of this dp rank: every dp_size-th of all.
        num_rows: number of rows of all ranks.
    Yields:
        Each row, with float32 [3, seq_len]: for each next token its negative log-likelihood, 1, and whether it was the
        most likely one; 0 where there is no target.
    """
    # Every rank makes as many forward passes as every other (ZeRO-3 gathers weights in each); the last may be empty.
    passes = -(-num_rows // (topology.dp_size * batch_size))
    for start in range(0, passes * batch_size, batch_size):
        batch = rows[start : start + batch_size]
        tokens, segment_ids = dense(batch, batch_size, seq_len)
        ids, segments = copy_to(topology.device, torch.from_numpy(tokens)), torch.from_numpy(segment_ids)
        targets = next_token_targets(ids, segments)
        scores = score(ids[:, :-1], segments[:, :-1], targets)
        figures = torch.zeros(3, batch_size * seq_len, device=topology.device)
        figures[:, targets.positions] = torch.stack((scores.nll, torch.ones_like(scores.nll), scores.correct.float()))
        by_row = figures.view(3, batch_size, seq_len).swapaxes(0, 1).cpu().numpy()
        yield from zip(batch, by_row, strict=False)  # the last batch is not full


def dense(rows: Sequence[Row], batch_size: int, seq_len: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return (tokens, segment_ids), int64 [batch_size, seq_len + 1]; a row's pieces count from 1, 0 is padding."""
    tokens = np.zeros((batch_size, seq_len + 1), np.int64)
    segment_ids = np.zeros_like(tokens)
    for i, row in enumerate(rows):
        tokens[i, : len(row.tokens)] = row.tokens
        segment_ids[i, : len(row.tokens)] = np.repeat(np.arange(1, len(row.lengths) + 1), row.lengths)
    return tokens, segment_ids
