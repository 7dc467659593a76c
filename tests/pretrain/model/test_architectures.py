"""A stage may change exactly the keys that the architectures allow, within the bounds that they set."""

from __future__ import annotations

from typing import get_args

from pydantic import TypeAdapter

from pretrain.model.architecture import ModelConfig
from pretrain.model.architectures import AnyModelConfig, StageModel

ARCHITECTURES: tuple[type[ModelConfig], ...] = get_args(get_args(AnyModelConfig)[0])


def test_a_stage_has_the_keys_of_all_architectures() -> None:
    assert set(StageModel.model_fields) == {key for one in ARCHITECTURES for key in one.POSITIONS}


def test_a_stage_bounds_a_key_as_each_architecture_does() -> None:
    of_stage = StageModel.model_json_schema()["properties"]
    for architecture in ARCHITECTURES:
        for key in architecture.POSITIONS:
            or_null = TypeAdapter(architecture.model_fields[key].rebuild_annotation() | None).json_schema()
            assert of_stage[key]["anyOf"] == or_null["anyOf"], f"{architecture.__name__}.{key}"
