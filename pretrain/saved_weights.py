"""Which of a model's weights DeepSpeed saves and loads: those that are trained. model -> saved_weights -> engine."""

from __future__ import annotations

import re

from torch import Tensor

from pretrain.model.architecture import Model
from pretrain.model.parallel import shard_dim


def trained_state(model: Model) -> dict[str, Tensor]:
    """Return a model's weights as a checkpoint has them: all but those that are frozen."""
    state: dict[str, Tensor] = model.state_dict()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:
            del state[name]
    return state


def load_trained(src: dict[str, Tensor], dst: Model) -> None:
    """Load the weights of a checkpoint, which lacks those that are frozen. Raises RuntimeError if they do not match."""
    found = dst.load_state_dict(src, strict=False)
    trained = [name for name, parameter in dst.named_parameters() if parameter.requires_grad]
    if wrong := [*found.unexpected_keys, *set(trained).intersection(found.missing_keys)]:
        raise RuntimeError(f"the model and the checkpoint do not both have {', '.join(sorted(wrong))}")


def universal_info(model: Model) -> dict[str, object]:
    """Describe the weights, by their tags, as DeepSpeed's conversion to another topology requires."""
    names: dict[int | None, list[str]] = {None: [], 0: [], 1: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            names[shard_dim(parameter)].append(f"^{re.escape(name)}$")
    return {
        "universal_checkpoint_version": 0.2,
        "tp_replicated_parameter_patterns": names[None],
        "parameter_to_average_patterns": [],
        "parameter_with_row_parallelism_patterns": names[1],
        "vocabulary_parameter_patterns": [n for n in names[0] if n.startswith(("^embedding", "^output"))],
        "original_vocab_size": model.config.vocab_size,
        "vocab_multiple": model.config.vocab_multiple,  # for our own conversion; DeepSpeed ignores it
    }
