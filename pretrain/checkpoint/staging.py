"""Copy a rank's state so that it can be written while training changes the original. engine -> staging -> save."""

from __future__ import annotations

import copy

import torch
from torch import Tensor


class Staging:
    """Host memory for a copy of what this rank saves, reused by every save.

    It is kept between saves because fresh memory costs a page fault every 4 KiB, an order of magnitude slower than the
    copy itself, and pinned memory costs a driver call.

    Args:
        pinned: whether to use pinned memory, into which a GPU copies at full speed; torch rounds the size of each
            pinned block up to a power of two.
    """

    def __init__(self, pinned: bool) -> None:
        self._pinned = pinned
        self._blocks: dict[tuple[str, int], Tensor] = {}  # (file, number of the tensor in it)

    def copy(self, file: str, content: object) -> object:
        """Copy a file's current content, with its tensors in this memory.

        Args:
            file: its name, the same at every save, which identifies its memory.
            content: nested dicts, lists and tuples; other objects in it must not hold large tensors.
        Returns:
            The copy, valid until the same file is copied again.
        """
        staged = _Copy(file, self._blocks, self._pinned).copied(content)
        if self._pinned:
            torch.cuda.synchronize()
        return staged


class _Copy:
    """One copy of one file's content."""

    def __init__(self, file: str, blocks: dict[tuple[str, int], Tensor], pinned: bool) -> None:
        self._file, self._blocks, self._pinned = file, blocks, pinned
        self._copies: dict[tuple[object, ...], Tensor] = {}  # one per distinct tensor, so tied weights share it

    def copied(self, item: object) -> object:
        if isinstance(item, Tensor):
            return self._tensor(item.detach())
        if isinstance(item, dict):
            copied = copy.copy(item)  # keeps the dict's class and attributes
            copied.update((key, self.copied(value)) for key, value in item.items())
            return copied
        if type(item) in (list, tuple):  # excludes torch.Size and other subclasses
            return type(item)(self.copied(value) for value in item)  # type: ignore[call-arg, attr-defined]
        return copy.deepcopy(item)

    def _tensor(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage().data_ptr()
        same = (tensor.device, storage, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        if storage and same in self._copies:
            return self._copies[same]
        key = (self._file, len(self._copies))
        block = self._blocks.get(key)
        if block is None or (block.shape, block.dtype) != (tensor.shape, tensor.dtype):
            block = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self._pinned)
            self._blocks[key] = block
        self._copies[same if storage else (len(self._copies),)] = block
        return block.copy_(tensor, non_blocking=self._pinned)
