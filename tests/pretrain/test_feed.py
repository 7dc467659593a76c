"""The feed's totals and lists, on one rank without a process group."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pretrain.feed import Feed
from shards import Loader
from tests.shards.corpora import config, record, words, write_shard

ALONE = SimpleNamespace(
    is_main=True,
    device=torch.device("cpu"),
    sum_int64=lambda values: [value % 2**64 for value in values],
    gather_objects=lambda own: [own],
    broadcast_in_tp=lambda tensor: tensor,
)


@pytest.mark.parametrize("seed", range(4))
def test_each_bad_record_is_listed_also_where_no_row_comes_after_it(tmp_path: Path, seed: int) -> None:
    write_shard(tmp_path / "good.jsonl", b"".join(record(words(i, 40)) for i in range(10)))
    write_shard(tmp_path / "bad.jsonl", b"{}\n" * 10)
    sources = [{"name": "a", "paths": [str(tmp_path / "*.jsonl")], "max_epochs": 1}]
    data = config(sources, on_bad_record="skip", lanes=1, window_bytes=256)
    with Loader(data, 1, seed) as loader:
        feed = Feed(loader, data, 1, ALONE)
        listed = []
        while (batch := feed.next(stop_requested=False)) is not None:
            listed += batch.skipped
        listed += feed.passed_over[0]
        assert feed.next(stop_requested=False) is None
    assert sorted(found.line for found in listed) == list(range(1, 11))
