"""Remote files read at any place, by ranges. remote -> ranges -> files.

Aligned blocks, of which the last used are kept: a Parquet file's columns are read in turn, each forward from a place of
its own, and small row groups have all of them in one block.
"""

from __future__ import annotations

import io
from collections import OrderedDict

from shards.storage import remote
from shards.storage.block_cache import BlockCache
from shards.storage.remote import Call, RemoteBlocks

KEPT_BLOCKS = 6  # per file: of a text, an id and a sub-source the block in use and the one ahead


class RangedFile(io.RawIOBase):
    """A remote file that can seek; a block that follows one in use is requested ahead."""

    def __init__(self, url: str, cache: BlockCache | None = None) -> None:
        """Open the file. Raises: ShardError if it is missing, or its server tells no size."""
        self._blocks = RemoteBlocks(url, cache=cache)
        self._position = 0
        self._kept: OrderedDict[int, Call[bytes] | bytes] = OrderedDict()  # by number, least recently used first

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._blocks.size}[whence] + offset
        return self._position

    def readinto(self, buffer: memoryview[int] | bytearray) -> int:  # type: ignore[override]
        """Read up to the end of a block. Raises: ShardError when all attempts to fetch it have failed."""
        if self._position >= self._blocks.size:
            return 0
        number, skip = divmod(self._position, remote.BLOCK_BYTES)
        block = self._block(number)
        count = min(len(buffer), len(block) - skip)
        buffer[:count] = block[skip : skip + count]
        self._position += count
        return count

    def _block(self, number: int) -> bytes:
        """Return a block, and request the following one if the one before was in use too."""
        found = self._kept.get(number) or self._request(number)
        if not isinstance(found, bytes):
            found = self._kept[number] = self._blocks.wait(found, *self._range(number))
        if number - 1 in self._kept and number + 1 not in self._kept and self._range(number + 1)[0] < self._blocks.size:
            self._kept[number + 1] = self._request(number + 1)
        # The one ahead stays as long as this one, or it would be the first to go, before it was ever read
        for used in (number + 1, number):
            if used in self._kept:
                self._kept.move_to_end(used)
        while len(self._kept) > KEPT_BLOCKS:
            self._kept.popitem(last=False)
        return found

    def _request(self, number: int) -> Call[bytes]:
        return self._blocks.request(*self._range(number))

    def _range(self, number: int) -> tuple[int, int]:
        return number * remote.BLOCK_BYTES, min((number + 1) * remote.BLOCK_BYTES, self._blocks.size)
