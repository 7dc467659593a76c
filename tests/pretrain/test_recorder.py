"""A step's record describes its batch, its figures and the saves before it, and omits what does not apply."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from pretrain.checkpoint.state import RunState
from pretrain.feed import StepBatch
from pretrain.gradient_noise import GradientNoise, NoiseScale
from pretrain.model.size import flops_of_documents, flops_per_token
from pretrain.model.transformer import LlamaConfig
from pretrain.recorder import StepRecorder
from pretrain.step_stats import StepStats
from pretrain.stepper import Step
from shards import DataConfig, Skipped, Stage
from tests.shards.corpora import config

DATA = config([{"name": name, "paths": ["x"]} for name in ("a", "b")])
MODEL = LlamaConfig(dim=32, n_layers=1, n_heads=2, vocab_size=64)
STATE = RunState(3, 300, {}, "00", restarts=0, config_hash="", tp_size=1, dp_size=1, zero_stage=1)
TRAINED = StepStats(loss=2.0, z_loss=0.5, grad_norm=1.0, applied=True)
SKIPPED = StepStats(loss=math.nan, z_loss=math.nan, grad_norm=math.nan, applied=False)


def record(
    n_targets: int, stats: StepStats, recorder: StepRecorder, failed_saves: int = 0, spike: bool = False
) -> dict[str, object]:
    nothing = torch.zeros(0)
    batch = StepBatch(
        nothing, nothing, 0, n_targets, n_tokens=96, n_padding=32, squared_lengths=3000, row_hash=1,
        trained_hash=1, n_forgotten=0,
        tokens_per_source={"a": 96}, epoch_per_source={"a": 0.5, "b": 0.0}, skipped=[], skipped_so_far=7, replays=2,
        contaminated=[Skipped("a", "shard", 1, "why")], stop_requested=False, saving=False,
    )  # fmt: skip
    with recorder.meter.part("data_wait"):
        pass
    return recorder.record(
        Step(STATE, stats, 1e-3, passed_over=False, spike=spike), batch, failed_saves, None
    ).as_json()


def recorder(with_z_loss: bool = False, peak_flops: float | None = None, data: DataConfig = DATA) -> StepRecorder:
    topology: Any = type("Alone", (), {"device": torch.device("cpu")})
    return StepRecorder(MODEL, [Stage(0, data, 8)], with_z_loss, peak_flops, topology, NoiseScale())


def test_the_record_of_a_trained_step() -> None:
    found = record(90, TRAINED, recorder(with_z_loss=True, peak_flops=1e12))
    assert (found["step"], found["tokens"], found["loss"], found["z_loss"]) == (3, 300, 2.0, 0.5)
    assert found["padding_share"] == 0.25
    assert (found["skipped_records"], found["replayed_entries"]) == (7, 2)
    per_second = found["tokens_per_second"]
    assert isinstance(per_second, float)
    assert found["mfu"] == pytest.approx(per_second * flops_per_token(MODEL, DATA.seq_len) / 1e12)
    assert found["mfu_documents"] == pytest.approx(flops_of_documents(MODEL, 96, 3000) / 96 * per_second / 1e12)
    assert not {"nonfinite", "without_targets", "failed_saves", "checkpoint_seconds"} & set(found)
    assert "contaminated_per_source" not in found, "nothing is checked without data.decontaminate"
    assert not {"mfu", "mfu_documents", "z_loss"} & set(record(90, TRAINED, recorder()))


def test_a_spike_has_no_estimate_of_the_noise() -> None:
    steps, stats = recorder(), replace(TRAINED, noise=GradientNoise(2.0, 8.0))
    keys = {"noise_scale", "gradient_signal", "gradient_variance"}
    assert {key: record(90, stats, steps)[key] for key in keys} == {
        "noise_scale": 4.0, "gradient_signal": 2.0, "gradient_variance": 8.0,
    }  # fmt: skip
    odd = record(90, replace(stats, noise=GradientNoise(1.0, 1e6)), steps, spike=True)
    assert {key: odd[key] for key in keys if key in odd} == {"noise_scale": 4.0}


def test_a_step_that_changed_nothing_says_why() -> None:
    assert {"nonfinite", "without_targets"} & set(record(90, SKIPPED, recorder())) == {"nonfinite"}
    assert {"nonfinite", "without_targets"} & set(record(0, SKIPPED, recorder())) == {"without_targets"}


@pytest.mark.parametrize(("keys", "expected"), [({}, None), ({"template": "{a}"}, 90), ({"loss_on": "all"}, None)])
def test_targets_are_counted_where_not_all_tokens_are(keys: dict[str, str], expected: int | None) -> None:
    source = {"name": "c", "paths": ["x"], "template": "{a}"} | keys
    data = config([*DATA.sources, source if keys else {"name": "c", "paths": ["x"]}])
    assert record(90, TRAINED, recorder(data=data)).get("targets") == expected


def test_a_save_is_charged_to_the_next_step_only() -> None:
    steps = recorder()
    steps.note_save(1.5)
    assert record(90, TRAINED, steps, failed_saves=2)["checkpoint_seconds"] == 1.5
    found = record(90, TRAINED, steps, failed_saves=2)
    assert "checkpoint_seconds" not in found
    assert found["failed_saves"] == 2
