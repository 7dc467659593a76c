"""The messages between the loading process and its workers, over pipes. worker_process <-> worker_protocol <-> worker.

A message is its header's length (8 bytes, little-endian), the header (msgpack), and the bytes of the arrays that the
header announces, as in memory: nothing is pickled, no object per token. Replies come in the order of requests.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import numpy as np

from shards.errors import ConfigError, HeadraceError, ShardError
from shards.tokenize.parts import Prompts
from shards.windows.packing import Rows
from shards.windows.recipe import Recipe
from shards.windows.window import SkippedRecord, Window, WindowTask

LENGTH_BYTES = 8


class Request(msgspec.Struct, frozen=True):
    """A message to a worker: first the stages' configs (as JSON) and the recipe of its tools, then one task each."""

    stages: tuple[str, ...] = ()
    recipe: Recipe | None = None
    task: WindowTask | None = None


class Reply(msgspec.Struct, frozen=True):
    """A message from a worker: first that it is ready, then the header of one window each; or an error instead."""

    error: tuple[str, str] | None = None  # class of the error, message
    seq_len: int = 0
    arrays: tuple[tuple[str, int], ...] = ()  # dtype and length of each array that follows
    sub_sources: tuple[str, ...] = ()
    skipped: tuple[SkippedRecord, ...] = ()
    replays: int = 0


def encode_request(request: Request) -> bytes:
    """Encode one message to a worker."""
    header = msgspec.msgpack.encode(request)
    return len(header).to_bytes(LENGTH_BYTES, "little") + header


def encode_ready() -> list[bytes | memoryview]:
    """Encode the answer to the first request, in parts."""
    return _framed(Reply())


def encode_window(window: Window) -> list[bytes | memoryview]:
    """Encode one window, in parts that follow each other."""
    rows = window.rows
    arrays = [
        np.ascontiguousarray(array)
        for array in (
            rows.tokens,
            rows.row_pieces,
            rows.row_tokens,
            rows.documents,
            rows.starts,
            rows.lengths,
            window.lines,
            window.shards,
            window.sub_source_of,
            window.forgotten,
            *window.prompts,
        )
    ]
    kinds = tuple((array.dtype.str, len(array)) for array in arrays)
    reply = Reply(None, rows.seq_len, kinds, window.sub_sources, window.skipped, window.replays)
    return [*_framed(reply), *(array.view(np.uint8).data for array in arrays)]


def encode_error(error: BaseException) -> list[bytes | memoryview]:
    """Encode an error to be passed on, in parts."""
    return _framed(Reply((type(error).__name__, str(error))))


def receive_ready(read: Callable[[int], bytearray]) -> HeadraceError | None:
    """Read the reply to the first request; return why the worker cannot work. `read(n)` gives exactly n bytes."""
    reply = _received(read)
    return None if reply.error is None else _error(*reply.error)


def receive_window(read: Callable[[int], bytearray]) -> Window | HeadraceError:
    """Read one reply. `read(n)` gives exactly n bytes."""
    reply = _received(read)
    if reply.error is not None:
        return _error(*reply.error)
    arrays = [
        np.frombuffer(read(np.dtype(kind).itemsize * length), np.dtype(kind)) if length else np.zeros(0, np.dtype(kind))
        for kind, length in reply.arrays
    ]
    of_prompts = len(Prompts._fields)
    *of_rows, lines, shards, sub_source_of, forgotten = arrays[:-of_prompts]
    rows, prompts = Rows(reply.seq_len, *of_rows), Prompts(*arrays[-of_prompts:])
    passed = reply.skipped, prompts, reply.replays
    return Window(rows, lines, shards, reply.sub_sources, sub_source_of, forgotten, *passed)


def _received(read: Callable[[int], bytearray]) -> Reply:
    header = bytes(read(int.from_bytes(read(LENGTH_BYTES), "little")))
    return msgspec.msgpack.decode(header, type=Reply)


def _error(kind: str, message: str) -> HeadraceError:
    known: dict[str, type[HeadraceError]] = {"ShardError": ShardError, "ConfigError": ConfigError}
    return known[kind](message) if kind in known else HeadraceError(f"a worker failed with {kind}: {message}")


def _framed(reply: Reply) -> list[bytes | memoryview]:
    header = msgspec.msgpack.encode(reply)
    return [len(header).to_bytes(LENGTH_BYTES, "little"), header]
