"""Ranks that share rows exchange what the estimates say; see the module that the ranks run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed.ranks import run_ranks
from tests.distributed.sequence import SP_SIZE


@pytest.mark.distributed
def test_exchanges_are_those_of_the_estimate_and_a_rank_without_tokens_changes_nothing(tmp_path: Path) -> None:
    for ranks in (1, SP_SIZE):
        run_ranks(ranks, "tests.distributed.sequence", str(ranks), str(tmp_path))
    alone, shared = (json.loads((tmp_path / f"{ranks}.json").read_text()) for ranks in (1, SP_SIZE))
    for found, wanted in zip(_flat(shared), _flat(alone), strict=True):
        assert found == pytest.approx(wanted, rel=1e-4, abs=1e-6)


def _flat(figures: object) -> list[float]:
    """Return the numbers of nested lists, in their order."""
    if isinstance(figures, list):
        return [number for part in figures for number in _flat(part)]
    assert isinstance(figures, float)
    return [figures]
