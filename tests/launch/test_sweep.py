"""`headrace sweep` trains real runs from a sweep's file, reports on them, and trains none of them again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pretrain.cluster.submission import runs_of
from pretrain.commands import dispatch
from pretrain.commands.sweep import best_first, plans_of, slots_of
from pretrain.config import load_config
from tests.pretrain.report.made_run import make_run, read_run
from tests.tiny_run import write_config

ROOT = Path(__file__).parents[2]


@pytest.fixture
def sweep_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(ROOT)
    path = tmp_path / "sweep.yaml"
    path.write_text("optim.learning_rate: [1e-3, 3e-3]\nrun.seed: [4, 5]\n")
    return path


def test_the_runs_are_those_of_a_job_array(tmp_path: Path, sweep_file: Path) -> None:
    config = write_config(tmp_path, "tiny")
    runs = runs_of(config, ["train.steps=2"], sweep_file)
    plans = plans_of(config, ["train.steps=2"], runs)
    assert [plan.folder for plan in plans] == [run.folder for run in runs]
    assert plans[1].settings == {"optim.learning_rate": "0.001", "run.seed": "5"}
    for plan, run in zip(plans, runs, strict=True):
        words = plan.words[plan.words.index("--config") :]
        assert load_config(Path(words[1]), words[2:]) == run.config
    assert len({plan.identity for plan in plans}) == 4
    assert plans[0].identity != plans_of(config, [], runs_of(config, [], sweep_file))[0].identity


def test_a_sweep_is_refused_before_anything_is_trained(
    tmp_path: Path, sweep_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(sweep_file), "--config", str(write_config(tmp_path, "tiny"))]
    for further, message in (
        (["optim.learning_rat=1"], "did you mean optim.learning_rate?"),
        (["--halve"], "give all of them one train.steps, one evaluation.every and one evaluation.suite"),
        (
            ["--halve", "loss", "evaluation.every=1", "evaluation.suite=shards/sample/eval"],
            "write a domain and a figure",
        ),
        (["model.vocab_size=5000"], "set model.vocab_size=4096"),
    ):
        assert dispatch.run("sweep", [*words, *further]) == 2
        assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("tiny*"))


def test_each_slot_has_cores_and_a_device_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 12)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    environments = [slot.environment for slot in slots_of(3)]
    assert all("CUDA_VISIBLE_DEVICES" not in each and each["DS_ACCELERATOR"] == "cpu" for each in environments)
    assert [each["OMP_NUM_THREADS"] for each in environments] == ["4"] * 3
    assert all(slot.is_warm for slot in slots_of(3))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert [slot.environment["CUDA_VISIBLE_DEVICES"] for slot in slots_of(3)] == ["0", "1", "0"]
    assert not any("DS_ACCELERATOR" in slot.environment or slot.is_warm for slot in slots_of(3))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert [slot.environment["CUDA_VISIBLE_DEVICES"] for slot in slots_of(3)] == ["5", "7", "5"]


def test_the_best_run_comes_first(tmp_path: Path) -> None:
    made = {
        "early": make_run(tmp_path / "early", learning_rate=1e-2, steps=20, evals=(0, 20)),
        "good": make_run(tmp_path / "good", learning_rate=2e-3),
        "poor": make_run(tmp_path / "poor", learning_rate=1e-3),
    }
    points: list[Any] = [SimpleNamespace(name=name, history=read_run(folder)) for name, folder in made.items()]
    assert [point.name for point in best_first(points)] == ["good", "poor", "early"]


@pytest.mark.distributed
def test_a_real_run_is_trained_once_and_reported(tmp_path: Path, sweep_file: Path) -> None:
    sweep_file.write_text("run.seed: [4]\n")
    config = write_config(tmp_path, "tiny", train={"steps": 2})
    command = [sys.executable, str(ROOT / "launch" / "sweep.py"), str(sweep_file), "--config", str(config)]
    environment = {**os.environ, "COLUMNS": "200"}
    outputs = [
        subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        for _ in range(2)
    ]
    assert [output.returncode for output in outputs] == [0, 0], outputs[0].stdout + outputs[0].stderr
    for output in outputs:
        assert "1 finished" in output.stdout
        assert f"Report  {tmp_path}/tiny.sweep/report.html" in output.stdout
    assert "tiny-seed-4: finished, step 2/2" in outputs[0].stdout
    assert (tmp_path / "tiny.sweep" / "logs" / "tiny-seed-4.log").read_text().count("Run folder") == 1
    metrics = (tmp_path / "tiny-seed-4" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in metrics] == [1, 2]
    # The run has written its own page and what it had to say
    assert "<svg" in (tmp_path / "tiny-seed-4" / "report.html").read_text()
    (sample,) = (tmp_path / "tiny-seed-4" / "samples.jsonl").read_text().splitlines()
    assert json.loads(sample).keys() == {"step", "prompt", "text"}
