"""Train ten steps with Muon in every ZeRO stage, again from the fifth, and from the fifth of another layout.

Usage: python -m tests.distributed.muon TP_SIZE FOLDER [OTHER]. OTHER is the folder of a start in another layout; each
stage continues from what another stage saved there. A stage's checkpoints are FOLDER/STAGE/5, 10 and `other`, the last
after seven steps.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from pretrain.checkpoint.state_hash import StateHash
from pretrain.checkpoint.universal import convert
from pretrain.deepspeed_keys import deepspeed_config
from pretrain.engine import Engine
from pretrain.model.pieces import valid_targets
from pretrain.model.transformer import LlamaConfig
from pretrain.optim import OptimConfig
from pretrain.parallel_config import ParallelConfig
from pretrain.run.metrics import Meter
from pretrain.topology import Topology, started
from tests.distributed.exchange import write
from tests.distributed.parity import GLOBAL_ROWS, RELEASED, SEED, global_batches

STAGES, STEPS, SAVED, LATER = (1, 2, 3), 10, 5, 7
OPTIM = OptimConfig(name="muon", weight_decay=0.1, grad_clip=0.5, z_loss=1e-3)
RATE = 1e-2
# Tall, wide and square matrices, in groups by their learning rates; ZeRO cuts groups and matrices, some within a row
MODEL = LlamaConfig.model_validate(
    {
        "dim": 36, "n_layers": 3, "n_heads": 6, "n_kv_heads": 2, "ffn_dim": 50, "vocab_size": 64, "qk_norm": True,
        "tie_embeddings": True, "init_std": 0.2, "parametrization": "mup",
        "base": {"dim": 18, "n_layers": 1, "head_dim": 6},
    }
)  # fmt: skip


def make_engine(topology: Topology, stage: int) -> Engine:
    parallel = ParallelConfig.model_validate({"tp_size": topology.tp_size, "zero_stage": stage})
    derived = deepspeed_config(parallel, OPTIM, "fp32", RELEASED if stage == 3 else {})
    return Engine(MODEL, OPTIM, parallel, derived, GLOBAL_ROWS // topology.dp_size, 1, topology, SEED)


def train(engine: Engine, topology: Topology, first: int, end: int) -> StateHash:
    """Make the steps from `first` up to `end`; return the hash of the state."""
    mine = slice(topology.dp_rank, None, topology.dp_size)
    for step in range(first, end):
        tokens, segment_ids = batches()[step]
        n_targets = int(valid_targets(segment_ids).sum())
        assert engine.train_step(tokens[mine], segment_ids[mine], n_targets, step, RATE, Meter()).applied
    return engine.state_hash()


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    return (global_batches() * 2)[:STEPS]


def check(topology: Topology, stage: int, folder: Path, other: Path | None) -> None:
    """Run the cases of one stage; what has to be equal to the last bit is compared here."""
    engine = make_engine(topology, stage)
    if topology.world_size == 1:
        torch.save(engine.model.state_dict(), folder / "initial.pt")
    saved = train(engine, topology, 0, SAVED)
    engine.save(folder / str(SAVED), write)
    (folder / "hash").write_text(f"{saved}")
    later = train(engine, topology, SAVED, LATER)
    train(engine, topology, LATER, STEPS)
    engine.save(folder / str(STEPS), write)
    engine = make_engine(topology, stage)
    if other is not None:
        convert(other, folder / "converted", topology.tp_size, topology.rank, topology.world_size)
        topology.barrier()
        engine.load_universal(folder / "converted")
        assert str(engine.state_hash()) == (other.parent / "hash").read_text()
        train(engine, topology, SAVED, LATER)
        engine.save(folder / "other", write)
    engine.load(folder / str(SAVED))
    assert train(engine, topology, SAVED, LATER) == later


def main() -> None:
    tp_size, folder = int(sys.argv[1]), Path(sys.argv[2])
    with started(ParallelConfig(tp_size=tp_size)) as topology:
        for stage in STAGES:
            other = Path(sys.argv[3]) / str(stage % len(STAGES) + 1) / str(SAVED) if sys.argv[3:] else None
            (folder / str(stage)).mkdir(parents=True, exist_ok=True)
            check(topology, stage, folder / str(stage), other)


if __name__ == "__main__":
    main()
