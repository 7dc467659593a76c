"""What a block of the transformer costs in training. transformer -> transformer_costs -> size."""

from __future__ import annotations

from collections.abc import Mapping

from pretrain.model.architecture import BlockCosts, Heads
from pretrain.model.lora import LoraConfig
from pretrain.model.sequence import copies_of_kv_heads
from pretrain.parallel_config import ParallelConfig


def block_costs(
    dim: int,
    hidden_dim: int,
    heads: Heads,
    qk_norm: bool,
    lora: LoraConfig | None,
    parallel: ParallelConfig,
    seq_len: int,
    bytes_per_weight: int,
) -> BlockCosts:
    """Count what a block costs one rank, in bytes per token; `benchmarks/memory_model.py` compares.

    A fused forward pass: each branch's sum and the norm after it read 2 dim and write 2 dim; rotations read and write
    queries and keys; SwiGLU reads two products and writes one.

    Attention with dropout makes the matrix of all its weights. Kept of it are the weights in fp32, which of them were
    dropped, and what is left of them; compiled, what is left is computed again in bf16. Any checkpointing leaves all of
    it to be computed again.

    Of SwiGLU a few tokens at a time (`swiglu.py`) nothing is kept but its input. Its backward pass has four hidden
    values of a tile, and the fp32 sums of its three matrices' gradients; it makes two of three products again.
    """
    queries, keys = heads.n_heads * heads.head_dim, heads.n_kv_heads * heads.head_dim
    exchanged = exchanged_numbers(heads, parallel)
    kept = _kept(dim, hidden_dim, queries, keys, exchanged, qk_norm, lora, parallel)
    tiled, hidden = parallel.feed_forward_tokens is not None, hidden_dim / parallel.tp_size
    products = 0 if tiled else hidden * (1 if parallel.compile else 2)
    without = parallel.model_copy(update={"activation_checkpointing": "none"})
    again = {
        "none": 0.0,
        "selective": 2 * dim + products,
        "full": _kept(dim, hidden_dim, queries, keys, exchanged, qk_norm, lora, without) - kept,
    }[parallel.activation_checkpointing]
    # Those of the stream; uncompiled, also of two of SwiGLU's products, or else of its input
    gradients = 2 * dim if tiled else dim + (0 if parallel.compile else 2 * hidden)
    stream = dim / (parallel.tp_size if parallel.sequence_parallel else 1)
    moved = 8 * stream + (2 * (queries + keys) + 3 * hidden_dim) / parallel.tp_size
    moved += 4 * exchanged  # read and written in another order, before and after
    # Of whole rows an sp rank has fewer heads, but of as many tokens more
    pairs = heads.n_heads * seq_len / parallel.tp_size if heads.dropout else 0.0
    left = 0 if parallel.compile and bytes_per_weight == 2 else bytes_per_weight
    matrix, is_kept = (5 + left) * pairs, parallel.activation_checkpointing == "none"
    return BlockCosts(
        kept=bytes_per_weight * kept + (matrix if is_kept else 0),
        # With the gradients of what is left of the attention's weights, and of all of them
        backward=bytes_per_weight * (again + gradients) + 4 * pairs + (0 if is_kept else matrix),
        moved=bytes_per_weight * moved,
        of_tile=4 * bytes_per_weight * hidden if tiled else 0,
        sums=(0 if lora else 3 * 4 * dim * hidden) if tiled else 0,
        repeated=2 * dim * hidden_dim if tiled and parallel.activation_checkpointing != "full" else 0,
    )


def exchanged_numbers(heads: Heads, parallel: ParallelConfig) -> float:
    """Count the numbers per token that a rank exchanges in a block's forward pass, to give each rank its heads.

    They are queries, keys, values and attention's output, of each tensor-parallel rank its own, and keys and values as
    often as ranks need them. The backward pass exchanges as many gradients.
    """
    if parallel.sp_size == 1:
        return 0
    copies = copies_of_kv_heads(heads.n_kv_heads // parallel.tp_size, parallel.sp_size)
    return 2 * (heads.n_heads + copies * heads.n_kv_heads) * heads.head_dim / parallel.tp_size


def _kept(
    dim: int,
    hidden_dim: int,
    queries: int,
    keys: int,
    exchanged: float,
    qk_norm: bool,
    lora: LoraConfig | None,
    parallel: ParallelConfig,
) -> float:
    """Count the numbers per token that a block keeps of its forward pass, on one tp rank.

    Divided among the tp ranks: queries, keys, values, attention's output, SwiGLU's products. The residual stream, twice
    since each branch adds to it, is divided by sequence parallelism only; the branches' inputs are whole in any case.
    Compiled blocks compute again what is cheap, and so does selective checkpointing. What attention reads is kept as it
    was received, and its output also as it was sent back.
    """
    of_rank = 1 / parallel.tp_size
    stream = dim * (of_rank if parallel.sequence_parallel else 1)
    if parallel.activation_checkpointing == "full":
        return stream
    hidden = 0 if parallel.feed_forward_tokens else of_rank * hidden_dim
    kept = 2 * stream + of_rank * (2 * queries + 2 * keys) + 2 * hidden
    kept += _kept_by_adapters(dim, {"wo": queries, "w2": hidden_dim}, lora, parallel) if lora else 0
    if parallel.activation_checkpointing == "selective":
        kept += exchanged
        # Gathered tokens are kept, since gathering them again would wait for other ranks. Uncompiled, all results of
        # matrix products and collectives are, needed or not.
        kept += 2 * dim if parallel.sequence_parallel else 0
        if not parallel.compile:
            kept += 2 * dim + stream if parallel.tp_size > 1 else dim
        return kept
    if exchanged:
        kept += exchanged - of_rank * (queries + 2 * keys)
    kept += 2 * dim + hidden * (1 if parallel.compile else 2)
    return kept + (of_rank * (queries + keys) if qk_norm else 0)


def _kept_by_adapters(dim: int, split: Mapping[str, int], lora: LoraConfig, parallel: ParallelConfig) -> float:
    """Count the numbers per token that the adapters of a block keep: A x, and with dropout their inputs and masks.

    Args:
        split: widths of the inputs that the tp ranks divide, by the matrix that reads them; the others read dim.
    """
    kept = float(lora.r * len(lora.targets))
    if lora.dropout and parallel.activation_checkpointing == "none":
        kept += 2 * sum(split[name] / parallel.tp_size if name in split else dim for name in lora.targets)
    return kept
