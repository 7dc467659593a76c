"""Adapters in the layout of Hugging Face's `peft`: adapter_config.json and safetensors, written as a stream."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from pretrain.exchange.description import write_json
from pretrain.exchange.hf import hf_name
from pretrain.exchange.safetensors_file import write_safetensors
from pretrain.model.architecture import ModelConfig, WeightSpec
from pretrain.model.weights import Weights, trained_specs

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PARTS = {"lora.a": "lora_A", "lora.b": "lora_B"}


def peft_name(name: str) -> str:
    """Return peft's name for one of our adapters' weights."""
    layer, part = name[: -len(".lora.a")], name[-len("lora.a") :]
    module = hf_name(f"{layer}.weight").removesuffix(".weight")
    return f"base_model.model.{module}.{_PARTS[part]}.weight"


def write_config(folder: Path, model: ModelConfig, base: str) -> None:
    """Write adapter_config.json.

    Args:
        base: the model that the adapters were trained on, by its folder or name.
    """
    lora = model.adapters
    assert lora is not None
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.r,
        "lora_alpha": int(lora.alpha) if lora.alpha.is_integer() else lora.alpha,  # peft expects an int
        "lora_dropout": lora.dropout,
        "target_modules": sorted({peft_name(name).split(".")[-3] for name in trained_specs(model)}),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    write_json(folder / CONFIG, values)


def write_weights(folder: Path, weights: Weights, specs: Mapping[str, WeightSpec], dtype: torch.dtype) -> None:
    """Write the adapters' weights."""
    ours = {peft_name(name): name for name in specs}
    shapes = {theirs: specs[name].shape for theirs, name in ours.items()}
    write_safetensors(folder / WEIGHTS, shapes, dtype, lambda theirs: weights.read(ours[theirs]))
