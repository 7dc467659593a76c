"""A run starts from another model's weights at every tp size and ZeRO stage, and exports them unchanged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pretrain.checkpoint.store import Checkpoint
from pretrain.checkpoint.weights import CheckpointWeights
from pretrain.exchange.export import export
from pretrain.exchange.folder import open_codec, open_model
from pretrain.inference.forward_model import ForwardModel
from pretrain.inference.generate import generate
from pretrain.model.weights import weight_specs
from pretrain.parallel_config import ParallelConfig
from pretrain.topology import Topology
from tests.distributed.exchange import PROMPT, SAMPLING
from tests.distributed.ranks import run_ranks
from tests.pretrain.exchange.test_exchange import DATA, GROUPED, PLAIN, Memory, build, same_files

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize(
    ("world_size", "tp_size", "changes", "cases"),
    [
        (4, 2, PLAIN, ["zero1-bf16", "zero2-bf16", "zero3-fp32"]),
        (3, 1, GROUPED | {"dim": 40}, ["zero3-bf16", "zero2-fp32"]),  # few weights divide evenly by 3, so ZeRO pads
    ],
)
def test_import_and_export_copy_every_bit(
    world_size: int,
    tp_size: int,
    changes: dict[str, object],
    cases: list[str],
    topology: Topology,
    tmp_path: Path,
) -> None:
    ours = build(changes)
    export(Memory(ours), ours.config, DATA, tmp_path / "model")
    arguments = (str(tp_size), f"{tmp_path}/model", str(tmp_path), *cases)
    run_ranks(world_size, "tests.distributed.exchange", *arguments)
    for name in cases:
        weights = CheckpointWeights(Checkpoint(tmp_path / name, 0, [], 0.0), weight_specs(ours.config))
        export(weights, ours.config, DATA, tmp_path / f"{name}-out")
        assert same_files(tmp_path / "model", tmp_path / f"{name}-out"), name
        half = weights.read("blocks.1.attention.wo.weight", 1, 2)
        assert torch.equal(half, ours.blocks[1].attention.wo.weight.chunk(2, 1)[1])
    alone = ForwardModel(ours.config, ParallelConfig(), "fp32", topology)
    alone.set_weights(open_model(tmp_path / "model"))
    codec = open_codec(tmp_path / "model")
    assert (
        "".join(generate(alone.next_logits, alone.config.new_cache, 32, codec, PROMPT, SAMPLING, topology))
        == (tmp_path / "text").read_text()
    )
