"""The rank that works longer than the others for long is named, once, and no other."""

from __future__ import annotations

import random

import pytest

from pretrain.faults.stragglers import RankSeconds, Straggler, StragglerWatch

HOSTS = ["a", "a", "b", "b"]


def step(drawn: random.Random, slow: int | None = None, phase: str = "backward", by: float = 0.2) -> list[RankSeconds]:
    """Return the seconds of four ranks, which differ by some percent."""
    ranks = [RankSeconds(0.01, *(drawn.uniform(0.95, 1.05) * part for part in (0.3, 0.6, 0.1))) for _ in HOSTS]
    if slow is not None:
        ranks[slow] = ranks[slow]._replace(**{phase: getattr(ranks[slow], phase) + by})
    return ranks


@pytest.mark.parametrize("phase", ["loading", "forward", "backward"])
def test_a_slow_rank_is_named_with_its_node_and_what_is_slow(phase: str) -> None:
    drawn, watch = random.Random(1), StragglerWatch(HOSTS)
    assert [watch.note(n, step(drawn)) for n in range(30)] == [None] * 30
    found = [event for n in range(30, 80) if (event := watch.note(n, step(drawn, 2, phase)))]
    (event,) = found
    assert event.step < 50
    assert event.figures.items() >= {"rank": 2, "host": "b", "most": phase}.items()
    assert "rank 2 on b" in event.text
    assert watch.straggler is not None
    assert watch.straggler == Straggler(2, pytest.approx(0.2, abs=0.05))
    for n in range(80, 110):
        assert watch.note(n, step(drawn)) is None
    assert watch.straggler is None
    assert [watch.note(n, step(drawn, 2)) for n in range(110, 140)].count(None) == 29, "told again"


def test_single_slow_steps_and_changing_ranks_are_not_told() -> None:
    drawn, watch = random.Random(1), StragglerWatch(HOSTS)
    for n in range(200):
        assert watch.note(n, step(drawn, n % 4, by=0.3 if n % 3 == 0 else 0.0)) is None
    alone = StragglerWatch(["a"])
    assert [alone.note(n, [RankSeconds(0.0, n, n)]) for n in range(40)] == [None] * 40


def test_of_two_ranks_the_faster_one_is_typical() -> None:
    watch = StragglerWatch(["a", "b"])
    found = [watch.note(n, [RankSeconds(0.0, 0.1, 0.2), RankSeconds(0.0, 0.1, 0.3)]) for n in range(20)]
    assert found[-1] is not None
    assert watch.straggler == Straggler(1, pytest.approx(0.1))
