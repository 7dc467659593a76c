"""Decoding from a page inside a row group gives what decoding all of it gives, or is not done."""

from __future__ import annotations

import io
import itertools
import random
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shards import ShardError, SourceConfig
from shards.index.parquet_rows import ParquetRows
from shards.index.shard_index import ShardIndex, build
from shards.records import parquet, parquet_pages
from shards.records.parquet_pages import Chunk, Pages
from tests.shards.corpora import words

ROWS = 2000
TEXTS = [None if i % 97 == 5 else words(i % 300 if i < 700 else i, 1 + i * 7 % 40) for i in range(ROWS)]
TABLE = pa.table(
    {
        "noise": range(ROWS),
        "text": TEXTS,
        "meta": [None if i % 31 == 3 else {"id": f"d{i}", "site": f"s{i % 7}"} for i in range(ROWS)],
        "ids": pa.array([None if i % 50 == 3 else list(range(i % 40)) for i in range(ROWS)], pa.list_(pa.int32())),
    }
)
PLACES = (0, 333, 1299, 1300, ROWS - 1)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let pages be used for any distance, and batches end at other rows than pages."""
    monkeypatch.setattr(parquet, "MIN_SKIPPED_BYTES", 0)
    monkeypatch.setattr(parquet, "MAX_BATCH_ROWS", 97)


def write(path: Path, **options: object) -> str:
    """Write two row groups of many pages, with a dictionary that is given up on the way; return the column's path."""
    pages = {"data_page_size": 3000, "write_batch_size": 50, "dictionary_pagesize_limit": 2000}
    pq.write_table(TABLE, path, row_group_size=1300, write_page_checksum=True, **(pages | options))
    return f"{path}#text"


def entries(path: str, columns: tuple[str, ...], walk: bool = True) -> list[int]:
    """Compare what is decoded from several places with the table; return where decoding begins for each."""
    file, found = parquet.ParquetFile(path, pages=Pages(walk)), []
    for row in PLACES:
        found.append(file.entry(columns, row))
        rows = pa.Table.from_batches(file.batches(columns, row))
        for column in columns:
            whole, *inner = column.split(".")
            expected = TABLE.column(whole).to_pylist()[row:]
            if inner:
                expected = [value and value[inner[0]] for value in expected]
            assert rows.column(column).to_pylist() == expected, (row, column)
    file.close()
    return found


@pytest.mark.parametrize(
    ("codec", "version", "indexed", "use_dictionary"),
    [
        ("zstd", "1.0", False, True),
        ("snappy", "1.0", True, True),
        ("zstd", "2.0", True, False),
        ("snappy", "2.0", False, True),
        ("none", "1.0", False, False),
    ],
)
def test_rows_are_those_of_the_table_from_every_place(
    tmp_path: Path, codec: str, version: str, indexed: bool, use_dictionary: bool
) -> None:
    options = {"compression": codec, "data_page_version": version, "use_dictionary": use_dictionary}
    path = write(tmp_path / "a.parquet", write_page_index=indexed, **options)
    begun = entries(path, ("text", "meta.id", "meta.site"))
    assert begun[2] > 1000
    assert all(place - 300 < first <= place for first, place in zip(begun, PLACES, strict=True))
    of_lists = entries(path, ("ids", "text"))
    known = indexed or version == "2.0"  # else no header says how many rows its page has
    assert of_lists[2] > 1000 if known else of_lists == [0, 0, 0, 1300, 1300]
    assert entries(path, ("text", "meta")) == [0, 0, 0, 1300, 1300], "of a struct as a whole"
    without_walking = entries(path, ("text",), walk=False)
    assert without_walking[2] > 1000 if indexed else without_walking == [0, 0, 0, 1300, 1300]


