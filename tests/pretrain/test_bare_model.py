"""A bare model that is compiled: one graph a shape for scoring, none for generating."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from pretrain.evaluation.bare_model import BareModel
from pretrain.model.cache import KVCache
from pretrain.model.transformer import Block, ModelConfig
from pretrain.topology import ParallelConfig, Topology

CONFIG = ModelConfig(dim=16, n_layers=2, n_heads=2, vocab_size=64)


def test_generating_compiles_nothing_and_gives_what_scoring_gives(
    topology: Topology, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter, compile_module = CompileCounter(), torch.nn.Module.compile
    monkeypatch.setattr(Block, "compile", lambda block, **options: compile_module(block, backend=counter, **options))
    torch._dynamo.reset()
    model = BareModel(CONFIG, ParallelConfig(compile=True), "fp32", topology)
    torch.manual_seed(0)
    for parameter in model._model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ids = torch.randint(64, (1, 24))
    for length in range(2, 24):  # far more lengths than torch compiles before it gives up
        cache = KVCache(CONFIG.n_layers, 24)
        found = model.next_logits(ids[:, :length], cache)
        following = model.next_logits(ids[:, length : length + 1], cache)
    assert counter.frame_count == 0
    whole = model.logits(ids, torch.ones_like(ids))
    compiled = counter.frame_count
    assert compiled > 0, "scoring is compiled, also after many lengths were generated"
    torch.testing.assert_close(found, whole[:, -2])
    torch.testing.assert_close(following, whole[:, -1])
    model.logits(ids.roll(1), torch.ones_like(ids))
    assert counter.frame_count == compiled
