"""Open decoders: ranges are right in any order, and no more bytes are read than lie on the way to them."""

from __future__ import annotations

from pathlib import Path

import pytest

from shards.index import decoders
from shards.index.shard_index import build
from shards.storage import files
from shards.storage.block_cache import BlockCache
from tests.shards.corpora import record, words, write_shard

CELL = 4096


@pytest.fixture
def read_bytes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows by the size of every read of a shard."""
    sizes: list[int] = []
    opened = files.open_shard

    class Counting:
        def __init__(self, path: str, offset: int = 0, cache: BlockCache | None = None) -> None:
            self._file = opened(path, offset, cache)

        def read(self, size: int) -> bytes:
            data = self._file.read(size)
            sizes.append(len(data))
            return data

        def close(self) -> None:
            self._file.close()

        def __enter__(self) -> Counting:
            return self

        def __exit__(self, *_: object) -> None:
            self.close()

    monkeypatch.setattr(decoders.files, "open_shard", Counting)
    return sizes


def test_a_jump_ahead_in_a_plain_shard_reads_nothing_on_the_way(tmp_path: Path, read_bytes: list[int]) -> None:
    raw = b"".join(record(words(i, 400)) for i in range(3000))
    path = str(write_shard(tmp_path / "a.jsonl", raw))
    index = build(path, CELL, 1 << 27)
    opened = decoders.Decoders(1 << 27)
    read_bytes.clear()
    for start in (0, len(raw) // 2, len(raw) - 700, 100):
        assert opened.read(index.raw_range(path, start, start + 600)) == raw[start : start + 600]
    opened.close()
    assert sum(read_bytes) <= 4 << 18 < len(raw)  # one chunk each


def test_a_window_too_large_for_the_budget_is_still_decoded_once(
    tmp_path: Path, read_bytes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoders, "MAX_OPEN_BYTES", 1)
    raw = b"".join(record(words(i, 400)) for i in range(300))
    path = str(write_shard(tmp_path / "a.jsonl.zst", raw))
    index = build(path, CELL, 1 << 27)
    opened = decoders.Decoders(1 << 27)
    read_bytes.clear()
    parts = [
        opened.read(index.raw_range(path, start, min(start + CELL, len(raw)))) for start in range(0, len(raw), CELL)
    ]
    opened.close()
    assert b"".join(parts) == raw
    assert sum(read_bytes) == Path(path).stat().st_size
