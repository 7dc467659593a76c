"""Job scripts, sweeps and time limits, as far as they can be tested without a cluster (tests/slurm has one)."""

from __future__ import annotations

import itertools
import os
import subprocess
from pathlib import Path
from unittest import mock

import pytest

from pretrain.cluster.slurm import JobRequest, job_script, read_sweep, seconds_of, shell_words, submit
from pretrain.cluster.submission import layout_findings
from pretrain.commands import dispatch, evaluate, generate
from pretrain.config import load_config
from pretrain.parallel_config import ParallelConfig
from pretrain.topology import dp_size_of, launcher_environment, slurm_environment, world_size_of
from shards import ConfigError
from tests.tiny_run import write_config

TEMPLATE = Path(__file__).parents[3] / "slurm" / "pretrain.sbatch"
SETTINGS = ("run", "train", "check_nodes", "node_check", "arguments")


def request(**values: object) -> JobRequest:
    fixed = {"name": "a run", "nodes": 2, "gpus_per_node": 4, "cpus_per_task": 6, "time": "1-12", "grace_seconds": 300}
    return JobRequest(**{**fixed, "output": "runs/x/logs/%j.log", "chdir": Path("/some where"), **values})


def test_the_ranks_that_share_a_model_and_rows_have_to_divide_all() -> None:
    assert dp_size_of(24, ParallelConfig(tp_size=2, sp_size=4)) == 3
    with pytest.raises(ConfigError, match="tp_size=2 times parallel.sp_size=4 does not divide the 12 ranks .* of 8"):
        dp_size_of(12, ParallelConfig(tp_size=2, sp_size=4))


@pytest.mark.parametrize(
    ("sp_size", "gpus_per_node", "told"),
    [
        (1, 8, "16 ranks, tp 2 x dp 8, ZeRO-1; 1 micro-steps of 3 rows"),
        (4, 8, "16 ranks, tp 2 x sp 4 x dp 2, ZeRO-1; 1 micro-steps of 12 rows"),
        (4, 4, "parallel.sp_size=4 spans nodes of 4 ranks: attention waits for the network"),
    ],
)
def test_a_submission_tells_the_layout_and_what_waits_for_the_network(
    sp_size: int, gpus_per_node: int, told: str, tmp_path: Path
) -> None:
    model = {"n_heads": 8, "dim": 64, "n_kv_heads": 2}
    train = {"global_batch_size": 24, "micro_batch_size": None}
    path = write_config(tmp_path, "run", model=model, train=train, parallel={"tp_size": 2, "sp_size": sp_size})
    found = list(layout_findings(load_config(path), request(gpus_per_node=gpus_per_node)))
    assert any(told in finding.text for finding in found), found
    assert [finding.level for finding in found] == ["ok", "warning"][: 1 + (gpus_per_node == 4)]


def directives_in(script: str) -> dict[str, str]:
    lines = [line.partition(" #")[0].rstrip() for line in script.splitlines() if line.startswith("#SBATCH")]
    return {key: value for key, _, value in (line.removeprefix("#SBATCH --").partition("=") for line in lines)}


def test_a_script_is_the_template_with_what_was_asked_for() -> None:
    template = TEMPLATE.read_text()
    words = ["--config", "my config.yaml", "optim.learning_rate=1e-3", "evaluation.prompt=it's $HOME; rm"]
    settings = {name: shell_words([name]) for name in SETTINGS} | {"arguments": f"({shell_words(words)})"}
    script = job_script(template, request(partition="gpu", after="17").directives(), settings)
    found = directives_in(script)
    assert found["nodes"] == "2"
    assert found["ntasks-per-node"] == found["gpus-per-node"] == "4"
    assert found["signal"] == "B:USR1@300"
    assert found["chdir"] == "'/some where'"
    assert found["partition"] == "gpu"
    assert found["dependency"] == "afterok:17"
    assert found["kill-on-invalid-dep"] == "yes"
    assert "account" not in found
    changed = [line for line in script.splitlines() if line not in template.splitlines()]
    assert all(line.startswith(("#SBATCH", *(f"{name}=" for name in SETTINGS))) for line in changed)
    head = script[: script.index("set -u")]
    said = subprocess.run(["bash", "-c", head + 'printf "%s\\n" "${arguments[@]}"'], capture_output=True, text=True)
    assert said.stdout.splitlines() == words


