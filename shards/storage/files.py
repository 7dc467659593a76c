"""Access to shards' bytes: expanding the patterns of a config, opening files, and detecting changes.

remote, ranges -> files -> {shard_index, json_lines, parquet}.
"""

from __future__ import annotations

import glob
import io
import logging
import os
import re
from collections.abc import Iterable
from stat import S_ISDIR, S_ISREG
from typing import BinaryIO

import msgspec

from shards.errors import ShardError
from shards.storage import ranges, remote
from shards.storage.block_cache import BlockCache

SHARD_SUFFIXES = (".jsonl.zst", ".json.zst", ".jsonl.gz", ".json.gz", ".jsonl")
# Suffixes that a glob takes only if it ends as they do, since a run may have begun with one that passed them over
NAMED_SUFFIXES = (
    *(".parquet", ".jsonl.zstd", ".json.zstd"),
    *(".jsonl.xz", ".json.xz", ".jsonl.bz2", ".json.bz2"),
)
# Files that somebody may take for a shard, though a glob ignores them
_LIKE_A_SHARD = re.compile(
    r"\.((jsonl?|ndjson|jsonlines|parquet|arrow)(\.\w+)?|zstd?|gz|bz2|xz|lz4|br)$", re.IGNORECASE
)
# Marks the path of a column, FILE.arrow#COLUMN or FILE.parquet#COLUMN; a web address may have a query in between
_COLUMN_MARK = re.compile(r"\.(?:arrow|parquet)(?:\?[^#]*)?#")
_PARQUET = ".parquet"
_OURS = (".index.json", ".windows", ".manifest", ".texts")  # files that Headrace leaves beside shards
_SEEKABLE_BUFFER = 1 << 13  # bytes; longer reads go past it
_MAX_NAMED = 5  # names in a message, out of what may be thousands

_logger = logging.getLogger(__name__)


class Stat(msgspec.Struct, frozen=True):
    """What is known about a file without reading it.

    Another size means other content. An equal stamp saves reading the file to compare it; a different one says nothing.
    """

    size: int  # bytes, compressed
    stamp: str  # modification time, or a server's identifier of this content


def expand(patterns: tuple[str, ...], source: str) -> list[str]:
    """List the shards that a source's patterns name: sorted within a pattern, patterns in order, each shard once.

    A glob takes only names that end like a shard's, some only if it ends so itself; a name without wildcards is taken
    literally. Files in a glob's folders that look like shards and are not read are logged.
    Raises: ShardError for a pattern that matches nothing, and for a name that is not UTF-8.
    """
    shards: dict[str, None] = {}
    passed_over: dict[str, None] = {}
    for pattern in patterns:
        pattern = _local(os.path.expanduser(pattern))
        found = [pattern]
        if _has_wildcards(pattern) and not os.path.exists(pattern):
            ending = "." + pattern.rpartition(".")[2]
            named = tuple(suffix for suffix in NAMED_SUFFIXES if suffix.endswith(ending))
            found = [path for path in _matches(pattern) if path.endswith((*SHARD_SUFFIXES, *named))]
            if not found:
                raise ShardError(
                    f"source {source!r}: no shard matches {pattern!r} (current folder: {os.getcwd()}; names must end "
                    f"in one of {', '.join(SHARD_SUFFIXES)}, and {', '.join(NAMED_SUFFIXES)} where the pattern does)"
                )
            passed_over.update(dict.fromkeys(_unread(pattern)))
        shards.update(dict.fromkeys(found))
    for path in shards:
        if not path.isascii() and any("\ud800" <= character <= "\udfff" for character in path):
            raise ShardError(
                f"source {source!r}: {os.fsencode(path)!r} is not UTF-8, which a shard's name must be to appear in "
                "indexes, checkpoints and logs; rename it"
            )
    if unread := [path for path in passed_over if path not in shards]:
        _logger.warning(
            "source %r: not read, since a glob takes only names that end in %s, and in %s where the glob does: %s; "
            "rename what is a shard, or name it in paths without wildcards",
            source,
            ", ".join(SHARD_SUFFIXES),
            ", ".join(NAMED_SUFFIXES),
            listed(unread),
        )
    return list(shards)


def listed(names: list[str]) -> str:
    """List the first few names and the number of the others."""
    beyond = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return ", ".join(names[:_MAX_NAMED]) + beyond


def _matches(pattern: str) -> list[str]:
    """List what a glob matches, sorted."""
    return remote.expand(pattern) if remote.is_remote(pattern) else sorted(glob.glob(pattern, recursive=True))


def _unread(pattern: str) -> list[str]:
    """List the files in a glob's folders that look like shards but are not, by their names."""
    folder, mark, name = pattern.rpartition("/")
    beside = _matches(folder + mark + ("**" if name == "**" else "*"))
    return [
        path
        for path in beside
        if _LIKE_A_SHARD.search(path) and not path.endswith((*SHARD_SUFFIXES, *_OURS)) and not os.path.isdir(path)
    ]


