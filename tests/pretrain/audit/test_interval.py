"""An interval is read as the run recorded it, or refused with what is missing; an audit changes only how, not what."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pretrain.audit.certificate import check_place
from pretrain.audit.interval import Figures, read_interval, read_training
from pretrain.config import load_config
from pretrain.run.run_folder import RunFolder
from pretrain.run.starts import Environment, StartRecord, start_of
from shards import ConfigError
from tests.tiny_run import write_config

STEPS = 12


def line(step: int, **changes: object) -> dict[str, object]:
    figures: dict[str, object] = {"step": step, "batch_hash": f"b{step}", "learning_rate": 1e-3, "loss": 1 / step}
    return figures | {"grad_norm": 0.5, "tokens": 7, "skipped_records": 0} | changes


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    made = RunFolder(tmp_path / "run")
    made.create()
    write_config(tmp_path, "run").rename(made.config)
    for step in range(1, STEPS + 1):
        hashed = {"weight_hash": f"w{step}", "optimizer_hash": f"o{step}"} if step % 4 == 0 else {}
        made.metrics.append(line(step, **hashed))
    return made


def record(folder: RunFolder, step: int, *overrides: str) -> StartRecord:
    """Record a start with its config, as a run does."""
    config = load_config(folder.config, overrides)
    folder.config.write_text(config.to_yaml())
    start = StartRecord(step, "", "0.1", "", config.hash(), 1, 1, 1, Environment([], 1, {}, "varlen"), [])
    plain = {"step": step, **{name: getattr(start, name) for name in start.__struct_fields__}}
    folder.note_start(plain, config.hash())
    return start


def test_the_figures_of_an_interval_and_of_the_step_before(folder: RunFolder) -> None:
    found = read_interval(folder, 4, 3)
    assert found.before == Figures(4, "b4", 1e-3, 1 / 4, 0.5, "w4", "o4")
    assert found.steps == [Figures(step, f"b{step}", 1e-3, 1 / step, 0.5) for step in (5, 6, 7)]
    assert found.described == "steps 5 to 7"
    first = read_interval(folder, 0, 1)
    assert (first.before, first.described) == (Figures(0, ""), "step 1")


@pytest.mark.parametrize(
    ("from_step", "steps", "message"),
    [
        (4, 9, f"has records up to step {STEPS}, so --steps may be at most 8"),
        (12, 1, f"has records up to step {STEPS}, so --from-step must be below {STEPS}"),
        (-1, 2, "give a step from 0 on, and at least one step"),
        (4, 0, "give a step from 0 on, and at least one step"),
    ],
)
def test_steps_that_the_run_has_not_trained_are_refused(
    folder: RunFolder, from_step: int, steps: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        read_interval(folder, from_step, steps)


def test_a_torn_missing_double_or_damaged_record_is_named(folder: RunFolder) -> None:
    path = folder.metrics.path
    lines = path.read_text().splitlines(keepends=True)

    def refused(*changed: str) -> str:
        path.write_text("".join(changed))
        with pytest.raises(ConfigError) as error:
            read_interval(folder, 4, 8)
        return str(error.value)

    assert "step 7 is missing or torn" in refused(*lines[:6], lines[6][:30] + "\n", *lines[7:])
    assert "step 7 is missing or torn" in refused(*lines[:6], *lines[7:])
    assert "step 7 has several records" in refused(*lines[:7], *lines[6:])
    assert "has records up to step 11" in refused(*lines[:11], lines[11][:30])
    assert "is damaged" in refused(*lines[:6], json.dumps(line(7, loss="low")) + "\n", *lines[7:])
    path.write_text("".join([*lines[:2], lines[2][:9] + "\n", *lines[3:]]))
    assert read_interval(folder, 4, 8).steps[-1].step == STEPS, "what lies outside does not matter"


def test_the_config_is_that_of_the_start_that_trained_the_interval(folder: RunFolder) -> None:
    starts = [
        record(folder, 0, "optim.learning_rate=1e-3"),
        record(folder, 6, "optim.learning_rate=2e-3"),
        record(folder, 8, "optim.learning_rate=2e-3", "train.steps=50"),
    ]
    assert [start_of(starts, step) for step in (1, 6, 7, 9)] == [starts[0], starts[0], starts[1], starts[2]]
    cases = ((0, 6, 1e-3, starts[:1]), (6, 2, 2e-3, starts[1:2]), (6, 6, 2e-3, starts[1:]))
    for from_step, steps, rate, trained in cases:
        training = read_training(folder, read_interval(folder, from_step, steps), [])
        assert (training.config.optim.learning_rate, training.starts) == (rate, trained)
    with pytest.raises(ConfigError, match="the start after step 6 changed optim or the run's length"):
        read_training(folder, read_interval(folder, 4, 4), [])
    folder.config_of(starts[0].config_hash).unlink()
    with pytest.raises(ConfigError, match="is missing, the config that steps 1 to 6 were trained with"):
        read_training(folder, read_interval(folder, 0, 6), [])


def test_with_a_schedule_that_ends_a_changed_length_splits_an_interval(folder: RunFolder) -> None:
    record(folder, 0, "optim.schedule=cosine")
    record(folder, 6, "train.steps=50")
    with pytest.raises(ConfigError, match="audit the steps up to 6 and those after it one by one"):
        read_training(folder, read_interval(folder, 4, 4), [])


def test_a_run_that_recorded_no_starts_has_its_folder_s_config(folder: RunFolder) -> None:
    training = read_training(folder, read_interval(folder, 4, 4), [])
    assert (training.starts, training.config) == ([], load_config(folder.config, begun=True))
    start = record(folder, 6)
    assert read_training(folder, read_interval(folder, 6, 2), []).starts == [start]
    assert read_training(folder, read_interval(folder, 4, 4), []).starts == [], "steps 5 and 6 are still unknown"


def test_an_audit_may_change_how_but_not_what_is_trained(folder: RunFolder) -> None:
    interval = read_interval(folder, 4, 4)
    free = {"parallel.zero_stage": 3, "train.micro_batch_size": 4, "data.num_workers": 2, "data.sources.0.paths": ["x"]}
    training = read_training(folder, interval, [f"{key}={json.dumps(value)}" for key, value in free.items()])
    found: Any = training.config
    assert found.parallel.zero_stage == 3
    assert found.data.sources[0].paths == ("x",)
    assert training.recorded == [load_config(folder.config, begun=True)]
    for override in ("optim.learning_rate=1", "data.seq_len=32", "train.steps=4", "run.seed=1", "precision=bf16"):
        with pytest.raises(ConfigError, match=f"{override}: an audit trains what the run trained"):
            read_training(folder, interval, [override])


def test_a_certificate_lies_outside_of_the_run(folder: RunFolder, tmp_path: Path) -> None:
    check_place(tmp_path / "a.json", folder)
    with pytest.raises(ConfigError, match="lies in the run's folder"):
        check_place(folder.checkpoints / "a.json", folder)
    with pytest.raises(ConfigError, match="nowhere is no folder; make it first"):
        check_place(tmp_path / "nowhere" / "a.json", folder)
