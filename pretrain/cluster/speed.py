"""Estimate how fast a run will train, before it does: from its arithmetic, the bytes that it moves, and the links.

workload, GPUs -> speed -> preflight. The formula, with what it assumes and leaves out, stands in docs/performance.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pretrain.devices import Device
from pretrain.model.size import Workload, flops_per_token, orthogonalization_flops
from pretrain.model.transformer_costs import exchanged_numbers

# Attainable shares of what data sheets say. The best shapes of matrix products reach 0.8 to 0.86 of the peak on A100,
# H100 and GH200 (Bekman, Machine Learning Engineering, "Maximum Achievable Matmul FLOPS"); those of a step are smaller,
# attention reaches less, and clocks drop under a load that lasts.
_PRODUCTS_SHARE = 0.65
_MEMORY_SHARE = 0.8
_LINK_SHARE = 0.8

_UNFUSED = 3  # times as many bytes are moved where each operation runs by itself, without parallel.compile
_HEAD_PASSES = 12  # how often a logit is written or read, forward and backward
_SUMS = 4  # all-reduces of a layer over the tp ranks, one for each branch, forward and backward


@dataclass(frozen=True)
class Cluster:
    """The GPUs of a job, and what joins them.

    Attributes:
        network_bandwidth: bytes/s of one node to others, in one direction.
    """

    device: Device
    nodes: int
    gpus_per_node: int
    network_bandwidth: float

    def bandwidth(self, within_node: bool, sharing: int = 1) -> float:
        """Return the attainable bytes/s of one device in a ring; `sharing` rings leave a node over its network."""
        link = self.device.link_bandwidth
        return _LINK_SHARE * (link if within_node else min(link, self.network_bandwidth / sharing))


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step on each rank, by what they are spent on.

    Attributes:
        products: matrix products and attention, and with checkpointing those that are computed again.
        memory: the other operations of forward and backward passes, which wait for the GPU's memory.
        optimizer: clipping and the update, which wait for it too, and Muon's matrix products.
        tensor_parallel, sequence, data_parallel: links, as far as they do not work beside the rest.
    """

    products: float
    memory: float
    optimizer: float
    tensor_parallel: float
    sequence: float
    data_parallel: float

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    @property
    def parts(self) -> Mapping[str, float]:
        """Return the seconds by name, in the words of a message."""
        return {
            "matrix products": self.products,
            "memory traffic": self.memory,
            "optimizer": self.optimizer,
            "links of tp ranks": self.tensor_parallel,
            "links of sp ranks": self.sequence,
            "links of dp ranks": self.data_parallel,
        }

    @property
    def bound(self) -> str:
        """Return the part that takes longest."""
        return max(self.parts, key=lambda name: self.parts[name])


def why_unknown(work: Workload, device: Device) -> str:
    """Return why there is no estimate for a workload on a device; empty if there is one."""
    costs = work.block_costs
    if costs is None or costs.moved is None:
        return f"model.architecture={work.model.architecture}"
    if work.bytes_per_weight != 2:
        return "precision=fp32"
    if work.parallel.offload:
        return f"parallel.offload={','.join(work.parallel.offload)}"
    return "" if device.flops else f"{device.name}, which has no bf16"


def step_time(work: Workload, micro_steps: int, cluster: Cluster) -> StepTime:
    """Estimate the seconds of one optimizer step, unless `why_unknown`."""
    device = cluster.device
    assert device.flops, why_unknown(work, device)
    products = _flops(work) / (_PRODUCTS_SHARE * device.flops)
    memory = _bytes_moved(work) / (_MEMORY_SHARE * device.memory_bandwidth)
    every_micro_step, once = _data_parallel_seconds(work, cluster)
    # ZeRO-2 reduces gradients while the backward pass computes others, two thirds of the time; ZeRO-3 also gathers
    # weights ahead of the forward pass.
    beside = (products + memory) * {1: 0, 2: 2 / 3, 3: 1}[work.parallel.applied_zero_stage]
    return StepTime(
        products=micro_steps * products,
        memory=micro_steps * memory,
        optimizer=_optimizer_bytes(work) / (_MEMORY_SHARE * device.memory_bandwidth)
        + _optimizer_flops(work) / (_PRODUCTS_SHARE * device.flops),
        tensor_parallel=micro_steps * _tensor_parallel_seconds(work, cluster),
        sequence=micro_steps * _sequence_seconds(work, cluster),
        data_parallel=micro_steps * max(0.0, every_micro_step - beside) + once,
    )


def tokens_per_second(work: Workload, micro_steps: int, seconds: float) -> float:
    """Return the tokens a second of all ranks together, given the seconds of a step."""
    return work.tokens * micro_steps * work.zero_size / seconds


def _flops(work: Workload) -> float:
    """Count one rank's FLOPs of a micro-step in rows of one document each; shorter ones have less attention."""
    config = work.model
    of_model = flops_per_token(config, work.seq_len)
    # A frozen matrix has no gradient of its own
    passes = 2 if config.adapters else 3
    of_blocks = of_model - 2 * passes * config.vocab_size * config.dim
    again = of_blocks / passes if work.parallel.activation_checkpointing == "full" else 0  # one more forward pass
    costs = work.block_costs
    assert costs is not None, "or `why_unknown` says so"
    again += 2 * config.n_layers * costs.repeated
    return work.tokens * (of_model + again) / work.parallel.tp_size