def test_without_gpus_there_is_one_rank_per_node() -> None:
    found = directives_in(job_script(TEMPLATE.read_text(), request(gpus_per_node=0).directives(), {}))
    assert found["ntasks-per-node"] == "1"
    assert "gpus-per-node" not in found


def test_further_options_override_the_others() -> None:
    found = directives_in(
        job_script(TEMPLATE.read_text(), request(options=("--mem=0", "--nodes=3-4", "--exclusive")).directives(), {})
    )
    assert (found["mem"], found["nodes"], found["exclusive"]) == ("0", "3-4", "")
    with pytest.raises(ConfigError, match="--sbatch=mem"):
        request(options=("mem=0",)).directives()


def test_a_sweep_is_the_product_of_its_lists(tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text("optim.learning_rate: [1e-3, 3e-3]\nmodel.qk_norm: [true, false]\noptim.betas: [[0.9, 0.95]]\n")
    tasks = read_sweep(path)
    assert [task.overrides for task in tasks] == [
        (f"optim.learning_rate={rate}", f"model.qk_norm={norm}", "optim.betas=[0.9, 0.95]")
        for rate, norm in itertools.product(("0.001", "0.003"), ("true", "false"))
    ]
    assert len({task.suffix for task in tasks}) == 4
    assert tasks[0].suffix == "learning_rate-0.001-qk_norm-True-betas-0.9-0.95"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("optim.learning_rate: 1e-3", "sweep.yaml:1: optim.learning_rate is 0.001; a sweep needs a list"),
        ("a: [1]\nrun.name: [x, y]", "sweep.yaml:2: run.name"),
        ("a.x: [1, 1]", "'x-1'"),
    ],
)
def test_an_invalid_sweep_is_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_sweep(path)


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("90", 5400), ("1:30", 90), ("2:00:01", 7201), ("1-2", 93600), ("1-02:03", 93780), ("1-00:00:05", 86405)],
)
def test_time_limits_are_read_as_sbatch_reads_them(time: str, seconds: int) -> None:
    assert seconds_of(time) == seconds


def test_an_invalid_time_limit_is_refused() -> None:
    assert [seconds_of(text) for text in ("", "soon", "1:2:3:4", "24h", "1-")] == [None] * 5


def test_a_task_of_a_slurm_step_is_a_rank() -> None:
    step = {"SLURM_STEP_NUM_TASKS": "16", "SLURM_PROCID": "9", "SLURM_LOCALID": "1"}
    assert slurm_environment(step) == {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1"}
    # torchrun under srun, one per node, has already numbered the ranks; a batch script is not a step.
    assert slurm_environment({**step, "RANK": "3", "WORLD_SIZE": "8"}) == {}
    assert slurm_environment({"SLURM_PROCID": "0", "SLURM_NTASKS": "16"}) == {}
    with pytest.raises(ConfigError, match="MASTER_ADDR.*launch/submit.py"):
        launcher_environment(slurm_environment(step))


def test_a_job_does_not_inherit_the_device_of_the_command_that_submits_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(f"#!/bin/sh\nenv > {tmp_path}/environment\necho 7\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")  # as the command sets it for itself
    assert submit("#!/bin/bash\n") == "7"
    assert "DS_ACCELERATOR" not in (tmp_path / "environment").read_text()


@pytest.mark.parametrize("command", ["evaluate", "generate"])
def test_other_commands_under_slurm_are_ranks_too(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(evaluate, "evaluate_run", lambda _: seen.append(world_size_of(os.environ)))
    monkeypatch.setattr(generate, "print_continuations", lambda _: seen.append(world_size_of(os.environ)))
    step = {"SLURM_STEP_NUM_TASKS": "16", "SLURM_PROCID": "9", "SLURM_LOCALID": "1"}
    with mock.patch.dict(os.environ, step):
        assert dispatch.run(command, ["--run", "a run"]) == 0
    assert seen == [16]
