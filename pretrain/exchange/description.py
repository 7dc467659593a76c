"""The description of a model in a folder, compared with ours. {hf, meta, own} -> description.

Nothing is guessed: a key without a counterpart in our model is refused by name, and so is a model whose keys differ
from those of the config that it is to be used with.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from pretrain.model.architecture import ModelConfig, WeightSpec
from pretrain.model.weights import weight_specs
from shards import ConfigError, installation

C = TypeVar("C", bound=ModelConfig, covariant=True)


@dataclass(frozen=True)
class ModelDescription(Generic[C]):
    """A model's architecture as a file describes it.

    Attributes:
        file: the file that describes the model.
        config: its content, under our keys.
        keys: our key -> the file's key.
        context: context length that the model was made for, in tokens.
    """

    file: Path
    config: C
    keys: Mapping[str, str]
    context: int

    def check(self, model: ModelConfig) -> None:
        """Compare with our model's config, which may have fewer tokens than the embedding has rows.

        Raises:
            ConfigError: naming each key that differs, under both names.
        """
        theirs, ours = computed_by(self.config), computed_by(model)
        differing = [
            f"{self.keys.get(key, 'no key for it')}={theirs[key]!r}, but model.{key}={ours.get(key)!r}"
            for key in theirs
            if theirs[key] != ours.get(key) and not (key == "vocab_size" and self.config.vocab_size > model.vocab_size)
        ]
        if self.config.architecture != model.architecture:  # other keys say nothing then
            differing = [f"it is a {self.config.architecture}, but model.architecture={model.architecture!r}"]
        if differing:
            raise ConfigError(
                f"{self.file} describes another model: {'; '.join(differing)}. To print its `model:` section, run"
                f" `{installation.typed('export', '--describe', str(self.file.parent))}`"
            )


def read_specs(config: ModelConfig, expected: ModelConfig | None) -> dict[str, WeightSpec]:
    """Return what to read of a model's weights: the rows of the tokens that the expected model has; None: all rows."""
    if expected is None:
        return weight_specs(config)
    rows = {"vocab_size": expected.vocab_size, "vocab_multiple": expected.vocab_multiple}
    return weight_specs(config.model_copy(update=rows))


def computed_by(config: ModelConfig) -> dict[str, object]:
    """Return the keys of a model's config that decide what it computes, with defaults filled in."""
    values = config.spelled_out()
    return {key: values[key] for key in config.COMPUTES}


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that describes a model. Raises ConfigError if it cannot be read."""
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    return content


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Write a file that describes a model, for people to read as well."""
    path.write_text(json.dumps(content, indent=2) + "\n")


def refuse(file: Path, key: str, value: object, wanted: str) -> ConfigError:
    """Make the error for a value that our model has no counterpart for."""
    return ConfigError(f"{file}: {key}={value!r} is not the architecture that Headrace trains, which has {wanted}")


def required(file: Path, values: Mapping[str, object], key: str) -> object:
    """Return a key's value. Raises ConfigError if the file lacks it."""
    if values.get(key) is None:
        raise ConfigError(f"{file}: the key {key} is missing; is this the description of a LLaMA model?")
    return values[key]
