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
    """Writes a file that after a crash is there whole, or as it was before; other processes see no part of it either.

    Raises: OSError if the folder is missing or cannot be written to, or the disk is full.
    """
    with written_atomically(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def written_atomically(path: Path) -> Iterator[BinaryIO]:
    """`write_atomically` for what is written piece by piece; after an error the file is as it was before."""
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
    """Tell whether a name stands for anything, following symbolic links.

    What a disk refuses to say is no "no": `Path.exists` takes every error for one from Python 3.14 on, and whoever
    deletes or writes over what is not there would then delete what is.

    Raises: OSError if it cannot be told, such as after an I/O error.
    """
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def names_in(folder: Path) -> list[str]:
    """List the names in a folder, sorted; none if it is not there.

    `Path.glob` passes over a folder that cannot be read, which is not the same.

    Raises: OSError if it is there and cannot be read.
    """
    try:
        return sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []


def partial_name(path: Path) -> Path:
    """What a file or folder is called until it is complete."""
    # Node and process keep apart ranks that write the same name; what a killed one leaves, it overwrites in time.
    return path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.tmp")


def fsync_folder(folder: Path) -> None:
    """Makes the names in a folder durable: an fsync of a file does not cover the name it goes by."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
