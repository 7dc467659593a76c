"""A forward model generates a document as it scores it, at any length and in any chunks, and compiles nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pretrain.inference.forward_model import ForwardModel
from pretrain.model import prefill
from pretrain.model.architecture import ModelConfig
from pretrain.model.recurrent import RecurrentConfig
from pretrain.model.transformer import LlamaConfig
from pretrain.parallel_config import ParallelConfig
from pretrain.topology import Topology

CONFIG = LlamaConfig(dim=16, n_layers=2, n_heads=2, vocab_size=64)
RECURRENT = RecurrentConfig(dim=16, n_layers=2, context_dim=8, ffn_dim=24, vocab_size=64)


def drawn(config: ModelConfig, topology: Topology) -> tuple[ForwardModel, Tensor, Tensor]:
    """Return a model, the tokens of a document [1, 24], and the logits of one pass over them."""
    model = ForwardModel(config, ParallelConfig(compile=True), "fp32", topology)
    torch.manual_seed(0)
    for parameter in model._model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ids = torch.randint(64, (1, 24))
    with torch.no_grad():
        return model, ids, model._model(ids, torch.ones_like(ids))


def test_generation_and_scoring_agree_and_neither_compiles(topology: Topology, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", None)
    monkeypatch.setattr(torch.nn.Module, "compile", None)
    model, ids, whole = drawn(CONFIG, topology)
    for length in range(2, 24):
        cache = CONFIG.new_cache(24)
        found = model.next_logits(ids[:, :length], cache)
        following = model.next_logits(ids[:, length : length + 1], cache)
        torch.testing.assert_close(found, whole[:, length - 1])
        torch.testing.assert_close(following, whole[:, length])


@pytest.mark.parametrize("config", [CONFIG, RECURRENT], ids=["llama", "recurrent"])
def test_a_prompt_in_chunks_has_the_logits_of_one_pass_and_only_the_last(
    config: ModelConfig, topology: Topology, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(prefill, "CHUNK_TOKENS", 5)
    predicted = []
    monkeypatch.setattr(
        prefill, "last_logits", lambda hidden, weight: (predicted.append(hidden.shape), hidden[:, -1] @ weight.T)[1]
    )
    model, ids, whole = drawn(config, topology)
    for length in (4, 5, 6, 22):
        cache = config.new_cache(24)
        torch.testing.assert_close(model.next_logits(ids[:, :length], cache), whole[:, length - 1])
        torch.testing.assert_close(model.next_logits(ids[:, length : length + 2], cache), whole[:, length + 1])
    assert [shape[1] for shape in predicted] == [4, 2, 5, 2, 1, 2, 2, 2]


def test_a_cache_in_bf16_rounds_what_it_keeps_whichever_chunk_it_comes_in(
    topology: Topology, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    model, ids, whole = drawn(CONFIG, topology)
    found = []
    for size in (24, 5, 1):
        monkeypatch.setattr(prefill, "CHUNK_TOKENS", size)
        found.append(model.next_logits(ids, CONFIG.new_cache(24, torch.bfloat16)))
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])
    assert 0 < float((found[0] - whole[:, -1]).norm() / whole[:, -1].norm()) < 0.02
