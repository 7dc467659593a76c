"""One cluster for all tests that need it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.slurm.cluster import DAEMONS, Cluster, executable


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    missing = [daemon for daemon in DAEMONS if executable(daemon) is None]
    if missing:
        reason = f"{', '.join(missing)} not installed; on Debian: apt-get install slurm-wlm munge"
        # On the machine that decides whether a change may land, no daemon may be missing.
        assert not os.environ.get("HEADRACE_REQUIRE_SLURM"), reason
        pytest.skip(reason)
    with Cluster(tmp_path_factory.mktemp("slurm"), ["node1", "node2"]) as cluster:
        yield cluster
