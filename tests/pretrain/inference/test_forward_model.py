"""A forward model generates a document as it scores it, at any length, and compiles nothing."""

from __future__ import annotations

import pytest
import torch

from pretrain.inference.forward_model import ForwardModel
from pretrain.model.kv_cache import KVCache
from pretrain.model.transformer import LlamaConfig
from pretrain.topology import ParallelConfig, Topology

CONFIG = LlamaConfig(dim=16, n_layers=2, n_heads=2, vocab_size=64)


def test_generation_and_scoring_agree_and_neither_compiles(topology: Topology, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", None)
    monkeypatch.setattr(torch.nn.Module, "compile", None)
    model = ForwardModel(CONFIG, ParallelConfig(compile=True), "fp32", topology)
    torch.manual_seed(0)
    for parameter in model._model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ids = torch.randint(64, (1, 24))
    whole = model._model(ids, torch.ones_like(ids))
    for length in range(2, 24):
        cache = KVCache(CONFIG.n_layers, 24)
        found = model.next_logits(ids[:, :length], cache)
        following = model.next_logits(ids[:, length : length + 1], cache)
        torch.testing.assert_close(found, whole[:, length - 1])
        torch.testing.assert_close(following, whole[:, length])
