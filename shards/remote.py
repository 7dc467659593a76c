"""Shards over https://, s3://, gs://, hf:// and whatever else fsspec speaks. files -> remote.

A file is fetched in blocks by range, one ahead of the reader; a block that fails, stalls or comes short is asked for
again with growing pauses, so that a stream goes on at the block where it broke.
"""

import threading
import time
from collections.abc import Callable
from typing import TypeVar

import fsspec
from fsspec.core import url_to_fs

from shards.cache import BlockCache
from shards.errors import ShardError

BLOCK_BYTES = 4 << 20
ATTEMPTS = 8
FIRST_PAUSE_SECONDS = 0.25  # doubled after each failure: 32 s in all
STALL_SECONDS = 60.0

Result = TypeVar("Result")


def is_remote(path: str) -> bool:
    """True for what is not a path of this machine's file systems."""
    return "://" in path and not path.startswith("file://")


def expand(pattern: str) -> list[str]:
    """The URLs that a glob matches, sorted. Raises: ShardError if the listing fails for good."""
    system, path = _system(pattern)
    system.invalidate_cache()  # of listings, which fsspec remembers for the life of the process
    found = _persist(pattern, lambda: system.glob(path))
    return sorted(str(system.unstrip_protocol(name)) for name in found)


def stat(url: str, fresh: bool = False) -> tuple[int, str]:
    """(size in bytes, stamp that changes with the content).

    Args:
        fresh: asks the server, also where the listing that a glob was expanded from has told both.
    Raises: ShardError if it is missing or has no size.
    """
    system, path = _system(url)
    if fresh:
        system.invalidate_cache(path)
    info = _persist(url, lambda: system.info(path))
    if info.get("type") == "directory":
        raise ShardError(f"{url}: is a folder, not a shard; name the files in it, e.g. {url.rstrip('/')}/*.jsonl.zst")
    if info.get("size") is None:
        raise ShardError(f"{url}: the server does not tell its size; download the shard and name the local file")
    keys = ("ETag", "etag", "xet_hash", "blob_id", "md5Hash", "LastModified", "Last-Modified", "updated", "mtime")
    return int(info["size"]), next((str(info[key]) for key in keys if info.get(key)), "")


class RemoteFile:
    """Reads a remote file forward from an offset, one block ahead."""

    def __init__(
        self,
        url: str,
        offset: int = 0,
        stall_seconds: float = STALL_SECONDS,
        cache: BlockCache | None = None,
    ) -> None:
        """
        Args:
            offset: of the first byte to read.
            stall_seconds: a block that takes longer is asked for again.
            cache: where blocks are looked for first, and kept.
        """
        self._url, self._next, self._stall_seconds = url, offset, stall_seconds
        self._system, self._path = _system(url)
        self._size, self._stamp = stat(url)
        # Where nothing tells whether a file changed, a kept block could be of an older one.
        self._cache = cache if self._stamp else None
        self._block, self._taken = b"", 0
        self._ahead = self._fetch()

    def read(self, size: int, /) -> bytes:
        """Up to `size` bytes; none only at the file's end. Raises: ShardError when all attempts have failed."""
        if self._taken == len(self._block):
            if self._next >= self._size:
                return b""
            self._block, self._taken = self._await_block(), 0
            self._next += len(self._block)
            self._ahead = self._fetch()
        data = self._block[self._taken : self._taken + size]
        self._taken += len(data)
        return data

    def close(self) -> None:
        """Lets go of what was fetched ahead."""
        self._next, self._block, self._taken = self._size, b"", 0

    def __enter__(self) -> "RemoteFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _fetch(self) -> "_Call":
        start, stop = self._range()
        return _Call(lambda: self._block_of(start, stop) if start < stop else b"")

    def _range(self) -> tuple[int, int]:
        """The bytes to fetch for the next block; the same for every offset in it if blocks are kept."""
        start = self._next - (self._next % BLOCK_BYTES if self._cache else 0)
        return start, min(start + BLOCK_BYTES, self._size)

    def _block_of(self, start: int, stop: int) -> bytes:
        """Bytes [start, stop), or what the server gives instead."""
        if self._cache and (kept := self._cache.get(self._url, self._size, self._stamp, start, stop)) is not None:
            return kept
        # The hub's client opens a file for it, which else would read on beyond the range.
        options = {"cache_type": "none"} if self._system.protocol == "hf" else {}
        # By name, since S3's second argument is another.
        data = bytes(self._system.cat_file(self._path, start=start, end=stop, **options))
        if self._cache and len(data) == stop - start:
            unchanged = stat(self._url, fresh=True) == (self._size, self._stamp)
            if unchanged:  # else they may be of another file than the stamp
                self._cache.put(self._url, self._size, self._stamp, start, data)
        return data

    def _await_block(self) -> bytes:
        """The bytes from `_next` to the end of its block."""
        start, stop = self._range()
        wanted = stop - start
        calls = [self._ahead]

        def attempt() -> bytes:
            call = calls.pop() if calls else self._fetch()
            data = call.result(self._stall_seconds)
            if len(data) > wanted:
                raise ShardError(
                    f"{self._url}: the server ignores byte ranges (asked for {wanted} bytes, got {len(data)}); "
                    "download the shard and name the local file"
                )
            if len(data) < wanted:
                raise OSError(f"got {len(data)} of {wanted} bytes")
            return data

        return _persist(f"{self._url} at byte {self._next}", attempt)[self._next - start :]


class _Call:
    """A function's result, worked out in a thread that may hang without holding up anything else."""

    def __init__(self, function: Callable[[], bytes]) -> None:
        self._result: bytes | Exception | None = None
        self._done = threading.Event()
        threading.Thread(target=self._run, args=(function,), daemon=True).start()

    def _run(self, function: Callable[[], bytes]) -> None:
        try:
            self._result = function()
        except Exception as error:
            self._result = error
        self._done.set()

    def result(self, seconds: float) -> bytes:
        if not self._done.wait(seconds):
            raise TimeoutError(f"no answer for {seconds:g} s")
        if isinstance(self._result, Exception):
            raise self._result
        assert self._result is not None
        return self._result


def _persist(what: str, attempt: Callable[[], Result]) -> Result:
    """Tries until it works. Raises: ShardError if the file is missing, or every attempt failed."""
    pause = FIRST_PAUSE_SECONDS
    for number in range(1, ATTEMPTS + 1):
        try:
            return attempt()
        except (FileNotFoundError, PermissionError) as error:
            raise ShardError(f"{what}: no such shard, or no right to read it ({error})") from None
        except ShardError:
            raise
        except Exception as error:  # each of fsspec's systems raises errors of its own library
            if number == ATTEMPTS:
                raise ShardError(f"{what}: failed {ATTEMPTS} times, the last with {error!r}; try again later") from None
        time.sleep(pause)
        pause *= 2
    raise AssertionError


def _system(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    try:
        system, path = url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ShardError(f"{url}: cannot be reached: {error}") from None
    return system, path
