"""Parquet files as shards: the batches of JSON lines, whatever the layout, ranks and restarts; errors that say why."""

from __future__ import annotations

import bz2
import itertools
import json
import lzma
import os
import random
import subprocess
import sys
from pathlib import Path

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash

from pretrain.commands import dispatch
from shards import ConfigError, Loader, ShardError, Tokenizer, batch_after, document, preparation, read_documents
from shards.arrays import greedy_groups
from shards.config import DataConfig
from shards.exposure import naming, text_index
from shards.exposure.search import TextSearch
from shards.index.shard_index import build, hash_tables
from shards.records import parquet
from shards.records.document_list import DocumentList, hash_of_text
from shards.storage import files, remote
from shards.suites.suite import find
from shards.tokenizer_check import check_sources
from tests.shards.corpora import ROOT, config, record, restarted_hashes, words, write_shard

TEXTS = [words(i, 5 + i * 37 % 120) + "\nβ" * (i % 3) for i in range(300)]
IDS = [f"d{i}" for i in range(300)]
SITES = [f"s{i % 4}" for i in range(300)]


def write(path: Path, texts: list[str | None] = TEXTS, rows: int = 70, **options: object) -> Path:  # type: ignore[assignment]
    """Write texts, with ids, sites and a column that nothing reads."""
    count = len(texts)
    meta = pa.array([{"site": SITES[i % 300], "long": "x" * 500} for i in range(count)])
    columns = {"noise": pa.array(range(count)), "id": pa.array(IDS[:count]), "meta": meta, "text": pa.array(texts)}
    pq.write_table(pa.table(columns), path, row_group_size=rows, **options)
    return path


def of(path: Path | str, **changes: object) -> DataConfig:
    source = {"name": "a", "paths": [str(path)], "source_from": "meta.site", **changes.pop("source", {})}  # type: ignore[dict-item]
    return config([source], **({"lanes": 8} | changes))


def hashes(data: DataConfig, count: int = 30) -> list[int]:
    with Loader(data, 8, seed=3) as loader:
        return [batch.row_hash for batch in itertools.islice(loader, count)]


def test_batches_do_not_depend_on_ranks_workers_or_restarts(tmp_path: Path) -> None:
    data = of(write(tmp_path / "a.parquet"))
    straight = hashes(data)
    assert len(set(straight)) == 30
    assert hashes(data.model_copy(update={"num_workers": 1})) == straight
    assert restarted_hashes(data) == straight


def test_layout_changes_no_batch_and_no_hash(tmp_path: Path) -> None:
    """Row groups, pages, compression, dictionaries, the type and the place of the column are no content."""
    tables = {"text": {}, "large": {"type": pa.large_string()}, "view": {"type": pa.string_view()}, "bytes": {}}
    expected = None
    for number, (name, options) in enumerate(
        {
            "zstd": {"compression": "zstd", "rows": 7},
            "snappy": {"compression": "snappy", "rows": 300, "data_page_size": 100},
            "plain": {"compression": "none", "use_dictionary": False, "data_page_version": "2.0"},
        }.items()
    ):
        path = write(tmp_path / f"{name}.parquet", **options)  # type: ignore[arg-type]
        found = hashes(of(path)), build(f"{path}#text", 2048, 0).content_hash
        expected = expected or found
        assert found == expected, (number, name)
    for name, kind in tables.items():
        column = pa.array([text.encode() for text in TEXTS]) if name == "bytes" else pa.array(TEXTS, kind.get("type"))
        content = pa.StructArray.from_arrays([column, pa.array(IDS)], ["text", "other"])
        meta = pa.array([{"site": site} for site in SITES])
        pq.write_table(pa.table({"content": content, "id": IDS, "meta": meta}), tmp_path / f"{name}-in.parquet")
        data = of(tmp_path / f"{name}-in.parquet", source={"text_key": "content.text"})
        assert hashes(data) == expected[0], name  # type: ignore[index]


@pytest.mark.parametrize("plan", [1, 2])
@pytest.mark.parametrize("alone", [True, False])
def test_json_lines_of_the_same_documents_give_the_same_batches(tmp_path: Path, alone: bool, plan: int) -> None:
    """Hold where record bounds are alike: if each record is a segment and a window, or one window holds all of them."""
    texts = [text for text in TEXTS if len(text.encode()) > 100][: 300 if alone else 40]
    (tmp_path / "a.jsonl").write_bytes(b"".join(record(text) for text in texts))
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", row_group_size=9)
    lanes = 1 if plan == 1 else 16 if alone else 4  # of plan version 2 each lane has 64 segments
    shape = {"window_bytes": 100 if alone else 1 << 20, "lanes": lanes, "plan_version": plan}
    assert hashes(of(tmp_path / "a.parquet", **shape)) == hashes(of(tmp_path / "a.jsonl", **shape))


