"""Cached blocks of remote shards: never wrong and never too many, whichever process is killed."""

from __future__ import annotations

import errno
import multiprocessing
import os
import time
from pathlib import Path

import pytest

from shards import ConfigError
from shards.storage.block_cache import BLOCK_SUFFIX, CHECK_BYTES, BlockCache

URL = "https://host/a.jsonl.zst"
BLOCK = 1000


def block(number: int) -> bytes:
    return bytes([number % 256]) * BLOCK


def put(cache: BlockCache, number: int) -> None:
    cache.put(URL, 10**6, "one", number * BLOCK, block(number))


def get(cache: BlockCache, number: int, stamp: str = "one", size: int = 10**6) -> bytes | None:
    return cache.get(URL, size, stamp, number * BLOCK, (number + 1) * BLOCK)


def taken(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.name != "lock")


def test_a_block_is_returned_only_for_the_content_it_came_from(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path / "new" / "folder", 10**6)
    put(cache, 3)
    assert get(BlockCache(tmp_path / "new" / "folder", 10**6), 3) == block(3)
    assert get(cache, 2) is None
    assert get(cache, 3, stamp="two") is None
    assert get(cache, 3, size=10**6 + 1) is None


@pytest.mark.parametrize("damage", ["torn", "empty", "flipped", "of another block"])
def test_a_damaged_block_is_not_returned(tmp_path: Path, damage: str) -> None:
    cache = BlockCache(tmp_path, 10**6)
    put(cache, 0)
    (path,) = tmp_path.glob(f"*{BLOCK_SUFFIX}")
    stored = path.read_bytes()
    put(cache, 1)
    (other,) = set(tmp_path.glob(f"*{BLOCK_SUFFIX}")) - {path}
    replacements = {"torn": stored[:-7], "empty": b"", "flipped": b"?" + stored[1:], "of another block": stored}
    (other if damage == "of another block" else path).write_bytes(replacements[damage])
    assert get(cache, 1 if damage == "of another block" else 0) is None
    put(cache, 0)
    assert get(cache, 0) == block(0)


def test_the_least_recently_used_block_is_evicted_first_and_the_bound_holds(tmp_path: Path) -> None:
    limit = 10 * (BLOCK + CHECK_BYTES)
    cache = BlockCache(tmp_path, limit)
    for number in range(40):
        put(cache, number)
        assert get(cache, number) == block(number)
        assert get(cache, 0) == block(0)  # in use all the time
        assert taken(tmp_path) <= limit
        time.sleep(0.002)  # so that times of use differ
    assert taken(tmp_path) > limit // 2
    assert get(cache, 20) is None
    smaller = BlockCache(tmp_path, limit // 2)
    put(smaller, 50)
    assert taken(tmp_path) <= limit // 2
    put(BlockCache(tmp_path, BLOCK), 60)
    assert get(cache, 60) is None  # larger than the whole cache


def write_until_killed(folder: Path, limit: int, first: int) -> None:
    cache = BlockCache(folder, limit)
    for number in range(first, 1 << 30):
        put(cache, number)
        assert get(cache, number) in (block(number), None)


@pytest.mark.distributed
def test_several_processes_and_kills_leave_only_whole_blocks_within_the_bound(tmp_path: Path) -> None:
    limit = 100 * (BLOCK + CHECK_BYTES)
    context = multiprocessing.get_context("fork")
    for turn in range(2):
        writers = [
            context.Process(target=write_until_killed, args=(tmp_path, limit, 100_000 * turn + 1000 * i))
            for i in range(3)
        ]
        for writer in writers:
            writer.start()
        for _ in range(20):
            time.sleep(0.02)
            # Under the lock nothing is added or removed while the folder is listed and measured.
            with BlockCache(tmp_path, limit)._lock():
                assert taken(tmp_path) <= limit
        for writer in writers:
            assert writer.is_alive()
            writer.kill()
            writer.join()
        assert taken(tmp_path) <= limit
    cache = BlockCache(tmp_path, limit)
    for path in tmp_path.glob(f"*{BLOCK_SUFFIX}"):
        assert path.stat().st_size == BLOCK + CHECK_BYTES
    put(cache, 7)
    assert get(cache, 7) == block(7)


def test_an_unusable_cache_folder_is_named_and_one_that_fails_later_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"data\.remote_cache\.dir=.*file/x"):
        BlockCache(tmp_path / "file" / "x", 10**6)
    cache = BlockCache(tmp_path / "gone", 10**6)
    (tmp_path / "gone").rmdir()
    put(cache, 0)
    assert get(cache, 0) is None


def test_a_read_only_cache_still_provides_its_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    put(BlockCache(tmp_path, 10**6), 3)

    def refuse(*_: object, **__: object) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    for name in ("utime", "open", "replace"):  # root may write anywhere, so the folder cannot refuse
        monkeypatch.setattr(os, name, refuse)
    cache = BlockCache(tmp_path, 10**6)
    for number in (3, 4, 5):
        assert get(cache, number) == (block(3) if number == 3 else None)
        put(cache, number)
    assert caplog.text.count("cannot keep blocks of remote shards: Read-only file system") == 1
