"""Write a checkpoint's files in the background, hash them on the way and make them durable. save -> write -> files.

The hash covers what is written, not what can be read back, so a file that the disk corrupts is found when the
checkpoint is verified.
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

from pretrain.checkpoint.store import CheckpointFile
from shards import CheckpointError
from shards.storage.atomic import fsync_folder

T = TypeVar("T")

_CHUNK_BYTES = 1 << 26  # written between checks of whether the process is ending
_BUFFER_BYTES = 1 << 20


class Writer:
    """A thread that runs tasks in order; tasks that are not done at the end of `with` are abandoned."""

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
        """Run a task after those submitted before it."""
        return self._thread.submit(task, *arguments)

    def write(self, folder: Path, name: str, content: object) -> Future[CheckpointFile]:
        """Write `folder`/`name`: bytes unchanged, anything else with `torch.save`.

        The future raises CheckpointError, naming the file, if it could not be written and made durable.
        """
        return self.submit(self._write, folder, name, content)

    def _write(self, folder: Path, name: str, content: object) -> CheckpointFile:
        path = folder / name
        try:
            path.parent.mkdir(exist_ok=True)
            with path.open("xb", buffering=_BUFFER_BYTES) as file:  # never overwrites another process's file
                hashed = _HashedFile(file, self._left)
                _dump(content, hashed)
                file.flush()
                os.fsync(file.fileno())
            fsync_folder(path.parent)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be written: {error.strerror or error}") from error
        return CheckpointFile(name, hashed.size, hashed.hexdigest())


def _dump(content: object, file: _HashedFile) -> None:
    if isinstance(content, bytes):
        file.write(content)
        return
    # torch.save computes its own checksum at a tenth of the speed, and torch.load never checks it.
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(content, cast(IO[bytes], file))
    except Exception as error:
        raise file.failure or error from error  # torch.save hides the file's error behind its own
    finally:
        torch.serialization.set_crc32_options(before)


class _HashedFile:
    """A file that hashes everything written to it."""

    def __init__(self, file: IO[bytes], left: threading.Event) -> None:
        self._file, self._left = file, left
        self._hash = xxhash.xxh3_128()
        self.size = 0  # bytes so far
        self.failure: OSError | None = None

    def write(self, content: bytes | memoryview) -> int:
        view = memoryview(content).cast("B")
        try:
            for start in range(0, len(view), _CHUNK_BYTES):
                if self._left.is_set():
                    raise InterruptedError("the process ends before the save")
                chunk = view[start : start + _CHUNK_BYTES]
                self._file.write(chunk)
                self._hash.update(chunk)
        except OSError as error:
            self.failure = self.failure or error
            raise
        self.size += len(view)
        return len(view)

    def flush(self) -> None:
        """Do nothing: torch.save calls it, but only the flush before the fsync matters."""

    def hexdigest(self) -> str:
        return self._hash.hexdigest()
