"""`headrace scale` reads finished runs and tells a larger one, or says why it does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from pretrain.commands import dispatch
from tests.pretrain.report.made_run import make_run
from tests.tiny_run import write_config


@pytest.fixture
def target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COLUMNS", "200")
    return write_config(tmp_path, "target", model={"dim": 512}, train={"steps": 1000})


def made(root: Path, width: int, learning_rate: float, steps: int = 40) -> str:
    """Make a run of a width, whose loss falls faster with a higher learning rate."""
    folder = make_run(root, learning_rate, steps=steps)
    config = yaml.safe_load(folder.config.read_text())
    config["model"]["dim"], config["train"]["steps"] = width, 40
    folder.config.write_text(yaml.safe_dump(config))
    return str(root)


def test_three_sizes_tell_a_fourth(tmp_path: Path, target: Path, capsys: pytest.CaptureFixture[str]) -> None:
    roots = [made(tmp_path / str(width), width, 1e-5 * width) for width in (32, 64, 128)]
    stopped = made(tmp_path / "stopped", 256, 1e-3, steps=20)
    assert dispatch.run("scale", [*roots, stopped, "--config", str(target), "--set", "train.steps=500"]) == 0
    said = capsys.readouterr().out
    assert f"left out: {stopped} is stopped at step 20 of 40" in said
    assert "3 runs, 3 sizes" in said
    assert "target: width 512" in said
    assert f"{500 * 8 * 64:,} tokens" in said
    assert "bits per byte: " in said
    assert "1 x a CPU" not in said
    assert "on 2 x a CPU" in said
    assert dispatch.run("scale", [*roots, "--training-loss", "--config", str(target), "--tokens", "1e6"]) == 0
    assert "training loss: " in capsys.readouterr().out


def test_training_losses_on_other_data_are_not_compared(
    tmp_path: Path, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    roots = [made(tmp_path / str(width), width, 1e-5 * width) for width in (32, 64, 128)]
    path = tmp_path / "64" / "config.yaml"
    config = yaml.safe_load(path.read_text())
    config["data"]["sources"][0]["weight"] = 0.5
    path.write_text(yaml.safe_dump(config))
    words = [*roots, "--config", str(target)]
    assert dispatch.run("scale", [*words, "--training-loss"]) == 2
    assert "the runs differ in data.sources.0.weight" in capsys.readouterr().err
    assert dispatch.run("scale", [*words, "--set", "data.seq_len=32"]) == 0
    assert "the target differs from the runs in data." in capsys.readouterr().out


def test_too_few_sizes_or_unscored_runs_are_refused(
    tmp_path: Path, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    roots = [made(tmp_path / str(width), width, 1e-5 * width) for width in (32, 64)]
    assert dispatch.run("scale", [*roots, "--config", str(target)]) == 2
    assert "these runs are of 2 sizes" in capsys.readouterr().err
    (tmp_path / "32" / "evals.jsonl").unlink()
    assert dispatch.run("scale", [*roots, "--config", str(target)]) == 2
    assert f"{roots[0]} was not scored at its last step; give --training-loss" in capsys.readouterr().err
    assert dispatch.run("scale", [*roots, "--config", str(target), "--set", "train.epochs=1", "train.steps=null"]) == 2
    assert "give --tokens" in capsys.readouterr().err
