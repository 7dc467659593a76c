"""Where Headrace keeps what it found out about a shard, and how it writes that. files -> kept -> index, decoders."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from shards import durable, files
from shards.errors import ShardError

INDEX_SUFFIX = ".index.json"
WINDOWS_SUFFIX = ".windows"


def index_path(path: str, index_dir: Path | None) -> Path:
    """Where a shard's index is kept: `index_dir`, beside the shard, or (remote, read-only) the user's cache."""
    folder, name = files.place(path)
    if index_dir is None and os.access(folder, os.W_OK):
        return Path(folder) / (name + INDEX_SUFFIX)
    # Shards of the same name in several folders must not share an index.
    return (index_dir or user_cache()) / f"{name}.{digest([folder])}{INDEX_SUFFIX}"


def user_cache() -> Path:
    """Where what is no shard's neighbour goes, if the config names no folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "headrace"


def windows_path(index: Path) -> Path:
    """Where the windows of a shard's splice points are kept, given where its index is."""
    return index.with_name(index.name.removesuffix(INDEX_SUFFIX) + WINDOWS_SUFFIX)


def digest(parts: list[str]) -> str:
    """A short name for a list of names."""
    return hashlib.blake2b("\0".join(parts).encode("utf-8", "surrogateescape"), digest_size=6).hexdigest()


def store(path: Path, data: bytes) -> None:
    """Writes an index or a manifest. Raises: ShardError if the folder cannot be written."""
    with _errors_of(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        durable.write_atomically(path, data)


@contextmanager
def written_meanwhile(path: Path) -> Iterator[BinaryIO]:
    """A file to write to as long as the block runs, minutes maybe; then what it holds is stored.

    Until then it has no name, so that nothing is left of it, whatever ends the process. If nothing was written, there
    is no file under `path` afterwards. Raises: ShardError for any OSError, which must be one of writing.
    """
    with _errors_of(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent) as scratch:
            yield scratch
            if not scratch.tell():
                path.unlink(missing_ok=True)
                return
            scratch.seek(0)
            with durable.written_atomically(path) as file:
                shutil.copyfileobj(scratch, file)


@contextmanager
def _errors_of(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ShardError(
            f"{path}: cannot be written: {error.strerror}; set data.index_dir to a folder you own"
        ) from None
