"""The size of a model: parameters, floating-point operations, memory. No other module computes them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pretrain.model.transformer import ModelConfig
from pretrain.model.weights import weight_specs
from pretrain.topology import ParallelConfig


def parameter_count(config: ModelConfig) -> int:
    """Count the trainable parameters of the whole model; tied embeddings count once."""
    return sum(math.prod(spec.shape) for spec in weight_specs(config).values())


def flops_per_token(config: ModelConfig, seq_len: int) -> int:
    """Count the floating-point operations, forward and backward, per trained token of full-length documents.

    It is the usual basis of model FLOP utilization. Source: Chowdhery et al. 2022 (PaLM), arXiv 2204.02311, appendix B,
    with attention counted as causal.
    """
    return flops_of_documents(config, seq_len, seq_len**2) // seq_len


def flops_of_documents(config: ModelConfig, n_tokens: int, squared_lengths: int) -> int:
    """Count the floating-point operations, forward and backward, of tokens that attend within their own documents.

    Two per token and weight of every matrix multiplication in the forward pass (the embedding is a look-up and has
    none) and twice that in the backward pass; plus, in each layer, the causal half of the length x length products of
    each document's attention, twice (scores and values). Recomputation is not counted.

    Args:
        n_tokens: tokens of all documents together.
        squared_lengths: sum over the documents of their length in tokens, squared.
    """
    head_dim = config.head_dim
    attention = config.dim * head_dim * (2 * config.n_heads + 2 * config.kv_heads)
    matrices = config.n_layers * (attention + 3 * config.dim * config.hidden_dim) + config.vocab_size * config.dim
    products = config.n_layers * config.n_heads * head_dim * squared_lengths
    return 6 * (matrices * n_tokens + products)


def checkpoint_bytes(config: ModelConfig, bytes_per_weight: int) -> int:
    """Return the size of the whole model's checkpoint in bytes: the training weights and the optimizer's state.

    Args:
        bytes_per_weight: 2 for bf16, 4 for fp32.
    """
    return (bytes_per_weight + 12) * parameter_count(config)  # fp32: the master weight and two moments


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one rank at the peak of a training step."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True)
class Workload:
    """What one rank trains: everything that its memory depends on."""

    model: ModelConfig
    parallel: ParallelConfig
    dp_size: int
    micro_batch_size: int  # rows per forward pass
    seq_len: int  # tokens per row
    bytes_per_weight: int  # in the forward pass: 2 for bf16, 4 for fp32, which needs no master copy
    z_loss: bool  # whether the loss has a z-loss, which needs its own softmax


def memory_per_rank(work: Workload) -> MemoryEstimate:
    """Estimate one rank's memory; the optimizer keeps three fp32 numbers per parameter (master weight, two moments)."""
    parallel, dp_size = work.parallel, work.dp_size
    parameters = parameter_count(work.model) // parallel.tp_size
    stage = parallel.applied_zero_stage
    optimizer = (12 if work.bytes_per_weight == 2 else 8) * parameters // dp_size
    gradients = 4 * parameters // (dp_size if stage >= 2 else 1)
    weights = work.bytes_per_weight * parameters // (dp_size if stage == 3 else 1)
    if parallel.offload != "none":
        optimizer = 0
    if parallel.offload == "parameters":
        weights = 0
    return MemoryEstimate(weights, gradients, optimizer, _activations(work))


def _activations(work: Workload) -> int:
    """Estimate what the backward pass needs of one micro-batch: the tensors that the layers save.

    Per token and layer, every tp rank holds the two norms' inputs and outputs and the branches' sums whole (6 dim). The
    tp ranks divide the queries, keys, values, their rotations and attention's output (6 times the heads' width) and
    SwiGLU's three products (4 hidden_dim). The logits are held twice in fp32: as given to the loss, and as the softmax
    kept for the backward pass. A z-loss holds them once more as its exponentials, and in bf16 again, widened for it.
    """
    config, parallel, weight_bytes = work.model, work.parallel, work.bytes_per_weight
    tokens = work.micro_batch_size * work.seq_len
    split = (6 * config.n_heads * config.head_dim + 4 * config.hidden_dim) // parallel.tp_size
    block = weight_bytes * tokens * (6 * config.dim + split)
    if parallel.activation_checkpointing == "full":
        blocks = config.n_layers * weight_bytes * tokens * config.dim + block
    else:
        blocks = config.n_layers * block
    each = weight_bytes + 8 + (work.z_loss and (8 if weight_bytes == 2 else 4))  # bytes per logit
    return blocks + tokens * each * config.vocab_size // parallel.tp_size
