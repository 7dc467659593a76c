"""The learning rate follows the batch where a stage changes it, by the rule that the config names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pretrain.commands.train import how_to_train_longer
from pretrain.config import RunConfig, load_config
from pretrain.optim import learning_rate_of_run
from pretrain.start import announce
from pretrain.topology import Topology
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
