"""Ranks that share rows exchange what the estimates say, and no more; see the module that the ranks run."""

from __future__ import annotations

import pytest

from tests.distributed.ranks import run_ranks
from tests.distributed.sequence import SP_SIZE


@pytest.mark.distributed
def test_exchanges_are_those_of_the_estimate_and_continuations_have_none() -> None:
    run_ranks(SP_SIZE, "tests.distributed.sequence")
