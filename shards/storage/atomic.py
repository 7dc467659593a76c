"""Files that survive a kill at any byte.

shard_index, manifest, a run's folder, checkpoints -> atomic.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file that after a crash is either complete or as it was before; no process sees part of it.

    Raises: OSError if the folder is missing or not writable, or the disk is full.
    """
    with written_atomically(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def written_atomically(path: Path) -> Iterator[BinaryIO]:
    """Open a file to write piece by piece as `write_atomically` does; after an error it is as it was before."""
    partial = partial_name(path)
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def is_there(path: Path) -> bool:
    """Return whether a path exists, following symbolic links.

    An I/O error is no "no". `Path.exists` returns False for every error from Python 3.14 on, and a caller that deletes
    or overwrites what does not exist would then delete what does.

    Raises: OSError if that cannot be determined, such as after an I/O error.
    """
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def names_in(folder: Path) -> list[str]:
    """List the names in a folder, sorted; none if it does not exist.

    `Path.glob` ignores a folder that cannot be read, which is not the same.

    Raises: OSError if it exists and cannot be read.
    """
    try:
        return sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []


def partial_name(path: Path) -> Path:
    """Return the name of a file or folder until it is complete."""
    # Host and process separate ranks that write the same name; leftovers of a killed one are overwritten in time.
    return path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.tmp")


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder durable, since an fsync of a file does not cover its name."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
