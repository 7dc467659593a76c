"""The command that submits, where there is no Slurm: all findings at once, and the script that it prints."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from pretrain.commands import dispatch

ROOT = Path(__file__).parents[2]
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def submit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Return a function that runs the command on the quickstart: its exit code, the script, its output."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PATH", str(tmp_path))  # a folder without sbatch

    def run(*arguments: str) -> tuple[int, str, str]:
        words = ["--config", "configs/quickstart.yaml", "--time=1:00:00", f"run.dir={tmp_path}/runs", *arguments]
        code = dispatch.run("submit", words)
        said = capsys.readouterr()
        return code, said.out, " ".join(said.err.split())

    return run


def test_a_dry_run_shows_a_whole_script(submit: Command, tmp_path: Path) -> None:
    code, script, said = submit("--nodes=2", "--gpus-per-node=4", "--dry-run", "optim.learning_rate=2e-3")
    assert code == 0, said
    assert "8 ranks, tp 1 x dp 8" in said
    assert "optim.learning_rate=2e-3)" in script
    assert f"#SBATCH --output={tmp_path}/runs/quickstart/logs/%j.log" in script
    assert subprocess.run(["/bin/bash", "-n"], input=script, text=True, check=False).returncode == 0
    assert not (tmp_path / "runs").exists(), "nothing has happened yet"


def test_an_evaluation_is_a_job_of_its_own(submit: Command, tmp_path: Path) -> None:
    job = ("--evaluate", "--nodes=1", "--gpus-per-node=2")
    code, script, said = submit(*job, "--dry-run", "evaluation.max_documents=9")
    assert code == 0, said
    assert f"run={tmp_path}/runs/quickstart" in script
    assert "arguments=(evaluation.max_documents=9)" in script
    assert "#SBATCH --ntasks-per-node=2" in script
    assert "--signal" not in script, "without a trap it would end the job"
    assert subprocess.run(["/bin/bash", "-n"], input=script, text=True, check=False).returncode == 0
    code, _, said = submit(*job, "evaluation.suite=null")
    assert code == 2
    assert "evaluation.suite" in said


def test_without_slurm_nothing_is_submitted(submit: Command) -> None:
    code, script, said = submit("--nodes=1", "--gpus-per-node=1")
    assert (code, script) == (2, "")
    assert "no sbatch" in said


def test_without_a_cluster_the_script_can_still_be_seen(submit: Command, tmp_path: Path) -> None:
    for name in ("sbatch", "scontrol"):
        command = tmp_path / name
        command.write_text("#!/bin/sh\necho nobody there >&2\nexit 1\n")
        command.chmod(0o755)
    code, script, said = submit("--nodes=1", "--gpus-per-node=1", "--dry-run")
    assert (code, script[:11]) == (0, "#!/bin/bash")
    assert "nobody there: no cluster was asked" in said
    assert submit("--nodes=1", "--gpus-per-node=1")[0] == 2


def test_all_errors_are_reported_at_once(submit: Command) -> None:
    code, _, said = submit(
        "--nodes=3", "--gpus-per-node=8", "--time=1", "--dry-run", "data.sources.0.paths=[nowhere/*.zst]",
        "data.tokenizer=nowhere.model",
    )  # fmt: skip
    assert code == 2
    for words in (
        "train.global_batch_size=8 cannot be split",
        "other node counts that work: 1",
        "nowhere/*.zst",
        "nowhere.model",
    ):
        assert words in said
    assert "asked to save 120 s before the limit of 60 s" in said


def test_a_model_too_large_for_the_gpu_is_refused_with_what_would_fit(submit: Command) -> None:
    large = ("model.dim=4096", "model.n_layers=32", "model.n_heads=32", "model.n_kv_heads=32", "model.ffn_dim=11008")
    code, _, said = submit("--nodes=1", "--gpus-per-node=8", "--gpu-memory=40", "--dry-run", *large)
    assert code == 2
    assert "this would fit: parallel.zero_stage=" in said


def test_rows_too_long_for_their_mask_are_refused_before_the_job_waits(submit: Command) -> None:
    code, _, said = submit(
        "--nodes=1", "--gpus-per-node=1", "--dry-run", "data.seq_len=131072", "parallel.attention=sdpa"
    )
    assert code == 2
    assert "parallel.attention=sdpa needs a whole mask" in said


def test_a_task_of_a_sweep_has_its_overrides_and_its_folder(submit: Command, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text('optim.learning_rate: [1e-3, 3e-3]\nevaluation.prompt: ["it\'s", two words]\n')
    code, script, said = submit("--nodes=1", "--gpus-per-node=1", f"--array={sweep}", "--dry-run")
    assert code == 0, said
    assert "#SBATCH --array=0-3" in script
    head = script[: script.index("set -u")] + 'printf "%s\\n" "$run" "${arguments[@]}"'
    ran = subprocess.run(["/bin/bash", "-c", head], env={"SLURM_ARRAY_TASK_ID": "3"}, capture_output=True, text=True)
    run, *arguments = ran.stdout.splitlines()
    name = "quickstart-learning_rate-0.003-prompt-two-words"
    assert run == f"{tmp_path}/runs/{name}"
    assert arguments[-4:] == [
        "optim.learning_rate=0.003", 'evaluation.prompt="two words"', f"run.name={name}", "wandb.group=quickstart",
    ]  # fmt: skip


def test_an_impossible_sweep_is_named(submit: Command, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text("model.n_heads: [3, 4, 5]\n")
    code, script, said = submit("--nodes=1", "--gpus-per-node=1", f"--array={sweep}", "--dry-run")
    assert (code, script) == (2, "")
    assert "model.n_heads=3" in said
    assert "model.n_heads=5" in said


def test_a_job_needs_nodes(submit: Command) -> None:
    with pytest.raises(SystemExit) as ended:
        submit("--nodes=0", "--gpus-per-node=1")
    assert ended.value.code == 2
