"""A profile holds the steps that were asked for, whoever asked, and never stops a training."""

from __future__ import annotations

import gzip
import json
import os
import re
import signal
from pathlib import Path

import pytest
import torch

from pretrain.profiling import StepProfiler
from pretrain.run.metrics import ProfileConfig
from pretrain.topology import Topology


def rank(number: int) -> Topology:
    """Return the place of one of two ranks."""
    return Topology(rank=number, world_size=2, tp_rank=0, tp_size=1, dp_rank=number, dp_size=2, device=CPU)


CPU = torch.device("cpu")


def train(profiler: StepProfiler, first: int, last: int, asked_in: int | None = None) -> None:
    """Make steps, each of one product of matrices of its own size; SIGUSR2 arrives in one of them."""
    for step in range(first, last + 1):
        profiler.begin_step(step)
        torch.ones(step, step) @ torch.ones(step, step)
        if step == asked_in:
            os.kill(os.getpid(), signal.SIGUSR2)
        profiler.end_step(step)


def profiled(folder: Path) -> dict[str, list[int]]:
    """Return, for each profile by its steps and rank, the sizes of the products in its trace."""
    found = {}
    for path in sorted(folder.glob("*.trace.json.gz")):
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        sizes = [event["args"]["Input Dims"][0][0] for event in events if event["name"] == "aten::mm"]
        name = re.match(r"steps_(\d+)-(\d+)\.rank\d", path.name)
        assert name
        found[name[0]] = sizes
        assert "aten::mm" in path.with_name(path.name.replace(".trace.json.gz", ".txt")).read_text()
    return found


def test_the_planned_steps_are_profiled_on_the_planned_ranks(tmp_path: Path) -> None:
    config = ProfileConfig(steps=(3, 4), ranks=(1,))
    for number in (0, 1):
        with StepProfiler(config, tmp_path / "profiles", rank(number)) as profiler:
            train(profiler, 1, 6)
    assert profiled(tmp_path / "profiles") == {"steps_00000003-00000004.rank1": [3, 4]}


def test_a_signal_asks_for_the_next_five_steps(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGUSR2)
    with StepProfiler(None, tmp_path, rank(0)) as profiler:
        train(profiler, 1, 9, asked_in=2)
    assert profiled(tmp_path) == {"steps_00000003-00000007.rank0": [3, 4, 5, 6, 7]}
    assert signal.getsignal(signal.SIGUSR2) == before


def test_a_run_that_ends_or_resumes_within_the_steps_profiles_those_that_it_makes(tmp_path: Path) -> None:
    config = ProfileConfig(steps=(3, 6))
    for first, last in ((1, 4), (5, 8)):
        with StepProfiler(config, tmp_path, rank(0)) as profiler:
            train(profiler, first, last)
    assert profiled(tmp_path) == {
        "steps_00000003-00000004.rank0": [3, 4],
        "steps_00000005-00000006.rank0": [5, 6],
    }


def test_what_cannot_be_written_is_an_error_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "profiles"
    folder.write_text("a file")
    with StepProfiler(ProfileConfig(steps=(1, 1)), folder, rank(0)) as profiler:
        train(profiler, 1, 2)
    assert "could not be written" in caplog.text


def test_a_rank_that_there_is_not_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in (0, 1):
        StepProfiler(ProfileConfig(steps=(1, 1), ranks=(1, 2)), tmp_path, rank(number))
    assert [record.getMessage() for record in caplog.records] == [
        "metrics.profile.ranks: [2]; there are 2 ranks, from 0 on"
    ]


@pytest.mark.parametrize("steps", [(0, 3), (5, 4)])
def test_steps_that_are_none_are_refused(steps: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="are no steps"):
        ProfileConfig(steps=steps)
