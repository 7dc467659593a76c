"""Mistakes in a data config are named as the user wrote them, even without the rest of a run's config."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from shards import ConfigError, DataConfig

RIGHT = {"seq_len": 32, "tokenizer": "some.model", "sources": [{"name": "a", "paths": ["a-*"]}]}


@pytest.mark.parametrize("at", ["", "data"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seqlen": 1}, "AT.seqlen: unknown key; did you mean AT.seq_len?"),
        (
            {"sources": [{"name": "a", "paths": ["x"], "wieght": 1}]},
            "AT.sources.0.wieght: unknown key; did you mean AT.sources.0.weight?",
        ),
        ({"max_epochs": 1}, "AT.max_epochs: unknown key; did you mean AT.sources.max_epochs?"),
        ({"sources": [{"paths": ["x"]}]}, "AT.sources.0.name: missing, and it has no default"),
        ({"seq_len": "32"}, 'AT.seq_len: "32" is wrong; it should be a whole number'),
        ({"seq_len": Path("x")}, 'AT.seq_len: "x" is wrong'),
        ({"packing": {"overflow_tolerance": 0}}, "AT.packing.overflow_tolerance: 0 is wrong"),
        (
            {"packing": {"max_overflow": -1}},
            "AT.packing.max_overflow: -1 is wrong; it should be greater than or equal to 0",
        ),
        ({"packing": {"max_overflow": 1.5}}, "AT.packing.max_overflow: 1.5 is wrong; it should be a whole number"),
        (
            {"packing": {"overflow": 3}},
            "AT.packing: {'overflow': 3} must be {overflow_tolerance: n} or {max_overflow: n}",
        ),
        (
            {"packing": {"max_overflow": 3, "overflow_tolerance": 3}},
            "AT.packing: {'max_overflow': 3, 'overflow_tolerance': 3} must be {overflow_tolerance: n} or",
        ),
        (
            {"packing": "bestfit"},
            "AT.packing: \"bestfit\" is wrong; it should be 'best_fit', 'concat', 'truncate' or 'pad'",
        ),
        ({"sources": [{"name": "a", "paths": ["x"]}] * 2}, "sources: the name 'a' is used twice"),
    ],
)
def test_a_wrong_value_is_named(changes: dict[str, object], message: str, at: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message.replace("AT.", f"{at}." if at else ""))):
        DataConfig.parse(RIGHT | changes, at)


def test_a_config_survives_a_round_trip_through_plain_values() -> None:
    data = DataConfig.parse(RIGHT)
    assert DataConfig.parse(data.model_dump(mode="json")) == data
