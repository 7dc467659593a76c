"""Losses by how much context there was: sums over targets by the tokens before each. scoring -> contexts -> scores.

A target's context is the tokens before it in its window, which begins anew where a document was cut; the target after
a window's first token has one. Sums are kept for each group of texts, such as a domain, in buckets that double.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from pretrain.evaluation.rows import Row
from pretrain.run.eval_figure import perplexity

_FIRST_BOUND = 16  # tokens of context in the first bucket, at most

Floats = npt.NDArray[np.float64]
Figures = Mapping[str, Mapping[str, float]]  # by bucket, then by figure; as `by_context` in evals.jsonl


def bounds_of(seq_len: int) -> npt.NDArray[np.int64]:
    """Return the most tokens of context in each bucket, [buckets]: 16, 32, 64 and so on, up to seq_len."""
    doubled = range(max(0, math.ceil(math.log2(seq_len / _FIRST_BOUND))))
    return np.array([*(_FIRST_BOUND << i for i in doubled), seq_len], np.int64)


class ContextSums:
    """The sums over the rows that were added, in float64.

    Attributes:
        sums: [groups, buckets, 2], nll in nats and number of targets.
    """

    def __init__(self, group: npt.NDArray[np.integer], seq_len: int) -> None:
        """Begin with nothing.

        Args:
            group: [items], the group of each text, counted from 0; empty if no sums are wanted.
            seq_len: the most context that there is.
        """
        self._group, bounds = group, bounds_of(seq_len)
        self.sums = np.zeros((int(group.max(initial=-1)) + 1, len(bounds), 2))
        self._bucket = np.searchsorted(bounds, np.arange(1, seq_len + 1))  # by position in a window

    def add(self, row: Row, figures: npt.NDArray[np.float32]) -> None:
        """Add a row.

        Args:
            figures: [2 or more, seq_len]: for each next token its nll and 1, or 0 if it is no target.
        """
        if not len(self._group):
            return
        starts = np.cumsum(row.lengths) - row.lengths
        size = min(len(row.tokens), figures.shape[1])
        positions = np.arange(size) - np.repeat(starts, row.lengths)[:size]
        cells = np.repeat(self._group[row.items], row.lengths)[:size], self._bucket[positions]
        np.add.at(self.sums, cells, figures[:2, :size].T.astype(np.float64))


def figures_of(sums: Floats, bounds: Sequence[int]) -> dict[str, dict[str, float]]:
    """Return the figures of each bucket that has targets, by its name, such as 17-32.

    Args:
        sums: [buckets, 2], those of a group or of several together.
    """
    firsts = [1, *(bound + 1 for bound in bounds)]
    return {
        f"{first}-{bound}": _figures(nll / tokens, int(tokens))
        for first, bound, (nll, tokens) in zip(firsts, bounds, sums.tolist(), strict=False)
        if tokens
    }


def _figures(loss: float, tokens: int) -> dict[str, float]:
    return {"nll_per_token": loss, "perplexity": perplexity(loss), "tokens": tokens}


def mean_of(groups: Sequence[Figures]) -> dict[str, dict[str, float]]:
    """Return the mean over the groups that have targets in a bucket, and how many those are."""
    names = dict.fromkeys(name for group in groups for name in group)
    found = {}
    for name in sorted(names, key=lambda name: int(name.partition("-")[0])):
        members = [group[name] for group in groups if name in group]
        loss = math.fsum(one["nll_per_token"] for one in members) / len(members)
        found[name] = _figures(loss, sum(int(one["tokens"]) for one in members)) | {"domains": len(members)}
    return found
