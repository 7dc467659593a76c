"""Decide which runs of a sweep go on: successive halving by an evaluation figure. evals -> halving -> local.

The decisions are a pure function of the figures at the rungs, so they are the same after any number of restarts, and
however the runs were scheduled. Source: Jamieson and Talwalkar 2016, arXiv 1502.07943.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from pretrain.run.eval_figure import EVAL_FIGURE, EvalFigure
from shards import ConfigError


def figure_of(text: str) -> EvalFigure:
    """Read DOMAIN/FIGURE, by which runs are compared. Raises: ConfigError if there is no such figure."""
    if not re.match(EVAL_FIGURE, f"eval/{text}"):
        raise ConfigError(
            f"--halve {text}: write a domain and a figure, such as macro/bits_per_byte, or --halve as the last word;"
            " the figures are bits_per_byte, nll_per_token, perplexity, accuracy"
        )
    return EvalFigure.parse(f"eval/{text}")


def rungs_of(n_runs: int, steps: int, every: int) -> list[int]:
    """Return the steps after which half of the runs stop, until one is left: the run's length halved again and again.

    Args:
        every: steps between evaluations, of which each rung is a multiple.
    """
    halvings = math.ceil(math.log2(n_runs)) if n_runs > 1 else 0
    wanted = [math.ceil(steps / 2**i / every) * every for i in range(halvings, 0, -1)]
    return sorted({rung for rung in wanted if rung < steps})


class Standing(NamedTuple):
    """Where a run stands: it may be trained up to a step, and no further if it is out."""

    limit: int
    is_out: bool


def standings(
    costs: Sequence[Mapping[int, float]], rungs: Sequence[int], steps: int, failed: Collection[int] = ()
) -> list[Standing]:
    """Decide how far each run may be trained now.

    A run waits at a rung until all that are still in have their figure there; then the better half goes on, and of two
    that are equal the one that comes first.

    Args:
        costs: of each run, by step; less is better.
        rungs: in order.
        steps: the runs' length.
        failed: numbers of runs that take no part.
    """
    found = [Standing(steps, i in failed) for i in range(len(costs))]
    alive = [i for i in range(len(costs)) if i not in failed]
    for rung in rungs:
        if any(rung not in costs[i] for i in alive):
            for i in alive:
                found[i] = Standing(rung, False)
            break
        best = sorted(alive, key=lambda i: (costs[i][rung], i))
        stay = math.ceil(len(best) / 2)
        for i in best[stay:]:
            found[i] = Standing(rung, True)
        alive = sorted(best[:stay])
    return found
