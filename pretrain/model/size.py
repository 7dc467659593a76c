"""The size of a model: parameters, floating-point operations, memory. No other module computes them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pretrain.model.architecture import BlockCosts, ModelConfig
from pretrain.model.loss import CHUNK_LOGITS, SUMMED_WEIGHTS
from pretrain.model.parallel import slice_size
from pretrain.model.weights import trained_specs, weight_specs
from pretrain.optim import ORTHOGONALIZATION_ITERATIONS, OptimizerName, is_hidden
from pretrain.parallel_config import ParallelConfig

_REDUCED_TOGETHER = 500_000_000  # elements: DeepSpeed 0.19.8's MEMORY_OPT_ALLREDUCE_SIZE


def parameter_count(config: ModelConfig) -> int:
    """Count the parameters of the whole model without adapters; tied embeddings count once."""
    return sum(math.prod(spec.shape) for spec in weight_specs(config).values())


def trained_count(config: ModelConfig) -> int:
    """Count the parameters that a training changes: those of the adapters, if there are any, or else all."""
    return sum(math.prod(spec.shape) for spec in trained_specs(config).values())


def flops_per_token(config: ModelConfig, seq_len: int) -> int:
    """Count the floating-point operations, forward and backward, per trained token of full-length documents.

    It is the usual basis of model FLOP utilization. Source: Chowdhery et al. 2022 (PaLM), arXiv 2204.02311, appendix B,
    with attention counted as causal.
    """
    return flops_of_documents(config, seq_len, seq_len**2) // seq_len


def flops_of_documents(config: ModelConfig, n_tokens: int, squared_lengths: int) -> int:
    """Count the floating-point operations, forward and backward, of the tokens of whole documents.

    Two per token and weight of every matrix multiplication in the forward pass (the embedding is a look-up and has
    none) and twice that in the backward pass; likewise for products of activations, such as those of attention within
    each document. A frozen matrix has no gradient of its own, so its backward pass takes as much as its forward pass.
    Recomputation is not counted.

    Args:
        n_tokens: tokens of all documents together.
        squared_lengths: sum over the documents of their length in tokens, squared.
    """
    matrices = sum(math.prod(shape) for shape in _block_matrices(config)) + config.vocab_size * config.dim
    products = config.products_of(squared_lengths)
    if config.adapters:
        return (4 * matrices + 6 * trained_count(config)) * n_tokens + 6 * products
    return 6 * (matrices * n_tokens + products)


def orthogonalization_flops(config: ModelConfig) -> int:
    """Count the floating-point operations of one of Muon's updates of a whole model.

    An iteration multiplies a matrix [m, n], m <= n, by its transpose, the product [m, m] by itself and by the matrix.
    """
    sides = [(min(shape), max(shape)) for shape in _block_matrices(config)]
    return sum(2 * ORTHOGONALIZATION_ITERATIONS * (2 * m * m * n + m**3) for m, n in sides)


def _block_matrices(config: ModelConfig) -> list[tuple[int, ...]]:
    """Return the shapes of the matrices of all blocks."""
    return [spec.shape for name, spec in weight_specs(config).items() if is_hidden(name, len(spec.shape))]


def checkpoint_bytes(
    config: ModelConfig,
    bytes_per_weight: int,
    optimizer: OptimizerName = "adamw",
    averaged: bool = False,
    moment_bytes: int = 4,
) -> int:
    """Return the size of a checkpoint in bytes: the weights that are trained, and the optimizer's state of them.

    Args:
        bytes_per_weight: 2 for bf16, 4 for fp32.
        averaged: whether there is a moving average of the weights.
        moment_bytes: of one moment of one weight.
    """
    trained = trained_count(config)
    return bytes_per_weight * trained + _state_bytes(trained, _under_muon(config, optimizer), averaged, moment_bytes)


def _under_muon(config: ModelConfig, optimizer: OptimizerName) -> int:
    """Count the weights of a whole model that Muon trains."""
    return sum(math.prod(shape) for shape in _block_matrices(config)) if optimizer == "muon" else 0


def _state_bytes(trained: int, under_muon: int, averaged: bool, moment_bytes: int) -> int:
    """Return the bytes of the state of so many weights in the optimizer, some of them under Muon.

    It is master weights in fp32, two moments of each or one under Muon, and the average in fp32.
    """
    return (8 if averaged else 4) * trained + moment_bytes * (2 * trained - under_muon)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one rank at the peak of a training step.

    Attributes:
        buffers: what DeepSpeed sets aside to reduce gradients and, in ZeRO-3, gathers weights into.
        activations: what the forward pass keeps for the backward pass, and what is computed meanwhile.
        host: what parallel.offload moves to the host's memory, which is no part of the total.
    """

    weights: int
    gradients: int
    optimizer: int
    buffers: int
    activations: int
    host: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.buffers + self.activations


