"""The learning rate follows the batch where a stage changes it, by the rule that the config names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from pretrain.commands.train import how_to_train_longer
from pretrain.config import RunConfig, load_config
from pretrain.config_changes import compare_for_resume
from pretrain.optim import learning_rate_of_run
from pretrain.start import announce
from pretrain.topology import Topology
from shards import ConfigError
from tests.tiny_run import write_config

STEPS = 40
WARM_UP = [
    {"step": 10, "train": {"global_batch_size": 16}},
    {"step": 20, "train": {"global_batch_size": 32}},
]


def config_of(folder: Path, rule: str, stages: list[dict[str, Any]], **optim: object) -> RunConfig:
    """Return the config of a run that begins with 8 rows of 64 tokens a step and a constant rate of 1e-3."""
    settings = {"learning_rate": 1e-3, "batch_size_rule": rule, **optim}
    return load_config(write_config(folder, "run", train={"steps": STEPS}, optim=settings, stages=stages))


def rates_of(config: RunConfig) -> list[float]:
    return [learning_rate_of_run(step, config.schedule, STEPS) for step in range(STEPS)]


@pytest.mark.parametrize(("rule", "factors"), [("none", (1, 1)), ("sqrt", (2**0.5, 2)), ("linear", (2, 4))])
def test_the_rate_follows_the_batch(tmp_path: Path, rule: str, factors: tuple[float, float]) -> None:
    rates = rates_of(config_of(tmp_path, rule, WARM_UP))
    assert rates == pytest.approx([1e-3] * 10 + [1e-3 * factors[0]] * 10 + [1e-3 * factors[1]] * 20)


def test_the_rule_multiplies_the_schedule(tmp_path: Path) -> None:
    shape = {"schedule": "cosine", "warmup_steps": 15}
    plain, scaled = (rates_of(config_of(tmp_path, rule, WARM_UP, **shape)) for rule in ("none", "linear"))
    assert [of / rate for of, rate in zip(scaled, plain, strict=True)] == pytest.approx([1] * 10 + [2] * 10 + [4] * 20)


def test_a_stage_that_sets_the_rate_sets_it_for_its_own_batch(tmp_path: Path) -> None:
    stages = [
        {"step": 10, "train": {"global_batch_size": 16}, "optim": {"learning_rate": 5e-4}},
        {"step": 20, "train": {"global_batch_size": 32}},
        {"step": 30, "optim": {"floor": 1.0}},
    ]
    rates = rates_of(config_of(tmp_path, "linear", stages))
    assert rates == pytest.approx([1e-3] * 10 + [5e-4] * 10 + [1e-3] * 10 + [4e-3] * 10), "the last is that of optim"


def test_rows_of_another_length_count_by_their_tokens(tmp_path: Path) -> None:
    stages = [{"step": 10, "data": {"seq_len": 128}, "train": {"global_batch_size": 4}}]
    assert set(rates_of(config_of(tmp_path, "linear", stages))) == {1e-3}


def test_the_tokens_of_a_run_are_those_of_its_stages(tmp_path: Path) -> None:
    config, rows = config_of(tmp_path, "none", WARM_UP), [8] * 10 + [16] * 10 + [32] * 20
    assert [config.tokens_until(step) for step in range(STEPS + 1)] == [
        64 * sum(rows[:step]) for step in range(STEPS + 1)
    ]


def test_the_advice_at_the_end_keeps_the_last_rate(tmp_path: Path) -> None:
    config = config_of(tmp_path, "linear", WARM_UP, schedule="linear", floor=0.1)
    advice = how_to_train_longer(config)
    rate = float(advice.partition("optim.learning_rate=")[2].split()[0])
    longer = config_of(tmp_path, "linear", WARM_UP, schedule="constant", learning_rate=rate)
    assert rates_of(longer)[-1] == pytest.approx(rates_of(config)[-1], rel=1e-5)


def test_a_rule_that_has_nothing_to_scale_is_told(
    tmp_path: Path, topology: Topology, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_config(tmp_path, "tiny", train={"steps": 4}, optim={"batch_size_rule": "sqrt"})
    said = "optim.batch_size_rule=sqrt does nothing, since no stage changes the tokens of a step"
    announce(load_config(path, []), topology)
    assert said in caplog.text
    caplog.clear()
    announce(load_config(path, ["stages=[{step: 2, train: {global_batch_size: 16}}]"]), topology)
    assert said not in caplog.text


LONGER = [
    {"step": 10, "model": {"rope_theta": 5e4}},
    {"step": 20, "model": {"rope_scaling": {"factor": 8.0}}, "data": {"seq_len": 128}},
    {"step": 30, "train": {"global_batch_size": 4}},
]


def test_a_checkpoint_has_the_positions_of_the_last_step_that_was_done(tmp_path: Path) -> None:
    config = config_of(tmp_path, "none", LONGER)
    scaled = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaled["original_max_position_embeddings"] = 8192
    expected = [
        *[{"rope_theta": 1e4}] * 11,
        *[{"rope_theta": 5e4}] * 10,
        *[{"rope_theta": 5e4, "rope_scaling": scaled}] * (STEPS - 20),
    ]
    assert [config.stage_of(step).model.positions for step in range(STEPS + 1)] == expected
    assert [config.stage_of(step).data.seq_len for step in range(STEPS + 1)] == [64] * 21 + [128] * (STEPS - 20)
    plain = config.model.model_dump(exclude={"rope_theta", "rope_scaling"})
    assert config.stage_of(STEPS).model.model_dump(exclude={"rope_theta", "rope_scaling"}) == plain


def test_positions_of_the_past_may_not_be_edited(tmp_path: Path) -> None:
    old = config_of(tmp_path, "none", LONGER)
    new = config_of(tmp_path, "none", [LONGER[0], {**LONGER[1], "model": {"rope_theta": 1e6}}, LONGER[2]])
    for step in (10, 20):
        assert compare_for_resume(old, new, step)[0] == []
    refused, _ = compare_for_resume(old, new, 21)
    assert {change.key for change in refused} >= {"stages.1.model.rope_theta", "stages.1.model.rope_scaling.factor"}


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        (
            {"architecture": "recurrent", "dim": 8, "n_layers": 1, "vocab_size": 4096},
            {"rope_theta": 5e4},
            "stages.0.model.rope_theta: of model.architecture=recurrent a stage may change nothing",
        ),
        ({}, {"dim": 64}, "stages.0.model.dim: unknown key"),
        (
            {"rope_theta": 1.0},
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}},
            "stages.0.model.rope_theta=1.0 must be above 1 for model.rope_scaling.rope_type=yarn",
        ),
    ],
)
def test_a_stage_changes_only_positions_that_the_model_has(
    tmp_path: Path, model: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    path = write_config(tmp_path, "run", train={"steps": STEPS}, stages=[{"step": 10, "model": changes}])
    tree = yaml.safe_load(path.read_text())
    tree["model"] = model if "architecture" in model else tree["model"] | model
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert message in str(caught.value)
