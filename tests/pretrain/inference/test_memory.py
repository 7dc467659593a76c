"""What a generation takes, as it is said before, is what its weights and its cache take."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch

from pretrain.inference.forward_model import ForwardModel
from pretrain.inference.memory import GenerationMemory, generation_memory
from pretrain.model.kv_cache import KVCache
from pretrain.model.recurrent import RecurrentConfig
from pretrain.model.transformer import LlamaConfig
from pretrain.parallel_config import ParallelConfig
from pretrain.topology import Topology
from shards import ConfigError
from tests.pretrain.model.test_size import LLAMA_7B

CONFIG = LlamaConfig(dim=24, n_layers=3, n_heads=4, n_kv_heads=2, vocab_size=64)


def of_7b(available: float, precision: str = "fp32") -> GenerationMemory:
    return GenerationMemory(LLAMA_7B, precision, False, 1, torch.device("cuda"), int(available))  # type: ignore[arg-type]


@pytest.mark.parametrize("half", [False, True])
def test_weights_and_cache_are_those_of_a_model(topology: Topology, half: bool) -> None:
    model = ForwardModel(CONFIG, ParallelConfig(), "fp32", topology)
    found = generation_memory(CONFIG, "fp32", half, topology)
    assert found.weights == sum(weight.nbytes for weight in model._model.parameters())
    cache = CONFIG.new_cache(50, torch.bfloat16 if half else None)
    assert isinstance(cache, KVCache)
    model.next_logits(torch.zeros(1, 1, dtype=torch.int64), cache)
    kept = sum(part.nbytes for memory in cache._memory if memory for part in memory)
    assert found.total(50) - found.total(0) == kept == 50 * found.of_token
    assert found.fits(50)
    assert not replace(found, available=found.total(50) - 1).fits(50)
    assert replace(found, tp_size=2).of_token == found.of_token / 2


def test_a_model_with_contexts_takes_the_same_for_any_length(topology: Topology) -> None:
    config = RecurrentConfig(dim=16, n_layers=2, context_dim=8, ffn_dim=24, vocab_size=64)
    found = generation_memory(config, "fp32", False, topology)
    assert found.total(1 << 20) == found.total(0) > found.weights


def test_what_does_not_fit_is_refused_with_what_would(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    # 27 GB of weights, and of a token's keys and values 2 * 32 layers * 4096 numbers in fp32
    with pytest.raises(ConfigError, match=r"cache of 131,072 tokens 137.44 GB\), but only 80.00 GB are free") as error:
        of_7b(80e9).check(131_072)
    assert "use --bf16-cache" not in str(error.value), "68.7 GB beside 27 do not fit either"
    assert "use --precision bf16" not in str(error.value)
    assert "start 4 ranks, which share the model" in str(error.value)
    fits = (80_000_000_000 - of_7b(0).total(0)) // of_7b(0).of_token
    assert f"{fits:,} tokens of prompt and continuation together would fit" in str(error.value)
    of_7b(80e9).check(fits)
    assert "memory a rank, estimated: 80.00 GB" in caplog.text
    with pytest.raises(ConfigError):
        of_7b(80e9).check(fits + 1)
    with pytest.raises(ConfigError, match=r"use --bf16-cache; or use --precision bf16; or start 2 ranks"):
        of_7b(110e9).check(131_072)
    with pytest.raises(ConfigError, match=r"weights 26.95 GB.*only 24.00 GB are free on cuda; use --precision bf16"):
        of_7b(24e9).check(0)
    with pytest.raises(ConfigError, match=r"take a smaller model"):
        of_7b(1e9, "bf16").check(0)
