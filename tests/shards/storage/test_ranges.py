"""Remote files read at any place: the bytes that are there, of which no more is fetched than is read."""

from __future__ import annotations

import random
from collections.abc import Iterator

import fsspec
import pytest

from shards import ShardError
from shards.storage import files, ranges, remote

BLOCK = 1000
DATA = bytes(random.Random(1).choices(range(256), k=20 * BLOCK + 345))


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int]]]:
    """Put DATA under memory://file; yield the ranges that are fetched of it."""
    system = fsspec.filesystem("memory")
    system.pipe("/file", DATA)
    asked: list[tuple[int, int]] = []
    cat_file = system.cat_file

    def watched(path: str, start: int, end: int) -> bytes:
        asked.append((start, end))
        return cat_file(path, start=start, end=end)

    monkeypatch.setattr(system, "cat_file", watched)
    monkeypatch.setattr(remote, "BLOCK_BYTES", BLOCK)
    yield asked
    system.rm("/file")


def test_any_place_holds_the_bytes_of_the_file(fetched: list[tuple[int, int]]) -> None:
    draw = random.Random(2)
    with files.open_seekable("memory://file") as file:
        for _ in range(300):
            at, size = draw.randrange(len(DATA) + 10), draw.choice([0, 1, 500, 999, 5000])
            assert file.seek(at) == at
            assert file.read(size) == DATA[at : at + size]


def test_places_read_in_turn_are_fetched_once(fetched: list[tuple[int, int]]) -> None:
    """As columns are: each forward from a place of its own."""
    file = ranges.RangedFile("memory://file")
    for step in range(60):
        for begin in (0, 7 * BLOCK, 14 * BLOCK):
            file.seek(begin + step * 100)
            assert file.read(100) == DATA[begin + step * 100 : begin + step * 100 + 100]
    assert len(fetched) == len(set(fetched)) <= 21


def test_a_missing_file_is_named(fetched: list[tuple[int, int]]) -> None:
    with pytest.raises(ShardError, match="memory://other: no such shard"):
        files.open_seekable("memory://other")
