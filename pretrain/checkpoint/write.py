"""Writes a checkpoint's files in the background: each new, hashed as it is written, on the disk when it is done.

save -> write -> files. What was written is known by its hash before anything can be read back, so a disk that garbles
it is found out when the checkpoint is verified.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import IO, TypeVar, cast

import torch
import xxhash

from pretrain.checkpoint.store import FileEntry
from shards import CheckpointError
from shards.storage.atomic import fsync_folder

T = TypeVar("T")

_PIECE_BYTES = 1 << 26  # between two looks at whether the process wants to end
_BUFFER_BYTES = 1 << 20


class Writer:
    """One thread that does one thing after the other; what it has not done at the end of `with` is left undone."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._left = threading.Event()

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left.set()
        self._thread.shutdown(cancel_futures=True)

    def submit(self, task: Callable[..., T], *arguments: object) -> Future[T]:
        return self._thread.submit(task, *arguments)

    def write(self, folder: Path, name: str, content: object) -> Future[FileEntry]:
        """Writes `folder`/`name`: bytes as they are, anything else as `torch.save` does.

        The future raises CheckpointError, naming the file, if it could not be written and made durable.
        """
        return self.submit(self._write, folder, name, content)

    def _write(self, folder: Path, name: str, content: object) -> FileEntry:
        path = folder / name
        try:
            path.parent.mkdir(exist_ok=True)
            with path.open("xb", buffering=_BUFFER_BYTES) as file:  # never over what another process writes
                hashed = _HashedFile(file, self._left)
                _dump(content, hashed)
                file.flush()
                os.fsync(file.fileno())
            fsync_folder(path.parent)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be written: {error.strerror or error}") from error
        return FileEntry(name, hashed.size, hashed.hexdigest())


def _dump(content: object, file: _HashedFile) -> None:
    if isinstance(content, bytes):
        file.write(content)
        return
    # torch.save computes a checksum of its own, at a tenth of the speed, that torch.load never looks at
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(content, cast(IO[bytes], file))
    except Exception as error:
        raise file.failure or error from error  # it hides what went wrong with the file behind an error of its own
    finally:
        torch.serialization.set_crc32_options(before)


class _HashedFile:
    """A file that hashes what goes through it."""

    def __init__(self, file: IO[bytes], left: threading.Event) -> None:
        self._file, self._left = file, left
        self._hash = xxhash.xxh3_128()
        self.size = 0  # bytes so far
        self.failure: OSError | None = None

    def write(self, content: bytes | memoryview) -> int:
        view = memoryview(content).cast("B")
        try:
            for start in range(0, len(view), _PIECE_BYTES):
                if self._left.is_set():
                    raise InterruptedError("the process ends before the save")
                piece = view[start : start + _PIECE_BYTES]
                self._file.write(piece)
                self._hash.update(piece)
        except OSError as error:
            self.failure = self.failure or error
            raise
        self.size += len(view)
        return len(view)

    def flush(self) -> None:
        """torch.save asks for it; what counts is the flush before the fsync."""

    def hexdigest(self) -> str:
        return self._hash.hexdigest()
