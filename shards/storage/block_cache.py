"""Blocks of remote shards on local disk, bounded in bytes, evicted by least recent use.

remote -> block_cache. All processes of a node share it: a block appears whole or not at all, and one process at a time
adds or removes. A block that is damaged, or belongs to other content of its URL, counts as missing.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import xxhash

from shards.config import RemoteCache
from shards.errors import ConfigError

BLOCK_SUFFIX = ".block"
_LOCK_NAME = "lock"  # held while the folder changes; contains an upper bound of the bytes in use
CHECK_BYTES = 16  # xxh3-128 of a block and its name, stored after the block
_EVICT_TO = 0.9  # fraction of max_bytes, so that the folder is listed only once in many blocks

_logger = logging.getLogger(__name__)


class BlockCache:
    """A folder of blocks. If it is not writable, nothing is kept, and a warning is logged once."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        """Make the folder.

        Args:
            folder: on a local disk; created if missing.
            max_bytes: limit for all blocks together.
        Raises: ConfigError if the folder cannot be created.
        """
        self._folder, self._max_bytes = folder, max_bytes
        self._counted = False  # trust the lock's count only after a listing, since a machine's crash may lose it
        self._warned = False
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"data.remote_cache.dir={folder}: cannot be created: {error.strerror}; name a folder on a local disk"
            ) from None

    def get(self, url: str, size: int, stamp: str, start: int, stop: int) -> bytes | None:
        """Return bytes [start, stop) of what a URL held when it had this size and stamp; None if not cached."""
        path = self._path(url, size, stamp, start, stop)
        try:
            stored = path.read_bytes()
            data = stored[:-CHECK_BYTES]
            if len(data) != stop - start or stored[-CHECK_BYTES:] != _check(path, data):
                return None
        except OSError:
            return None
        with suppress(OSError):  # a read-only folder still provides its blocks
            os.utime(path)  # the time of last use decides what is evicted first
        return data

    def put(self, url: str, size: int, stamp: str, start: int, data: bytes) -> None:
        """Keep the bytes that a URL of this size and stamp holds from `start` on, if there is room for them at all."""
        path = self._path(url, size, stamp, start, start + len(data))
        needed = len(data) + CHECK_BYTES
        if needed > self._max_bytes:
            return
        try:
            with self._lock() as lock:
                # Counted before it is written: a process killed in between leaves too large a number, never too small.
                self._write_used(lock, self._make_room(lock, needed) + needed)
                part = self._folder / "part"  # one name for all, since the lock is held
                part.write_bytes(data + _check(path, data))
                os.replace(part, path)
        except OSError as error:
            if not self._warned:
                _logger.warning("%s: cannot keep blocks of remote shards: %s", self._folder, error.strerror)
            self._warned = True

    def _make_room(self, lock: int, needed: int) -> int:
        """Evict the oldest blocks if `needed` more bytes are too many; return an upper bound of the bytes in use."""
        said = os.pread(lock, 32, 0)
        if self._counted and said.isdigit() and int(said) + needed <= self._max_bytes:
            return int(said)
        (self._folder / "part").unlink(missing_ok=True)  # left by a process that was killed
        blocks: list[tuple[int, int, str]] = []  # (last use, bytes, path)
        for file in os.scandir(self._folder):
            if file.name.endswith(BLOCK_SUFFIX):
                found = file.stat()
                blocks.append((found.st_mtime_ns, found.st_size, file.path))
        used = sum(size for _, size, _ in blocks)
        limit = min(_EVICT_TO * self._max_bytes, self._max_bytes - needed)
        if used + needed > self._max_bytes:
            for _, size, path in sorted(blocks):
                if used <= limit:
                    break
                with suppress(FileNotFoundError):
                    os.unlink(path)
                used -= size
        self._counted = True
        return used

    def _write_used(self, lock: int, used: int) -> None:
        os.pwrite(lock, str(used).zfill(32).encode(), 0)

    @contextmanager
    def _lock(self) -> Iterator[int]:
        """Wait until no other process or thread changes the folder; yield the lock's file descriptor."""
        lock = os.open(self._folder / _LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield lock
        finally:
            os.close(lock)  # also releases the lock, as the end of the process would

    def _path(self, url: str, size: int, stamp: str, start: int, stop: int) -> Path:
        parts = "\0".join([url, str(size), stamp, str(start), str(stop)])
        name = hashlib.blake2b(parts.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
        return self._folder / (name + BLOCK_SUFFIX)


def open_cache(config: RemoteCache | None) -> BlockCache | None:
    """Open the cache that a config asks for. Raises: as the constructor."""
    return None if config is None else BlockCache(config.dir, config.max_bytes)


def _check(path: Path, data: bytes) -> bytes:
    """Compute the checksum stored after a block; it covers the name, so that no block passes under another's name."""
    found = xxhash.xxh3_128(path.name.encode())
    found.update(data)
    return found.digest()
