"""Parquet files as shards: the batches of JSON lines, whatever the layout, ranks and restarts; errors that say why."""

from __future__ import annotations

import bz2
import itertools
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

from shards import Loader, ShardError, document, preparation
from shards.arrays import greedy_groups
from shards.config import DataConfig
from shards.index.shard_index import build, hash_tables
from shards.records import parquet
from shards.storage import files, remote
from shards.suites.suite import find
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


@pytest.mark.parametrize("alone", [True, False])
def test_json_lines_of_the_same_documents_give_the_same_batches(tmp_path: Path, alone: bool) -> None:
    """Hold where record bounds are alike: if each record is a cell, or one window holds all of them."""
    texts = [text for text in TEXTS if len(text.encode()) > 100][: 300 if alone else 40]
    (tmp_path / "a.jsonl").write_bytes(b"".join(record(text) for text in texts))
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", row_group_size=9)
    shape = {"window_bytes": 100 if alone else 1 << 20, "lanes": 1, "plan_version": 1}
    assert hashes(of(tmp_path / "a.parquet", **shape)) == hashes(of(tmp_path / "a.jsonl", **shape))


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
        sizes = np.array([-1 if text is None else len(text.encode()) for text in part])
        assert parquet.check_of(sizes, "".join(text or "" for text in part).encode()) == check


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
        ({"text_key": "meta"}, r"column 'meta' holds struct<.*not texts"),
        ({"text_key": "noise"}, r"column 'noise' holds int64, not texts"),
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
    patterns = [f"{tmp_path}/*{ending}" for ending in (".parquet", ".gz", ".xz", ".bz2")]
    data = of("", source={"paths": patterns, "max_epochs": 1}, lanes=4, seq_len=500)
    with Loader(data, 4, seed=1) as loader:
        found = sorted((Path(origin.shard).name, origin.line) for batch in loader for origin in batch.origins())
    names = {"a.parquet#text": 100, "b.jsonl.gz": 100, "c.jsonl.xz": 50, "d.json.bz2": 50}
    assert sorted(set(found)) == [(name, line) for name, count in names.items() for line in range(1, count + 1)]
    (tmp_path / "suite.yaml").write_text("sources: [{name: a, path: a.parquet, domain_from: meta.site}]")
    documents = list(find(tmp_path / "suite.yaml", "val").documents())
    assert [document.text for document in documents] == TEXTS[:100]
    assert [document.domain for document in documents] == [f"a/{site}" for site in SITES[:100]]


def test_the_index_command_takes_the_column(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": TEXTS}), tmp_path / "a.parquet")
    command = [sys.executable, str(ROOT / "launch/index.py"), "--text-key", "body", "--workers", "1"]
    done = subprocess.run([*command, f"{tmp_path}/*.parquet", "--show"], capture_output=True, text=True, check=True)
    assert "row groups: 1" in done.stdout
    data = of(f"{tmp_path}/*.parquet", source={"text_key": "body"}, max_index_at_start=0, window_bytes=1 << 20)
    assert len(hashes(data, 3)) == 3, "what the command made is what a run looks for"
    (tmp_path / "a.parquet#body.index.json").unlink()
    (tmp_path / next(tmp_path.glob("*.manifest")).name).unlink()
    with pytest.raises(ShardError, match=r"index them first: .*--text-key body"):
        Loader(data, 8)
    shown = subprocess.run(
        [*command[:4], "--cat", str(tmp_path / "a.parquet"), "--document", "7"], capture_output=True, text=True
    )
    assert shown.stdout.rstrip("\n") == TEXTS[6].rstrip("\n")


def test_reading_imports_no_pandas(tmp_path: Path) -> None:
    """Each worker would hold it, and wait for it."""
    code = "import sys, shards; shards.document(sys.argv[1], 7); assert 'pandas' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, str(write(tmp_path / "a.parquet"))], cwd=ROOT, check=True)


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
