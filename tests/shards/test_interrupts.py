"""After an error or an interrupt anywhere, `next` yields the batch that the loader's state names, and no other."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import shards
from shards import Loader, ShardError
from shards.leg import Leg
from shards.windows.window import WindowMaker
from tests.shards.corpora import config, record, words, write_shard

# Modules that hold a loader's state. What makes windows holds none that matters, since it is dropped when interrupted.
MODULES = (
    *("loader", "leg", "carry", "lane", "prefetch", "batch", "source", "windows/worker_pool"),
    *("plan/segments", "plan/mixing", "plan/cursor"),
)
PLACES = {str(Path(shards.__file__).parent / f"{name}.py") for name in MODULES}
assert all(Path(place).exists() for place in PLACES)
BATCH = 6
BATCHES = 40
FURTHER = 80  # more batches that interrupted loads of a state may reach


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    """Write two sources with bad records, one of which runs out on the way."""
    folder = tmp_path_factory.mktemp("corpus")
    for name in "ab":
        lines = [record(f"{name}{i} " + words(i, 5 + (i * 37) % 50)) for i in range(24)]
        lines[4::8] = [b'{"text": 1}\n'] * 3
        write_shard(folder / f"{name}.jsonl.zst", b"".join(lines), frames=3)
    return [
        {"name": "a", "paths": [str(folder / "a.jsonl.zst")]},
        {"name": "b", "paths": [str(folder / "b.jsonl.zst")], "max_epochs": 1},
    ]


def data_of(sources: list[dict[str, object]], num_workers: int = 0) -> shards.DataConfig:
    return config(sources, lanes=3, window_bytes=512, on_bad_record="skip", num_workers=num_workers)


@pytest.fixture(scope="module")
def undisturbed(sources: list[dict[str, object]]) -> list[tuple[int, int]]:
    with Loader(data_of(sources), BATCH) as loader:
        return [(batch.row_hash, batch.skipped_so_far) for batch in (next(loader) for _ in range(BATCHES + FURTHER))]


class Interrupter:
    """A tracer that raises KeyboardInterrupt at lines of these modules, once per line and at most once per call."""

    def __init__(self) -> None:
        self.seen: set[tuple[str, int]] = set()

    def call(self, action: Callable[[], object]) -> bool:
        """Run `action`; return whether it ended with no line left to interrupt."""
        before = sys.gettrace()
        sys.settrace(self._trace)
        try:
            action()
        except KeyboardInterrupt:
            return False
        finally:
            sys.settrace(before)
        return True

    def _trace(self, frame: FrameType, event: str, argument: object) -> Any:
        if frame.f_code.co_filename not in PLACES:
            return None
        place = (frame.f_code.co_filename, frame.f_lineno)
        if event == "line" and place not in self.seen:
            self.seen.add(place)
            raise KeyboardInterrupt
        return self._trace


@pytest.mark.distributed
@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_interrupt_at_any_line_neither_loses_nor_repeats_a_batch(
    sources: list[dict[str, object]], undisturbed: list[tuple[int, int]], num_workers: int
) -> None:
    interrupter = Interrupter()
    interrupts = 0
    with Loader(data_of(sources, num_workers), BATCH) as loader:

        def check_next() -> None:
            rows = loader.state_dict()["rows"]
            assert isinstance(rows, int)
            batch = next(loader)
            assert (batch.row_hash, batch.skipped_so_far) == undisturbed[rows // BATCH]

        check_next()
        early = loader.state_dict()
        for _ in range(BATCHES // 3):
            while not interrupter.call(lambda: next(loader)):
                interrupts += 1
            check_next()
        late = loader.state_dict()
        for turn in range(2 * BATCHES):
            if interrupter.call(lambda saved=(early, late)[turn % 2]: loader.load_state_dict(saved)):
                break
            check_next()
    assert interrupts > 100


@pytest.mark.distributed
@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("error", [KeyboardInterrupt, ShardError, MemoryError])
def test_a_failed_batch_comes_next_whichever_draw_failed(
    sources: list[dict[str, object]],
    undisturbed: list[tuple[int, int]],
    monkeypatch: pytest.MonkeyPatch,
    num_workers: int,
    error: type[BaseException],
) -> None:
    with Loader(data_of(sources, num_workers), BATCH) as loader:
        draw = Leg._draw
        for number, expected in enumerate(undisturbed[:BATCHES]):
            left = number % (BATCH + 1)

            def fail(leg: Leg, j: int) -> object:
                nonlocal left
                left -= 1
                if left < 0:
                    raise error
                return draw(leg, j)

            monkeypatch.setattr(Leg, "_draw", fail)
            if left < BATCH:
                with pytest.raises(error):
                    next(loader)
            monkeypatch.undo()
            batch = next(loader)
            assert (batch.row_hash, batch.skipped_so_far) == expected


def test_a_batch_with_too_many_bad_records_is_not_skipped(sources: list[dict[str, object]]) -> None:
    data = data_of(sources).model_copy(update={"max_bad_records": 2})
    with Loader(data, BATCH) as loader:
        with pytest.raises(ShardError, match="max_bad_records=2") as first:
            list(itertools.islice(loader, BATCHES))
        state = loader.state_dict()
        with pytest.raises(ShardError, match="max_bad_records=2") as second:
            next(loader)
        assert str(first.value) == str(second.value)
        assert loader.state_dict() == state


def test_an_interrupted_window_maker_is_not_used_again(
    sources: list[dict[str, object]], undisturbed: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    makers: list[WindowMaker] = []
    documents = WindowMaker.documents

    def interrupted(maker: WindowMaker, task: Any) -> Any:
        makers.append(maker)
        if len(makers) == 5:
            raise KeyboardInterrupt
        return documents(maker, task)

    monkeypatch.setattr(WindowMaker, "documents", interrupted)
    with Loader(data_of(sources), BATCH) as loader:
        with pytest.raises(KeyboardInterrupt):
            list(itertools.islice(loader, BATCHES))
        next(loader)
    assert makers[4] is makers[0]
    assert makers[5] is not makers[0]
