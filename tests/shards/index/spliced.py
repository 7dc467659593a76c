"""Text compressed in many ways and indexed; with the fixture `near`, entries are close together."""

from __future__ import annotations

import functools
import gzip
from collections.abc import Callable
from pathlib import Path

import zstandard

from shards.formats import zstd_blocks
from shards.index import paths
from shards.index.shard_index import ShardIndex, build
from tests.shards.corpora import SAMPLE

CELL = 1 << 16
MAX_WINDOW = 1 << 27


def zstandard_all(data: bytes) -> bytes:
    """Decode zstd data of any number of frames with the library's own reader."""
    return zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW).stream_reader(data, read_across_frames=True).read()


TEXT = b"".join(zstandard_all(path.read_bytes())[: 1 << 20] for path in sorted(SAMPLE.glob("*.zst"))[:4])


def compressed(raw: bytes, level: int = 3, block_bytes: int = 0, **parameters: int | bool) -> bytes:
    """Compress into one zstd frame, cut into blocks by flushes if `block_bytes` is given."""
    chosen = zstandard.ZstdCompressionParameters.from_level(level, write_content_size=False, **parameters)
    stream = zstandard.ZstdCompressor(compression_params=chosen).compressobj()
    step = block_bytes or len(raw)
    parts = [
        stream.compress(raw[i : i + step]) + (stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK) if block_bytes else b"")
        for i in range(0, len(raw), step)
    ]
    return b"".join(parts) + stream.flush()


_MADE_BY: dict[str, Callable[[], bytes]] = {
    "level 1, checksum": lambda: compressed(TEXT, 1, write_checksum=True),
    "level 3, window of 128 KiB": lambda: compressed(TEXT, 3, window_log=17),
    "level 19, small blocks": lambda: compressed(TEXT[: 1 << 20], 19, block_bytes=20_000, window_log=18),
    "long mode": lambda: compressed(TEXT, 3, window_log=18, enable_ldm=True),
    "two frames": lambda: compressed(TEXT, 3) + compressed(TEXT, 5, write_checksum=True),
    "gzip": lambda: gzip.compress(TEXT, 6),
    "two gzip members": lambda: gzip.compress(TEXT, 1) + gzip.compress(TEXT, 9),
}
SHARDS = tuple(_MADE_BY)


@functools.cache
def shard(name: str) -> bytes:
    """Return the content of one of SHARDS, which is compressed only once a test asks for it."""
    return _MADE_BY[name]()


def indexed(folder: Path, data: bytes, verify: bool = True) -> tuple[str, ShardIndex]:
    path = folder / "a.jsonl.zst"
    path.write_bytes(data)
    histories = paths.history_path(paths.index_path(str(path), None))
    return str(path), build(str(path), CELL, MAX_WINDOW, histories=histories, verify_entries=verify)


def raw_of(data: bytes) -> bytes:
    return zstandard_all(data) if data.startswith(zstd_blocks.MAGIC) else gzip.decompress(data)
