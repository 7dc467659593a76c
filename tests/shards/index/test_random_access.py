"""Reading from anywhere in a shard, local or remote: from the nearest entry and no further."""

from __future__ import annotations

import io
import json
import subprocess
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import zstandard

from pretrain.commands import dispatch
from shards import Loader, ShardError, document, open_at, read_documents
from shards.index.paths import history_path, index_path
from shards.index.shard_index import obtain
from shards.storage import files, remote
from tests.shards.corpora import SAMPLE, config

SHARDS = [SAMPLE / "pile-00.jsonl.zst", SAMPLE / "dolma-wikipedia-0000.json.gz"]
pytestmark = pytest.mark.usefixtures("near")


@pytest.mark.parametrize("path", SHARDS, ids=lambda path: path.name)
def test_a_document_equals_the_one_read_from_the_start(tmp_path: Path, path: Path) -> None:
    documents = list(read_documents(path))
    for number in (0, 1, len(documents) // 2, len(documents) - 1):
        assert document(path, documents[number].line, index_dir=tmp_path) == documents[number]
    with pytest.raises(ShardError, match="has no line 0"):
        document(path, 0, index_dir=tmp_path)
    with pytest.raises(ShardError, match=f"its lines are 1 to {documents[-1].line}"):
        document(path, documents[-1].line + 1, index_dir=tmp_path)


@pytest.mark.parametrize("path", SHARDS, ids=lambda path: path.name)
def test_an_opened_shard_reads_and_seeks_like_the_unpacked_file(tmp_path: Path, path: Path) -> None:
    unpacked = {".zst": ["zstd", "-dc"], ".gz": ["gzip", "-dc"]}[path.suffix]
    raw = subprocess.run([*unpacked, str(path)], stdout=subprocess.PIPE, check=True).stdout
    reference = io.BytesIO(raw)
    with open_at(path, 1234, index_dir=tmp_path) as file:
        reference.seek(1234)
        assert file.read(100) == reference.read(100)
        for offset, whence, size in ((len(raw) // 2, 0, 5), (3_000_000, 1, 9), (-50, 2, 200), (0, 0, 2_000_000)):
            assert file.seek(offset, whence) == reference.seek(offset, whence)
            assert file.read(size) == reference.read(size)
        assert file.readline() == reference.readline()
        file.seek(len(raw) + 10)
        assert file.read() == b""


def test_the_command_prints_a_document(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = list(read_documents(SHARDS[0]))[40]
    command = ["--index-dir", str(tmp_path), "--cat", str(SHARDS[0])]
    assert dispatch.run("index", [*command, "--document", str(expected.line)]) == 0
    assert capsys.readouterr().out == expected.text + "\n"
    assert dispatch.run("index", command) == 2
    assert "--cat and --document belong together" in capsys.readouterr().err


class Handler(BaseHTTPRequestHandler):
    """Serve the file in `server.data` by ranges and count their bytes."""

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(len(self.server.data), 200)  # type: ignore[attr-defined]

    def do_GET(self) -> None:
        first, last = self.headers["Range"].removeprefix("bytes=").split("-")
        data: bytes = self.server.data  # type: ignore[attr-defined]
        part = data[int(first) : int(last) + 1]
        self.server.sent += len(part)  # type: ignore[attr-defined]
        self.answer(len(part), 206)
        self.wfile.write(part)

    def answer(self, length: int, status: int) -> None:
        self.send_response(status)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", '"one"')
        self.send_header("Content-Length", str(length))
        self.end_headers()


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    text = b"".join(zstandard.ZstdDecompressor().stream_reader(path.read_bytes()).read() for path in SHARDS[:1])
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.data = zstandard.ZstdCompressor(write_content_size=False, level=1).compress(text)  # type: ignore[attr-defined]
        running.sent = 0  # type: ignore[attr-defined]
        Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield running
        running.shutdown()


def test_only_the_parts_read_of_a_remote_shard_are_fetched(
    server: ThreadingHTTPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "BLOCK_BYTES", 1 << 16)
    url = f"http://127.0.0.1:{server.server_port}/a.jsonl.zst"
    size = len(server.data)  # type: ignore[attr-defined]
    assert size > 1_500_000
    index = obtain(url, tmp_path, 1 << 16, 1 << 27)
    assert history_path(index_path(url, tmp_path)).exists()
    assert len(index.splices) >= 8
    server.sent = 0  # type: ignore[attr-defined]
    last = document(url, index.num_records, index_dir=tmp_path)
    assert json.dumps(last.text)
    gap = max(b.offset - a.offset for a, b in zip(index.splices, index.splices[1:], strict=False))
    assert server.sent <= gap + 3 * (1 << 16) < size / 4  # type: ignore[attr-defined]
    # A lane somewhere in the middle of the shard, with windows shorter than its segments.
    data = config([{"name": "a", "paths": [url]}], index_dir=tmp_path, window_bytes=1 << 16, lanes=1, seq_len=128)
    with Loader(data, 1) as loader:
        server.sent = 0  # type: ignore[attr-defined]
        next(loader)
        assert server.sent <= gap + 4 * (1 << 16)  # type: ignore[attr-defined]
    assert files.stat(url).size == size
