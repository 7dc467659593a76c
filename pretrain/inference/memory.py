"""Whether there is memory for a generation, before it begins. size -> memory -> commands.generate."""

from __future__ import annotations

import logging
import platform
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from pretrain.host_memory import available_memory
from pretrain.model.architecture import ModelConfig, Precision
from pretrain.model.prefill import CHUNK_TOKENS
from pretrain.model.size import Workload
from pretrain.model.weights import split_problems
from pretrain.parallel_config import ParallelConfig
from pretrain.topology import Topology
from shards import ConfigError

_logger = logging.getLogger(__name__)

_WORTH_SAYING = 1_000_000_000  # bytes
_TP_SIZES = (2, 4, 8)  # what is tried for a model that is too large: the GPUs of one node


@dataclass(frozen=True)
class GenerationMemory:
    """The memory that generating takes on one rank: weights, the cache, and what the model makes of a prompt's chunk.

    Attributes:
        half_cache: whether the cache is in bf16 although the weights are fp32.
        device: the rank's; ranks on CPUs share one memory.
        available: bytes that the rank may take, its weights among them; None if that is not known.
    """

    config: ModelConfig
    precision: Precision
    half_cache: bool
    tp_size: int
    device: torch.device
    available: int | None

    @property
    def weights(self) -> int:
        """Return the bytes of one tp rank's weights."""
        return self._chunk.parameters * self._chunk.bytes_per_weight

    @property
    def activations(self) -> int:
        """Return the most bytes that a block makes of a chunk; 0 if they are not known of the architecture."""
        costs = self._chunk.block_costs
        return int(costs.kept * self._chunk.tokens) if costs else 0

    @property
    def of_token(self) -> int:
        """Return the bytes of the cache for each token, of one tp rank; 0 if its size is fixed."""
        return (2 if self.half_cache else self._chunk.bytes_per_weight) * self.config.cached_numbers // self.tp_size

    @property
    def _chunk(self) -> Workload:
        """Return a chunk as rows of one token, since attention keeps no matrix of a chunk's tokens."""
        bytes_per_weight = 2 if self.precision == "bf16" else 4
        return Workload(self.config, ParallelConfig(tp_size=self.tp_size), 1, CHUNK_TOKENS, 1, bytes_per_weight)

    def total(self, length: int) -> int:
        """Return the bytes for a prompt and a continuation of so many tokens together."""
        return self.weights + self.activations + length * self.of_token

    def fits(self, length: int) -> bool:
        """Return whether there is as much memory, as far as is known."""
        return self.available is None or self.total(length) <= self.available

    def check(self, length: int) -> None:
        """Log what so many tokens will take if it is much.

        Raises:
            ConfigError: if there is less memory, with what would fit.
        """
        total = self.total(length)
        parts = f"weights {_gb(self.weights)}, activations of a chunk {_gb(self.activations)}"
        if length:
            parts += f", cache of {length:,} tokens {_gb(length * self.of_token)}"
        if not self.fits(length):
            assert self.available is not None
            remedies = "; or ".join([*self._shorter(), *self._remedies(length)]) or "take a smaller model"
            raise ConfigError(
                f"generating takes {_gb(total)} a rank ({parts}), but only {_gb(self.available)} are free on"
                f" {self.device.type}; {remedies}"
            )
        if length and total >= _WORTH_SAYING:
            _logger.info("memory a rank, estimated: %s (%s)", _gb(total), parts)

    def _shorter(self) -> Iterator[str]:
        """Yield how many tokens would fit, if any."""
        assert self.available is not None
        if self.of_token and (tokens := (self.available - self.total(0)) // self.of_token) > 0:
            yield f"{tokens:,} tokens of prompt and continuation together would fit"

    def _remedies(self, length: int) -> Iterator[str]:
        """Yield what would make room for so many tokens."""
        if self.precision == "fp32":
            if self.config.cached_numbers and replace(self, half_cache=True).fits(length):
                yield "use --bf16-cache"
            if replace(self, precision="bf16").fits(length):
                yield "use --precision bf16"
        if self.device.type == "cuda":
            splitting = [n for n in _TP_SIZES if n > self.tp_size and not any(split_problems(self.config, n, "ranks"))]
            if enough := [n for n in splitting if replace(self, tp_size=n).fits(length)]:
                yield f"start {enough[0]} ranks, which share the model"


def generation_memory(
    config: ModelConfig, precision: Precision, half_cache: bool, topology: Topology
) -> GenerationMemory:
    """Return what a generation takes, and what is free now, before the weights are loaded. Every rank must call it."""
    return GenerationMemory(config, precision, half_cache, topology.tp_size, topology.device, _available(topology))


def _available(topology: Topology) -> int | None:
    """Return the bytes that are free on this rank's device; of those of a host, its part."""
    hosts = topology.gather_objects(platform.node())
    if topology.device.type == "cuda":
        return torch.cuda.mem_get_info(topology.device)[0]
    free = available_memory()
    return None if free is None else free // hosts.count(platform.node())


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
