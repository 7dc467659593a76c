"""What DeepSpeed is told of the ranks that share a model. topology -> mpu -> engine."""

from __future__ import annotations

import torch.distributed as dist

from pretrain.topology import Topology


class ModelParallelUnit:
    """The functions that DeepSpeed calls on an `mpu`, under Megatron's names; fairscale's own module lacks half.

    What DeepSpeed calls data parallel is everything over which it averages gradients: `Topology.zero_group`.
    """

    def __init__(self, topology: Topology) -> None:
        self._topology = topology

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._topology.zero_group

    def get_data_parallel_rank(self) -> int:
        return self._topology.zero_rank

    def get_data_parallel_world_size(self) -> int:
        return self._topology.zero_size

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._topology.tp_group

    def get_model_parallel_rank(self) -> int:
        return self._topology.tp_rank

    def get_model_parallel_world_size(self) -> int:
        return self._topology.tp_size

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
