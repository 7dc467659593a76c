"""What `weight_specs` says of a model is what the model is."""

from __future__ import annotations

import pytest
import torch

from pretrain.model.parallel import shard_dim
from pretrain.model.transformer import ModelConfig, Transformer
from pretrain.model.weights import WeightSpec, weight_specs


@pytest.mark.usefixtures("topology")
@pytest.mark.parametrize("changes", [{}, {"qk_norm": True}, {"tie_embeddings": True, "n_kv_heads": 1, "ffn_dim": None}])
def test_specs_are_those_of_the_model(changes: dict[str, object]) -> None:
    values = {"dim": 48, "n_layers": 2, "n_heads": 6, "n_kv_heads": 2, "ffn_dim": 80, "vocab_size": 97}
    config = ModelConfig.model_validate(values | changes)
    found = {
        name: WeightSpec(tuple(parameter.shape), shard_dim(parameter))
        for name, parameter in Transformer(config).named_parameters()
    }
    assert weight_specs(config) == found


@pytest.mark.parametrize("dim", [None, 0, 1])
def test_bounds_name_the_slice(dim: int | None) -> None:
    spec, whole = WeightSpec((12, 18), dim), torch.arange(216).view(12, 18)
    for index in range(3):
        assert torch.equal(whole[spec.bounds(index, 3)], spec.slice_of(whole, index, 3))
    parts = [spec.slice_of(whole, index, 3) for index in range(3)]
    assert torch.equal(torch.cat(parts, dim or 0) if dim is not None else parts[1], whole)
