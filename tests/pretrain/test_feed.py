"""The feed's totals and lists are those of the global batch, on any number of ranks."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.faults.stragglers import RankSeconds
from pretrain.feed import Feed, FeedLeft
from shards import DataConfig, HeadraceError, Loader, ShardError, Stage, prepare
from tests.shards.corpora import config, record, words, write_shard

ROWS = 4  # rows of a global batch


UNLIKE = ("tokens", "segment_ids", "rank_seconds")  # on each rank, or at each time


class Ranks:
    """Data-parallel ranks that are threads."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._barrier = threading.Barrier(size)
        self._values: list[Any] = [None] * size

    def gather(self, rank: int, value: Any) -> list[Any]:
        self._values[rank] = value
        self._barrier.wait(60)
        gathered = list(self._values)
        self._barrier.wait(60)
        return gathered

    def run(self, work: Any) -> list[Any]:
        """Return a function's result on each rank."""
        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(lambda rank: work(Place(self, rank)), range(self.size)))


class Place:
    """The part of a topology that the feed uses."""

    device = torch.device("cpu")

    def __init__(self, ranks: Ranks, rank: int) -> None:
        self._ranks, self.rank, self.world_size = ranks, rank, ranks.size
        self.is_main = rank == 0

    def gather_objects(self, own: Any) -> list[Any]:
        return self._ranks.gather(self.rank, own)

    def broadcast_object(self, own: Any) -> Any:
        return self.gather_objects(own)[0]

    def sum_int64(self, values: list[int]) -> list[int]:
        return [sum(parts) % 2**64 for parts in zip(*self.gather_objects(values), strict=True)]

    def share_rows(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


def steps(data: DataConfig, ranks: int, seed: int = 0) -> list[list[dict[str, Any]]]:
    """Return, for each rank, what a feed reports for every step until the data is used up."""

    prepared = prepare(data)

    def work(place: Place) -> list[dict[str, Any]]:
        topology: Any = place
        with Loader(data, ROWS, seed, place.rank, ranks, prepared=prepared) as loader:
            feed = Feed(loader, [Stage(0, data, ROWS)], topology)
            found = []
            own = RankSeconds(0.0, *(place.rank + part / 4 for part in (1, 2, 3)))
            while (batch := feed.next(lambda: place.rank == 1, saving=place.rank == 0, seconds=own)) is not None:
                assert [each[1:] for each in batch.rank_seconds] == [
                    (r + 0.25, r + 0.5, r + 0.75) for r in range(ranks)
                ]
                assert all(0 < each.loading < 60 for each in batch.rank_seconds)
                assert batch.tokens.shape == (ROWS // ranks, data.seq_len + 1)
                found.append({key: value for key, value in vars(batch).items() if key not in UNLIKE})
            assert feed.next(lambda: False) is None
            return [*found, {"passed_over": feed.skipped_at_end}]

    return Ranks(ranks).run(work)


def mixed(folder: Path, **changes: object) -> DataConfig:
    """Return the config of two sources, one of which has sub-sources and bad records."""
    texts = [words(i, 20 + 7 * (i % 9)) for i in range(60)]
    write_shard(folder / "a.jsonl", b"".join(record(text) for text in texts))
    kinds = [b'{"text": "%s", "kind": "%s"}\n' % (words(i, 30).encode(), b"xyz"[i % 3 : i % 3 + 1]) for i in range(40)]
    write_shard(folder / "b.jsonl", b"{}\n".join(kinds))
    sources = [
        {"name": "a", "paths": [str(folder / "a.jsonl")], "max_epochs": 1},
        {"name": "b", "paths": [str(folder / "b.jsonl")], "max_epochs": 2, "source_from": "kind"},
    ]
    return config(sources, lanes=4, window_bytes=512, **({"on_bad_record": "skip"} | changes))


@pytest.mark.parametrize("ranks", [2, 4])
def test_totals_do_not_depend_on_the_ranks(tmp_path: Path, ranks: int) -> None:
    data = mixed(tmp_path)
    (alone,) = steps(data, 1)
    together = steps(data, ranks)
    assert all(found == together[0] for found in together)
    asked = {"stop_requested": True, "saving": True}
    assert together[0] == [step | asked if "saving" in step else step for step in alone]
    for step in alone[:-1]:
        by_source = step["tokens_per_source"]
        assert step["n_tokens"] == by_source["a"] + by_source["b"]
        assert by_source["b"] == sum(count for name, count in by_source.items() if name.startswith("b/"))
        assert step["n_tokens"] + step["n_padding"] == ROWS * (data.seq_len + 1)
        assert not step["stop_requested"]
    assert alone[-2]["epoch_per_source"] == {"a": 1.0, "b": 2.0}
    listed = [found.line for step in alone[:-1] for found in step["skipped"]]
    assert len(listed) == alone[-2]["skipped_so_far"]
    assert alone[-2]["skipped_so_far"] > 0


def test_all_ranks_learn_of_data_that_one_cannot_read(tmp_path: Path) -> None:
    data = mixed(tmp_path, on_bad_record="fail")

    prepared = prepare(data)

    def work(place: Place) -> HeadraceError | None:
        topology: Any = place
        with Loader(data, ROWS, 0, place.rank, 2, prepared=prepared) as loader:
            feed = Feed(loader, [Stage(0, data, ROWS)], topology)
            try:
                while feed.next(lambda: False):
                    pass
            except HeadraceError as error:
                return error
        return None

    errors = Ranks(2).run(work)
    assert all(isinstance(error, ShardError) for error in errors)
    assert any("b.jsonl" in str(error) for error in errors)


@pytest.mark.parametrize("seed", range(4))
def test_each_bad_record_is_listed_even_if_no_row_follows_it(tmp_path: Path, seed: int) -> None:
    write_shard(tmp_path / "good.jsonl", b"".join(record(words(i, 40)) for i in range(10)))
    write_shard(tmp_path / "bad.jsonl", b"{}\n" * 10)
    sources = [{"name": "a", "paths": [str(tmp_path / "*.jsonl")], "max_epochs": 1}]
    data = config(sources, on_bad_record="skip", lanes=1, window_bytes=256)
    (found,) = steps(data, 1, seed)
    listed = [skipped for step in found[:-1] for skipped in step["skipped"]] + found[-1]["passed_over"][0]
    assert sorted(skipped.line for skipped in listed) == list(range(1, 11))


def test_a_stop_is_noticed_where_batches_are_empty_and_a_resume_is_exact(tmp_path: Path) -> None:
    """Between the end of one source and the step that brings in the other there are 1,000 batches without a row."""
    for name in "ab":
        write_shard(tmp_path / f"{name}.jsonl", b"".join(record(words(i, 40)) for i in range(20)))
    sources = [
        {"name": "a", "paths": [str(tmp_path / "a.jsonl")], "max_epochs": 1, "weight": 1.0},
        {"name": "b", "paths": [str(tmp_path / "b.jsonl")], "max_epochs": 1, "weight": 0.0},
    ]
    changes = [{"step": 1000, "weights": {"a": 0.0, "b": 1.0}}]
    data = config(sources, lanes=2, window_bytes=512, weight_changes=changes)
    prepared = prepare(data)

    def work(place: Place) -> tuple[list[int], list[int], int]:
        """Return the hashes of the batches up to the stop, of those after it, and the looks after the last batch."""
        topology: Any = place
        before: list[int] = []
        looks = 0

        def wants_stop() -> bool:
            nonlocal looks
            looks += 1
            return looks == 3 and place.rank == 1

        with Loader(data, ROWS, 0, place.rank, 2, prepared=prepared) as loader:
            feed = Feed(loader, [Stage(0, data, ROWS)], topology)
            with suppress(FeedLeft):
                while batch := feed.next(wants_stop):
                    before.append(batch.row_hash)
                    looks = 0
            cursors = topology.broadcast_object(feed.cursors())
        with Loader(data, ROWS, 0, place.rank, 2, prepared=prepared) as loader:
            loader.load_state_dict(cursors)
            feed, after = Feed(loader, [Stage(0, data, ROWS)], topology), []
            while batch := feed.next(lambda: False):
                after.append(batch.row_hash)
        return before, after, looks

    found = Ranks(2).run(work)
    assert found[0] == found[1]
    before, after, looks = found[0]
    assert looks == 3, "the stop is noticed with the batch at which it is asked for"
    (alone,) = steps(data, 1)
    assert before + after == [step["row_hash"] for step in alone[:-1]]
    assert before
    assert after
