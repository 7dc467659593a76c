"""Halving leaves the same runs at the end as a plain simulation, whatever was known in between and in which order."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.sweep.halving import figure_of, rungs_of, standings
from shards import ConfigError

STEPS = 64


def winners(table: list[list[float]], rungs: list[int]) -> dict[int, int]:
    """Return how far each run of a complete table [runs][rungs] gets."""
    alive, reached = list(range(len(table))), {}
    for column, rung in enumerate(rungs):
        ranked = sorted(alive, key=lambda i: table[i][column] * 1000 + i)
        keep = ranked[: (len(ranked) + 1) // 2]
        reached |= {i: rung for i in alive if i not in keep}
        alive = keep
    return reached | dict.fromkeys(alive, STEPS)


@given(
    table=st.lists(st.lists(st.integers(0, 5), min_size=4, max_size=4), min_size=1, max_size=9),
    order=st.randoms(use_true_random=False),
)
def test_runs_get_as_far_as_in_a_plain_simulation(table: list[list[int]], order) -> None:
    rungs = rungs_of(len(table), STEPS, 4)
    expected = winners([[float(value) for value in row] for row in table], rungs)
    costs: list[dict[int, float]] = [{} for _ in table]
    out: dict[int, int] = {}
    while True:
        found = standings(costs, rungs, STEPS)
        for i, standing in enumerate(found):
            if standing.is_out:
                assert out.setdefault(i, standing.limit) == standing.limit, "a decision is never taken back"
        open_runs = [
            i for i, (limit, is_out) in enumerate(found) if not is_out and limit < STEPS and limit not in costs[i]
        ]
        if not open_runs:
            break
        i = order.choice(open_runs)
        costs[i][found[i].limit] = float(table[i][rungs.index(found[i].limit)])
    assert {i: standing.limit for i, standing in enumerate(found)} == expected


def test_failed_runs_hold_up_nobody_and_a_diverged_one_is_the_worst() -> None:
    figure = figure_of("macro/bits_per_byte")
    nan, poor, good = ({8: figure.cost({"bits_per_byte": value})} for value in (None, 3.0, 2.0))
    costs: list[dict[int, float]] = [nan, poor, {}, good]
    assert not any(standing.is_out for standing in standings(costs, [8], STEPS))
    found = standings(costs, [8], STEPS, failed=[2])
    assert [(standing.limit, standing.is_out) for standing in found] == [
        (8, True),
        (64, False),
        (64, True),
        (64, False),
    ]


def test_rungs_are_evaluations_and_accuracy_rises() -> None:
    assert rungs_of(8, 1000, 100) == [200, 300, 500]
    assert rungs_of(1, 1000, 100) == []
    assert rungs_of(5, 30, 20) == [20]
    accuracy = figure_of("source:pile/accuracy")
    assert accuracy.cost({"accuracy": 0.5}) < accuracy.cost({"accuracy": 0.4})
    with pytest.raises(ConfigError, match="write a domain and a figure"):
        figure_of("loss")
