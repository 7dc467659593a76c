"""Train ten steps of adapters in every ZeRO stage, again from the fifth, and from the fifth of another layout.

Usage: python -m tests.distributed.lora TP_SIZE MODEL FOLDER [OTHER]. OTHER is the folder of a start in another layout;
each stage goes on from what another stage saved there. Rank 0 leaves FOLDER/figures.json: loss and gradient norm of
each step, by case. A stage's checkpoints are FOLDER/STAGE/0, 5 and 10.
"""

from __future__ import annotations

import functools
import json
import math
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch._dynamo.utils import counters

from pretrain.checkpoint.universal import convert
from pretrain.deepspeed_keys import deepspeed_config
from pretrain.engine import Engine
from pretrain.exchange.folder import open_model
from pretrain.model.lora import LoraConfig, is_adapter
from pretrain.model.parallel import padded_for
from pretrain.model.pieces import valid_targets
from pretrain.model.transformer import LlamaConfig
from pretrain.model.weights import Weights
from pretrain.optim import OptimConfig
from pretrain.parallel_config import ParallelConfig
from pretrain.run.metrics import Meter
from pretrain.topology import Topology, started
from tests.distributed.exchange import write
from tests.distributed.parity import GLOBAL_ROWS, RELEASED, SEED, global_batches, replicated_equal

STAGES, STEPS, SAVED, LATER = (1, 2, 3), 10, 5, 7
OPTIM = OptimConfig(weight_decay=0.1, grad_clip=0.5)
RATE = 1e-2
BASE = LlamaConfig(
    dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=48, vocab_size=64, tie_embeddings=True, init_std=0.2
)
LORA = LoraConfig(r=3, alpha=12)


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    return (global_batches() * 2)[:STEPS]


def engine_of(topology: Topology, base: Weights, precision: str, dropout: float, layout: dict[str, Any]) -> Engine:
    parallel = ParallelConfig.model_validate({"tp_size": topology.tp_size, **layout})
    model = BASE.model_copy(update={"lora": LORA.model_copy(update={"dropout": dropout})})
    derived = deepspeed_config(parallel, OPTIM, precision, RELEASED if parallel.zero_stage == 3 else {})
    micro_steps = GLOBAL_ROWS // (topology.dp_size * 2)
    engine = Engine(model, OPTIM, parallel, derived, 2, micro_steps, topology, SEED, noise_scale=True)
    engine.set_weights(base)
    return engine


def train(engine: Engine, topology: Topology, first: int, end: int) -> list[tuple[float, float]]:
    """Make the steps from `first` up to `end`, and average their weights; return losses and gradient norms."""
    history, mine = [], slice(topology.dp_rank, None, topology.dp_size)
    for step in range(first, end):
        tokens, segment_ids = batches()[step]
        n_targets = int(valid_targets(segment_ids).sum())
        stats = engine.train_step(
            tokens[mine], segment_ids[mine], n_targets, step, RATE, Meter(), measured=step == SAVED
        )
        engine.average.update(1 / (step + 1))
        history.append((stats.loss, stats.grad_norm))
        assert stats.noise is not None
        if stats.layers:
            assert all(map(is_adapter, stats.layers.weights))
            norm = math.hypot(*(norms.gradient for norms in stats.layers.weights.values()))
            assert math.isclose(norm, stats.grad_norm, rel_tol=1e-4), "the layers' gradients are all there is"
    return history


def check_base(engine: Engine, base: Weights, topology: Topology) -> None:
    """Check that the frozen weights have the bits of the model that they came from."""
    for name, parameter in engine.model.named_parameters():
        if not is_adapter(name):
            wanted = padded_for(base.read(name, topology.tp_rank, topology.tp_size), parameter)
            with deepspeed.zero.GatheredParameters([parameter]):
                assert torch.equal(parameter, wanted.to(parameter.dtype)), name


def check(topology: Topology, base: Weights, stage: int, folder: Path, other: Path | None) -> list[tuple[float, float]]:
    """Run the cases of one stage; what has to be equal to the last bit is compared here."""
    layout = {"zero_stage": stage}
    engine = engine_of(topology, base, "fp32", 0.0, layout)
    engine.save(folder / "0", write)
    history = train(engine, topology, 0, SAVED)
    engine.save(folder / str(SAVED), write)
    saved = engine.state_hash()
    (folder / "hash").write_text(f"{saved}")
    engine.average.show(True)
    engine.average.show(False)
    history += train(engine, topology, SAVED, LATER)
    later = engine.state_hash()
    history += train(engine, topology, LATER, STEPS)
    engine.save(folder / str(STEPS), write)
    check_base(engine, base, topology)
    assert replicated_equal(engine, topology), "the tp ranks' copies of A and B differ"
    engine = engine_of(topology, base, "fp32", 0.0, layout)
    if other is not None:
        convert(other, folder / "converted", topology.tp_size, topology.rank, topology.world_size)
        topology.barrier()
        engine.load_universal(folder / "converted")
        assert str(engine.state_hash()) == (other.parent / "hash").read_text()
        for found, wanted in zip(train(engine, topology, SAVED, LATER), history[SAVED:], strict=False):
            assert math.isclose(found[0], wanted[0], rel_tol=1e-5), "of another layout"
    engine.load(folder / str(SAVED))
    train(engine, topology, SAVED, LATER)
    assert engine.state_hash() == later
    check_base(engine, base, topology)
    return history


def main() -> None:
    tp_size, base, folder = int(sys.argv[1]), open_model(Path(sys.argv[2])), Path(sys.argv[3])
    figures = {}
    torch.compile = functools.partial(torch.compile, backend="aot_eager")  # inductor would take a minute
    with started(ParallelConfig(tp_size=tp_size)) as topology:
        for stage in STAGES:
            other = Path(sys.argv[4]) / str(stage % len(STAGES) + 1) / str(SAVED) if sys.argv[4:] else None
            (folder / str(stage)).mkdir(parents=True, exist_ok=True)
            figures[f"fp32 ZeRO-{stage}"] = check(topology, base, stage, folder / str(stage), other)
        cases: list[tuple[str, float, dict[str, Any]]] = [
            ("fp32", 0.3, {"zero_stage": 1}),
            ("fp32", 0.3, {"zero_stage": 3, "activation_checkpointing": "full", "compile": tp_size > 1}),
        ]
        if tp_size > 1:
            cases += [
                ("bf16", 0.0, {"zero_stage": 3, "activation_checkpointing": "selective"}),
                ("fp32", 0.0, {"zero_stage": 2, "activation_checkpointing": "full", "sequence_parallel": True}),
            ]
        for precision, dropout, layout in cases:
            engine = engine_of(topology, base, precision, dropout, layout)
            figures[f"{precision} dropout={dropout} {layout['zero_stage']}"] = train(engine, topology, 0, LATER)
            check_base(engine, base, topology)
            assert replicated_equal(engine, topology)
        assert not counters["graph_break"], "a block is one graph"
        if topology.is_main:
            (folder / "figures.json").write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
