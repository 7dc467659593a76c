"""A node that cannot take part is named, whether it lacks something or does not respond."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.cluster.node_check import Task, check
from pretrain.topology import free_port
from tests.distributed.ranks import ROOT, rank_environment


@pytest.mark.distributed
def test_a_node_without_the_run_folder_is_named(tmp_path: Path) -> None:
    port = free_port()
    processes = []
    for rank, folder in enumerate((tmp_path, tmp_path / "not mounted")):
        step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": str(rank), "SLURM_LOCALID": "0"}
        command = [sys.executable, "launch/check_nodes.py", "a", "b", f"--run-folder={folder}"]
        processes.append(
            subprocess.Popen(
                [*command, f"--bad-nodes={tmp_path}/bad"],
                cwd=ROOT,
                env={**rank_environment(rank, 2, port), **step},
                stdout=subprocess.PIPE,
                text=True,
            )
        )
    said = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [1, 1]
    assert said[0].startswith(f"b: does not see the run folder {tmp_path}/not mounted")
    assert (tmp_path / "bad").read_text() == "b\n"


def test_a_rank_that_does_not_report_is_named(tmp_path: Path) -> None:
    task = Task(0, 4, 0, 2, ("a", "b"), gpus=0, meeting=("127.0.0.1", free_port()))
    found = check(task, tmp_path, patience=0.3)
    assert found == {"a": "rank 1 did not report in time", "b": "rank 2 did not report in time"}
