"""Remote shards over a real HTTP server that drops, stalls, fails, serves ranges, or ignores them."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest

from pretrain.commands import dispatch
from shards import Loader, ShardError
from shards.storage import files, remote
from shards.storage.block_cache import BlockCache
from tests.shards.corpora import compress, config, record, words

RAW = b"".join(record(words(i, 50 + i % 300)) for i in range(3000))
DATA = compress(RAW, ".zst", frames=3)


class Server(ThreadingHTTPServer):
    """A server of `data` at /shard.jsonl.zst that misbehaves as `faults` says, one request after another."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults: Iterator[str] = iter(())
        self.ranges = True
        self.content = DATA, '"one"'  # and its ETag, together, since they change between two requests
        self.bodies = 0
        self.query = ""  # nothing is served without it
        self.head_faults: Iterator[str] = iter(())  # for requests for the size, whatever their method
        self.etags: Iterator[str] = iter(())  # used before the content's, as mirrors differ in theirs
        self.over = threading.Event()  # ends all stalls

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/shard.jsonl.zst{self.query}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        if unquote(self.path) not in ("/", f"/shard.jsonl.zst{self.server.query}"):
            self.send_error(404)
            return
        if unquote(self.path) == "/":
            self._list()
            return
        of_block = "Range" in self.headers
        fault = next(self.server.faults if of_block else self.server.head_faults, "")
        if fault.isdecimal():
            self.send_error(int(fault))
            return
        if fault == "stall":
            self.server.over.wait(3)
        if fault == "drop" and not of_block:
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        data, own_etag = self.server.content
        start, stop = 0, len(data)
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked and self.server.ranges:
            start, stop = int(asked[1]), min(len(data), int(asked[2] or len(data)) + 1)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
        else:
            self.send_response(200)
        if self.server.ranges:
            self.send_header("Accept-Ranges", "bytes")
        if etag := next(self.server.etags, own_etag):
            self.send_header("ETag", etag)
        self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        if with_body:
            self.server.bodies += 1
            body = data[start:stop]
            self.wfile.write(body[: len(body) // 2] if fault == "drop" else body)
            self.close_connection = True

    def _list(self) -> None:
        """Send the folder as a page of links, or drop the connection."""
        if next(self.server.head_faults, ""):
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        body = b'<a href="shard.jsonl.zst">one</a> <a href="shard.jsonl.bz2">other</a>'
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(remote, "BLOCK_BYTES", len(DATA) // 9)
    monkeypatch.setattr(remote, "FIRST_PAUSE_SECONDS", 0.001)
    with Server() as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield running
        running.over.set()
        running.shutdown()


def read_all(url: str, offset: int = 0, cache: BlockCache | None = None) -> bytes:
    with remote.RemoteFile(url, offset, stall_seconds=1.0, cache=cache) as file:
        return b"".join(iter(lambda: file.read(10_000), b""))


def test_a_stream_through_faults_is_complete_and_the_same(server: Server) -> None:
    assert read_all(server.url) == DATA
    assert read_all(server.url, 12_345) == DATA[12_345:]
    server.faults = itertools.cycle(["drop", "", "500", "", "503", "drop", ""])
    assert read_all(server.url) == DATA
    server.faults = iter(["", "stall", ""])
    assert read_all(server.url) == DATA


def test_permanent_failures_are_named(server: Server) -> None:
    with pytest.raises(ShardError, match=r"none\.jsonl.*no such shard"):
        remote.stat(server.url.replace("shard", "none"))
    server.faults = itertools.repeat("503")
    with pytest.raises(ShardError, match=r"shard\.jsonl\.zst at byte 0: failed 8 times"):
        read_all(server.url)


@pytest.mark.parametrize("fault", ["503", "429", "500", "drop", "stall"])
def test_a_failed_request_for_a_size_is_repeated(server: Server, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    if fault == "stall":
        monkeypatch.setattr(remote, "ANSWER_SECONDS", 0.2)
    expected = remote.stat(server.url)
    for times in (1, 2, 4):  # an attempt makes two requests with different methods
        server.head_faults = iter([fault] * times)
        assert remote.stat(server.url) == expected
        assert next(server.head_faults, "none left") == "none left"


@pytest.mark.parametrize(("fault", "said"), [("503", "503"), ("drop", "isconnect"), ("stall", "no answer for 0.05 s")])
def test_a_size_that_is_never_answered_is_blamed_on_the_server(
    server: Server, monkeypatch: pytest.MonkeyPatch, fault: str, said: str
) -> None:
    if fault == "stall":
        monkeypatch.setattr(remote, "ANSWER_SECONDS", 0.05)
    server.head_faults = itertools.repeat(fault)
    with pytest.raises(ShardError, match=rf"failed 8 times, the last with .*{said}.* not the file") as caught:
        remote.stat(server.url)
    assert "no such shard" not in str(caught.value)


@pytest.mark.parametrize("status", ["404", "403", "410"])
def test_a_refused_request_is_not_repeated(server: Server, status: str) -> None:
    server.head_faults = iter([status] * 2 + ["503"])
    with pytest.raises(ShardError, match="no such shard, or no right to read it"):
        remote.stat(server.url)
    assert next(server.head_faults) == "503"
    server.faults = iter([status, "503"])
    with pytest.raises(ShardError, match="no such shard, or no right to read it"):
        read_all(server.url)
    assert next(server.faults) == "503"


def test_a_failed_listing_is_repeated_and_ignored_files_are_named(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    """Repeat a failed listing, which fsspec would take for an empty folder."""
    pattern = f"http://127.0.0.1:{server.server_port}/*.jsonl.*"
    server.head_faults = iter(["drop"] * 3)
    assert files.expand((pattern,), "s") == [server.url]
    assert "shard.jsonl.bz2" in caplog.text
    server.head_faults = itertools.repeat("drop")
    with pytest.raises(ShardError, match="failed 8 times"):
        files.expand((pattern,), "s")


def test_mirrors_with_different_stamps_for_one_content_are_one_shard(server: Server, tmp_path: Path) -> None:
    data = config([{"name": "a", "paths": [server.url]}], index_dir=tmp_path / "i", window_bytes=1 << 17, lanes=4)

    def hashes() -> list[int]:
        with Loader(data, 8, seed=1) as loader:
            return [batch.row_hash for batch in itertools.islice(loader, 30)]

    expected = hashes()
    shutil.rmtree(tmp_path / "i")
    server.etags = (f'"{number}"' for number in itertools.count())
    assert hashes() == expected
    assert hashes() == expected


def test_a_server_that_ignores_ranges_is_detected(server: Server) -> None:
    server.ranges = False
    with pytest.raises(ShardError, match="ignores byte ranges"):
        read_all(server.url)


def test_a_remote_shard_gives_the_same_batches_as_a_local_one(server: Server, tmp_path: Path) -> None:
    local = tmp_path / "shard.jsonl.zst"
    local.write_bytes(DATA)

    def hashes(path: str) -> list[int]:
        data = config([{"name": "a", "paths": [path]}], index_dir=tmp_path / "i", window_bytes=1 << 17, lanes=4)
        with Loader(data, 8, seed=1) as loader:
            return [batch.row_hash for batch in itertools.islice(loader, 30)]

    server.faults = itertools.cycle(["drop", "", "", "500", ""])
    assert hashes(server.url) == hashes(str(local))


def test_an_address_may_have_a_query(server: Server, tmp_path: Path) -> None:
    """Accept the queries of signed addresses: of any characters, and longer than a file's name may be."""
    server.query = "?token=a*b[c]/d&signature=" + 300 * "x"
    data = config([{"name": "a", "paths": [server.url]}], index_dir=tmp_path / "i", window_bytes=1 << 17, lanes=4)
    with Loader(data, 4) as loader:
        assert next(loader).n_targets
    (index,) = (tmp_path / "i").glob("*.index.json")
    assert index.name.startswith("shard.jsonl.zst.")


def test_cached_blocks_are_not_requested_again(server: Server, tmp_path: Path) -> None:
    cache = BlockCache(tmp_path, 10 * len(DATA))
    server.faults = itertools.cycle(["drop", "", "500", ""])
    assert read_all(server.url, 12_345, cache) == DATA[12_345:]
    server.faults = iter(())
    assert read_all(server.url, 0, cache) == DATA
    bodies = server.bodies
    for offset in (0, 1, 12_345, len(DATA) - 1, len(DATA)):
        assert read_all(server.url, offset, BlockCache(tmp_path, 10 * len(DATA))) == DATA[offset:]
    assert server.bodies == bodies


def test_a_changed_file_is_read_again(server: Server, tmp_path: Path) -> None:
    cache = BlockCache(tmp_path, 10 * len(DATA))
    assert read_all(server.url, 0, cache) == DATA
    server.content = DATA[::-1], '"two"'
    assert read_all(server.url, 0, cache) == DATA[::-1]
    server.content = DATA, '"one"'
    assert read_all(server.url, 0, cache) == DATA


def test_bytes_of_a_file_that_changes_while_it_is_read_are_not_cached(server: Server, tmp_path: Path) -> None:
    cache = BlockCache(tmp_path, 10 * len(DATA))
    with remote.RemoteFile(server.url, cache=cache) as file:
        file.read(1)
        server.content = DATA[::-1], '"two"'
        while file.read(1 << 20):
            pass
    server.content = DATA, '"one"'
    assert read_all(server.url, 0, cache) == DATA


def test_the_index_command_fills_the_cache_that_the_run_reads(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "BLOCK_BYTES", 4 << 20)  # as in the command
    data = config(
        [{"name": "a", "paths": [server.url]}],
        index_dir=tmp_path / "i",
        remote_cache={"dir": tmp_path / "cache", "max_bytes": 1 << 24},
        lanes=4,
    )
    run = tmp_path / "run.yaml"
    run.write_text(json.dumps({"data": data.model_dump(mode="json")}))  # JSON is YAML
    assert dispatch.run("index", ["--config", str(run)]) == 0
    bodies = server.bodies
    with Loader(data, 4) as loader:
        assert next(loader).n_targets
    assert server.bodies == bodies > 0


def test_each_block_is_requested_once(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request, asked = remote.RemoteBlocks.request, []

    def noted(blocks: remote.RemoteBlocks, start: int, stop: int) -> remote.Call[bytes]:
        asked.extend(range(start, stop))
        return request(blocks, start, stop)

    monkeypatch.setattr(remote.RemoteBlocks, "request", noted)
    for cache in (None, BlockCache(tmp_path, 10 * len(DATA))):
        asked.clear()
        assert read_all(server.url, 0, cache) == DATA
        assert asked == list(range(len(DATA)))


def test_without_a_stamp_nothing_is_cached(server: Server, tmp_path: Path) -> None:
    server.content = DATA, ""
    cache = BlockCache(tmp_path, 10 * len(DATA))
    assert read_all(server.url, 0, cache) == DATA
    server.content = DATA[::-1], ""
    assert read_all(server.url, 0, cache) == DATA[::-1]


def test_a_second_run_reads_its_shards_from_the_cache(server: Server, tmp_path: Path) -> None:
    def hashes(number: int) -> list[int]:
        data = config(
            [{"name": "a", "paths": [server.url]}],
            index_dir=tmp_path / f"i{number}",
            window_bytes=1 << 17,
            lanes=4,
            remote_cache={"dir": tmp_path / "cache", "max_bytes": 1 << 24},
        )
        with Loader(data, 8, seed=1) as loader:
            return [batch.row_hash for batch in itertools.islice(loader, 10)]

    first = hashes(0)
    bodies = server.bodies
    assert hashes(1) == first
    assert server.bodies == bodies
