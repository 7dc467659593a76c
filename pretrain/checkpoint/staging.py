"""The copy of a rank's state that is written while training changes the original. engine -> staging -> save."""

from __future__ import annotations

import copy

import torch
from torch import Tensor


class Staging:
    """Host memory as large as what this rank saves, used again by every save.

    It is kept between saves: fresh memory costs a page fault every 4 KiB, which is an order of magnitude slower than
    the copy itself, and pinned memory costs a call of the driver.

    Args:
        pinned: in memory that a GPU copies into at full speed; torch rounds each such block up to a power of two.
    """

    def __init__(self, pinned: bool) -> None:
        self._pinned = pinned
        self._blocks: dict[tuple[str, int], Tensor] = {}  # (file, number of the tensor in it)

    def copy(self, file: str, content: object) -> object:
        """What a file is to hold, as it is now: its tensors in this memory, everything else copied.

        Args:
            file: the same name at every save, so that it finds its memory again.
            content: nested dicts, lists and tuples; what else there is must not hold large tensors.
        Returns:
            Valid until the next copy for the same file.
        """
        staged = _Copy(file, self._blocks, self._pinned).of(content)
        if self._pinned:
            torch.cuda.synchronize()
        return staged

    @property
    def bytes(self) -> int:
        """Host memory held."""
        return sum(block.nbytes for block in self._blocks.values())


class _Copy:
    """One copy of one file's content."""

    def __init__(self, file: str, blocks: dict[tuple[str, int], Tensor], pinned: bool) -> None:
        self._file, self._blocks, self._pinned = file, blocks, pinned
        self._copies: dict[tuple[object, ...], Tensor] = {}  # one for what is one tensor, such as tied weights

    def of(self, item: object) -> object:
        if isinstance(item, Tensor):
            return self._tensor(item.detach())
        if isinstance(item, dict):
            copied = copy.copy(item)  # keeps the kind of dict, and what hangs on it
            copied.update((key, self.of(value)) for key, value in item.items())
            return copied
        if type(item) in (list, tuple):  # not torch.Size and its like
            return type(item)(self.of(value) for value in item)  # type: ignore[call-arg, attr-defined]
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
