"""Check on ranks that share rows what their exchanges cost, and that a continuation is not divided.

Usage: python -m tests.distributed.sequence SP_SIZE FOLDER. Rank 0 leaves FOLDER/SP_SIZE.json: the figures of steps on
rows of which only the first rank has any tokens.
"""

from __future__ import annotations

import functools
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain.cluster.speed import sequence_bytes
from pretrain.deepspeed_keys import deepspeed_config
from pretrain.engine import Engine
from pretrain.model.loss import last_logits, next_token_targets, training_loss
from pretrain.model.size import Workload
from pretrain.model.transformer import LlamaConfig, Transformer
from pretrain.optim import OptimConfig
from pretrain.parallel_config import Checkpointing, ParallelConfig
from pretrain.run.metrics import Meter
from pretrain.topology import Topology, started

SP_SIZE, ROWS, SEQ_LEN = 2, 3, 24
OPTIM = OptimConfig(z_loss=1e-3)


class Exchanges(TorchDispatchMode):
    """Counts the exchanges inside, and the bytes that this rank gives to them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function)
        if "c10d" in name and "wait" not in name:
            self.calls[name] += 1
            self.bytes += args[0].nbytes
        return function(*args, **(kwargs or {}))


def model_config(n_kv_heads: int, layers: int = 2) -> LlamaConfig:
    return LlamaConfig(dim=48, n_layers=layers, n_heads=6, n_kv_heads=n_kv_heads, ffn_dim=64, vocab_size=32)


def check_costs(n_kv_heads: int, checkpointing: Checkpointing, each_way: int) -> None:
    """Check that a step's exchanges are those that the estimate of its speed counts, and how many."""
    parallel = ParallelConfig(sp_size=SP_SIZE, activation_checkpointing=checkpointing)
    config = model_config(n_kv_heads)
    model = Transformer(config, parallel, "varlen")
    model.initialize(0)
    tokens = torch.randint(32, (ROWS, SEQ_LEN + 1), generator=torch.Generator().manual_seed(1))
    segment_ids = torch.ones_like(tokens)
    head = functools.partial(training_loss, targets=next_token_targets(tokens, segment_ids), z_loss=0.0)
    with Exchanges() as found:
        model.train()(tokens[:, :-1], segment_ids[:, :-1], head).total.backward()
    work = Workload(config, parallel, 1, ROWS, SEQ_LEN, bytes_per_weight=4)
    assert found.bytes == sequence_bytes(work), (n_kv_heads, checkpointing, found.bytes)
    assert sum(found.calls.values()) == config.n_layers * each_way * 2, found.calls


def check_continuations() -> None:
    """Check that every rank continues whole texts, as after a pass over the whole text without a cache."""
    config = model_config(3)
    model = Transformer(config).eval()
    model.initialize(0)
    text = torch.arange(SEQ_LEN).unsqueeze(0)
    with torch.no_grad(), Exchanges() as found:
        cache = config.new_cache(SEQ_LEN)
        model(text[:, :7], head=last_logits, cache=cache)  # 7 tokens, which two ranks could not share
        continued = model(text[:, 7:], head=last_logits, cache=cache)
    assert not found.calls
    with torch.no_grad():
        parts = model(text, torch.ones_like(text))
    assert parts.shape[1] == SEQ_LEN // SP_SIZE
    if dist.get_rank() == SP_SIZE - 1:
        torch.testing.assert_close(continued, parts[:, -1])


def figures_of_padding(topology: Topology, zero_stage: Literal[2, 3]) -> list[object]:
    """Train three steps on rows whose second half is padding; return their losses, norms and layers' figures."""
    parallel = ParallelConfig(sp_size=topology.sp_size, zero_stage=zero_stage)
    derived = deepspeed_config(parallel, OPTIM, "fp32", {})
    engine = Engine(model_config(3), OPTIM, parallel, derived, ROWS, 1, topology, seed=1)
    tokens = torch.randint(1, 32, (ROWS, SEQ_LEN + 1), generator=torch.Generator().manual_seed(2))
    segment_ids = torch.zeros_like(tokens)
    segment_ids[:, : SEQ_LEN // 2] = 1
    found: list[object] = []
    for step in range(3):
        stats = engine.train_step(tokens, segment_ids, ROWS * (SEQ_LEN // 2 - 1), step, 1e-2, Meter(), measured=True)
        assert stats.layers
        found.append([stats.loss, stats.grad_norm, *stats.layers.activations.values()])
    return found


def main() -> None:
    sp_size, folder = int(sys.argv[1]), Path(sys.argv[2])
    with started(ParallelConfig(sp_size=sp_size)) as topology:
        figures = [figures_of_padding(topology, stage) for stage in (2, 3)]
        if topology.is_main:
            (folder / f"{sp_size}.json").write_text(json.dumps(figures))
        if sp_size == 1:
            return
        for n_kv_heads in (6, 3, 1):
            check_costs(n_kv_heads, "none", each_way=2)
        check_costs(2, "selective", each_way=2)
        check_costs(2, "full", each_way=3)
        check_continuations()


if __name__ == "__main__":
    main()
