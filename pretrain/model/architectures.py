"""The architectures by the names that `model.architecture` gives them: the one place that a new one is added to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Discriminator, Field

from pretrain.model.architecture import ModelConfig
from pretrain.model.recurrent import RecurrentConfig
from pretrain.model.rotary import RopeScaling
from pretrain.model.transformer import LlamaConfig
from shards import Config

_DEFAULT = "llama"  # of configs that name none, as those from before there was a choice


def _named(values: Any) -> Any:
    return {"architecture": _DEFAULT, **values} if isinstance(values, Mapping) else values


# A config's class says all else of its architecture.
AnyModelConfig = Annotated[LlamaConfig | RecurrentConfig, Discriminator("architecture"), BeforeValidator(_named)]


# Its keys are those in the `POSITIONS` of any architecture, within the same bounds.
class StageModel(Config):
    """A stage's changes of how positions are computed; null: as before."""

    rope_theta: float | None = Field(None, gt=0)  # base of the rotary wavelengths
    rope_scaling: RopeScaling | None = None  # replaces the scaling before, if there is one, as a whole

    @property
    def changes(self) -> dict[str, object]:
        """Return the new values by key."""
        return {key: value for key in type(self).model_fields if (value := getattr(self, key)) is not None}


class _WithModel(Config):
    model: AnyModelConfig


def parse_model(values: Mapping[str, object], at: str) -> ModelConfig:
    """Validate a model's section, as read from a file; `at` is the key that holds it.

    Raises: ConfigError naming each wrong key, its value, and what would be right.
    """
    return _WithModel.parse({"model": values}, at=at).model


def without_default(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return a section as it was before architectures had names, if it is of the only one that there was then."""
    return {key: value for key, value in model.items() if (key, value) != ("architecture", _DEFAULT)}
