"""HF data sets as sources: the same batches however they are read, ids unchanged, errors that name the cause."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shards import (
    ConfigError,
    Loader,
    ShardError,
    SourceConfig,
    batch_after,
    check_fingerprint,
)
from shards.config import DataConfig
from shards.records import arrow
from shards.records.arrow_rows import Columns
from shards.storage import files
from tests.shards.corpora import config, record, restarted_hashes, words

TEXTS = [words(i, 5 + i * 37 % 120) for i in range(300)]
IDS = [[3 + (i * 31 + j * j) % 4000 for j in range(i * 13 % 90)] for i in range(300)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep tests out of the user's folders and off the network."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


def rows() -> datasets.Dataset:
    return datasets.Dataset.from_dict({"text": TEXTS, "input_ids": IDS, "id": [f"d{i}" for i in range(300)]})


def saved(tmp_path: Path, kind: str) -> str:
    """Save the rows as a data set of one kind and return its name."""
    path = tmp_path / f"set.{kind}"
    if kind == "parquet":
        rows().to_parquet(path)
    elif kind == "json":
        rows().to_json(path)
    elif kind == "folder":
        path.mkdir()
        for i in range(2):
            rows().shard(2, i, contiguous=True).to_parquet(path / f"train-{i}.parquet")
    elif kind == "disk":
        datasets.DatasetDict({"train": rows()}).save_to_disk(path, num_shards={"train": 3})
    return str(path)


def of(name: str, source: dict[str, object] | None = None, **changes: object) -> DataConfig:
    return config([{"name": "a", "dataset": name, **(source or {})}], **({"lanes": 8} | changes))


def hashes(data: DataConfig, count: int = 30) -> list[int]:
    with Loader(data, 8, seed=3) as loader:
        return [batch.row_hash for batch in itertools.islice(loader, count)]


@pytest.mark.parametrize("key", [None, "input_ids"])
def test_batches_do_not_depend_on_ranks_workers_or_restarts(tmp_path: Path, key: str | None) -> None:
    source = {"input_ids_key": key}
    data = of(saved(tmp_path, "disk"), source)
    straight = hashes(data)
    assert len(set(straight)) == 30
    assert hashes(data.model_copy(update={"num_workers": 1})) == straight
    assert restarted_hashes(data) == straight


def test_an_epoch_holds_the_ids_of_each_row_once_and_unchanged(tmp_path: Path) -> None:
    data = of(saved(tmp_path, "parquet"), {"input_ids_key": "input_ids", "max_epochs": 1}, seq_len=100, lanes=1)
    with Loader(data, 1, seed=1) as loader:
        seen = {}
        for batch in loader:
            for piece, origin in enumerate(batch.origins(), 1):
                seen[origin.line] = batch.tokens[0][batch.segment_ids[0] == piece].tolist()
    assert seen == {line: ids for line, ids in enumerate(IDS, 1) if ids}


def test_texts_give_the_same_documents_as_a_shard(tmp_path: Path) -> None:
    shard = tmp_path / "shard.jsonl"
    shard.write_bytes(b"".join(record(text) for text in TEXTS))

    def documents(data: DataConfig) -> list[list[int]]:
        with Loader(data, 1, seed=1) as loader:
            return sorted(
                batch.tokens[0][batch.segment_ids[0] == piece].tolist()
                for batch in loader
                for piece in range(1, int(batch.segment_ids.max()) + 1)
            )

    shape = {"seq_len": 2000, "lanes": 1}
    expected = documents(config([{"name": "a", "paths": [str(shard)], "max_epochs": 1}], **shape))
    assert len(expected) == len(TEXTS)
    for kind in ("json", "folder", "disk"):
        assert documents(of(saved(tmp_path, kind), {"max_epochs": 1}, **shape)) == expected


@pytest.mark.parametrize("kind", ["uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"])
def test_token_ids_of_any_integer_type_give_the_same_tokens(tmp_path: Path, kind: str) -> None:
    """Include nulls, which once were filled with a -1 that unsigned numbers have no room for."""
    ids: list[list[int | None] | None] = [[3 + (i * 7 + j) % 100 for j in range(i % 30)] for i in range(200)]
    ids[5], ids[6] = None, [7, None]
    hashes_of = {}
    for name in (kind, "int64"):
        features = datasets.Features({"input_ids": datasets.List(datasets.Value(name))})
        datasets.Dataset.from_dict({"input_ids": ids}, features=features).save_to_disk(tmp_path / name)
        data = of(str(tmp_path / name), {"input_ids_key": "input_ids", "max_epochs": 1}, lanes=1, on_bad_record="skip")
        with Loader(data, 8, seed=3) as loader:
            batches = list(loader)
            hashes_of[name] = [batch.row_hash for batch in batches], loader.fingerprint["shards"]
        assert {item.line for batch in batches for item in batch.skipped} == {6, 7}
    digests = [pairs["a"][0][1] for _, pairs in hashes_of.values()]
    assert hashes_of[kind][0] == hashes_of["int64"][0]
    assert len(set(digests)) == 1, "contents are equal, however they are stored"


@pytest.mark.parametrize("element", [pa.uint16(), pa.int64()])
def test_token_ids_in_any_kind_of_list_are_the_same(tmp_path: Path, element: pa.DataType) -> None:
    """Include lists of one length with nulls, whose places in the values a fixed size keeps."""
    ids = [[3 + (i * 7 + j) % 100 for j in range(20)] if i % 17 else None for i in range(100)]
    ids[5] = [7, None, *range(18)]  # type: ignore[list-item]
    found = []
    for number, kind in enumerate((pa.list_(element), pa.large_list(element), pa.list_(element, 20))):
        path = tmp_path / f"{number}.arrow"
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, pa.schema({"ids": kind})) as stream:
            stream.write_table(pa.table({"ids": pa.array(ids, kind)}), max_chunksize=33)
        column = files.column_path(str(path), "ids")
        source = SourceConfig(name="a", dataset=str(path), input_ids_key="ids")
        records = Columns().records(column, files.stat(column), 3, 90, source)
        assert records.token_ids is not None
        measured = arrow.measure(column)
        values = [part.tolist() for part in records.token_ids]
        found.append((values, records.lines, records.bad, measured.row_bytes.tolist(), measured.content_hash))
    assert found[0] == found[1] == found[2]
    assert found[0][0] == [row for i, row in enumerate(ids) if 3 <= i < 93 and row is not None and i != 5]


def test_files_that_are_no_data_set_are_reported_with_the_cause(tmp_path: Path) -> None:
    for name, second, cause in (
        ("keys", {"text": "b", "extra": 1}, r"CastError: .*extra.*column names don't match"),
        ("types", {"text": "b", "id": [1]}, r"TypeError: .*list<item: int64> to string"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        for number, line in enumerate(({"text": "a", "id": "x"}, second)):
            (folder / f"train-{number}.jsonl").write_text(json.dumps(line) + "\n")
        with pytest.raises(ShardError, match=rf"source 'a'.*cannot be loaded: {cause}.*with paths: instead"):
            Loader(of(str(folder)), 8)
        # The way around that the message suggests works, and for Parquet as for JSON lines
        for file in folder.glob("*.jsonl"):
            pq.write_table(pa.Table.from_pylist([json.loads(file.read_text())]), file.with_suffix(".parquet"))
        with Loader(config([{"name": "a", "paths": [f"{folder}/*.parquet"], "max_epochs": 1}], lanes=1), 1) as loader:
            assert sum(len(list(batch.origins())) for batch in loader) == 2
        with Loader(config([{"name": "a", "paths": [f"{folder}/*.jsonl"], "max_epochs": 1}], lanes=1), 1) as loader:
            assert sum(len(list(batch.origins())) for batch in loader) == 2


def test_provenance_names_the_row_and_its_document(tmp_path: Path) -> None:
    for key in (None, "input_ids"):
        data = of(saved(tmp_path, "disk"), {"input_ids_key": key})
        origin = next(batch_after(data, 8, 3, None, 5).origins())
        found = Columns().records(origin.shard, files.stat(origin.shard), origin.line - 1, 1, data.sources[0])
        (name,) = found.ids
        assert name is not None
        number = int(name[1:])
        if found.token_ids is None:
            assert found.texts == [TEXTS[number]]
        else:
            assert found.token_ids[0].tolist() == IDS[number]


def test_changed_contents_are_detected_and_a_moved_data_set_is_accepted(tmp_path: Path) -> None:
    def fingerprint(name: str) -> dict[str, object]:
        with Loader(of(name), 8) as loader:
            return loader.fingerprint

    before = fingerprint(saved(tmp_path, "disk"))
    (tmp_path / "set.disk").rename(tmp_path / "moved")
    check_fingerprint(before, fingerprint(str(tmp_path / "moved")))
    changed = rows().to_dict()
    changed["text"][7] = TEXTS[7][::-1]  # as long as before
    datasets.Dataset.from_dict(changed).save_to_disk(tmp_path / "other", num_shards=3)
    with pytest.raises(ShardError, match=r"00000-of-00003\.arrow#text.*content changed"):
        check_fingerprint(before, fingerprint(str(tmp_path / "other")))


def test_nulls_are_bad_records(tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    lines = [{"text": text, "input_ids": ids} for text, ids in zip(TEXTS, IDS, strict=True)]
    lines[4] = {"text": None, "input_ids": None}
    lines[5] = {"text": "x", "input_ids": [7, None]}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for key, bad in ((None, {5}), ("input_ids", {5, 6})):
        source = {"input_ids_key": key, "max_epochs": 1}
        with pytest.raises(ShardError, match=r"#(text|input_ids), line [56]: .* null"):
            hashes(of(str(path), source, lanes=1), 1000)
        with Loader(of(str(path), source, on_bad_record="skip", lanes=1), 1) as loader:
            assert {skipped.line for batch in loader for skipped in batch.skipped} == bad


def test_mistakes_in_a_data_set_source_are_named(tmp_path: Path) -> None:
    name = saved(tmp_path, "disk")
    for source, message in (
        ({"text_key": "body"}, r"source 'a'.*no column 'body' \(text_key\); its columns are text, input_ids, id"),
        ({"input_ids_key": "ids"}, r"no column 'ids' \(input_ids_key\)"),
        ({"input_ids_key": "text"}, r"column 'text' holds texts; name it with text_key"),
        ({"text_key": "input_ids"}, r"column 'input_ids' holds token ids; name it with input_ids_key"),
        ({"split": "valid"}, r"split 'valid'.*its splits are train"),
        ({"dataset": "nobody/nothing-here"}, r"data set 'nobody/nothing-here'.*cannot be loaded"),
    ):
        with pytest.raises(ShardError, match=message):
            Loader(of(name, source), 8)
    rows().select([]).to_parquet(tmp_path / "empty.parquet")
    with pytest.raises(ShardError, match=r"cannot be loaded.*no data"):
        Loader(of(str(tmp_path / "empty.parquet")), 8)
    with pytest.raises(ShardError, match=r"covers only part of its files"):
        Loader(of(saved(tmp_path, "parquet"), {"split": "train[:10%]"}), 8)
    large = datasets.Dataset.from_dict({"input_ids": [[1, 2], [3, 70_000]]})
    large.save_to_disk(tmp_path / "large")
    with pytest.raises(ShardError, match=r"line 2: token id 70000, but data.tokenizer has 4096 tokens"):
        hashes(of(str(tmp_path / "large"), {"input_ids_key": "input_ids"}))
    huge = pa.table({"input_ids": pa.array([[1], [2**63]], pa.list_(pa.uint64()))})
    datasets.Dataset(datasets.table.InMemoryTable(huge)).save_to_disk(tmp_path / "huge")
    with pytest.raises(
        ShardError, match=r"huge.*#input_ids: holds a token id beyond any vocabulary: .*9223372036854775808"
    ):
        Loader(of(str(tmp_path / "huge"), {"input_ids_key": "input_ids"}), 8)
    for source in ({"name": "a"}, {"name": "a", "paths": ["x"], "dataset": "y"}):
        with pytest.raises(ConfigError, match="either paths or dataset"):
            DataConfig.parse({"seq_len": 8, "tokenizer": "t", "sources": [source]})
