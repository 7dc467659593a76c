"""Train five steps on every rank for each way of splitting the work; rank 0 prints the results of each case.

Usage: python -m tests.distributed.parity TP_SIZE SP_SIZE FOLDER
"""

from __future__ import annotations

import functools
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._dynamo.utils import counters

from pretrain.deepspeed_keys import deepspeed_config
from pretrain.engine import Engine
from pretrain.model.parallel import shard_dim
from pretrain.model.transformer import LlamaConfig
from pretrain.optim import OptimConfig
from pretrain.parallel_config import ParallelConfig
from pretrain.run.metrics import Meter
from pretrain.topology import Topology, started
from tests.reference_model import target_counts

GLOBAL_ROWS, SEQ_LEN, STEPS, SEED = 8, 24, 5, 3
MEASURED = (0, 3)  # steps of which the layers' figures are compared
# Weights of ZeRO-3 are freed after each use, even of a model this small.
RELEASED: dict[str, Any] = {
    "zero_optimization": {
        "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_param_persistence_threshold": 0,
        "stage3_prefetch_bucket_size": 1,
    }
}
LEARNING_RATES = [1e-3, 3e-3, 2e-3, 1e-3, 5e-4]
OPTIM = OptimConfig(learning_rate=3e-3, weight_decay=0.1, grad_clip=0.5, z_loss=1e-3)


def model_config(tied: bool) -> LlamaConfig:
    """Return a model with fewer heads of keys and values than the sequence-parallel ranks that there are at most."""
    return LlamaConfig(
        dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=48, vocab_size=64, qk_norm=True, tie_embeddings=tied,
        init_std=0.2,
    )  # fmt: skip


def global_batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return packed rows with very unevenly spread valid targets: every other slot is nearly all padding.

    Some documents have prompts, whose segment ids are negative: a whole piece, a beginning, and two that alternate with
    responses.
    """
    generator = torch.Generator().manual_seed(11)
    batches = []
    for _ in range(STEPS):
        tokens = torch.randint(1, 64, (GLOBAL_ROWS, SEQ_LEN + 1), generator=generator)
        segment_ids = torch.zeros(GLOBAL_ROWS, SEQ_LEN + 1, dtype=torch.int64)
        for slot in range(GLOBAL_ROWS):
            bounds = [0, 3] if slot % 2 else [0, 7, 8, 20 + slot // 2]
            for piece, (start, end) in enumerate(itertools.pairwise(bounds), start=1):
                segment_ids[slot, start:end] = piece
        for slot, prompt in ((1, slice(0, 3)), (2, slice(0, 4)), (4, slice(8, 12)), (4, slice(15, 17))):
            segment_ids[slot, prompt] *= -1
        batches.append((tokens * (segment_ids != 0), segment_ids))
    return batches


def layouts(topology: Topology) -> Iterator[tuple[str, bool, int, dict[str, Any]]]:
    """Yield the precision, whether the embeddings are tied, the rows of a micro-batch, and how it is laid out."""
    if topology.sp_size > 1:
        yield from layouts_of_split_rows(topology)
        return
    rows = GLOBAL_ROWS // topology.dp_size
    # Each stage with one micro-step and with several; embeddings are tied in half of either
    for stage, micro, tied in (
        (1, rows, False), (1, 2, True), (2, rows, True), (2, 2, False), (3, rows, False), (3, 2, True),
    ):  # fmt: skip
        yield "fp32", tied, micro, {"zero_stage": stage}
    for stage, micro in ((1, rows), (2, 2), (3, rows)) if topology.dp_size > 1 else ():
        yield "bf16", True, micro, {"zero_stage": stage}
    if (topology.tp_size > 1) != (topology.dp_size > 1):
        return  # what follows is computed by one rank, and by those that are split both ways
    split = {"sequence_parallel": topology.tp_size > 1}
    tiled, moved = {"feed_forward_tokens": 7}, {"offload": "activations"}
    for stage, what, saved in ((1, "selective", tiled), (1, "full", moved), (3, "none", tiled), (3, "selective", {})):
        yield "fp32", stage == 1, 2, {"zero_stage": stage, "activation_checkpointing": what, **split, **saved}
    # With the last case, each stage and each way once; to compile takes several ranks long
    for stage, what, saved in ((1, "none", {}), (3, "full", tiled | moved))[topology.world_size > 1 :]:
        layout = {"zero_stage": stage, "activation_checkpointing": what, **split, **saved, "compile": True}
        yield "fp32", stage == 3, 2, layout
    if topology.world_size == 1:
        return
    for stage in (1, 2, 3):
        yield "bf16", False, 2, {"zero_stage": stage, "reduce_dtype": "bf16"}
    layout = {"zero_stage": 2, "activation_checkpointing": "selective", **split, **tiled, "compile": True}
    yield "bf16", False, 2, layout


def layouts_of_split_rows(topology: Topology) -> Iterator[tuple[str, bool, int, dict[str, Any]]]:
    """Yield fewer of the same: whatever tokens' ranks divide or exchange, each way once or twice."""
    split = {"sequence_parallel": topology.tp_size > 1}
    for stage, tied in ((1, False), (2, True), (3, False)):
        yield "fp32", tied, 2, {"zero_stage": stage, **split}
    saved = {"activation_checkpointing": "full", "feed_forward_tokens": 7, "offload": "activations"}
    yield "fp32", True, 4, {"zero_stage": 1, "attention": "sdpa", **saved}
    if topology.tp_size > 1:
        yield "fp32", False, 2, {"zero_stage": 3, "activation_checkpointing": "selective", **split, "compile": True}
    if topology.dp_size > 1:
        yield "bf16", False, 2, {"zero_stage": 2, "activation_checkpointing": "selective"}


