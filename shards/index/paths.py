"""Where Headrace keeps what it learned about a shard, and how it writes it.

files -> paths -> shard_index, decoders.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from shards import installation
from shards.config import DEFAULT_MAX_DECODER_WINDOW, DEFAULT_TEXT_KEY, MIB
from shards.errors import ShardError
from shards.storage import atomic, files, remote

INDEX_SUFFIX = ".index.json"
_HISTORY_SUFFIX = ".windows"


def index_paths(path: str, index_dir: Path | None) -> list[Path]:
    """List the places where a shard's index may be; a new one is written to the first.

    That is `index_dir`, or beside the shard, or (if remote or read-only) the user's cache. All of them are searched,
    since somebody who could write to the folder, or a run without `index_dir`, may have made an index.
    """
    folder, name = files.place(path)
    # Shards of the same name in several folders must not share an index.
    elsewhere = f"{name}.{digest([folder])}{INDEX_SUFFIX}"
    places = [user_cache() / elsewhere]
    if not remote.is_remote(path):
        places.insert(0 if os.access(folder, os.W_OK) else 1, Path(folder) / (name + INDEX_SUFFIX))
    return places if index_dir is None else [index_dir / elsewhere, *places]


def index_path(path: str, index_dir: Path | None) -> Path:
    """Return the place where a new index of a shard is written."""
    return index_paths(path, index_dir)[0]


def index_stamp(path: str, index_dir: Path | None) -> str:
    """Return a stamp that changes when a shard's index is rebuilt, without reading the index; "" if there is none."""
    for place in index_paths(path, index_dir):
        try:
            found = place.stat()
        except OSError:
            continue
        return f"{found.st_size}-{found.st_mtime_ns}"
    return ""


def index_command(
    paths: Sequence[str],
    index_dir: Path | None,
    cell_bytes: int,
    max_window: int,
    verify: bool = False,
    text_key: str = DEFAULT_TEXT_KEY,
) -> str:
    """Return the shell command that makes indexes where, and in the form that, a run with these settings expects.

    In a clone it is typed at the root. Args: `paths`: shards, or patterns of them; `text_key`: the column of Parquet
    files among them.
    """
    options = ["--verify"] if verify else []
    if text_key != DEFAULT_TEXT_KEY and any(files.is_parquet(path) for path in paths):
        options += ["--text-key", text_key]
    if index_dir is not None:
        options += ["--index-dir", str(index_dir)]
    if cell_bytes != MIB:
        options += ["--cell-bytes", str(cell_bytes)]
    if max_window != DEFAULT_MAX_DECODER_WINDOW:
        options += ["--max-decoder-window", str(max_window)]
    return installation.typed("index", *paths, *options)


def user_cache() -> Path:
    """Return the folder for files that cannot be stored beside their shard when the config names no folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "headrace"


def history_path(index: Path) -> Path:
    """Return where the histories of a shard's splice points are kept, given the place of its index."""
    return index.with_name(index.name.removesuffix(INDEX_SUFFIX) + _HISTORY_SUFFIX)


def digest(parts: list[str]) -> str:
    """Return a short name for a list of names."""
    return hashlib.blake2b("\0".join(parts).encode("utf-8", "surrogateescape"), digest_size=6).hexdigest()


def store(path: Path, data: bytes) -> None:
    """Write an index or a manifest. Raises: ShardError if its folder is not writable."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_atomically(path, data)


@contextmanager
def written_meanwhile(path: Path) -> Iterator[BinaryIO]:
    """Open a file for a block that may write for minutes, then store its content under `path`.

    Until then the file has no name, so nothing is left behind if the process dies. If nothing was written, no file
    exists under `path` afterwards. Raises: ShardError for any OSError of the block, which must come from writing.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent) as scratch:
            yield scratch
            if not scratch.tell():
                path.unlink(missing_ok=True)
                return
            scratch.seek(0)
            with atomic.written_atomically(path) as file:
                shutil.copyfileobj(scratch, file)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError of a block, which must come from writing `path`, into a ShardError that says what to do."""
    try:
        yield
    except OSError as error:
        remedy = "set data.index_dir to a folder you own"
        if error.errno == errno.ENAMETOOLONG:
            remedy = "an index is named after its shard: give the shard a shorter name"
        raise ShardError(f"{path}: cannot be written: {error.strerror}; {remedy}") from None