def records(path: str, index: ShardIndex, rows: ParquetRows, first: int, stop: int) -> list[str]:
    """Read the cells that hold rows [first, stop), as a window does; return the texts of those rows."""
    table = index.table()
    cells = [int((table[:, 0] <= row).sum()) - 1 for row in (first, stop - 1)]
    (begin, start), (end, last) = table[cells[0]].tolist(), table[cells[1] + 1].tolist()
    wanted = index.raw_range(path, start, last)
    source = SourceConfig(name="a", paths=(path,))
    found = rows.records(wanted, (begin, end - begin), (begin, end - begin), source)
    return [text for line, text in zip(found.lines, found.texts, strict=True) if first < line <= stop]


def test_windows_in_turn_from_many_places_decode_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.parquet")
    index, rows, decoded = build(path, 1024, 0), ParquetRows(), 0
    decode = parquet.ParquetFile._rows

    def counted(*arguments: object) -> Iterator[pa.RecordBatch]:
        nonlocal decoded
        for batch in decode(*arguments):  # type: ignore[arg-type]
            decoded += batch.num_rows
            yield batch

    monkeypatch.setattr(parquet.ParquetFile, "_rows", counted)
    for turn in range(4):
        for place in range(0, ROWS, 200):
            first = place + 50 * turn
            assert records(path, index, rows, first, first + 50) == [text for text in TEXTS[first : first + 50] if text]
    assert decoded < 4 * ROWS, "for 40 places, of which each would decode half a row group"


def test_pages_that_prove_wrong_are_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "a.parquet")
    walked = parquet_pages._walked

    def wrong(*arguments: object) -> Chunk:
        found = walked(*arguments)  # type: ignore[arg-type]
        assert found is not None
        return found._replace(rows=[max(0, row - 1) for row in found.rows])

    monkeypatch.setattr(parquet_pages, "_walked", wrong)
    index, rows = build(path, 1024, 0), ParquetRows()
    for first in (900, 950):
        assert records(path, index, rows, first, first + 30) == [text for text in TEXTS[first : first + 30] if text]
    (warning,) = (record.getMessage() for record in caplog.records)
    assert "its pages are not used" in warning


def test_damage_is_an_error_whether_pages_are_used_or_not(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", compression="none", use_dictionary=False)
    index = build(path, 1024, 0)
    raw = (tmp_path / "a.parquet").read_bytes()
    text = (TEXTS[1250] or "").encode()
    (tmp_path / "a.parquet").write_bytes(raw.replace(text, b"W" + text[1:]))
    cell = int((index.table()[:, 0] <= 1250).sum()) - 1
    (first, start), (stop, end) = index.table()[cell].tolist(), index.table()[cell + 1].tolist()
    cells, source = (first, stop - first), SourceConfig(name="a", paths=(path,))
    with pytest.raises(ShardError, match=r"a\.parquet.*changed after it was indexed"):
        ParquetRows().records(index.raw_range(path, start, end), cells, cells, source)


def test_footers_and_pages_that_are_not_understood_are_passed_over(tmp_path: Path) -> None:
    """Flip bits anywhere: what is said of pages is None or something, never another error, and never takes long."""
    write(tmp_path / "a.parquet")
    raw, draw = (tmp_path / "a.parquet").read_bytes(), random.Random(1)
    found = set()
    for _ in range(100):
        broken = bytearray(raw)
        place = draw.randrange(4, len(raw)) if draw.random() < 0.5 else len(raw) - 1 - draw.randrange(3000)
        broken[place] ^= 1 << draw.randrange(8)
        chunk = Pages().chunk(io.BytesIO(broken), draw.randrange(2), 1, True)
        found.add(chunk is None)
    assert found == {True, False}


def test_a_tail_reads_as_one_file() -> None:
    file = parquet_pages.Tail(io.BytesIO(b"0123456789"), 10, [(2, 3), (7, 2)], b"foot")
    whole = b"0123456789" + b"234" + b"78" + b"foot"
    for first, stop in itertools.combinations(range(len(whole) + 1), 2):
        file.seek(first)
        assert file.read(stop - first) == whole[first:stop]
        assert file.tell() == stop
    assert (file.seek(-4, io.SEEK_END), file.read(), file.read(5)) == (15, b"foot", b"")