def test_json_lines_of_the_same_documents_give_the_same_epoch_wherever_bounds_fall(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"".join(record(text) for text in TEXTS))
    of_lines, of_rows = (
        epoch(of(path, lanes=3, source={"max_epochs": 1}, seq_len=1000))
        for path in (tmp_path / "a.jsonl", write_texts(tmp_path / "a.parquet", [*TEXTS], 50))
    )
    assert of_lines == of_rows
    assert len(of_rows) == 300


def epoch(data: DataConfig) -> dict[int, list[list[int]]]:
    """Return the tokens of each line, once for each time that it is read."""
    found: dict[int, list[list[int]]] = {}
    with Loader(data, 3, seed=1) as loader:
        for batch in loader:
            origins = iter(batch.origins())
            for tokens, ids in zip(batch.tokens, batch.segment_ids, strict=True):
                for piece in range(1, int(ids.max()) + 1):
                    found.setdefault(next(origins).line, []).append(tokens[ids == piece].tolist())
    return found


TOKEN_IDS = [None if i == 7 else [3 + (i * 31 + j * j) % 200 for j in range(i * 13 % 40)] for i in range(300)]


def write_ids(path: Path, kind: pa.DataType = pa.list_(pa.int32()), **options: object) -> Path:  # noqa: B008
    """Write token ids, with a list that holds a null, beside texts."""
    ids: list[object] = [*TOKEN_IDS]
    ids[9] = [7, None, *range(3, 21)]
    columns = {"text": TEXTS, "input_ids": pa.array(ids, kind), "id": IDS}
    pq.write_table(pa.table(columns), path, **({"row_group_size": 70} | options))
    return path


def of_ids(path: Path | str, **changes: object) -> DataConfig:
    source = {"name": "a", "paths": [str(path)], "input_ids_key": "input_ids", **changes.pop("source", {})}  # type: ignore[dict-item]
    return config([source], **({"lanes": 4, "on_bad_record": "skip"} | changes))


def test_token_ids_give_the_batches_of_a_data_set_of_the_same_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = write_ids(tmp_path / "a.parquet")
    listed = of_ids(path)
    whole = of_ids("", source={"paths": [], "dataset": str(path)})
    expected = hashes(whole)
    assert hashes(listed) == expected
    assert restarted_hashes(listed) == expected
    indexes = [preparation.source_shards(data, data.sources[0]) for data in (listed, whole)]
    assert len({hash_tables(shard.index for shard in shards) for shards in indexes}) == 1


@pytest.mark.parametrize("kind", [pa.uint8(), pa.uint64()])
def test_token_ids_of_any_type_and_layout_give_the_same_batches(tmp_path: Path, kind: pa.DataType) -> None:
    expected = hashes(of_ids(write_ids(tmp_path / "a.parquet")), 8)
    path = write_ids(tmp_path / "b.parquet", pa.large_list(kind), row_group_size=300, data_page_size=100)
    assert hashes(of_ids(path), 8) == expected
    tokens = pa.table({"tokens": [{"ids": ids} for ids in pq.read_table(path)["input_ids"].to_pylist()]})
    pq.write_table(tokens.cast(pa.schema({"tokens": pa.struct({"ids": pa.list_(kind)})})), tmp_path / "c.parquet")
    assert hashes(of_ids(tmp_path / "c.parquet", source={"input_ids_key": "tokens.ids"}), 8) == expected


def test_an_epoch_holds_the_ids_of_each_row_unchanged_also_from_lists_of_one_size(tmp_path: Path) -> None:
    ids = [[3 + (i + j) % 200 for j in range(20)] if i != 5 else None for i in range(60)]
    fixed = pa.array(ids, pa.list_(pa.uint16(), 20))
    pq.write_table(pa.table({"input_ids": fixed}), tmp_path / "a.parquet", row_group_size=13)
    found = epoch(of_ids(tmp_path / "a.parquet", source={"max_epochs": 1}, seq_len=50))
    assert found == {line: [row] for line, row in enumerate(ids, 1) if row is not None}


