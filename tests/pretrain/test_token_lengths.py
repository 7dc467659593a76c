"""Lengths in tokens become the steps that a walk over the steps finds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.config import RunConfig, load_config
from pretrain.token_lengths import in_steps, tokens_of
from shards import ConfigError
from tests.tiny_run import write_config


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("8.3M tokens", 8_300_000),
        ("20e9 tokens", 20e9), ("1.5B tokens", 1.5e9), ("300_000 tokens", 3e5), ("1 token", 1), ("2 K tokens", 2000),
        ("20e9", None), ("x tokens", None), ("-1 tokens", None), (5, None), (None, None),
    ],
)  # fmt: skip
def test_a_text_says_tokens(text: object, number: float | None) -> None:
    assert tokens_of(text) == number


@given(
    sizes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 50)), min_size=1, max_size=4),  # rows, steps
    seq_len=st.integers(1, 7),
    wanted=st.integers(1, 3000),
    part=st.integers(1, 400),
)
def test_steps_are_those_that_a_walk_finds(sizes: list[tuple[int, int]], seq_len: int, wanted: int, part: int) -> None:
    begins = [0]
    for _, length in sizes[:-1]:
        begins.append(begins[-1] + length)
    per_step = [rows * seq_len for rows, _ in sizes]

    def tokens_before(step: int) -> int:
        return sum(per_step[max(i for i, begin in enumerate(begins) if begin <= k)] for k in range(step))

    tree: dict[str, Any] = {
        "data": {"seq_len": seq_len},
        "train": {"global_batch_size": sizes[0][0], "steps": f"{wanted} tokens"},
        "optim": {"warmup_steps": f"{part} tokens", "decay_steps": f"{part} tokens", "floor": 0.5},
        "stages": [
            {
                "step": f"{tokens_before(begin)} tokens",
                "train": {"global_batch_size": rows},
                "optim": {"warmup_steps": f"{part} tokens"},
            }
            for begin, (rows, _) in zip(begins[1:], sizes[1:], strict=True)
        ],
    }
    found = in_steps(tree)
    steps = next(step for step in range(1, 4000) if tokens_before(step) >= wanted)
    assert found["train"] == {"global_batch_size": sizes[0][0], "steps": steps}
    assert [stage["step"] for stage in found["stages"]] == begins[1:]
    for begin, schedule in zip(begins, [found["optim"], *(stage["optim"] for stage in found["stages"])], strict=True):
        reached = (k for k in range(1, 4000) if tokens_before(begin + k) - tokens_before(begin) >= part)
        assert schedule["warmup_steps"] == next(reached)
    lengths = (k for k in range(1, steps) if tokens_before(steps) - tokens_before(steps - k) >= part)
    assert found["optim"]["decay_steps"] == next(lengths, steps)
    assert in_steps(found) == found


def test_a_schedule_ends_where_the_next_one_begins_even_if_that_changes_nothing(tmp_path: Path) -> None:
    stages: list[dict[str, Any]] = [
        {"step": 10, "optim": {"schedule": "wsd", "decay_steps": "5120 tokens"}},
        {"step": 50, "train": {"global_batch_size": 80}, "optim": {}},
    ]
    path = write_config(tmp_path, "tiny", train={"steps": 100}, stages=stages)
    config = load_config(path, [])
    (first, second) = config.stages
    assert [part.step for part in config.schedule] == [0, 10, 50]
    assert first.optim is not None
    assert first.optim.decay_steps == 10  # 8 rows of 64 tokens a step
    assert second.optim is not None


def test_a_config_is_kept_in_steps(tmp_path: Path) -> None:
    config = write_config(tmp_path, "tiny", optim={"schedule": "wsd"})
    words = ["train.steps=10K tokens", "optim.warmup_steps=1024 tokens", "optim.decay_steps=1025 tokens"]
    found = load_config(config, words)  # 8 rows of 64 tokens a step
    assert (found.train.steps, found.optim.warmup_steps, found.optim.decay_steps) == (20, 2, 3)
    assert found == RunConfig.parse(found.model_dump(mode="json"))
    assert found.tokens_until(20) >= 10_000 > found.tokens_until(19)


@pytest.mark.parametrize("words", [["train.steps=10K tokns"], ["evaluation.every=10K tokens"]])
def test_what_is_no_length_in_tokens_is_refused_as_ever(tmp_path: Path, words: list[str]) -> None:
    with pytest.raises(ConfigError, match=words[0].partition("=")[0]):
        load_config(write_config(tmp_path, "tiny"), words)
