"""Shards over https://, s3://, gs://, hf:// and whatever else fsspec supports. files -> remote.

A file is fetched in blocks by range, one ahead of the reader. Every request to a server (for blocks, sizes, listings)
is repeated with growing pauses if the answer fails, stalls or is too short, so that a stream resumes at the block where
it broke. A file counts as missing only if the answer says so.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Generic, TypeVar

import fsspec
from fsspec.core import url_to_fs
from fsspec.utils import glob_translate

from shards.errors import ShardError
from shards.storage.block_cache import BlockCache

BLOCK_BYTES = 4 << 20
_ATTEMPTS = 8
FIRST_PAUSE_SECONDS = 0.25  # doubled after each failure: 32 s in all
_STALL_SECONDS = 60.0  # limit for a block, or for one folder's listing, which may take a store many requests
ANSWER_SECONDS = 15.0  # limit for a size
_REFUSED = (401, 403, 404, 410)  # HTTP statuses that a repeated request does not change
WEB = ("http://", "https://")
FILE = "file://"
GLOB = re.compile(r"[*?\[]")

Result = TypeVar("Result")


def is_remote(path: str) -> bool:
    """Return whether a path lies outside this machine's file systems."""
    return "://" in path and not path.startswith(FILE)


def expand(pattern: str) -> list[str]:
    """List the URLs that a glob matches, sorted. Raises: ShardError if a listing fails for good."""
    system, path = _system(pattern)
    if pattern.startswith(WEB):
        path = path.replace("?", "[?]")  # in a web address it begins a query
    system.invalidate_cache()  # fsspec remembers listings for the life of the process
    fits = re.compile(glob_translate(path))
    found = [name for name in _files_below(system, path) if fits.match(name)]
    return sorted(str(system.unstrip_protocol(name)) for name in found)


def _files_below(system: fsspec.AbstractFileSystem, path: str) -> Iterator[str]:
    """Yield the files in the folders that a glob may cover. Raises: ShardError if a listing fails for good.

    fsspec's own glob treats a folder whose listing failed as empty.
    """
    wildcard = GLOB.search(path)
    root = path[: wildcard.start()].rpartition("/")[0] if wildcard else path.rpartition("/")[0]
    levels = path[len(root) :].count("/")
    folders = [(root, 1)]
    while folders:
        folder, level = folders.pop()
        try:
            listed = _persist(folder, partial(system.ls, folder, detail=True), _STALL_SECONDS)
        except FileNotFoundError:
            continue  # nothing in a missing folder matches
        for item in listed:
            name = item["name"].rstrip("/")
            if item["type"] != "directory":
                yield name
            elif name != folder.rstrip("/") and (level < levels or "**" in path):
                folders.append((name, level + 1))


def stat(url: str, fresh: bool = False) -> tuple[int, str]:
    """Return (size in bytes, stamp that changes with the content).

    Args:
        fresh: ask the server even if the listing that expanded a glob gave both.
    Raises: ShardError if it is missing or has no size.
    """
    system, path = _system(url)
    if fresh:
        system.invalidate_cache(path)
    try:
        info = _persist(url, lambda: system.info(path), ANSWER_SECONDS)
    except (FileNotFoundError, PermissionError) as error:
        raise _missing(url, error) from None
    if info.get("type") == "directory":
        raise ShardError(f"{url}: is a folder, not a shard; name the files in it, e.g. {url.rstrip('/')}/*.jsonl.zst")
    if info.get("size") is None:
        raise ShardError(f"{url}: the server does not report its size; download the shard and name the local file")
    keys = ("ETag", "etag", "xet_hash", "blob_id", "md5Hash", "LastModified", "Last-Modified", "updated", "mtime")
    return int(info["size"]), next((str(info[key]) for key in keys if info.get(key)), "")


class RemoteBlocks:
    """A remote file's bytes, fetched range by range in the background."""

    def __init__(self, url: str, stall_seconds: float = _STALL_SECONDS, cache: BlockCache | None = None) -> None:
        """Ask for the file's size.

        Args:
            stall_seconds: a range that takes longer is requested again.
            cache: where ranges are looked up first and kept.
        """
        self._url, self._stall_seconds = url, stall_seconds
        self._system, self._path = _system(url)
        self.size, self._stamp = stat(url)
        # Without a stamp, a cached block might come from an older version of the file.
        self._cache = cache if self._stamp else None
        self.is_cached = self._cache is not None

    def request(self, start: int, stop: int) -> Call[bytes]:
        """Begin to fetch bytes [start, stop), which may be none; `wait` returns them."""
        return Call(lambda: self._fetch(start, stop) if start < stop else b"")

    def wait(self, requested: Call[bytes], start: int, stop: int) -> bytes:
        """Return the bytes [start, stop) that were requested. Raises: ShardError when all attempts have failed."""
        wanted = stop - start
        calls = [requested]

        def attempt() -> bytes:
            call = calls.pop() if calls else self.request(start, stop)
            data = call.result(self._stall_seconds)
            if len(data) > wanted:
                raise ShardError(
                    f"{self._url}: the server ignores byte ranges (asked for {wanted} bytes, got {len(data)}); "
                    "download the shard and name the local file"
                )
            if len(data) < wanted:
                raise OSError(f"got {len(data)} of {wanted} bytes")
            return data

        what = f"{self._url} at byte {start}"
        try:
            return _persist(what, attempt, None)
        except (FileNotFoundError, PermissionError) as error:
            raise _missing(what, error) from None

    def _fetch(self, start: int, stop: int) -> bytes:
        """Fetch bytes [start, stop), or whatever the server sends instead."""
        if self._cache and (kept := self._cache.get(self._url, self.size, self._stamp, start, stop)) is not None:
            return kept
        # The hub's client opens a file for this, which by default reads ahead beyond the range.
        options = {"cache_type": "none"} if self._system.protocol == "hf" else {}
        # Passed by name, since S3's second argument is a different one.
        data = bytes(self._system.cat_file(self._path, start=start, end=stop, **options))
        if self._cache and len(data) == stop - start:
            unchanged = stat(self._url, fresh=True) == (self.size, self._stamp)
            if unchanged:  # otherwise they may come from a newer file than the stamp's
                self._cache.put(self._url, self.size, self._stamp, start, data)
        return data


