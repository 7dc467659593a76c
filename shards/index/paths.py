"""Where Headrace keeps what it found out about a shard, and how it writes that.

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
from shards.config import DEFAULT_MAX_DECODER_WINDOW, MIB
from shards.errors import ShardError
from shards.storage import atomic, files, remote

INDEX_SUFFIX = ".index.json"
_HISTORY_SUFFIX = ".windows"


def index_paths(path: str, index_dir: Path | None) -> list[Path]:
    """List the places where a shard's index may be; a new one is written to the first.

    That is `index_dir`, or beside the shard, or (remote, read-only) the user's cache. The others are looked at as well:
    an index may have been made by somebody who could write to the folder, or by a run that set no `index_dir`.
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
    """Tell the kept index of a shard from one made later, without reading it; "" if there is none."""
    for place in index_paths(path, index_dir):
        try:
            found = place.stat()
        except OSError:
            continue
        return f"{found.st_size}-{found.st_mtime_ns}"
    return ""


def index_command(
    paths: Sequence[str], index_dir: Path | None, cell_bytes: int, max_window: int, verify: bool = False
) -> str:
    """Return the command that makes indexes where and as a run with these settings looks for them.

    It is for the shell, in a clone from its root. Args: `paths` of shards, or patterns of them.
    """
    options = ["--verify"] if verify else []
    if index_dir is not None:
        options += ["--index-dir", str(index_dir)]
    if cell_bytes != MIB:
        options += ["--cell-bytes", str(cell_bytes)]
    if max_window != DEFAULT_MAX_DECODER_WINDOW:
        options += ["--max-decoder-window", str(max_window)]
    return installation.typed("index", *paths, *options)


def user_cache() -> Path:
    """Return the folder of what cannot lie beside its shard, if the config names none."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "headrace"


def history_path(index: Path) -> Path:
    """Return where the histories of a shard's splice points are kept, given where its index is."""
    return index.with_name(index.name.removesuffix(INDEX_SUFFIX) + _HISTORY_SUFFIX)


def digest(parts: list[str]) -> str:
    """Make a short name for a list of names."""
    return hashlib.blake2b("\0".join(parts).encode("utf-8", "surrogateescape"), digest_size=6).hexdigest()


def store(path: Path, data: bytes) -> None:
    """Write an index or a manifest. Raises: ShardError if the folder cannot be written."""
    with _errors_of(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_atomically(path, data)


@contextmanager
def written_meanwhile(path: Path) -> Iterator[BinaryIO]:
    """Open a file to write to as long as the block runs, minutes maybe; then store what it holds.

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
            with atomic.written_atomically(path) as file:
                shutil.copyfileobj(scratch, file)


@contextmanager
def _errors_of(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        remedy = "set data.index_dir to a folder you own"
        if error.errno == errno.ENAMETOOLONG:
            remedy = "an index is named after its shard: give the shard a shorter name"
        raise ShardError(f"{path}: cannot be written: {error.strerror}; {remedy}") from None