def stat(path: str, fresh: bool = False) -> Stat:
    """Return the size and stamp of a shard; a remote one's may be as last listed, unless `fresh`.

    Raises: ShardError if it is missing, is a folder or a pipe, or may not be read.
    """
    path = file_of(path)
    if remote.is_remote(path):
        return Stat(*remote.stat(path, fresh))
    path = _local(path)
    try:
        found = os.stat(path)
    except OSError as error:
        raise _unreadable(path, error) from None
    if S_ISDIR(found.st_mode):
        raise ShardError(f"{path}: is a folder, not a shard; name the files in it, e.g. {path.rstrip('/')}/*.jsonl.zst")
    if not S_ISREG(found.st_mode):
        raise ShardError(f"{path}: is a pipe, a socket or a device, not a file that can be read again; name a file")
    return Stat(size=found.st_size, stamp=str(found.st_mtime_ns))


def check_size(path: str, indexed: Stat) -> Stat:
    """Return a shard's present stat. Raises: ShardError if its size is not that of when it was indexed.

    A different stamp is no error, since what is read is compared with the index.
    """
    found = stat(path, fresh=True)
    if found.size != indexed.size:
        raise changed(path, indexed, found)
    return found


def changed(path: str, indexed: Stat, found: Stat) -> ShardError:
    """Make the error for a shard whose content is not what was indexed."""
    return ShardError(
        f"{path}: changed after it was indexed (size {indexed.size} -> {found.size} bytes, "
        f"modification time {indexed.stamp} -> {found.stamp}); put the old file back, or start a new run"
    )


def open_shard(path: str, offset: int = 0, cache: BlockCache | None = None) -> BinaryIO | remote.RemoteFile:
    """Open a shard for reading at a compressed offset, a remote one through `cache`.

    Raises: ShardError if it cannot be opened.
    """
    if remote.is_remote(path):
        return remote.RemoteFile(path, offset, cache=cache)
    path = _local(path)
    try:
        file = open(path, "rb", buffering=0)  # noqa: SIM115 - the caller closes it
    except OSError as error:
        raise _unreadable(path, error) from None
    file.seek(offset)
    return file


def is_column(path: str) -> bool:
    """Return True for the path of a column, False for that of a file."""
    return _COLUMN_MARK.search(path) is not None


def is_parquet(path: str) -> bool:
    """Return True for a Parquet file, which its name says, and for a column of one."""
    path = file_of(path)
    return (path.partition("?")[0] if path.startswith(remote.WEB) else path).endswith(_PARQUET)


def column_of(path: str) -> str:
    """Return the name of a column, from its path."""
    mark = _COLUMN_MARK.search(path)
    assert mark is not None, path
    return path[mark.end() :]


def column_path(file: str, column: str) -> str:
    """Return the path of a column of an Arrow or a Parquet file."""
    return f"{file}#{column}"


def with_columns(paths: Iterable[str], column: str) -> list[str]:
    """Return the paths with a column's path in place of each Parquet file."""
    return [column_path(path, column) if is_parquet(path) and not is_column(path) else path for path in paths]


def file_of(path: str) -> str:
    """Return the file of a column's path; any other path unchanged."""
    mark = _COLUMN_MARK.search(path)
    return path[: mark.end() - 1] if mark else path


def place(path: str) -> tuple[str, str]:
    """Split a shard's path into (folder, name), with the folder spelt the same from everywhere on this machine.

    A web address's query belongs to the folder, since the name becomes a file's, which a signature would make too long.
    """
    if path.startswith(remote.WEB):
        address, mark, query = path.partition("?")
        folder, name = os.path.split(address)
        return folder + mark + query, name
    folder, name = os.path.split(path if remote.is_remote(path) else os.path.abspath(_local(path)))
    return folder, name


def open_seekable(path: str, cache: BlockCache | None = None) -> BinaryIO:
    """Open a file for reads at any place, a remote one through `cache`; a column's path opens its file.

    Raises: ShardError if it cannot be opened; reading a remote one raises it too.
    """
    path = file_of(path)
    if remote.is_remote(path):
        return io.BufferedReader(ranges.RangedFile(path, cache), _SEEKABLE_BUFFER)
    path = _local(path)
    try:
        return open(path, "rb", buffering=_SEEKABLE_BUFFER)
    except OSError as error:
        raise _unreadable(path, error) from None


def _local(path: str) -> str:
    """Remove fsspec's scheme from a local path; return any other unchanged."""
    return path.removeprefix(remote.FILE)


def _has_wildcards(pattern: str) -> bool:
    """Return True for a glob. In a web address, wildcards end at the question mark, where the query begins."""
    if pattern.startswith(remote.WEB):
        pattern = pattern.partition("?")[0]
    return remote.GLOB.search(pattern) is not None


def _unreadable(path: str, error: OSError) -> ShardError:
    if isinstance(error, FileNotFoundError):
        return ShardError(f"{path}: no such shard (current folder: {os.getcwd()})")
    return ShardError(f"{path}: cannot be read: {error.strerror}")