class RemoteFile:
    """A remote file read forward from an offset, one block ahead."""

    def __init__(
        self,
        url: str,
        offset: int = 0,
        stall_seconds: float = _STALL_SECONDS,
        cache: BlockCache | None = None,
    ) -> None:
        """Open the file and request its first block.

        Args:
            offset: offset of the first byte to read.
            stall_seconds: a block that takes longer is requested again.
            cache: where blocks are looked up first and kept.
        """
        self._next, self._blocks = offset, RemoteBlocks(url, stall_seconds, cache)
        self._size = self._blocks.size
        self._block, self._taken = b"", 0
        self._ahead = self._blocks.request(*self._range())

    def read(self, size: int, /) -> bytes:
        """Read up to `size` bytes; none only at the file's end. Raises: ShardError when all attempts have failed."""
        if self._taken == len(self._block):
            if self._next >= self._size:
                return b""
            start, stop = self._range()
            self._block, self._taken = self._blocks.wait(self._ahead, start, stop)[self._next - start :], 0
            self._next += len(self._block)
            self._ahead = self._blocks.request(*self._range())
        data = self._block[self._taken : self._taken + size]
        self._taken += len(data)
        return data

    def close(self) -> None:
        """Discard what was fetched ahead."""
        self._next, self._block, self._taken = self._size, b"", 0

    def __enter__(self) -> RemoteFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _range(self) -> tuple[int, int]:
        """Return the byte range to fetch for the next block, aligned if blocks are cached, so that offsets share it.

        Behind the file's end it is empty, or its last block would be fetched twice.
        """
        if self._next >= self._size:
            return self._size, self._size
        start = self._next - (self._next % BLOCK_BYTES if self._blocks.is_cached else 0)
        return start, min(start + BLOCK_BYTES, self._size)


class Call(Generic[Result]):
    """A function's result, computed in a thread that may hang without blocking anything else."""

    def __init__(self, function: Callable[[], Result]) -> None:
        self._result: Result | Exception | None = None
        self._done = threading.Event()
        threading.Thread(target=self._run, args=(function,), daemon=True).start()

    def _run(self, function: Callable[[], Result]) -> None:
        try:
            self._result = function()
        except Exception as error:
            self._result = error
        self._done.set()

    def result(self, seconds: float) -> Result:
        if not self._done.wait(seconds):
            raise TimeoutError(f"no answer for {seconds:g} s")
        if isinstance(self._result, Exception):
            raise self._result
        assert self._result is not None
        return self._result


def _persist(what: str, attempt: Callable[[], Result], seconds: float | None) -> Result:
    """Repeat an attempt until it succeeds.

    Args:
        seconds: limit for one attempt; None = the attempt limits itself.
    Raises: FileNotFoundError or PermissionError at once if the server says so; ShardError if every attempt failed.
    """
    pause = FIRST_PAUSE_SECONDS
    for number in range(1, _ATTEMPTS + 1):
        try:
            return attempt() if seconds is None else Call(attempt).result(seconds)
        except ShardError:
            raise
        except Exception as error:  # each of fsspec's systems raises errors of its own library
            if _is_refused(error):
                raise FileNotFoundError(str(error)) from None
            if number == _ATTEMPTS:
                reason = repr(error.__cause__ or error)
                raise ShardError(
                    f"{what}: failed {_ATTEMPTS} times, the last with {reason}; the server or the network is at "
                    "fault, not the file: try again later"
                ) from None
        time.sleep(pause)
        pause *= 2
    raise AssertionError


def _is_refused(error: Exception) -> bool:
    """Return whether a server said that the file does not exist or may not be read, so that repeating is useless.

    fsspec's HTTP raises FileNotFoundError for every failed request for a size; what made it fail is the cause.
    """
    import aiohttp  # only after a failure, since it takes a while

    cause = error.__cause__ if isinstance(error, FileNotFoundError) else error
    if isinstance(cause, aiohttp.ClientResponseError):
        return cause.status in _REFUSED
    if cause is error or cause is None:
        return isinstance(error, FileNotFoundError | PermissionError)
    return not isinstance(cause, aiohttp.ClientError | ConnectionError | TimeoutError)


def _missing(what: str, error: OSError) -> ShardError:
    return ShardError(f"{what}: no such shard, or no right to read it ({error})")


def _system(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    try:
        system, path = url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ShardError(f"{url}: cannot be reached: {error}") from None
    return system, path
