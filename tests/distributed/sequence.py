"""Check on two ranks that share rows what their exchanges cost, and that a continuation is not divided.

Usage: python -m tests.distributed.sequence
"""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain.cluster.speed import sequence_bytes
from pretrain.model.loss import last_logits, next_token_targets, training_loss
from pretrain.model.size import Workload
from pretrain.model.transformer import LlamaConfig, Transformer
from pretrain.topology import Checkpointing, ParallelConfig, started

SP_SIZE, ROWS, SEQ_LEN = 2, 3, 24


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


def main() -> None:
    with started(ParallelConfig(sp_size=SP_SIZE)):
        for n_kv_heads in (6, 3, 1):
            check_costs(n_kv_heads, "none", each_way=2)
        check_costs(2, "selective", each_way=2)
        check_costs(2, "full", each_way=3)
        check_continuations()


if __name__ == "__main__":
    main()