@dataclass(frozen=True)
class Workload:
    """The training of one rank: everything that its memory depends on."""

    model: ModelConfig
    parallel: ParallelConfig
    dp_size: int
    micro_batch_size: int  # rows per forward pass
    seq_len: int  # tokens per row
    bytes_per_weight: int  # in the forward pass: 2 for bf16, 4 for fp32
    reduce_bucket: int = 500_000_000  # elements of DeepSpeed's reduce_bucket_size; this is its default
    gathered_weights: int = 1_000_000_000  # elements of DeepSpeed's stage3_max_live_parameters; this is its default
    layers_measured: bool = False  # at some steps
    averaged: bool = False  # there is a moving average of the weights
    optimizer: OptimizerName = "adamw"
    moment_bytes: int = 4  # of one moment of one weight

    @property
    def tokens(self) -> int:
        """Tokens of one rank per forward pass."""
        return self.micro_batch_size * self.seq_len // self.parallel.sp_size

    @property
    def zero_size(self) -> int:
        """Ranks that divide the optimizer's state; those that share rows do so too."""
        return self.dp_size * self.parallel.sp_size

    @property
    def parameters(self) -> int:
        """Parameters of one tp rank's slice of the model, with the padding of its vocabulary and with its adapters."""
        of_model = parameter_count(self._padded_model) // self.parallel.tp_size
        return of_model + self.trained if self.model.adapters else of_model

    @property
    def trained(self) -> int:
        """Return how many of them are trained."""
        if self.model.adapters is None:
            return self.parameters
        tp_size, specs = self.parallel.tp_size, trained_specs(self.model).values()
        return sum(math.prod(spec.shape) // (1 if spec.shard_dim is None else tp_size) for spec in specs)

    @property
    def optimizer_bytes(self) -> int:
        """Return the bytes of one rank's part of the optimizer's state."""
        under_muon = _under_muon(self.model, self.optimizer) // self.parallel.tp_size
        return _state_bytes(self.trained, under_muon, self.averaged, self.moment_bytes) // self.zero_size

    @property
    def _padded_model(self) -> ModelConfig:
        return self.model.model_copy(update={"vocab_size": self.vocab_rows * self.parallel.tp_size})

    @property
    def vocab_rows(self) -> int:
        """Rows of the embedding, and of the output projection, on one tp rank."""
        return slice_size(self.model.vocab_size, self.parallel.tp_size, self.model.vocab_multiple)

    @property
    def block_costs(self) -> BlockCosts | None:
        """Return what a block costs per token; None if it is not known of the architecture."""
        return self.model.block_costs(self.parallel, self.seq_len, self.bytes_per_weight)

    @property
    def reduce_bytes(self) -> int:
        """Return the bytes of a gradient on its way to other ranks."""
        return 4 if self.parallel.reduce_dtype == "fp32" else 2


def memory_per_rank(work: Workload) -> MemoryEstimate | None:
    """Estimate one rank's memory; `benchmarks/memory_model.py` compares it with a simulated step.

    Returns:
        None if it is not known what the architecture's blocks keep.
    """
    parallel, costs = work.parallel, work.block_costs
    if costs is None:
        return None
    stage = parallel.applied_zero_stage
    weights = work.bytes_per_weight * (work.parameters // work.zero_size if stage == 3 else work.parameters)
    return MemoryEstimate(
        weights=0 if parallel.offloads_weights else weights,
        gradients=4 * (work.trained if stage == 1 else work.trained // work.zero_size),
        optimizer=0 if parallel.offloads_optimizer else work.optimizer_bytes,
        buffers=_buffers(work),
        activations=int(_activations(work, costs)),
        host=int(
            (weights if parallel.offloads_weights else 0)
            + (work.optimizer_bytes if parallel.offloads_optimizer else 0)
            + (work.model.n_layers * work.tokens * costs.kept if parallel.offloads_activations else 0)
        ),
    )


def _buffers(work: Workload) -> int:
    """Return the bytes that DeepSpeed sets aside; only ZeRO-1's optimizer for bf16 needs none.

    Source: DeepSpeed 0.19.8, `setup_buckets` of stage_1_and_2.py, twice with overlap_comm; `ipg_buckets` of stage3.py.
    """
    stage, weight_bytes = work.parallel.applied_zero_stage, work.bytes_per_weight
    if stage == 1:
        return 0 if weight_bytes == 2 and not work.parallel.offloads_optimizer else 4 * work.reduce_bucket
    if stage == 2:
        return 2 * weight_bytes * work.reduce_bucket
    gathered = weight_bytes * min(work.parameters, work.gathered_weights)
    return work.reduce_bytes * work.reduce_bucket + gathered


def _activations(work: Workload, costs: BlockCosts) -> float:
    """Estimate the most bytes that activations and what is computed from them take.

    Four moments can be the fullest: the loss, when all blocks have run; the last block's backward pass; the reduction
    of gradients; and an update: Muon's, and one that is measured, from a copy of the rank's fp32 weights.
    """
    config, weight_bytes = work.model, work.bytes_per_weight
    # Of inputs on the host, the device has the last from its block on, and in the backward pass two
    on_host = work.parallel.offloads_activations
    kept = work.tokens * costs.kept
    blocks = config.n_layers * kept
    behind = min(2 * kept, blocks) if on_host else blocks
    ends = 2 * work.tokens * weight_bytes * config.dim  # the last norm's input and output
    return max(
        (kept if on_host else blocks) + ends + _loss_bytes(work),
        behind + _backward_bytes(work, costs),
        _reduction_bytes(work, costs, behind),
        _update_bytes(work),
    )


def _update_bytes(work: Workload) -> float:
    """Estimate what an update takes: a measured one a copy of the weights, and Muon's the largest matrix a few times.

    Muon holds what it has received of a matrix, its two orders, and a product that becomes the next of them; and three
    square ones.
    """
    copied = 4 * work.trained / work.zero_size if work.layers_measured and not work.parallel.offloads_optimizer else 0
    if work.optimizer == "adamw":
        return copied
    rows, columns = sorted(_largest_matrix(work))
    return copied + work.bytes_per_weight * (4 * rows * columns + 3 * rows * rows)


def _largest_matrix(work: Workload) -> tuple[int, ...]:
    """Return the shape of the largest matrix in a block."""
    return max(_block_matrices(work.model), key=math.prod)


def _loss_bytes(work: Workload) -> float:
    """Estimate what the loss takes: the gradients of states and weight, and the logits of a chunk in two types."""
    config, weight_bytes = work.model, work.bytes_per_weight
    width = work.vocab_rows
    states, weight = work.tokens * config.dim, width * config.dim
    logits = min(CHUNK_LOGITS, work.tokens * width)
    chunk = logits * weight_bytes + min(logits, CHUNK_LOGITS / 2) * 4  # exponentials of a quarter, and of that before
    if config.adapters:
        return 2 * states * weight_bytes + chunk
    if weight > SUMMED_WEIGHTS:
        return states * (weight_bytes + 8) + weight * weight_bytes + chunk
    return 2 * states * weight_bytes + weight * (4 + weight_bytes) + chunk


def _backward_bytes(work: Workload, costs: BlockCosts) -> float:
    """Estimate what a block's backward pass takes beside what is kept, with the gradient of its largest matrix.

    A frozen matrix has none.
    """
    matrix = 0 if work.model.adapters else math.prod(_largest_matrix(work)) / work.parallel.tp_size
    tile = min(work.tokens, work.parallel.feed_forward_tokens or 0)
    return work.tokens * costs.backward + tile * costs.of_tile + costs.sums + work.bytes_per_weight * matrix


def _reduction_bytes(work: Workload, costs: BlockCosts, blocks: float) -> float:
    """Estimate what the reduction of gradients takes beside the buffers, and what blocks then still keep.

    ZeRO-1 reduces them all after the backward pass, where they are, or from a copy where matrices and vectors fit in
    one. ZeRO-2 and 3 reduce a bucket as soon as it is full, from a copy; the blocks whose gradients it holds need
    nothing more, but for one that is in the midst of its backward pass. In another type than the gradients', there is a
    copy in that type too.
    """
    if work.parallel.applied_zero_stage == 1:
        copy = 4 if work.trained <= _REDUCED_TOGETHER else 0
        return (copy + (work.reduce_bytes if work.reduce_bytes < 4 else 0)) * work.trained
    reduced = min(work.reduce_bucket, work.trained)
    cast = work.reduce_bytes if work.reduce_bytes != work.bytes_per_weight else 0
    # SwiGLU's values, which are gone when its gradients are there, are half of a block's; of tiles there are none
    begun = work.tokens * costs.backward / (1 if work.parallel.feed_forward_tokens else 2)
    return (work.bytes_per_weight + cast) * reduced + blocks * (1 - reduced / work.trained) + begun
