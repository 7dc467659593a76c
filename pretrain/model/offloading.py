"""Blocks' inputs on the host from the forward pass to the backward pass. offloading -> engine.

With checkpointing, a block's input is all that is kept of it, and with long rows those of all blocks are most of what a
device holds. Here each is copied to the host while its block computes, and back while the block behind it is computed
again; on CUDA on a stream of their own, from and to pinned memory. So the device holds two at a time.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


def keep_inputs_on_host(blocks: nn.ModuleList) -> None:
    """Let what autograd keeps of the first argument of each block lie on the host.

    Args:
        blocks: those of a `Model`, with full checkpointing; they are called in their order.
    """
    moves = _Moves()
    for block in blocks:
        block.forward = functools.partial(_forward, moves, block.forward)


def _forward(moves: _Moves, forward: Callable[..., Tensor], x: Tensor, *others: Any) -> Tensor:
    with moves.of(x):
        return forward(x, *others)


class _Moves:
    """Moves the inputs of blocks, in the order in which they compute, and back in reverse."""

    def __init__(self) -> None:
        self._input: Tensor | None = None  # of the block that computes
        # Weak, since only the graph says how long an input is needed: after the backward pass there is none
        self._last: Callable[[], _Moved | None] = lambda: None

    @contextlib.contextmanager
    def of(self, x: Tensor) -> Iterator[None]:
        """Move x wherever it is kept for the backward pass inside the block."""
        self._input = x
        try:
            # The same functions each time, or compiled code might be compiled again
            with saved_tensors_hooks(self._keep, _returned):
                yield
        finally:
            self._input = None

    def _keep(self, tensor: Tensor) -> Tensor | _Moved:
        assert self._input is not None
        if _place(tensor) != _place(self._input):
            return tensor
        last = self._last()
        if last is not None and last.is_of(tensor):
            return last
        moved = _Moved(tensor.detach(), last)
        self._last = weakref.ref(moved)
        return moved


def _place(tensor: Tensor) -> tuple[object, ...]:
    """Return what is equal for tensors that are the same values in the same memory."""
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride()


def _returned(kept: Tensor | _Moved) -> Tensor:
    return kept.back() if isinstance(kept, _Moved) else kept


class _Moved:
    """The input of a block, on its way to the host or back.

    It leaves the device when the next one begins to be moved, so the last of a forward pass never does: it is the first
    that the backward pass needs.

    Args:
        tensor: the input, detached from the graph.
        before: that of the block before, in the same forward pass.
    """

    def __init__(self, tensor: Tensor, before: _Moved | None) -> None:
        self._before = before
        self._device = tensor.device
        self._on_device: Tensor | None = tensor
        self._stream = _copy_stream(tensor.device) if tensor.device.type == "cuda" else None
        with self._copying():
            self._on_host = on_host(tensor)
        if before is not None:
            before._leave()

    def is_of(self, tensor: Tensor) -> bool:
        """Return whether a tensor is the one that was moved, and has not left."""
        return self._on_device is not None and _place(self._on_device) == _place(tensor)

    def back(self) -> Tensor:
        """Return the input on its device, and let the one before it follow."""
        self._fetch()
        self._wait()
        if self._before is not None:
            self._before._fetch()
            self._before = None
        assert self._on_device is not None
        return self._on_device

    def _leave(self) -> None:
        # What is enqueued from here on may take the memory, so it has to wait for the copy
        self._wait()
        self._on_device = None

    def _fetch(self) -> None:
        if self._on_device is None:
            # Made on the stream that computes, which frees it; the copy waits for what is there now
            arrived = torch.empty(self._on_host.shape, dtype=self._on_host.dtype, device=self._device)
            with self._copying():
                self._on_device = arrived.copy_(self._on_host, non_blocking=True)

    @contextlib.contextmanager
    def _copying(self) -> Iterator[None]:
        """Copy on the stream for that, behind all that the computing stream has to do so far."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield
            self._copied = self._stream.record_event()

    def _wait(self) -> None:
        """Let the computing stream wait for the last copy."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_event(self._copied)


def on_host(tensor: Tensor) -> Tensor:
    """Return a copy in the host's memory; from CUDA in pinned memory, once the current stream has come to it."""
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
    return copy.copy_(tensor, non_blocking=True)


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
