"""Where a shard's bytes come from: expanding the patterns of a config, opening files, and telling whether one changed.

index and reader -> files.
"""

import glob
import os
from stat import S_ISDIR
from typing import BinaryIO

import msgspec

from shards import arrow, remote
from shards.cache import BlockCache
from shards.errors import ShardError

SHARD_SUFFIXES = (".jsonl.zst", ".json.zst", ".jsonl.gz", ".json.gz", ".jsonl")
GLOB_CHARACTERS = "*?["
WEB = ("http://", "https://")


class Stat(msgspec.Struct, frozen=True):
    """What tells, without reading a file, that it is still the same."""

    size: int  # bytes, compressed
    stamp: str  # modification time


def expand(patterns: tuple[str, ...], source: str) -> list[str]:
    """The shards that a source's patterns name: sorted within a pattern, patterns in their order, each shard once.

    A glob takes only names that end as a shard's does; a name without wildcards is taken as it is.
    Raises: ShardError for a pattern that matches nothing, and for a folder.
    """
    shards: dict[str, None] = {}
    for pattern in patterns:
        pattern = os.path.expanduser(pattern)
        found = [pattern]
        if _has_wildcards(pattern) and not os.path.exists(pattern):
            matches = remote.expand(pattern) if remote.is_remote(pattern) else glob.glob(pattern, recursive=True)
            found = sorted(path for path in matches if path.endswith(SHARD_SUFFIXES))
            if not found:
                raise ShardError(
                    f"source {source!r}: no shard matches {pattern!r} (looked from {os.getcwd()}; "
                    f"names must end in one of {', '.join(SHARD_SUFFIXES)})"
                )
        shards.update(dict.fromkeys(found))
    return list(shards)


def stat(path: str, fresh: bool = False) -> Stat:
    """Size and stamp of a shard, of a remote one maybe as it was last listed unless `fresh`.

    Raises: ShardError if it is missing, a folder, or may not be read.
    """
    if remote.is_remote(path):
        return Stat(*remote.stat(path, fresh))
    path = arrow.file_of(path)
    try:
        found = os.stat(path)
    except OSError as error:
        raise _unreadable(path, error) from None
    if S_ISDIR(found.st_mode):
        raise ShardError(f"{path}: is a folder, not a shard; name the files in it, e.g. {path.rstrip('/')}/*.jsonl.zst")
    return Stat(size=found.st_size, stamp=str(found.st_mtime_ns))


def check_unchanged(path: str, indexed: Stat) -> None:
    """Raises: ShardError if a shard is not as it was when it was indexed."""
    found = stat(path, fresh=True)
    if found != indexed:
        raise ShardError(
            f"{path}: changed after it was indexed (size {indexed.size} -> {found.size} bytes, "
            f"modification time {indexed.stamp} -> {found.stamp}); put the old file back, or start a new run"
        )


def open_shard(path: str, offset: int = 0, cache: BlockCache | None = None) -> BinaryIO | remote.RemoteFile:
    """Opens a shard for reading at a compressed offset, a remote one through `cache`.

    Raises: ShardError if it cannot be opened.
    """
    if remote.is_remote(path):
        return remote.RemoteFile(path, offset, cache=cache)
    try:
        file = open(path, "rb", buffering=0)  # noqa: SIM115 - the caller closes it
    except OSError as error:
        raise _unreadable(path, error) from None
    file.seek(offset)
    return file


def place(path: str) -> tuple[str, str]:
    """(folder, name) of a shard, the folder spelt so that it is the same from everywhere on this machine.

    A web address's query belongs to the folder: the name becomes a file's, which a signature would be too long for.
    """
    if path.startswith(WEB):
        address, mark, query = path.partition("?")
        folder, name = os.path.split(address)
        return folder + mark + query, name
    folder, name = os.path.split(path if remote.is_remote(path) else os.path.abspath(path))
    return folder, name


def _has_wildcards(pattern: str) -> bool:
    """True for a glob. In a web address a question mark begins the query, where no character is a wildcard."""
    if pattern.startswith(WEB):
        pattern = pattern.partition("?")[0]
    return any(character in pattern for character in GLOB_CHARACTERS)


def _unreadable(path: str, error: OSError) -> ShardError:
    if isinstance(error, FileNotFoundError):
        return ShardError(f"{path}: no such shard (looked from {os.getcwd()})")
    return ShardError(f"{path}: cannot be read: {error.strerror}")
