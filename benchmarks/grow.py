"""Make a large shard out of small ones: `python benchmarks/grow.py 'corpus/*' OUT.jsonl.zst --raw-bytes 4e9`.

The records of a corpus are repeated in order, each marked with the number of its pass, as one frame (or one gzip
member, by the name's suffix), which is how the Pile's and Dolma's shards were written.
"""

from __future__ import annotations

import argparse
import glob
import gzip
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import zstandard

from shards import read_documents

PART_BYTES = 8 << 20


def records(paths: list[str], raw_bytes: int) -> Iterator[bytes]:
    """Yield JSON lines in parts of some MiB, `raw_bytes` in all or slightly more."""
    total, part = 0, bytearray()
    for number in itertools.count():
        for path in paths:
            for document in read_documents(path):
                text = f"{number} {document.text}" if number else document.text
                part += (
                    json.dumps({"text": text, "meta": {"set": document.source}}, ensure_ascii=False).encode() + b"\n"
                )
                if len(part) >= PART_BYTES:
                    yield bytes(part)
                    total += len(part)
                    part.clear()
                    if total >= raw_bytes:
                        return


def write(paths: list[str], out: Path, raw_bytes: int, level: int, frames: int) -> None:
    """Write a shard; its suffix names the compression."""
    if out.suffix == ".gz":
        with gzip.open(out, "wb", compresslevel=level) as packed:
            for part in records(paths, raw_bytes):
                packed.write(part)
        return
    with out.open("wb") as file:
        stream, written = zstandard.ZstdCompressor(level).compressobj(), 0
        for part in records(paths, raw_bytes):
            file.write(stream.compress(part))
            written += len(part)
            if written * frames >= raw_bytes and frames > 1:
                file.write(stream.flush())
                stream, written = zstandard.ZstdCompressor(level).compressobj(), 0
        file.write(stream.flush())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("patterns", nargs="+", metavar="SHARD", help="shards or globs of the corpus")
    parser.add_argument("out", type=Path, help="the shard to write: .jsonl.zst or .json.gz")
    parser.add_argument("--raw-bytes", type=float, default=1e9)
    parser.add_argument("--level", type=int, default=3)
    parser.add_argument("--frames", type=int, default=1)
    arguments = parser.parse_args()
    paths = sorted(path for pattern in arguments.patterns for path in glob.glob(pattern))
    write(paths, arguments.out, int(arguments.raw_bytes), arguments.level, arguments.frames)


if __name__ == "__main__":
    main()
