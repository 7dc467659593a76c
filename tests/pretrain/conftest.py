"""What many tests share: a process group of one, for models that are built of model-parallel layers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pretrain.topology import ParallelConfig, Topology, started


@pytest.fixture(scope="session")
def topology() -> Iterator[Topology]:
    with started(ParallelConfig()) as here:
        yield here
