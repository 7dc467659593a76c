"""Parquet files: a resume inside a large row group, the cost of reading on, and the memory that it takes.

    python benchmarks/parquet.py [--gib 1] [--rows ROWS] [--folder FOLDER]

For one row group of English-like text, a JSON-lines file of the same documents beside it: seconds of the index's pass,
seconds until a process that starts at a place has the first window from there, MB/s of the windows that follow, of
segments anywhere in the file, of windows taken in turn from 16 and from 64 places, as lanes take them, and the most
memory that the process took. Seconds are the processor's, which other programs on the machine change least; the files
are in the system's cache.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from shards.config import DEFAULT_MAX_DECODER_WINDOW, MIB, SourceConfig
from shards.index.decoders import Decoders
from shards.index.parquet_rows import ParquetRows
from shards.index.shard_index import find, obtain
from shards.records.json_lines import parser_for
from shards.storage import files

_FOLLOWING = 16  # windows of 1 MiB that are timed after the first
_SCATTERED = 12  # places
_PER_PLACE = 16  # MiB read at each, as a segment of a large source has
_ROUNDS = 4  # windows of 1 MiB from each of the places that are read in turn; the first round opens them


def documents(size: int) -> Iterator[str]:
    """Yield texts of 200 to 10,000 characters of made-up words, until they are `size` characters."""
    draw = random.Random(1)
    words = ["".join(draw.choices("etaoinshrdlucmfwypvbgk", k=draw.randint(2, 9))) for _ in range(30_000)]
    base = " ".join(draw.choices(words, weights=[1 / (i + 1) for i in range(len(words))], k=8_000_000))
    while size > 0:
        begin, length = draw.randrange(len(base) - 10_000), draw.randint(200, 10_000)
        yield base[begin : begin + length]
        size -= length


def make(folder: Path, size: int, codec: str, rows: int) -> Path:
    """Write a Parquet file of that much text, if it is not there yet."""
    path = folder / f"{codec}-{size}-{rows}.parquet"
    if path.exists():
        return path
    schema = pa.schema({"text": pa.string(), "id": pa.string(), "url": pa.string()})
    texts, number = list(documents(size)), 0
    with pq.ParquetWriter(path, schema, compression=codec) as writer:
        for first in range(0, len(texts), rows or len(texts)):
            part = texts[first : first + (rows or len(texts))]
            ids = [f"<urn:uuid:{number + i}>" for i in range(len(part))]
            urls = [f"https://example.org/{i}" for i in range(len(part))]
            writer.write_table(pa.table({"text": part, "id": ids, "url": urls}, schema), row_group_size=len(part))
            number += len(part)
    return path


def make_lines(folder: Path, size: int) -> Path:
    """Write the same documents as JSON lines in one zstd frame, if they are not there yet."""
    path = folder / f"lines-{size}.jsonl.zst"
    if not path.exists():
        with path.open("wb") as file, zstandard.ZstdCompressor(level=3).stream_writer(file) as stream:
            for number, text in enumerate(documents(size)):
                stream.write(json.dumps({"text": text, "id": f"<urn:uuid:{number}>"}).encode() + b"\n")
    return path


class Reader:
    """An indexed shard whose cells can be read."""

    def __init__(self, path: str) -> None:
        self.path = path
        index = find(path, None, files.stat(path))
        assert index is not None, path
        self.index, self.table = index, index.table()
        self._source = SourceConfig(name="a", paths=(path,))
        self._rows, self._decoders = ParquetRows(), Decoders(DEFAULT_MAX_DECODER_WINDOW)

    def read(self, first: int, stop: int) -> int:
        """Read the records of cells [first, stop); return their raw bytes."""
        (record, start), (last, end) = self.table[[first, stop]].tolist()
        wanted = self.index.raw_range(self.path, start, end)
        if files.is_parquet(self.path):
            cells = (record, last - record)
            found = self._rows.records(wanted, cells, cells, self._source)
        else:
            found = parser_for(self._source).parse(self._decoders.read(wanted), record + 1)
        assert len(found.texts) == last - record
        return int(end - start)


def measure(path: str, what: str) -> None:
    """Print the figures of one process: of the pass, of a resume at a share of the shard, or of scattered places."""
    begun = time.process_time()
    if what == "index":
        index = obtain(path, None, MIB, DEFAULT_MAX_DECODER_WINDOW, verify_entries=True)
        seconds = time.process_time() - begun
        print(f"  index: {seconds:.1f} s, {index.raw_bytes / 1e6 / seconds:.0f} MB/s raw", end="")
    else:
        reader = Reader(path)
        cells = len(reader.table) - 1
        begun = time.process_time()
        if what.endswith("lanes"):
            lanes = int(what.removesuffix("lanes"))
            for turn in range(_ROUNDS):
                if turn == 1:
                    opened = time.process_time()
                size = sum(
                    reader.read(first + turn, first + turn + 1)
                    for first in (lane * (cells - _ROUNDS) // lanes for lane in range(lanes))
                )
            rate = size * (_ROUNDS - 1) / 1e6 / (time.process_time() - opened)
            print(
                f"  from {lanes} places in turn: first windows after {opened - begun:.1f} s, then {rate:.0f} MB/s",
                end="",
            )
        elif what == "scattered":
            draw = random.Random(3)
            size = sum(
                reader.read(cell, cell + 4)
                for first in (draw.randrange(cells - _PER_PLACE) for _ in range(_SCATTERED))
                for cell in range(first, first + _PER_PLACE, 4)
            )
            print(
                f"  segments of {_PER_PLACE} MiB anywhere: {size / 1e6 / (time.process_time() - begun):.0f} MB/s",
                end="",
            )
        else:
            first = int(float(what) * (cells - _FOLLOWING - 1))
            reader.read(first, first + 1)
            resumed = time.process_time()
            size = reader.read(first + 1, first + 1 + _FOLLOWING)
            rate = size / 1e6 / (time.process_time() - resumed)
            print(f"  from {what}: first window after {resumed - begun:.2f} s, then {rate:.0f} MB/s", end="")
    # Not the resource module's figure, which a process inherits from the one that started it
    (peak,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(f"; peak {int(peak.split()[1]) / 1024:.0f} MiB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=1.0, help="text per file")
    parser.add_argument("--rows", type=int, default=0, help="rows per row group; 0 = one row group")
    parser.add_argument("--folder", type=Path, help="where to keep the files; default: a temporary one")
    parser.add_argument("--one", nargs=2, metavar=("SHARD", "WHAT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        measure(*arguments.one)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        size = int(arguments.gib * (1 << 30))
        shards = [str(make_lines(folder, size))]
        for codec in ("zstd", "snappy"):
            shards += files.with_columns([str(make(folder, size, codec, arguments.rows))], "text")
        for shard in shards:
            print(f"{Path(shard).name}: {files.stat(shard).size / 1e6:.0f} MB", flush=True)
            for what in ("index", "0", "0.5", "0.95", "scattered", "16lanes", "64lanes"):
                subprocess.run([sys.executable, __file__, "--one", shard, what], check=True)


if __name__ == "__main__":
    main()
