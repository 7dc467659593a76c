"""Tables of postings, compared with a dictionary."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from shards.exposure import postings
from shards.exposure.postings import Postings, PostingsWriter


@pytest.mark.parametrize("run_entries", [64, 1 << 22])
@pytest.mark.parametrize("size", [0, 1, 7, 5000])
def test_a_table_gives_the_records_of_each_hash_and_no_others(
    size: int, run_entries: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postings, "_RUN_ENTRIES", run_entries)
    chance = np.random.default_rng(size)
    different = chance.integers(0, 2**64, max(1, size // 2), np.uint64)
    different[: size // 8] >>= np.uint64(12)  # some that crowd into one bucket
    hashes, records = chance.choice(different, size), np.sort(chance.integers(0, max(1, size // 3), size))
    expected = defaultdict(set)
    for one, record in zip(hashes.tolist(), records.tolist(), strict=True):
        expected[one].add(record)
    writer = PostingsWriter(tmp_path / "table")
    bounds = np.searchsorted(records, np.unique(records))[::5].tolist()
    for first, stop in zip([0, *bounds[1:]], [*bounds[1:], size], strict=True):
        writer.add(hashes[first:stop], records[first:stop])
    with (tmp_path / "table").open("wb") as file:
        file.write(b"before")
        shape = writer.write(file)
        assert file.tell() == 6 + shape.num_bytes
        file.write(b"behind")
    table = Postings(tmp_path / "table", 6, shape)
    asked = np.concatenate([different, chance.integers(0, 2**64, 100, np.uint64), different[:3]])
    which, found = table.find(asked)
    pairs = list(zip(which.tolist(), found.tolist(), strict=True))
    assert sorted(pairs) == sorted((i, record) for i, one in enumerate(asked.tolist()) for record in expected[one])
    assert [path.name for path in tmp_path.iterdir()] == ["table"], "runs wait in a file without name"
    assert [column.size for column in table.find(np.zeros(0, np.uint64))] == [0, 0]
