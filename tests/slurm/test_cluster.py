"""Runs on a real Slurm cluster continue by themselves, whatever the cluster does to them, until finished."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from pretrain.cluster.slurm import job_script
from pretrain.commands import dispatch
from pretrain.config import load_config
from pretrain.feed import chain_hash
from shards import Loader
from tests.distributed.ranks import ROOT
from tests.slurm.cluster import Cluster, environment_of, wait_for
from tests.tiny_run import write_config

pytestmark = pytest.mark.slurm


class Submitted:
    """A job that launch/submit.py has submitted, and the folder of its run."""

    def __init__(self, cluster: Cluster, job: str, run: Path) -> None:
        self.cluster, self.id, self.run = cluster, job, run

    @property
    def log(self) -> str:
        """Return what the job script printed."""
        return (self.run / "logs" / f"{self.id}.log").read_text()

    def metrics(self) -> list[dict]:
        return [json.loads(line) for line in (self.run / "metrics.jsonl").read_text().splitlines()]

    def wait_for_start(self, restart: int) -> None:
        """Wait until a restart, counted from 0, has trained a step."""
        log = self.run / "logs" / f"{self.id}-{restart}.log"
        wait_for(
            lambda: log.exists() and "INFO pretrain.run.metrics: step " in log.read_text(), log.name, self.everything
        )

    def everything(self) -> str:
        logs = [f"== {path.name}\n{path.read_text()}" for path in sorted(self.run.glob("logs/*.log"))]
        return "\n".join([str(self.cluster.job(self.id)), *logs])


@pytest.fixture
def submit(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Return a function that submits the tiny config with further arguments, as a user would."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("SLURM_CONF", str(cluster.config))
    model, train = {"n_layers": 1}, {"micro_batch_size": None}
    run = {"dir": str(tmp_path / "runs")}
    config = write_config(tmp_path, "tiny", run=run, model=model, train=train, checkpoint={"every": 20})

    def run(*arguments: str) -> Submitted:
        words = ["--config", str(config), "--time=60", "--grace=40", *arguments]
        code = dispatch.run("submit", words)
        said = capsys.readouterr().err
        found = re.search(r"Submitted as job (\d+)", said)
        assert found, said
        assert code == 0
        return Submitted(cluster, found[1], tmp_path / "runs" / "tiny")

    return run


def test_a_run_survives_what_a_cluster_does_to_it(cluster: Cluster, submit, tmp_path: Path) -> None:
    run = submit("--nodes=2", "--gpus-per-node=0", "--partition=low", "--no-node-check", "train.steps=1000000")
    run.wait_for_start(0)

    cluster.ask("scontrol", "requeue", run.id)
    run.wait_for_start(1)

    cluster.ask("sbatch", "--wait", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    run.wait_for_start(2)
    assert "preempted; back into the queue" in run.log

    cluster.lose_node("node2")
    cluster.wait_for_state(run.id, "PENDING")
    cluster.start_node("node2")
    run.wait_for_start(3)
    assert "DUE TO NODE FAILURE" in run.log

    cluster.ask("scontrol", "update", f"jobid={run.id}", "timelimit=1")
    cluster.wait_for_state(run.id, "PENDING")
    cluster.ask("scontrol", "update", f"jobid={run.id}", "timelimit=60")
    assert "warned by Slurm" in run.log
    assert "ended with exit code 75; back into the queue" in run.log
    cluster.wait_for_state(run.id, "RUNNING")

    cluster.ask("scancel", run.id)
    cluster.wait_for_state(run.id, "CANCELLED")
    steps = len(run.metrics()) + 10
    last = submit("--nodes=2", "--gpus-per-node=0", f"train.steps={steps}")
    cluster.wait_for_state(last.id, "COMPLETED", "FAILED", "PENDING")
    cluster.wait_for_state(last.id, "COMPLETED", "FAILED")
    assert "the run is finished" in last.log, last.everything()
    assert "2 nodes, 2 ranks: fine, alone and together" in last.everything()
    assert cluster.job(run.id)["JobState"] == "CANCELLED"

    found = [(record["step"], record["batch_hash"]) for record in last.metrics()]
    config = load_config(tmp_path / "config.yaml")
    expected, previous = [], ""
    with Loader(config.data, config.train.global_batch_size, config.run.seed) as loader:
        for step in range(1, steps + 1):
            previous = chain_hash(previous, next(loader).row_hash)
            expected.append((step, previous))
    assert found == expected


def test_a_sweep_is_an_array_with_a_run_and_a_gpu_for_each_combination(
    cluster: Cluster, submit, tmp_path: Path
) -> None:
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text("optim.learning_rate: [1e-3, 3e-3]\nrun.seed: [0, 1]\n")
    job = submit("--nodes=1", "--gpus-per-node=1", "--no-node-check", f"--array={sweep}")
    gpus: dict[str, tuple[str, str]] = {}  # by task: (node, CUDA_VISIBLE_DEVICES)

    def all_seen() -> bool:
        for rank in map(environment_of, cluster.processes(SLURM_ARRAY_JOB_ID=job.id, SLURM_STEP_ID="0")):
            gpus[rank["SLURM_ARRAY_TASK_ID"]] = (rank["SLURMD_NODENAME"], rank["CUDA_VISIBLE_DEVICES"])
        return len(gpus) == 4

    wait_for(all_seen, "four ranks", lambda: cluster.ask("squeue"))
    assert sorted(gpus.values()) == [("node1", "0"), ("node1", "1"), ("node2", "0"), ("node2", "1")]

    for task in range(4):
        cluster.wait_for_state(f"{job.id}_{task}", "COMPLETED", "FAILED")
    found = {}
    for folder in tmp_path.glob("runs/tiny-*"):
        config = yaml.safe_load((folder / "config.yaml").read_text())
        steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        found[folder.name] = (config["optim"]["learning_rate"], config["run"]["seed"], config["wandb"]["group"], steps)
    assert found == {
        f"tiny-learning_rate-{rate}-seed-{seed}": (rate, seed, "tiny", [1, 2, 3])
        for rate in (0.001, 0.003)
        for seed in (0, 1)
    }


def test_a_node_that_fails_its_check_is_left_out(cluster: Cluster, submit) -> None:
    run = submit("--nodes=1", "--gpus-per-node=2")
    wait_for(lambda: cluster.job(run.id).get("NodeList", "") in cluster.nodes, "a start", run.everything)
    first = cluster.job(run.id)["NodeList"]
    wait_for(lambda: cluster.job(run.id)["ExcNodeList"] == first, f"{first} is excluded", run.everything)
    wait_for(lambda: run.log.count("meeting at") == 2, "a second start", run.everything)
    second = cluster.job(run.id)["NodeList"]
    cluster.ask("scancel", run.id)
    assert {first, second} == set(cluster.nodes)
    said = (run.run / "logs" / f"{run.id}-0.log").read_text()  # the GPUs are copies of /dev/null
    assert f"{first}: torch sees none of the job's 2 GPUs (CUDA_VISIBLE_DEVICES=0,1)" in said


@pytest.mark.parametrize(("code", "starts"), [(2, 1), (1, 3)])
def test_a_failure_that_no_restart_can_fix_stops_the_job(
    code: int, starts: int, cluster: Cluster, tmp_path: Path
) -> None:
    fails = tmp_path / "train"
    fails.write_text(f"#!/bin/sh\nexit {code}\n")
    fails.chmod(0o755)
    directives = {"gpus-per-node": None, "nodes": "2", "ntasks-per-node": "1", "cpus-per-task": "1"}
    directives |= {"output": str(tmp_path / "log"), "time": "60"}
    settings = {"run": str(tmp_path), "train": f"({fails})", "node_check": "no"}
    script = tmp_path / "script"
    script.write_text(job_script((ROOT / "slurm" / "pretrain.sbatch").read_text(), directives, settings))
    job = cluster.ask("sbatch", "--parsable", str(script)).strip()
    cluster.wait_for_state(job, "FAILED")
    assert cluster.job(job)["ExitCode"] == f"{code}:0"
    said = (tmp_path / "log").read_text()
    assert said.count("meeting at") == starts, said
    assert "stopped:" in said
