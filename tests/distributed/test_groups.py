"""Each rank is in the groups that it needs and in no others; see the module that the ranks run."""

from __future__ import annotations

import pytest

from tests.distributed.ranks import run_ranks


@pytest.mark.distributed
@pytest.mark.parametrize(("tp_size", "sp_size"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_groups_are_fairscales_without_those_of_a_pipeline(tp_size: int, sp_size: int) -> None:
    run_ranks(4, "tests.distributed.groups", str(tp_size), str(sp_size))