def test_mistakes_with_token_ids_are_named(tmp_path: Path) -> None:
    path = write_ids(tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_bytes(record("text"))
    with pytest.raises(
        ShardError, match=r"source 'a': input_ids_key is for a data set or Parquet .*a\.jsonl; leave it"
    ):
        Loader(of_ids(tmp_path / "a.jsonl"), 8)
    with pytest.raises(ShardError, match=r"a\.parquet#input_ids, line (8|10): 'input_ids' is null"):
        hashes(of_ids(path, on_bad_record="fail", lanes=1))
    for source, message in (
        ({"input_ids_key": "text"}, r"column 'text' holds texts; name it with text_key"),
        ({"input_ids_key": None, "text_key": "input_ids"}, r"'input_ids' holds token ids; name it with input_ids_key"),
    ):
        data = of_ids(path, source=source)
        with pytest.raises(ShardError, match=message):
            hashes(data)
        with pytest.raises(ShardError, match=message):  # before a run begins
            check_sources(data, Tokenizer.of(data))
    for ids, message in (([3, 70_000], "line 1: token id 70000, but data.tokenizer has"), ([2**63], "beyond any")):
        pq.write_table(pa.table({"input_ids": pa.array([ids], pa.list_(pa.uint64()))}), tmp_path / "b.parquet")
        with pytest.raises(ShardError, match=message):
            hashes(of_ids(tmp_path / "b.parquet"))
    for read in (lambda data: document(path, 1, data), lambda data: next(read_documents(path, data))):
        with pytest.raises(ShardError, match="holds token ids, no texts to read"):
            read(of_ids(path).sources[0])


def test_cells_are_those_of_the_lengths_and_hashed_as_read(tmp_path: Path) -> None:
    texts: list[str | None] = [*TEXTS, "é" * 5000, None, "", "x" * 2048, *TEXTS]
    path = f"{write_texts(tmp_path / 'a.parquet', texts, 33)}#text"
    lengths = np.array([len((text or "").encode()) + 1 for text in texts])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    firsts = [*greedy_groups(offsets, np.array([0, len(texts)]), 2048).tolist(), len(texts)]
    index = build(path, 2048, 0)
    assert index.table().tolist() == [[first, int(offsets[first])] for first in firsts]
    assert index.num_documents == len(texts) - 1
    assert index.num_frames == -(-len(texts) // 33)
    for first, stop, check in zip(firsts, firsts[1:], np.frombuffer(index.checks, "<u8").tolist(), strict=False):
        part = texts[first:stop]
        sizes = np.array([-1 if text is None else len(text.encode()) for text in part], "<i8")
        assert xxhash.xxh3_64_intdigest(sizes.tobytes() + "".join(text or "" for text in part).encode()) == check


def write_texts(path: Path, texts: list[str | None], rows: int = 1000) -> Path:
    pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), path, row_group_size=rows)
    return path


