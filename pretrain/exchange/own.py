"""Our own layout of a model's folder, for every architecture: config.json, safetensors with our names, the tokenizer.

config.json has the `model:` section of a run's config, which names the architecture, and what else generation needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from pretrain.exchange.description import ModelDescription, read_json, read_specs, write_json
from pretrain.exchange.safetensors_folder import CONFIG, StoredWeights, write_weights
from pretrain.model.architecture import ModelConfig
from pretrain.model.architectures import parse_model
from pretrain.model.weights import Weights, weight_specs
from shards import ConfigError

_FORMAT = "headrace"


def is_own(folder: Path) -> bool:
    """Return whether a folder's config.json is one of our own layout."""
    path = folder / CONFIG
    return path.exists() and read_json(path).get("format") == _FORMAT


class OwnModel:
    """A model in a folder of our own layout; only the requested slices of weights are read, on request.

    Args:
        expected: the config of the model that the slices are for; None: the folder's.
    Raises:
        ConfigError: if the model is of an architecture that this version has not, or weights are missing.
    """

    def __init__(self, folder: Path, expected: ModelConfig | None = None) -> None:
        self.folder = folder
        self.description = _read_config(folder / CONFIG)
        config = self.description.config
        self.specs = read_specs(config, expected)
        names = {name: name for name in weight_specs(config)}
        self._weights = StoredWeights(folder, weight_specs(config), self.specs, names)

    def read(self, name: str, index: int = 0, count: int = 1) -> Tensor:
        """Read a weight, or its slice for tensor-parallel rank `index` of `count`, in the file's type."""
        return self._weights.read(name, index, count)


def _read_config(path: Path) -> ModelDescription[ModelConfig]:
    values = read_json(path)
    model, context = values.get("model"), values.get("seq_len")
    if not isinstance(model, dict) or not isinstance(context, int):
        raise ConfigError(f"{path}: needs the keys model, a section, and seq_len, a whole number")
    config = parse_model(model, at=str(path))
    return ModelDescription(path, config, {key: f"model.{key}" for key in model}, context)


def write_model(
    folder: Path,
    weights: Weights,
    config: ModelConfig,
    seq_len: int,
    ids: Mapping[str, int | None],
    dtype: torch.dtype,
    max_shard_bytes: int,
) -> None:
    """Write config.json and the weights.

    Args:
        seq_len: context length of the training, in tokens.
        ids: bos_token_id and eos_token_id; None if there is none.
        max_shard_bytes: maximum size of a file.
    """
    config = config.merged().model_copy(update={"vocab_multiple": 1})  # a folder has no padding
    values = {
        "format": _FORMAT,
        "model": config.model_dump(mode="json"),
        "seq_len": seq_len,
        "dtype": str(dtype).removeprefix("torch."),
        **ids,
    }
    write_json(folder / CONFIG, values)
    specs = weight_specs(config)
    write_weights(folder, weights, specs, {name: name for name in specs}, dtype, max_shard_bytes)
