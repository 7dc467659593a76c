"""An epoch is exact: each document as often as asked for, whatever the lanes, ranks, batches and sizes."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shards import Batch, DataConfig, Loader, Rows, ShardError, Tokenizer, merge_states
from shards.arrays import Hashes
from shards.hashing import mixed
from shards.windows.packing import pack
from tests.examples import examples
from tests.shards.corpora import config, ranks_of, record, words, write_shard

SEED = 7


def small_corpus(folder: Path, documents: int, shards: int = 1) -> str:
    """Write documents of 3 to 40 words, all different; return the pattern of their shards."""
    lines = [record(words(i, 3 + i * i % 38)) for i in range(documents)]
    for shard in range(shards):
        write_shard(folder / f"s-{shard:05}.jsonl", b"".join(lines[shard::shards]))
    return str(folder / "s-*.jsonl")


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    folder = tmp_path_factory.mktemp("corpora")
    return {count: small_corpus(folder / str(count), count, 1 + count // 100) for count in (25, 250, 2500)}


def of(paths: str, epochs: int | None = 1, **changes: object) -> DataConfig:
    return config([{"name": "a", "paths": [paths], "max_epochs": epochs}], **({"window_bytes": None} | changes))


def steps_of(loaders: list[Loader]) -> Iterator[list[Batch]]:
    """Yield the batches that the ranks of a run get together, as training asks for them."""
    while True:
        parts = [loader.next_batch() for loader in loaders]
        if any(part.num_rows for part in parts):
            yield parts
        elif all(loader.ended for loader in loaders):
            return


def run(data: DataConfig, rows: int, dp_size: int = 1, state: dict[str, object] | None = None) -> list[list[Batch]]:
    loaders = ranks_of(data, rows, SEED, dp_size)
    for loader in loaders:
        if state is not None:
            loader.load_state_dict(json.loads(json.dumps(state)))
    steps = list(steps_of(loaders))
    for loader in loaders:
        loader.close()
    return steps


def hashes(steps: list[list[Batch]]) -> list[int]:
    return [sum(part.row_hash for part in parts) % 2**64 for parts in steps]


def documents_read(steps: list[list[Batch]]) -> Counter[tuple[str, int]]:
    """Count how often each document begins in a row."""
    origins = (origin for parts in steps for part in parts for origin in part.origins())
    return Counter((origin.shard, origin.line) for origin in origins if origin.start == 0)


@settings(max_examples=examples(10), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    documents=st.sampled_from([25, 250, 2500]),
    rows=st.sampled_from([10, 64, 2048]),
    lanes=st.sampled_from([None, 1, 3, 8, 64]),
    dp_size=st.sampled_from([1, 2, 4]),
    epochs=st.integers(1, 3),
    version=st.sampled_from([1, 2]),
)
def test_each_document_is_read_exactly_as_often_as_requested(
    corpora: dict[int, str], documents: int, rows: int, lanes: int | None, dp_size: int, epochs: int, version: int
) -> None:
    dp_size = dp_size if rows % dp_size == 0 else 1
    data = of(corpora[documents], epochs, lanes=lanes, plan_version=version, seq_len=128)
    steps = run(data, rows, dp_size)
    read = documents_read(steps)
    assert len(read) == documents
    assert set(read.values()) == {epochs}
    assert sum(part.epochs["a"] for part in steps[-1]) == pytest.approx(epochs, abs=1e-9)
    assert hashes(steps) == hashes(run(data, rows, 1))


@pytest.mark.parametrize(("documents", "epochs", "lanes"), [(25, 100, 4), (250, 10, None), (2500, 1, 4)])
def test_a_run_ends_with_the_step_that_was_forecast(
    corpora: dict[int, str], documents: int, epochs: int, lanes: int | None
) -> None:
    with Loader(of(corpora[documents], epochs, lanes=lanes), 10, SEED) as loader:
        foretold = loader.forecast(None)
        assert foretold.is_exact
        assert foretold == loader.forecast(None)
        assert foretold.last_step == sum(1 for _ in loader)


def test_an_epoch_is_complete_before_the_next_begins(corpora: dict[int, str]) -> None:
    """Use one lane for small data by default, so that `epoch_per_source` can be taken literally."""
    with Loader(of(corpora[250], None), 10, SEED) as loader:
        assert loader.num_lanes == 1
        seen: Counter[tuple[str, int]] = Counter()
        for batch in loader:
            for origin in batch.origins():
                seen[origin.shard, origin.line] += origin.start == 0
            if batch.epochs["a"] < 1:
                assert max(seen.values()) == 1
            if batch.epochs["a"] >= 1:
                assert len(seen) == 250
            if batch.epochs["a"] >= 2:
                assert min(seen.values()) >= 2
                break


@settings(max_examples=examples(8), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(draw=st.data())
def test_a_run_resumes_from_any_step_on_any_number_of_ranks(corpora: dict[int, str], draw: st.DataObject) -> None:
    version, lanes = draw.draw(st.sampled_from([1, 2]), "version"), draw.draw(st.sampled_from([3, 8, 12]), "lanes")
    data = of(corpora[25], 2, lanes=lanes, plan_version=version)
    expected = run(data, 8)
    for dp_size in (1, 2, 4):
        stop = draw.draw(st.integers(0, len(expected) - 1), "stop")
        again = run(data, 8, dp_size, merge_states([part.state for part in expected[stop]]))
        assert hashes(again) == hashes(expected)[stop + 1 :]
        saved = [merge_states([part.state for part in parts]) for parts in again]
        assert saved == [merge_states([part.state for part in parts]) for parts in expected[stop + 1 :]]


def test_epochs_are_counted_the_same_after_a_resume(corpora: dict[int, str]) -> None:
    """Include a source that the first batches after it do not draw from, whose window nobody has opened yet."""
    sources = [
        {"name": "a", "paths": [corpora[2500]], "weight": 0.97},
        {"name": "b", "paths": [corpora[25]], "weight": 0.03},
    ]
    data = config(sources, lanes=4, window_bytes=None)
    with Loader(data, 4, SEED) as loader, Loader(data, 4, SEED) as resumed:
        for number, batch in zip(range(60), loader, strict=False):
            resumed.load_state_dict(json.loads(json.dumps(batch.state)))
            if number % 10 == 9:
                assert next(resumed).epochs == next(loader).epochs


@pytest.mark.parametrize("epochs", [0, 40])
def test_a_start_permutes_an_epoch_once_for_all_lanes(
    corpora: dict[int, str], epochs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Permute each epoch once, although many lanes, and long runs on little data, are in many epochs at once."""
    lanes, hashed = 256, 0

    def counted(x: Hashes) -> Hashes:
        nonlocal hashed
        hashed += x.size
        return mixed(x)

    with Loader(of(corpora[25], None, lanes=lanes), lanes, SEED) as loader:
        state = json.loads(json.dumps(loader.state_dict()))
        for lane in state["lanes"].values():
            lane["sources"][0][:2] = [epochs, epochs * 25 // lanes]
        monkeypatch.setattr("shards.hashing.mixed", counted)
        loader.load_state_dict(state)
        assert hashed <= (epochs + lanes // 25 + 2) * 25


def test_ranks_that_share_lanes_count_everything_once(tmp_path: Path) -> None:
    lines = [b"{}\n" if i % 7 == 3 else record(words(i, 30)) for i in range(200)]
    path = write_shard(tmp_path / "a.jsonl", b"".join(lines))
    data = of(str(path), 2, lanes=3, on_bad_record="skip", plan_version=2)

    def told(dp_size: int) -> list[tuple[object, ...]]:
        return [
            (
                sorted(record for part in parts for record in part.skipped),
                sum(part.skipped_so_far for part in parts),
                round(sum(part.epochs["a"] for part in parts), 9),
                merge_states([part.state for part in parts]),
            )
            for parts in run(data, 12, dp_size)
        ]

    alone = told(1)
    assert alone[-1][1] == 2 * sum(line == b"{}\n" for line in lines)
    assert told(2) == told(4) == told(6) == alone


def test_the_limit_of_bad_records_holds_if_ranks_share_lanes(tmp_path: Path) -> None:
    """Fail on the rank whose row they were skipped for, whichever rank reports on the lane."""
    lines = [b"{}\n" if i % 7 == 3 else record(words(i, 30)) for i in range(200)]
    path = write_shard(tmp_path / "a.jsonl", b"".join(lines))

    def steps_until_it_fails(dp_size: int, limit: int) -> int:
        data = of(str(path), 2, lanes=1, window_bytes=512, on_bad_record="skip", max_bad_records=limit)
        loaders = ranks_of(data, 12, SEED, dp_size)
        steps: list[list[Batch]] = []
        with pytest.raises(ShardError, match=f"bad records on rank .*, more than data.max_bad_records={limit}"):
            steps.extend(steps_of(loaders))
        return len(steps)

    for limit in (0, 27):
        alone = steps_until_it_fails(1, limit)
        assert [steps_until_it_fails(dp_size, limit) for dp_size in (3, 12)] == [alone] * 2


def test_a_forecast_of_many_epochs_on_many_lanes_packs_a_bounded_number_of_windows(
    corpora: dict[int, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = 0

    def counted(*arguments: object) -> Rows:
        nonlocal packed
        packed += 1
        return pack(*arguments)

    monkeypatch.setattr("shards.forecast.pack", counted)
    monkeypatch.setattr("shards.forecast.PACKED_WINDOWS", 100)
    with Loader(of(corpora[25], 60, lanes=5), 10, SEED) as loader:
        foretold = loader.forecast(None)
        assert packed <= 100
        assert not foretold.is_exact
        assert foretold.last_step == pytest.approx(sum(1 for _ in loader), rel=0.1)


def test_a_forecast_of_many_sources_tokenizes_no_more_than_that_of_one(
    corpora: dict[int, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shards.forecast.COUNTED_BYTES", 0)
    monkeypatch.setattr("shards.forecast.SAMPLE_BYTES", 200_000)
    tokenized = 0
    encode = Tokenizer.encode_documents

    def counted(self: Tokenizer, texts: list[str]) -> object:
        nonlocal tokenized
        tokenized += sum(map(len, texts))
        return encode(self, texts)

    sources = [{"name": f"s{i}", "paths": [corpora[2500]], "max_epochs": 1} for i in range(4)]
    with Loader(config(sources, window_bytes=None), 64, SEED) as loader:
        with monkeypatch.context() as patch:
            patch.setattr(Tokenizer, "encode_documents", counted)
            foretold = loader.forecast(None)
        assert 100_000 < tokenized < 220_000
        assert foretold.last_step == pytest.approx(sum(1 for _ in loader), rel=0.05)


def test_a_forecast_skips_bad_records(tmp_path: Path) -> None:
    """Ignore bad records, which a shorter run may never reach; one that does reports them itself."""
    lines = [b"{}\n" if i == 150 else record(words(i, 30)) for i in range(200)]
    path = write_shard(tmp_path / "a.jsonl", b"".join(lines))
    with Loader(of(str(path), on_bad_record="fail"), 4, SEED) as loader:
        foretold = loader.forecast(1)
    with Loader(of(str(path), on_bad_record="skip"), 4, SEED) as loader:
        assert foretold == loader.forecast(1)


def test_small_shards_pack_as_well_as_one(tmp_path: Path) -> None:
    def padding(shards: int) -> float:
        data = of(small_corpus(tmp_path / str(shards), 1500, shards), seq_len=512)
        batches = [part for parts in run(data, 8) for part in parts]
        return sum(batch.padding_tokens for batch in batches) / sum(batch.tokens.size for batch in batches)

    assert padding(500) < padding(1) + 0.02


def test_lanes_without_data_are_reported_and_give_empty_rows(
    corpora: dict[int, str], caplog: pytest.LogCaptureFixture
) -> None:
    steps = run(of(corpora[25], lanes=100), 100)
    assert "data.lanes=100: 75 of them get no segment within max_epochs (a has 25)" in caplog.text
    assert sum(documents_read(steps).values()) == 25
    # With more lanes than rows, batches whose lanes are all exhausted are no steps
    assert documents_read(run(of(corpora[25], lanes=100), 4)) == documents_read(steps)


def test_only_sources_that_are_drawn_from_count_for_empty_lanes(
    corpora: dict[int, str], caplog: pytest.LogCaptureFixture
) -> None:
    """Report empty lanes even if a source of weight 0 has no limit."""
    sources = [
        {"name": "a", "paths": [corpora[25]], "max_epochs": 1},
        {"name": "b", "paths": [corpora[2500]], "weight": 0},
    ]
    steps = run(config(sources, lanes=100, window_bytes=None), 100)
    assert "75 of them get no segment" in caplog.text
    assert sum(documents_read(steps).values()) == 25


def test_data_without_a_single_row_is_an_error(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "a.jsonl", record("") * 50)
    data = of(str(path), lanes=5, bos=False, eos=False)
    with Loader(data, 5) as loader, pytest.raises(ShardError, match="ends without a single row.*text_key"):
        next(loader)


def test_lanes_read_by_several_ranks_are_logged(corpora: dict[int, str], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "shards")
    Loader(of(corpora[25]), 8, SEED, 0, 4).close()
    assert "data.lanes=1 on 4 data-parallel ranks: 4 ranks read each lane" in caplog.text


def test_a_forecast_names_weights_that_cannot_be_met(corpora: dict[int, str]) -> None:
    sources = [
        {"name": "a", "paths": [corpora[25]], "weight": 0.3, "max_epochs": 2},
        {"name": "b", "paths": [corpora[2500]], "weight": 0.7},
    ]
    with Loader(config(sources, lanes=4, window_bytes=None), 8, SEED) as loader:
        foretold = loader.forecast(200)
        (short,) = foretold.shortfalls
        drawn = Counter[str]()
        last = 0
        for step in range(1, 201):
            batch = next(loader)
            drawn.update({origin.slot: origin.source for origin in batch.origins()}.values())
            last = step if "a" in batch.source_tokens else last
    assert (foretold.last_step, foretold.share_read) == (None, None)
    assert (short.source, short.wished) == ("a", pytest.approx(0.3))
    assert short.met == pytest.approx(drawn["a"] / drawn.total(), abs=0.002)
    assert short.step == pytest.approx(last, rel=0.2)  # the last lane to have any is later than their mean


def test_a_forecast_from_a_sample_is_close(corpora: dict[int, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shards.forecast.COUNTED_BYTES", 0)
    monkeypatch.setattr("shards.forecast.SAMPLE_BYTES", 200_000)
    with Loader(of(corpora[2500], 2, lanes=4, window_bytes=8192), 8, SEED) as loader:
        foretold = loader.forecast(100)
        steps = sum(1 for _ in loader)
        assert not foretold.is_exact
        assert foretold.last_step == pytest.approx(steps, rel=0.05)
        assert foretold.share_read == pytest.approx(100 / steps, rel=0.06)
        assert loader.forecast(10 * steps).share_read == 1


def test_sources_that_run_out_long_before_the_weights_change_are_reported_once(
    corpora: dict[int, str], caplog: pytest.LogCaptureFixture
) -> None:
    sources = [{"name": name, "paths": [corpora[25]], "weight": w, "max_epochs": 1} for name, w in (("a", 1), ("b", 0))]
    change = {"step": 500, "weights": {"a": 0.0, "b": 1.0}}
    with (
        Loader(config(sources, lanes=2, weight_changes=(change,)), 4, SEED) as loader,
        caplog.at_level(logging.WARNING),
    ):
        names = [set(batch.source_tokens) for batch in loader]
    assert all(len(found) == 1 for found in names)
    assert names == sorted(names, key=max)  # no step between the last of a and the first of b
    assert names[0] == {"a"}
    assert names[-1] == {"b"}
    (message,) = [entry.message for entry in caplog.records if "have run out" in entry.message]
    assert "empty up to step 500" in message
