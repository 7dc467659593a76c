"""The loss of a split vocabulary equals that of a whole one; see the module that the ranks run."""

from __future__ import annotations

import pytest

from tests.distributed.ranks import run_ranks


@pytest.mark.distributed
@pytest.mark.parametrize("order", ["targets", "vocabulary"])
@pytest.mark.parametrize(("tp_size", "vocabulary", "multiple"), [(2, 96, 1), (4, 96, 1), (2, 97, 32), (4, 93, 1)])
def test_a_split_vocabulary_gives_the_whole_ones_loss_gradients_and_scores(
    tp_size: int, vocabulary: int, multiple: int, order: str
) -> None:
    run_ranks(tp_size, "tests.distributed.loss", str(tp_size), order, str(vocabulary), str(multiple))
