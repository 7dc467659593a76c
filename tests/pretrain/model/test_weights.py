"""`weight_specs` describes a model's actual weights."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pretrain.checkpoint.store import Checkpoint
from pretrain.checkpoint.weights import CheckpointWeights
from pretrain.model.architecture import WeightSpec
from pretrain.model.parallel import full_shape, shard_dim, slice_of
from pretrain.model.transformer import LlamaConfig, Transformer
from pretrain.model.weights import check_row_splits, check_splits, weight_specs
from shards import CheckpointError, ConfigError


@pytest.mark.usefixtures("topology")
@pytest.mark.parametrize("changes", [{}, {"qk_norm": True}, {"tie_embeddings": True, "n_kv_heads": 1, "ffn_dim": None}])
def test_specs_are_those_of_the_model(changes: dict[str, object]) -> None:
    values = {"dim": 48, "n_layers": 2, "n_heads": 6, "n_kv_heads": 2, "ffn_dim": 80, "vocab_size": 97}
    config = LlamaConfig.model_validate(values | changes)
    found = {
        name: WeightSpec(tuple(full_shape(parameter)), shard_dim(parameter), parameter.slice_multiple if rows else 1)
        for name, parameter in Transformer(config).named_parameters()
        for rows in [shard_dim(parameter) is not None]
    }
    assert weight_specs(config) == found


@pytest.mark.usefixtures("topology")
@pytest.mark.parametrize("tied", [True, False])
def test_rows_are_padded_to_a_multiple_with_zeros_that_nothing_reads(tied: bool) -> None:
    values = {"dim": 48, "n_layers": 1, "n_heads": 6, "ffn_dim": 80, "vocab_size": 97, "tie_embeddings": tied}
    plain, padded = (
        Transformer(LlamaConfig.model_validate(values | {"vocab_multiple": multiple})) for multiple in (1, 64)
    )
    plain.initialize(3)
    padded.initialize(3)
    tokens = torch.arange(97)[None]
    found, expected = (model(tokens, torch.ones_like(tokens)) for model in (padded, plain))
    assert found.shape == (1, 97, 128)
    assert torch.equal(found[..., :97], expected)
    assert (found[..., 97:] == -torch.inf).all()
    for name, parameter in padded.named_parameters():
        wanted = plain.get_parameter(name)
        assert torch.equal(parameter[: len(wanted)], wanted)
        assert not parameter[len(wanted) :].any()


@pytest.mark.parametrize("dim", [None, 0, 1])
def test_bounds_name_the_slice(dim: int | None) -> None:
    spec, whole = WeightSpec((12, 18), dim), torch.arange(216).view(12, 18)
    parts = [whole[spec.bounds(index, 3)] for index in range(3)]
    assert len({part.shape for part in parts}) == 1
    assert torch.equal(torch.cat(parts, dim or 0) if dim is not None else parts[1], whole)


@pytest.mark.parametrize(
    ("dim", "count", "multiple"),
    [(0, 5, 1), (0, 4, 1), (1, 4, 1), (1, 2, 1), (0, 1, 8), (0, 2, 4), (0, 3, 4), (1, 2, 6)],
)
def test_slices_are_equal_and_hold_the_weight_and_then_zeros(dim: int, count: int, multiple: int) -> None:
    whole = torch.arange(1, 15 * 9 + 1).view(15, 9)
    spec = WeightSpec((15, 9), dim, multiple)
    parts = [slice_of(whole, dim, index, count, multiple) for index in range(count)]
    assert len({part.shape for part in parts}) == 1
    assert parts[0].shape[dim] % multiple == 0
    assert parts[0].shape[dim] < whole.shape[dim] / count + multiple, "no more padding than is needed"
    joined = torch.cat(parts, dim)
    assert torch.equal(joined.narrow(dim, 0, whole.shape[dim]), whole)
    assert joined.sum() == whole.sum()
    assert torch.equal(torch.cat([whole[spec.bounds(index, count)] for index in range(count)], dim), whole)
    found = spec.joined(parts)
    assert found is not None
    assert torch.equal(found, whole)
    larger = (16 + (dim == 0) * count * multiple, 9 + (dim == 1) * count * multiple)
    assert WeightSpec(larger, dim, multiple).joined(parts) is None


@pytest.mark.parametrize(
    ("vocab_size", "multiple", "tp_size", "fits"),
    [
        (9, 1, 8, False),
        (4097, 1, 8, True),
        (7, 1, 8, False),
        (8, 1, 8, True),
        (300, 128, 4, False),
        (400, 128, 4, True),
    ],
)
def test_no_rank_is_left_without_tokens(vocab_size: int, multiple: int, tp_size: int, fits: bool) -> None:
    config = LlamaConfig(dim=64, n_layers=1, n_heads=8, ffn_dim=64, vocab_size=vocab_size, vocab_multiple=multiple)
    if fits:
        check_splits(config, tp_size, "--tp")
    else:
        with pytest.raises(ConfigError, match=f"leaves some of --tp={tp_size} ranks without a token"):
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
    checkpoint, specs = Checkpoint(tmp_path, 1, [], 0.0), {"w": WeightSpec((rows, 4), 0)}
    weights = CheckpointWeights(checkpoint, specs)
    with pytest.raises(CheckpointError, match=r"no average of the weights; train\.ema was not set"):
        CheckpointWeights(checkpoint, specs, averaged=True)
    if fits:
        assert torch.equal(weights.read("w"), flat.view(3, 4))
    else:
        with pytest.raises(CheckpointError, match=rf"w is \[3, 4\], not \[{rows}, 4\]"):
            weights.read("w")


def test_rows_are_shared_by_as_many_ranks_as_heads_and_tokens_allow() -> None:
    config = LlamaConfig(dim=64, n_layers=1, n_heads=8, n_kv_heads=2, vocab_size=9)
    for tp_size, sp_size, seq_len in ((1, 8, 64), (2, 4, 64), (1, 1, 7)):
        check_row_splits(config, tp_size, sp_size, seq_len, "--sp")
    for tp_size, sp_size, seq_len, message in (
        (2, 8, 64, "--sp=8 does not divide the 4 heads of a rank"),
        (1, 3, 63, "--sp=3 does not divide the 8 heads of a rank"),
        (1, 4, 66, "--sp=4 does not divide the 66 tokens of a row"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_row_splits(config, tp_size, sp_size, seq_len, "--sp")
