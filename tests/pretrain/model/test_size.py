"""Parameter and FLOP counts match published and hand-computed values and the model itself."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pretrain.model.size import (
    Workload,
    checkpoint_bytes,
    flops_of_documents,
    flops_per_token,
    memory_per_rank,
    orthogonalization_flops,
    parameter_count,
)
from pretrain.model.transformer import LlamaConfig, Transformer
from pretrain.model.weights import weight_specs
from pretrain.muon import orthogonalize
from pretrain.optim import is_hidden
from pretrain.parallel_config import ParallelConfig

LLAMA_7B = LlamaConfig(dim=4096, n_layers=32, n_heads=32, vocab_size=32_000)
LLAMA_70B = LlamaConfig(dim=8192, n_layers=80, n_heads=64, n_kv_heads=8, ffn_dim=28_672, vocab_size=32_000)


def test_parameters_of_published_models() -> None:
    assert parameter_count(LLAMA_7B) == 6_738_415_616  # Touvron et al. 2023, as released
    assert parameter_count(LLAMA_70B) == 68_976_648_192  # Llama 2 70B, as released


def test_flops_of_llama_7b_by_hand() -> None:
    # 32 layers of 4 * 4096^2 + 3 * 4096 * 11008 weights, and the output's 4096 * 32000; 2 FLOPs each, 6 with backward
    matrices = 32 * (67_108_864 + 135_266_304) + 131_072_000
    # Causal attention at 2048: 1024 keys on average, 4096 wide, two products of 2 FLOPs, three times, 32 layers
    attention = 32 * 3 * 2 * 2 * 4096 * 1024
    assert flops_per_token(LLAMA_7B, 2048) == 6 * matrices + attention == 41_253_076_992


@pytest.mark.usefixtures("topology")
def test_flops_of_documents_are_those_that_torch_counts() -> None:
    """Compare with torch's counter, which counts the whole square of each attention: twice its causal half."""
    config = LlamaConfig(dim=48, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=80, vocab_size=101)
    model, lengths = Transformer(config), (3, 17, 40)
    model.initialize(seed=0)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        for length in lengths:  # each document in a row of its own
            tokens = torch.arange(length)[None]
            model(tokens, torch.ones_like(tokens)).sum().backward()
    squares = sum(length**2 for length in lengths)
    assert counter.get_total_flops() == flops_of_documents(config, sum(lengths), 2 * squares)


def test_flops_of_a_full_row_are_the_published_convention() -> None:
    assert flops_of_documents(LLAMA_70B, 4096, 4096**2) == 4096 * flops_per_token(LLAMA_70B, 4096)
    assert flops_of_documents(LLAMA_70B, 4096, 2 * 2048**2) == 4096 * flops_per_token(LLAMA_70B, 2048)


@pytest.mark.usefixtures("topology")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_the_count_is_what_the_model_has(tied: bool, qk_norm: bool) -> None:
    config = LlamaConfig(
        dim=64, n_layers=3, n_heads=4, n_kv_heads=2, vocab_size=101, tie_embeddings=tied, qk_norm=qk_norm
    )
    assert parameter_count(config) == sum(p.numel() for p in Transformer(config).parameters())


def test_memory_is_divided_as_zero_divides_it() -> None:
    def estimate(stage: int, dp_size: int, tp_size: int = 1, averaged: bool = False):
        parallel = ParallelConfig.model_validate({"tp_size": tp_size, "zero_stage": stage})
        return memory_per_rank(Workload(LLAMA_7B, parallel, dp_size, 1, 2048, bytes_per_weight=2, averaged=averaged))

    parameters = parameter_count(LLAMA_7B)
    one = estimate(1, 1)
    assert (one.weights, one.gradients, one.optimizer) == (2 * parameters, 4 * parameters, 12 * parameters)
    assert estimate(1, 8).optimizer == 12 * parameters // 8
    assert estimate(1, 8, averaged=True).optimizer == 16 * parameters // 8
    assert checkpoint_bytes(LLAMA_7B, 2, averaged=True) - checkpoint_bytes(LLAMA_7B, 2) == 4 * parameters
    assert estimate(1, 8).gradients == 4 * parameters
    assert estimate(2, 8).gradients == 4 * parameters // 8
    assert estimate(3, 8).weights == 2 * parameters // 8
    assert estimate(1, 8, tp_size=2).weights == parameters


def test_ranks_that_share_rows_divide_activations_and_zeros_state() -> None:
    def estimate(dp_size: int, **layout: object):
        parallel = ParallelConfig.model_validate({"zero_stage": 2, "activation_checkpointing": "full", **layout})
        return memory_per_rank(Workload(LLAMA_7B, parallel, dp_size, 1, 131_072, bytes_per_weight=2))

    apart, shared = estimate(8), estimate(2, sp_size=4)
    assert (shared.weights, shared.gradients) == (apart.weights, apart.gradients)
    assert shared.optimizer == apart.optimizer
    assert apart.activations / 5 < shared.activations < apart.activations / 3


def test_muon_keeps_one_moment_of_the_matrices_in_blocks() -> None:
    under_muon = 32 * (4 * 4096**2 + 3 * 4096 * 11_008)
    work = Workload(LLAMA_7B, ParallelConfig(), 8, 1, 2048, bytes_per_weight=2, optimizer="muon")
    assert memory_per_rank(work).optimizer == (12 * parameter_count(LLAMA_7B) - 4 * under_muon) // 8


@pytest.mark.usefixtures("topology")
def test_flops_of_an_orthogonalization_are_those_that_torch_counts() -> None:
    config = LlamaConfig(dim=48, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=80, vocab_size=101)
    with FlopCounterMode(display=False) as counter:
        for name, spec in weight_specs(config).items():
            if is_hidden(name, len(spec.shape)):
                orthogonalize(torch.ones(spec.shape))
    assert counter.get_total_flops() == orthogonalization_flops(config)


def test_a_ranks_parameters_include_the_padding_of_its_vocabulary() -> None:
    config = LlamaConfig(dim=64, n_layers=1, n_heads=4, vocab_size=4097)

    def parameters(vocab_size: int) -> int:
        model = config.model_copy(update={"vocab_size": vocab_size})
        return Workload(model, ParallelConfig(tp_size=4), 1, 1, 128, 2).parameters

    assert parameters(4097) == parameters(4100) > parameters(4096)
