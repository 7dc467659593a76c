"""`weight_specs` describes a model's actual weights."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pretrain.checkpoint.store import Checkpoint
from pretrain.checkpoint.weights import CheckpointWeights
from pretrain.model.parallel import shard_dim
from pretrain.model.transformer import ModelConfig, Transformer
from pretrain.model.weights import WeightSpec, check_splits, weight_specs
from shards import CheckpointError, ConfigError


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


@pytest.mark.parametrize(("dim", "count"), [(0, 5), (0, 4), (1, 4), (1, 2)])
def test_slices_are_equal_and_hold_the_weight_and_then_zeros(dim: int, count: int) -> None:
    whole = torch.arange(1, 15 * 9 + 1).view(15, 9)
    spec = WeightSpec((15, 9), dim)
    parts = [spec.slice_of(whole, index, count) for index in range(count)]
    assert len({part.shape for part in parts}) == 1
    joined = torch.cat(parts, dim)
    assert torch.equal(joined.narrow(dim, 0, whole.shape[dim]), whole)
    assert joined.sum() == whole.sum()
    assert torch.equal(torch.cat([whole[spec.bounds(index, count)] for index in range(count)], dim), whole)
    for index, part in enumerate(parts):
        assert torch.equal(spec.padded(whole[spec.bounds(index, count)], count), part)
    found = spec.joined(parts)
    assert found is not None
    assert torch.equal(found, whole)
    assert WeightSpec((16 + (dim == 0) * count, 9 + (dim == 1) * count), dim).joined(parts) is None


@pytest.mark.parametrize(
    ("vocab_size", "tp_size", "fits"), [(9, 8, False), (4097, 8, True), (7, 8, False), (8, 8, True)]
)
def test_no_rank_is_left_without_tokens(vocab_size: int, tp_size: int, fits: bool) -> None:
    config = ModelConfig(dim=64, n_layers=1, n_heads=8, ffn_dim=64, vocab_size=vocab_size)
    if fits:
        check_splits(config, tp_size, "--tp")
    else:
        with pytest.raises(ConfigError, match=f"--tp={tp_size} leaves ranks without any"):
            check_splits(config, tp_size, "--tp")


@pytest.mark.parametrize(("rows", "fits"), [(2, False), (3, True), (4, False)])
def test_a_checkpoint_of_another_shape_is_refused(tmp_path: Path, rows: int, fits: bool) -> None:
    """Check also a state with more values than needed, which would be cut into nonsense."""
    (tmp_path / "engine").mkdir()
    flat = torch.arange(12.0)
    state = {
        "base_optimizer_state": {"state": {0: {}}},
        "single_partition_of_fp32_groups": [flat],
        "param_slice_mappings": [{"w": SimpleNamespace(start=0, numel=12)}],
    }
    torch.save({"optimizer_state_dict": state}, tmp_path / "engine/zero_pp_rank_0_mp_rank_00_optim_states.pt")
    torch.save({"param_shapes": [{"w": torch.Size((3, 4))}]}, tmp_path / "engine/mp_rank_00_model_states.pt")
    weights = CheckpointWeights(Checkpoint(tmp_path, 1, [], 0.0), {"w": WeightSpec((rows, 4), 0)})
    if fits:
        assert torch.equal(weights.read("w"), flat.view(3, 4))
    else:
        with pytest.raises(CheckpointError, match=rf"w is \[3, 4\], not \[{rows}, 4\]"):
            weights.read("w")