def _bytes_moved(work: Workload) -> float:
    """Count the bytes of a micro-step that one rank reads and writes outside of matrix products and attention.

    A block's backward pass moves twice what its forward pass does. Then the logits; and each parameter's gradient is
    written, read, and added to the fp32 sum.
    """
    config, parallel = work.model, work.parallel
    costs = work.block_costs
    assert costs is not None, "or `why_unknown` says so"
    assert costs.moved is not None, "likewise"
    passes = 3 if parallel.activation_checkpointing == "none" else 4
    blocks = config.n_layers * passes * costs.moved * (1 if parallel.compile else _UNFUSED)
    head = _HEAD_PASSES * work.vocab_rows * work.bytes_per_weight
    return work.tokens * (blocks + head) + 12 * work.trained


def _optimizer_bytes(work: Workload) -> float:
    """Count the bytes that one rank reads and writes after the last micro-step.

    AdamW reads weight, gradient and two moments of each of the rank's own trained parameters and writes all but the
    gradient, and a bf16 copy. Before, the norm reads the gradients, clipping reads and writes them, and afterwards they
    are set to zero.
    """
    own = work.trained / work.zero_size
    gradients = work.trained if work.parallel.applied_zero_stage == 1 else own
    return (14 + 4 * work.moment_bytes) * own + 16 * gradients


def _optimizer_flops(work: Workload) -> float:
    """Count one rank's FLOPs of an update: Muon deals matrices to all ranks."""
    if work.optimizer == "adamw":
        return 0
    return orthogonalization_flops(work.model) / (work.parallel.tp_size * work.zero_size)


def tensor_parallel_bytes(work: Workload) -> float:
    """Count the bytes of all that the tp ranks sum in a micro-step; gathering and scattering tokens count half each.

    Besides the blocks' sums there are those of the embedding and of the gradient before the output projection. What is
    computed again needs the first branch's sum; with sequence parallelism also both branches' tokens. The gradients of
    adapters, which do not grow with the tokens, are left out.
    """
    config, parallel = work.model, work.parallel
    if parallel.tp_size == 1:
        return 0
    again = (1.5 if parallel.sequence_parallel else 1) if parallel.activation_checkpointing == "full" else 0
    return (config.n_layers * (_SUMS + again) + 2) * work.tokens * config.dim * work.bytes_per_weight


def _tensor_parallel_seconds(work: Workload, cluster: Cluster) -> float:
    """Estimate how long one rank waits for its tensor-parallel group in a micro-step."""
    tp_size = work.parallel.tp_size
    bandwidth = cluster.bandwidth(within_node=cluster.gpus_per_node % tp_size == 0)
    return _ring(2 * tensor_parallel_bytes(work), tp_size) / bandwidth


def sequence_bytes(work: Workload) -> float:
    """Count the bytes that one rank gives to exchanges of heads for tokens in a micro-step, its own part included.

    Forward and backward pass exchange as much; recomputed blocks, what they did forward once more.
    """
    config, parallel = work.model, work.parallel
    if parallel.sp_size == 1 or config.heads is None:
        return 0
    passes = 3 if parallel.activation_checkpointing == "full" else 2
    exchanged = exchanged_numbers(config.heads, parallel)
    return config.n_layers * passes * exchanged * work.tokens * work.bytes_per_weight


def _sequence_seconds(work: Workload, cluster: Cluster) -> float:
    """Estimate how long one rank waits for the ranks that share its rows in a micro-step.

    A rank sends to each of the others; where they lie on several nodes, the ranks of a node share its network.
    """
    tp_size, sp_size = work.parallel.tp_size, work.parallel.sp_size
    within_node = cluster.gpus_per_node % (tp_size * sp_size) == 0
    bandwidth = cluster.bandwidth(within_node, sharing=cluster.gpus_per_node)
    return _ring(sequence_bytes(work), sp_size) / bandwidth


@dataclass(frozen=True)
class DataParallelBytes:
    """Bytes that ranks with the same weights reduce, and gather, in each micro-step and once at a step's end."""

    reduced: float = 0
    reduced_once: float = 0
    scattered: float = 0  # reduced too, but each rank receives only its own part
    gathered: float = 0
    gathered_once: float = 0


def data_parallel_bytes(work: Workload) -> DataParallelBytes:
    """Count what the ranks with the same weights exchange.

    ZeRO-1 all-reduces the gradients once. ZeRO-2 does so in each micro-step: DeepSpeed's buckets hold several ranks'
    gradients, and each rank keeps its own (`use_multi_rank_bucket_allreduce`). Both gather the new weights. ZeRO-3
    scatters its gradients and gathers weights, for the backward pass again unless all of them fit.
    """
    gradients, weights = work.reduce_bytes * work.trained, work.bytes_per_weight * work.trained
    if work.parallel.applied_zero_stage == 3:
        weights = work.bytes_per_weight * work.parameters
        passes = 1 if work.parameters <= work.gathered_weights else 2
        return DataParallelBytes(scattered=gradients, gathered=passes * weights)
    if work.parallel.applied_zero_stage == 2:
        return DataParallelBytes(reduced=gradients, gathered_once=weights)
    return DataParallelBytes(reduced_once=gradients, gathered_once=weights)


def _data_parallel_seconds(work: Workload, cluster: Cluster) -> tuple[float, float]:
    """Estimate how long the links of ranks with the same weights work: in each micro-step, and once at a step's end."""
    # The ranks of a node that belong to one tp group are in as many such groups, which share the node's network.
    sharing = min(work.parallel.tp_size, cluster.gpus_per_node)
    bandwidth = cluster.bandwidth(cluster.nodes == 1, sharing)
    found = data_parallel_bytes(work)
    each = 2 * found.reduced + found.scattered + found.gathered
    once = 2 * found.reduced_once + found.gathered_once
    return _ring(each, work.zero_size) / bandwidth, _ring(once, work.zero_size) / bandwidth


def _ring(size: float, ranks: int) -> float:
    """Return the bytes that each rank of a ring sends, for `size` bytes that pass every rank but one."""
    return size * (ranks - 1) / ranks