def test_documents_keep_their_row_id_and_sub_source(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet")
    data = of(path, lanes=1, source={"max_epochs": 1})
    with Loader(data, 8, seed=1) as loader:
        seen = {origin.line for batch in loader for origin in batch.origins()}
        assert seen == set(range(1, 301))
    for line in (1, 70, 71, 300):
        found = document(path, line, data.sources[0])
        assert (found.text, found.id, found.source, found.line) == (
            TEXTS[line - 1],
            f"d{line - 1}",
            SITES[line - 1],
            line,
        )
    with pytest.raises(ShardError, match="has no line 301"):
        document(path, 301, data.sources[0])


def test_documents_are_read_from_the_beginning(tmp_path: Path) -> None:
    """By the file, the column, or a source that names the column, which may lie in a struct."""
    path, nested = write(tmp_path / "a.parquet"), tmp_path / "b.parquet"
    plain = list(read_documents(path))
    assert [(one.text, one.id, one.line) for one in plain] == list(zip(TEXTS, IDS, range(1, 301), strict=True))
    assert {(one.source, one.shard) for one in plain} == {("a", f"{path}#text")}
    assert list(read_documents(f"{path}#text")) == plain
    pq.write_table(pa.table({"content": [{"text": text} for text in TEXTS], "meta": [{"id": i} for i in IDS]}), nested)
    source = of(nested, source={"text_key": "content.text", "id_key": "meta.id"}).sources[0]
    found = list(read_documents(nested, source))
    assert [(one.text, one.id) for one in found] == list(zip(TEXTS, IDS, strict=True))
    assert document(nested, 7, source) == found[6]
    write_texts(path, [TEXTS[0], None, TEXTS[2]])
    assert [one.line for one in read_documents(path, on_bad_record="skip")] == [1, 3]
    documents = read_documents(path)
    assert next(documents).line == 1
    with pytest.raises(ShardError, match="line 2: 'text' is null.*on_bad_record='skip'"):
        next(documents)


def test_dotted_keys_mean_the_same_in_every_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"content": {"text": TEXTS[i]}, "meta": {"id": i, "site": SITES[i]}} for i in range(9)]
    flat = [{"content.text": TEXTS[i], "meta.id": i, "meta.site": SITES[i]} for i in range(9)]
    keys = {"text_key": "content.text", "id_key": "meta.id", "source_from": "meta.site"}
    for name, table in (("nested", rows), ("flat", flat)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
        pq.write_table(pa.Table.from_pylist(table), tmp_path / f"{name}.parquet")
        for source in (
            {"paths": [str(tmp_path / f"{name}.jsonl")]},
            {"paths": [str(tmp_path / f"{name}.parquet")]},
            {"dataset": str(tmp_path / f"{name}.parquet")},
        ):
            (parsed,) = config([{"name": "a", **source, **keys}]).sources
            (shard,) = preparation.shard_paths(parsed)
            found = [(one.text, one.id, one.source) for one in read_documents(shard, parsed)]
            assert found == [(TEXTS[i], str(i), SITES[i]) for i in range(9)], (name, source)


def test_documents_are_named_searched_and_forgotten_as_those_of_json_lines(tmp_path: Path) -> None:
    """By the file or the column, by an id inside a struct, and by text; ids of tokens by their rows."""
    texts = [words(i, 40) for i in range(50)]
    ids = [{"key": f"d{i}"} for i in range(50)]
    pq.write_table(pa.table({"text": texts, "meta": ids, "input_ids": [[5] * 9] * 50}), tmp_path / "a.parquet")
    data = of(tmp_path / "a.parquet", source={"id_key": "meta.key", "max_epochs": 1}, lanes=1, seq_len=400)
    shards = [preparation.source_shards(data, data.sources[0])]
    documents = naming.Documents(data, shards)
    (place,) = documents.at("a.parquet:7")
    assert documents.at(f"{tmp_path}/a.parquet#text:7") == [place]
    assert documents.read([place])[place].text == texts[6]
    text_index.obtain(data, data.sources[0], shards[0][0])
    search = TextSearch(data, shards)
    assert [(match.place, match.id) for match in search.texts([texts[6]])[0]] == [(place, "d6")]
    assert search.ids(["d6"]) == [[place]]
    with pytest.raises(ConfigError, match="has no line 51; it has 50"):
        documents.at("a.parquet:51")
    with Loader(data, 1, seed=1) as loader:
        all_learned = sum(batch.n_targets for batch in loader)
    for line in (
        {"shard": "a.parquet", "line": 7},
        {"shard": "a.parquet#text", "line": 7},
        {"source": "a", "id": "d6"},
        {"text_hash": hash_of_text(texts[6])},
    ):
        (tmp_path / "list.jsonl").write_text(json.dumps(line))
        listed = DocumentList(tmp_path / "list.jsonl", "--file")
        assert documents.listed(listed, lambda: search) == [place], line
        with Loader(data.model_copy(update={"forget": tmp_path / "list.jsonl"}), 1, seed=1) as loader:
            assert sum(batch.n_targets for batch in loader) < all_learned, line
    tokens = of_ids(tmp_path / "a.parquet", source={"id_key": "meta.key"})
    shards = [preparation.source_shards(tokens, tokens.sources[0])]
    (place,) = naming.Documents(tokens, shards).at("a.parquet:7")
    assert naming.Documents(tokens, shards).path(place) == f"{tmp_path}/a.parquet#input_ids"
    origin = next(batch_after(tokens, 8, 3, None, 5).origins())
    assert origin.shard == f"{tmp_path}/a.parquet#input_ids"


def test_bad_rows_are_named_by_their_number(tmp_path: Path) -> None:
    raw = pa.array([b"good one", None, b"bad \xff here", b"", b"last"])
    # Written as a string column, as some writers do without looking
    column = pa.Array.from_buffers(pa.string(), 5, raw.buffers(), raw.null_count)
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(ShardError, match=r"a\.parquet#text, line 2: 'text' is null"):
        hashes(of(tmp_path / "a.parquet", lanes=1))
    data = of(tmp_path / "a.parquet", lanes=1, on_bad_record="skip", source={"max_epochs": 1})
    with Loader(data, 1, seed=1) as loader:
        skipped = {(item.line, item.reason) for batch in loader for item in batch.skipped}
    assert {line for line, _ in skipped} == {2, 3}
    assert "'text' is not UTF-8 at its byte 4" in {reason for _, reason in skipped}


def test_mistakes_are_named(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet")
    for source, message in (
        (
            {"text_key": "body"},
            r"no column 'body'; its columns are noise, id, meta\.site, meta\.long, text: set",
        ),
        ({"text_key": "meta"}, r"column 'meta' holds struct<.*neither texts nor lists of token ids"),
        ({"text_key": "noise"}, r"column 'noise' holds int64, neither texts nor lists"),
        ({"text_key": "meta.size"}, r"no column 'meta\.size'"),
        ({"paths": [str(tmp_path / "none-*.parquet")]}, r"no shard matches"),
    ):
        with pytest.raises(ShardError, match=message):
            Loader(of(tmp_path / "a.parquet", source=source), 8)
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ShardError, match=r"cut\.parquet: cannot be read as Parquet .*truncated, damaged"):
        Loader(of(tmp_path / "cut.parquet"), 8)
    (tmp_path / "a.jsonl").write_bytes(whole)
    with pytest.raises(ShardError, match=r"is Parquet, which is read under a name that ends in \.parquet"):
        Loader(of(tmp_path / "a.jsonl"), 8)


def test_only_a_glob_that_ends_in_parquet_takes_parquet(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_bytes(record("one"))
    assert files.expand((f"{tmp_path}/*",), "a") == [f"{tmp_path}/b.jsonl"]
    assert "a.parquet" in caplog.text
    assert files.expand((f"{tmp_path}/*.parquet",), "a") == [f"{tmp_path}/a.parquet"]


@pytest.mark.parametrize("touched", [False, True])
def test_other_texts_of_equal_length_are_never_read(tmp_path: Path, touched: bool) -> None:
    path = write(tmp_path / "a.parquet", compression="none", use_dictionary=False)
    data = of(path, lanes=1)
    assert document(path, 151, data.sources[0]).text == TEXTS[150]
    raw, before = path.read_bytes(), path.stat()
    at = raw.index(TEXTS[150].encode())
    path.write_bytes(raw[:at] + b"W" + raw[at + 1 :])
    if not touched:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(ShardError, match="changed after it was indexed" if touched else "so it is damaged, or"):
        document(path, 151, data.sources[0])


def test_a_remote_file_gives_the_same_batches_and_only_its_columns_are_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "BLOCK_BYTES", 1 << 12)
    monkeypatch.setattr(parquet, "STREAM_BYTES", 1 << 10)
    draw = np.random.default_rng(0)
    noise = pa.array(draw.bytes(1 << 20) for _ in range(4))
    texts = pa.table({"text": TEXTS, "id": IDS, "meta": [{"site": site} for site in SITES]})
    more = pa.table({"noise": pa.concat_arrays([noise, pa.nulls(len(TEXTS) - 4, noise.type)])})
    pq.write_table(texts.append_column("noise", more.column(0)), tmp_path / "a.parquet", compression="zstd")
    data = (tmp_path / "a.parquet").read_bytes()
    system = fsspec.filesystem("memory")
    system.pipe("/a.parquet", data)
    fetched = []
    cat_file = system.cat_file

    def watched(path: str, start: int, end: int) -> bytes:
        fetched.append(end - start)
        return cat_file(path, start=start, end=end)

    monkeypatch.setattr(system, "cat_file", watched)
    local = hashes(of(tmp_path / "a.parquet"))
    assert hashes(of("memory://a.parquet", index_dir=tmp_path)) == local
    assert len(data) > 4 << 20
    assert sum(fetched) < len(data) / 4
    system.rm("/a.parquet")


def test_a_data_set_of_the_same_file_gives_the_same_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hold because both count texts alike, and hash the values alone."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = write(tmp_path / "a.parquet")
    listed = of(path)
    source = {"name": "a", "dataset": str(path), "source_from": "meta.site"}
    whole = config([source], lanes=8)
    assert hashes(whole) == hashes(listed)
    indexes = [preparation.source_shards(data, data.sources[0]) for data in (listed, whole)]
    assert len({hash_tables(shard.index for shard in shards) for shards in indexes}) == 1


def test_a_source_may_mix_formats_and_a_suite_may_be_parquet(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", TEXTS[:100])
    write_shard(tmp_path / "b.jsonl.gz", b"".join(record(text) for text in TEXTS[100:200]))
    (tmp_path / "c.jsonl.xz").write_bytes(lzma.compress(b"".join(record(text) for text in TEXTS[200:250])))
    (tmp_path / "d.json.bz2").write_bytes(bz2.compress(b"".join(record(text) for text in TEXTS[250:])))
    write_shard(tmp_path / "e.jsonl.zst", b"".join(record(text) for text in TEXTS[:10])).rename(
        tmp_path / "e.jsonl.zstd"
    )
    patterns = [f"{tmp_path}/*{ending}" for ending in (".parquet", ".gz", ".xz", ".bz2", ".zstd")]
    data = of("", source={"paths": patterns, "max_epochs": 1}, lanes=4, seq_len=500)
    with Loader(data, 4, seed=1) as loader:
        found = sorted((Path(origin.shard).name, origin.line) for batch in loader for origin in batch.origins())
    names = {"a.parquet#text": 100, "b.jsonl.gz": 100, "c.jsonl.xz": 50, "d.json.bz2": 50, "e.jsonl.zstd": 10}
    assert sorted(set(found)) == [(name, line) for name, count in names.items() for line in range(1, count + 1)]
    (tmp_path / "suite.yaml").write_text("sources: [{name: a, path: a.parquet, domain_from: meta.site}]")
    documents = list(find(tmp_path / "suite.yaml", "val").documents())
    assert [document.text for document in documents] == TEXTS[:100]
    assert [document.domain for document in documents] == [f"a/{site}" for site in SITES[:100]]


def test_the_index_command_takes_the_column(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pq.write_table(pa.table({"body": TEXTS}), tmp_path / "a.parquet")
    options = ["--text-key", "body"]
    assert dispatch.run("index", [*options, "--workers", "1", f"{tmp_path}/*.parquet", "--show"]) == 0
    assert "row groups: 1" in capsys.readouterr().out
    data = of(f"{tmp_path}/*.parquet", source={"text_key": "body"}, max_index_at_start=0, window_bytes=1 << 20)
    assert len(hashes(data, 3)) == 3, "what the command made is what a run looks for"
    (tmp_path / "a.parquet#body.index.json").unlink()
    (tmp_path / next(tmp_path.glob("*.manifest")).name).unlink()
    with pytest.raises(ShardError, match=r"index them first: .*--text-key body"):
        Loader(data, 8)
    assert dispatch.run("index", [*options, "--cat", str(tmp_path / "a.parquet"), "--document", "7"]) == 0
    assert capsys.readouterr().out.rstrip("\n") == TEXTS[6].rstrip("\n")


def test_reading_imports_no_pandas(tmp_path: Path) -> None:
    """Each worker would hold it, and wait for it."""
    paths = [str(write(tmp_path / "a.parquet")), f"{write_ids(tmp_path / 'b.parquet')}#input_ids"]
    code = """if True:
        import sys, shards
        from shards.records import arrow, parquet
        text, ids = sys.argv[1:]
        shards.document(text, 7)
        for batch in parquet.ParquetFile(ids).batches(["input_ids"]):
            arrow.values_of(batch.column(0), ids), arrow.token_ids(batch.column(0), ids)
        assert 'pandas' not in sys.modules
    """
    subprocess.run([sys.executable, "-c", code, *paths], cwd=ROOT, check=True)


def test_flipped_bits_are_an_error_or_the_texts_where_pages_have_checksums(tmp_path: Path) -> None:
    path = write_texts(tmp_path / "a.parquet", [*TEXTS], 100)
    pq.write_table(pq.read_table(path), path, row_group_size=100, compression="none", write_page_checksum=True)
    raw, good = path.read_bytes(), parquet.measure(f"{path}#text", 2048)
    draw, footer = random.Random(1), int.from_bytes(path.read_bytes()[-8:-4], "little") + 8
    errors = 0
    for _ in range(60):
        broken = bytearray(raw)
        broken[draw.randrange(4, len(raw) - footer)] ^= 1 << draw.randrange(8)
        path.write_bytes(broken)
        try:
            assert parquet.measure(f"{path}#text", 2048) == good
        except ShardError:
            errors += 1
    assert errors > 50