def micro_batches(dp_size: int, micro_batch_size: int) -> list[range]:
    """Return the rows of each micro-batch of a step, on all dp ranks."""
    of_ranks = [range(rank, GLOBAL_ROWS, dp_size) for rank in range(dp_size)]
    return [rows[i : i + micro_batch_size] for rows in of_ranks for i in range(0, len(rows), micro_batch_size)]


def run_case(
    topology: Topology, precision: str, tied: bool, micro_batch_size: int, layout: dict[str, Any], folder: Path
) -> dict[str, object]:
    """Train five steps; return the figures, and whether copies of weights stayed equal."""
    parallel = ParallelConfig.model_validate({"tp_size": topology.tp_size, "sp_size": topology.sp_size, **layout})
    micro_steps = GLOBAL_ROWS // (topology.dp_size * micro_batch_size)
    ds_config = deepspeed_config(parallel, OPTIM, precision, RELEASED if parallel.zero_stage == 3 else {})
    engine = Engine(model_config(tied), OPTIM, parallel, ds_config, micro_batch_size, micro_steps, topology, SEED, True)
    if topology.world_size == 1 and precision == "fp32" and layout == {"zero_stage": 1}:
        torch.save(engine.model.state_dict(), folder / f"weights-{'tied' if tied else 'untied'}.pt")
    history, layers, noise = [], [], []
    for step, (tokens, segment_ids) in enumerate(global_batches()):
        tokens = tokens.to(topology.device)
        mine = slice(topology.dp_rank, None, topology.dp_size)
        n_targets = int(target_counts(segment_ids).sum())
        stats = engine.train_step(
            tokens[mine], segment_ids[mine], n_targets, step, LEARNING_RATES[step], Meter(), step in MEASURED
        )
        history.append((stats.loss, stats.grad_norm))
        noise.append(stats.noise)
        if stats.layers:
            layers.append(stats.layers.as_record(step))
    if parallel.zero_stage == 3 and topology.zero_size > 1:
        weights = [parameter for block in engine.model.blocks for parameter in block.parameters()]
        assert all(weight.ds_status.name == "NOT_AVAILABLE" for weight in weights), "they are freed after a step"
    return {
        "history": history,
        "layers": layers,
        "noise": noise,
        "micro_batches": [list(rows) for rows in micro_batches(topology.dp_size, micro_batch_size)],
        "replicated_equal": replicated_equal(engine, topology),
    }


def replicated_equal(engine: Engine, topology: Topology) -> bool:
    """Return whether every weight has the same bits on ZeRO's ranks, and a replicated one on tp ranks too."""
    equal = True
    for parameter in engine.model.parameters():
        partitioned = hasattr(parameter, "ds_tensor")  # ZeRO-3 keeps a slice
        value = getattr(parameter, "ds_tensor", parameter).detach().float().contiguous()
        groups = [] if partitioned else [(topology.zero_group, topology.zero_size)]
        groups += [] if shard_dim(parameter) is not None else [(topology.tp_group, topology.tp_size)]
        for group, size in groups:
            others = [torch.empty_like(value) for _ in range(size)]
            dist.all_gather(others, value, group=group)
            equal &= all(torch.equal(value, other) for other in others)
    return equal


def main() -> None:
    tp_size, sp_size, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    results = {}
    torch.compile = functools.partial(torch.compile, backend="aot_eager")  # inductor would take a minute
    with started(ParallelConfig(tp_size=tp_size, sp_size=sp_size)) as topology:
        for precision, tied, micro, layout in layouts(topology):
            described = " ".join(f"{key}={value}" for key, value in layout.items())
            case = f"{precision} {'tied' if tied else 'untied'} micro={micro} {described}"
            results[case] = run_case(topology, precision, tied, micro, layout, folder)
        assert not counters["graph_break"], "a block is one graph"
        if topology.is_main:
            (folder / f"tp{tp_size}-sp{sp_size}-dp{topology.dp_size}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
