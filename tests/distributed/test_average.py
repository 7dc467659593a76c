"""The average of a run's checkpoints, and the moving one, are means of what each of them exports."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pretrain.commands import average, export
from shards import CheckpointError, ConfigError
from tests.distributed.ranks import run_starts
from tests.tiny_run import write_config


def written(command: object, *words: object) -> dict[str, Tensor]:
    """Run a command that writes a model with these arguments; return its weights."""
    assert command in (average, export)
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    arguments = parser.parse_args([str(word) for word in words])
    assert command.run(arguments) == 0
    return load_file(next(arguments.to.glob("*.safetensors")))


@pytest.mark.distributed
def test_an_average_is_the_mean_of_the_exports(tmp_path: Path) -> None:
    config = write_config(
        tmp_path, "averaged", checkpoint={"every": 1, "keep": 5}, train={"ema": {"half_life_steps": 1}}
    )
    codes, output = run_starts(config, [(2, [], "")])  # of two ranks, each with its part of the optimizer's state
    assert codes == [[0, 0]], output
    run = tmp_path / "averaged"
    exports = {
        step: written(export, "--run", run, "--step", step, "--to", tmp_path / str(step), "--dtype", "fp32")
        for step in (1, 2, 3)
    }
    moving = written(export, "--run", run, "--weights", "ema", "--to", tmp_path / "ema", "--dtype", "fp32")
    found = written(average, "--run", run, "--steps", 3, 1, 3, "--to", tmp_path / "mean", "--dtype", "fp32")
    assert found.keys() == exports[1].keys()
    for name, weight in found.items():
        torch.testing.assert_close(weight, (exports[1][name] + exports[3][name]) / 2, rtol=1e-6, atol=1e-8)
        of_steps = sum(exports[step][name] * 2.0**step for step in exports) / (2 + 4 + 8)
        torch.testing.assert_close(moving[name], of_steps, rtol=1e-5, atol=1e-7)
        assert weight.dim() == 1 or not torch.equal(exports[1][name], exports[3][name])
    with pytest.raises(ConfigError, match="at least two different steps"):
        written(average, "--run", run, "--steps", 3, 3, "--to", tmp_path / "one")
    with pytest.raises(ConfigError, match="--format peft: the run trains all weights, and has no adapters"):
        written(export, "--run", run, "--format", "peft", "--to", tmp_path / "adapters")
    with pytest.raises(CheckpointError, match="4"):
        written(average, "--run", run, "--steps", 3, 4, "--to", tmp_path / "other")
