"""Settings for all tests, and a shared fixture: a process group of one, for models of model-parallel layers."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from pretrain.topology import Topology

# Two tests run at once, and torch's threads collapse when they have to share a core.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A small kernel is compiled in less time than a process that would compile it takes to import torch.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


# How long an example takes means nothing on a machine that does other work. `--hypothesis-profile` chooses another.
settings.register_profile("quick", deadline=None, max_examples=10)
settings.register_profile("ci", deadline=None, max_examples=50)
settings.register_profile("thorough", deadline=None, max_examples=100)
settings.load_profile("quick")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the tests that mostly wait for Slurm, so that the other process does not wait for them at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slurm") is None)


@pytest.fixture(scope="session")
def topology() -> Iterator[Topology]:
    from pretrain.parallel_config import ParallelConfig
    from pretrain.topology import started  # imported here, since the loader's tests need no torch

    # DeepSpeed collects garbage dozens of times an engine, and would pass over all of torch's objects each time.
    gc.collect()
    gc.freeze()
    before = dict(os.environ)
    with started(ParallelConfig()) as here:
        # The rank's variables would reach every process that other tests start, and make ranks of them. DeepSpeed asks
        # for this one each time.
        for name in set(os.environ) - set(before) - {"LOCAL_RANK"}:
            del os.environ[name]
        yield here
