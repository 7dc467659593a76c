"""Which attention backend a run uses: the config's, or the fastest on its device. config -> attention_choice -> engine.

All of them compute the same; only speed and memory depend on it.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.attention import activate_flash_attention_impl

from pretrain.model.architecture import Heads
from pretrain.model.attention import MASK_LIMIT, AttentionBackend, attention_within_pieces, mask_bytes
from pretrain.model.pieces import pieces_of
from pretrain.parallel_config import ParallelConfig
from pretrain.topology import Topology
from shards import ConfigError

_logger = logging.getLogger(__name__)

_CALLS = 5  # timed forward and backward passes of each backend

_NEEDS: dict[AttentionBackend, str] = {
    "flex": "CUDA and heads of at least 16",
    "varlen": "on CUDA bf16, heads of a multiple of 8 up to 256, and a GPU of compute capability 8.0 or above",
}


@dataclass(frozen=True)
class AttentionShape:
    """The attention of one layer on one rank.

    Attributes:
        rows, length: of a micro-batch; length in tokens.
        n_heads, n_kv_heads: heads of this rank.
        dropout: model.attention_dropout.
        longest: tokens of the longest row that the backend has to compute too; 0: none is longer than these.
    """

    rows: int
    length: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    dropout: float = 0.0
    longest: int = 0


def attention_backend(
    parallel: ParallelConfig, topology: Topology, heads: Heads | None, dtype: torch.dtype
) -> AttentionBackend:
    """Return the attention that a config asks for; for auto the one that is usually fastest.

    Args:
        heads: those of the model; None if it has no attention, so that any backend will do.
        dtype: type of the weights.
    Raises:
        ConfigError: if this device cannot run it.
    """
    device = topology.device
    if heads is None:
        return "sdpa"
    fitting = _fitting(device, heads.head_dim, dtype, heads.dropout)
    chosen = fitting[0] if parallel.attention == "auto" else parallel.attention
    if chosen not in fitting:
        raise ConfigError(
            f"parallel.attention={chosen} needs {_NEEDS[chosen]}, not {device.type}, {dtype} and heads of"
            f" {heads.head_dim}; use auto"
        )
    if chosen == "varlen" and device.type == "cuda":
        _use_newest_flash_attention()
    return chosen


def with_fastest_attention(
    parallel: ParallelConfig, topology: Topology, shape: AttentionShape | None
) -> ParallelConfig:
    """Replace auto on CUDA by the fastest backend, as rank 0 measures it. Every rank must call it.

    A deterministic run keeps auto, which then stands for the same backend at every start.

    Args:
        shape: None if the model has no attention.
    Raises:
        ConfigError: if no backend can run this shape.
    """
    if shape is None or shape.dropout:
        return parallel
    affordable = _affordable(topology.device, shape)
    settled = parallel.attention != "auto" or parallel.deterministic or topology.device.type == "cpu"
    if settled:
        return parallel
    measured = topology.together(lambda: _fastest(topology.device, shape, affordable) if topology.is_main else None)
    return parallel.model_copy(update={"attention": topology.broadcast_object(measured)})


def _fitting(device: torch.device, head_dim: int, dtype: torch.dtype, dropout: float = 0.0) -> list[AttentionBackend]:
    """Return what a device can run, first what is usually fastest."""
    if dropout:
        return ["sdpa"]
    if device.type == "cpu":
        return ["varlen", "sdpa"]
    fitting: list[AttentionBackend] = []
    capable = torch.cuda.get_device_capability(device) >= (8, 0)
    if capable and dtype == torch.bfloat16 and head_dim % 8 == 0 and head_dim <= 256:
        fitting.append("varlen")
    if head_dim >= 16:
        fitting.append("flex")
    return [*fitting, "sdpa"]


def _affordable(device: torch.device, shape: AttentionShape) -> list[AttentionBackend]:
    """Return what a device can run of rows of this length and the longest, first what is usually fastest.

    Raises:
        ConfigError: if it is nothing.
    """
    fitting = _fitting(device, shape.head_dim, shape.dtype)
    length = max(shape.length, shape.longest)
    size = mask_bytes(length)
    affordable = [backend for backend in fitting if backend != "sdpa" or size <= MASK_LIMIT]
    if not affordable:
        raise ConfigError(
            f"data.seq_len={length}: with {shape.dtype} and heads of {shape.head_dim} this device can only run"
            f" sdpa, whose mask of a row would take {size / 1e9:.1f} GB; take precision: bf16 and heads of a multiple"
            " of 16, or shorter rows"
        )
    return affordable


def _fastest(device: torch.device, shape: AttentionShape, backends: Sequence[AttentionBackend]) -> AttentionBackend:
    seconds: dict[AttentionBackend, float] = {}
    for backend in backends:
        try:
            seconds[backend] = _seconds_of(backend, device, shape)
        except RuntimeError as error:  # out of memory, or a kernel that cannot be compiled
            _logger.warning("attention %s cannot run here: %s", backend, error)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the training's memory is laid out afresh
    if not seconds:
        raise ConfigError("no attention can run this model's shape on this device; the warnings above say why")
    fastest = min(seconds, key=lambda backend: seconds[backend])
    times = ", ".join(f"{backend} {1e3 * taken:.2f} ms" for backend, taken in seconds.items())
    _logger.info("attention: %s (forward and backward of one layer: %s)", fastest, times)
    return fastest


def _seconds_of(backend: AttentionBackend, device: torch.device, shape: AttentionShape) -> float:
    """Time a layer's attention, forward and backward, on rows of documents of 1/2, 1/4, 1/8 ... of a row."""
    if backend == "varlen" and device.type == "cuda":
        _use_newest_flash_attention()
    of_token = (shape.length / torch.arange(shape.length, 0, -1)).log2().floor().long() + 1  # [length] segment ids
    attend = attention_within_pieces(pieces_of(of_token.expand(shape.rows, -1), device), backend)
    heads = (shape.n_heads, shape.n_kv_heads, shape.n_kv_heads)
    inputs = [
        torch.randn(shape.rows, shape.length, n, shape.head_dim, device=device, dtype=shape.dtype).requires_grad_()
        for n in heads
    ]
    begin = 0.0
    for call in range(_CALLS + 1):  # the first is not timed: it compiles
        out = attend(*inputs)
        torch.autograd.grad(out, inputs, torch.ones_like(out))
        if call in (0, _CALLS) and device.type == "cuda":
            torch.cuda.synchronize(device)
        if call == 0:
            begin = time.perf_counter()
    return (time.perf_counter() - begin) / _CALLS


@functools.cache
def _use_newest_flash_attention() -> None:
    """Let FlashAttention 3 do the work of PyTorch's version 2, where it is installed and the GPU is one that it is for.

    It speeds up "varlen" only: "sdpa" has a mask, with which PyTorch does not use FlashAttention.
    """
    if torch.cuda.get_device_capability()[0] != 9 or importlib.util.find_spec("flash_attn_interface") is None:
        return
    try:
        activate_flash_attention_impl("FA3")
    except (ImportError, RuntimeError) as error:
        _logger.warning("FlashAttention 3 is installed but cannot be used, so PyTorch's version 2 is: %s", error)
    else:
        _logger.info("attention uses FlashAttention 3")
