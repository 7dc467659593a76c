"""Splice points: reading from them gives what reading from the start gives, and anything else is never delivered."""

from __future__ import annotations

import gzip
import itertools
import random
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest
import zstandard

from shards import Loader, ShardError, formats, preparation
from shards.formats import Chunk, Start, zstd, zstd_blocks
from shards.index import paths, splice_points
from shards.index.decoders import Decoders
from shards.index.shard_index import ShardIndex, load, obtain
from shards.index.thinning import Follower
from shards.storage import files
from tests.shards.corpora import config
from tests.shards.index.spliced import CELL, MAX_WINDOW, SHARDS, TEXT, compressed, indexed, raw_of, shard

pytestmark = pytest.mark.usefixtures("near")


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("name", SHARDS)
def test_every_entry_leads_to_the_same_bytes_to_the_end(tmp_path: Path, name: str, verify: bool) -> None:
    data = shard(name)
    path, index = indexed(tmp_path, data, verify)
    raw = raw_of(data)
    assert index.raw_bytes == len(raw)
    assert len(index.splices) >= 3
    ends = [found.raw_offset for found in index.splices[1:]] + [len(raw)]
    for found, end in zip(index.splices, ends, strict=True):
        decoders = Decoders(MAX_WINDOW)
        wanted = index.raw_range(path, found.raw_offset, end if verify else min(end, found.raw_offset + 100_000))
        assert wanted.splice == found
        assert decoders.read(wanted) == raw[wanted.start : wanted.stop]
        assert decoders.read(index.raw_range(path, len(raw) - 5, len(raw))) == raw[-5:]  # across frames' ends
        assert decoders.replays == 0


@pytest.mark.parametrize(("level", "block_bytes"), [(16, 5_000), (19, 2_000)])
def test_headers_show_exactly_which_blocks_refer_to_earlier_trees_and_tables(level: int, block_bytes: int) -> None:
    data = compressed(TEXT[: 200 * block_bytes], level, block_bytes)
    found, window, state = [], b"", 0
    for chunk in formats.chunks(formats.Peeked(ByteFile(data), 18), "zstd", "x", MAX_WINDOW):
        if chunk.begins:
            state = zstd.restart_state(chunk.data)
            continue
        if window:
            try:
                zstd.restart(window, state).decompress(chunk.data[: _first_block_bytes(chunk.data)])
                decoded = True
            except zstandard.ZstdError:
                decoded = False
            found.append((zstd_blocks.stands_alone(chunk.data), decoded))
        window += chunk.raw
    assert {alone for alone, _ in found} == {True, False}
    assert all(alone == decoded for alone, decoded in found)


def _first_block_bytes(data: bytes) -> int:
    return zstd_blocks.BLOCK_HEADER_BYTES + zstd_blocks.block_header(data)[2]


class ByteFile:
    def __init__(self, data: bytes) -> None:
        self._data = data

    def read(self, size: int) -> bytes:
        part, self._data = self._data[:size], self._data[size:]
        return part


def test_a_small_frame_that_unpacks_to_much_is_decoded_in_bounded_chunks() -> None:
    data = compressed(bytes(64 << 20))
    assert len(data) < 1 << 14
    sizes = [len(chunk) for chunk in formats.decode(ByteFile(data), "zstd", "x", MAX_WINDOW)]
    assert sum(sizes) == 64 << 20
    assert max(sizes) <= 1 << 20


@pytest.mark.parametrize("name", ["level 3, window of 128 KiB", "gzip"])
def test_a_wrong_history_is_detected_reported_once_counted_and_replayed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    path, index = indexed(tmp_path, shard(name))
    raw = raw_of(shard(name))
    found = index.splices[1]
    histories = paths.history_path(paths.index_path(path, None))
    packed = bytearray(histories.read_bytes())
    window = splice_points.read_history(histories, found)
    # An intact but different window: as many bytes, packed into as many.
    other = zstandard.ZstdCompressor(level=0, write_checksum=True).compress(window[::-1])[: found.packed_bytes]
    for wrong in (other.ljust(found.packed_bytes, b"\0"), None, b"\0" * found.packed_bytes):
        caplog.clear()
        if wrong is None:
            histories.unlink()
        else:
            packed[found.position : found.position + found.packed_bytes] = wrong
            histories.write_bytes(packed)
        decoders = Decoders(MAX_WINDOW)
        cells = [int(bound) for bound in index.table()[:, 1] if bound >= found.raw_offset][:4]
        for start, stop in itertools.pairwise(cells):
            assert decoders.read(index.raw_range(path, start, stop)) == raw[start:stop]
        assert decoders.replays == 1
        assert caplog.text.count(f"its entry at raw byte {found.raw_offset} is not used") == 1


def test_other_bytes_from_an_entry_are_never_delivered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Distrust an entry even if it decodes without error to other bytes, as stale repeat offsets can."""
    path, index = indexed(tmp_path, shard("level 3, window of 128 KiB"))
    raw = raw_of(shard("level 3, window of 128 KiB"))
    chunks = formats.chunks

    def lying(*args: object) -> object:
        start = args[4]
        assert isinstance(start, Start)
        for chunk in chunks(*args):  # type: ignore[arg-type]
            yield chunk._replace(raw=chunk.raw.replace(b"e", b"o")) if start.history else chunk

    monkeypatch.setattr(formats, "chunks", lying)
    replays = 0
    for start, stop in itertools.pairwise(index.table()[:, 1].tolist()):
        decoders = Decoders(MAX_WINDOW)
        assert decoders.read(index.raw_range(path, start, stop)) == raw[start:stop]
        replays += decoders.replays
    assert replays > len(index.splices)


def test_the_index_detects_flipped_bits_that_no_format_detects(tmp_path: Path) -> None:
    path, index = indexed(tmp_path, TEXT)  # not compressed
    broken = TEXT.replace(b" the ", b" teh ", 1)
    assert len(broken) == len(TEXT)
    Path(path).write_bytes(broken)
    index = msgspec.structs.replace(index, stat=files.stat(path))
    with pytest.raises(ShardError, match=r"raw bytes 0 to \d+ are not those that were indexed"):
        Decoders(MAX_WINDOW).read(index.raw_range(path, 0, len(TEXT)))


def test_entries_change_nothing_that_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(shard("level 1, checksum"))
    data = config([{"name": "a", "paths": [str(path)]}], window_bytes=CELL, lanes=4, seq_len=128)
    index_path = paths.index_path(str(path), None)

    def stream(num_workers: int) -> tuple[object, list[tuple[int, object]], int]:
        """Return the fingerprint, the batches with their states, and how many entries proved invalid."""
        with Loader(data.model_copy(update={"num_workers": num_workers}), 8) as loader:
            batches = list(itertools.islice(loader, 40))
            return loader.fingerprint, [(b.row_hash, b.state) for b in batches], sum(b.replays for b in batches)

    *with_entries, replays = stream(0)
    found = msgspec.json.decode(index_path.read_bytes(), type=ShardIndex)
    assert found.splices
    assert replays == 0
    paths.history_path(index_path).unlink()
    *without_windows, replays = stream(1)
    assert replays > 0
    index_path.write_bytes(msgspec.json.encode(msgspec.structs.replace(found, splices=())))
    for stale in tmp_path.glob("*.manifest"):
        stale.unlink()
    *without_entries, replays = stream(0)
    assert replays == 0
    assert with_entries == without_windows == without_entries


def test_histories_use_no_more_than_their_fraction_of_the_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    for name, value in {"MIN_GAP_BYTES": 1 << 17, "TRIAL_BYTES": 1 << 17, "HISTORIES_PER_GAP": 0}.items():
        monkeypatch.setattr(splice_points, name, value)
    for window_log, least, most in (
        (10, 8, splice_points.SHARE),
        (17, 6, splice_points.SMALL_SHARE),
        (20, 1, splice_points.SMALL_SHARE),
    ):
        _, index = indexed(tmp_path, compressed(TEXT * 2, 3, window_log=window_log))
        taken = sum(found.packed_bytes for found in index.splices)
        assert len(index.splices) >= least
        assert taken <= most * index.stat.size


def test_a_start_uses_the_newest_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the newest entries even if a manifest still names those of an index that was deleted and rebuilt."""
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(shard("level 1, checksum"))
    data = config([{"name": "a", "paths": [str(path)]}], window_bytes=CELL, lanes=4, seq_len=128)
    preparation.prepare(data)
    index_path = paths.index_path(str(path), None)
    index_path.unlink()
    monkeypatch.setattr(splice_points, "SPACING_BYTES", 1 << 19)
    obtain(str(path), None, CELL, MAX_WINDOW)
    with Loader(data, 4) as loader:
        assert sum(batch.replays for batch in itertools.islice(loader, 20)) == 0
    assert preparation.index_status(data, data.sources[0]).indexed[str(path)] == load(index_path)


def test_an_aborted_pass_leaves_the_old_histories_and_no_entries_need_none(tmp_path: Path) -> None:
    path, index = indexed(tmp_path, shard("level 1, checksum"))
    histories = paths.history_path(paths.index_path(path, None))
    before = histories.read_bytes()
    assert len(before) == sum(found.packed_bytes for found in index.splices)
    with pytest.raises(ShardError, match="truncated"):
        indexed(tmp_path, shard("level 1, checksum")[:-100])
    assert histories.read_bytes() == before
    assert sorted(tmp_path.iterdir()) == [Path(path), histories]
    _, index = indexed(tmp_path, compressed(TEXT[:1000]))
    assert index.splices == ()
    assert [Path(path)] == list(tmp_path.iterdir())


@pytest.mark.parametrize("verify", [True, False])
def test_gzip_data_that_unpacks_to_much_has_entries_too(tmp_path: Path, verify: bool) -> None:
    """Find entries although the decoder yields at most a MiB at a time and holds back the rest."""
    lines = b"".join(b'{"text": "%d %s"}\n' % (i * i, b"the same words, again and again, " * 3) for i in range(90_000))
    data = gzip.compress(lines)
    assert 8 < len(lines) / len(data) < 100
    path, index = indexed(tmp_path, data, verify)
    assert index.splice_counts.failed == 0
    assert len(index.splices) >= 3
    for found in index.splices:
        decoders = Decoders(MAX_WINDOW)
        assert decoders.read(index.raw_range(path, found.raw_offset, len(lines))) == lines[found.raw_offset :]
        assert decoders.replays == 0


def test_a_place_that_fails_before_the_next_entry_is_no_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    holds = Follower.holds
    followers: list[Follower] = []

    def once(follower: Follower, chunks: Sequence[Chunk]) -> bool:
        """Hold where a place is tried, and not in what comes after."""
        followers.append(follower)
        return holds(follower, chunks) and (followers.count(follower) == 1 or not chunks)

    monkeypatch.setattr(Follower, "holds", once)
    _, index = indexed(tmp_path, shard("level 1, checksum"))
    assert len(index.splices) <= 1  # one tried at the frame's end has nothing after it
    assert index.splice_counts.failed > 3
    _, index = indexed(tmp_path, shard("level 1, checksum"), verify=False)
    assert len(index.splices) > 3


def test_histories_that_are_too_large_do_not_exclude_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splice_points, "SHARE", 0.02)
    monkeypatch.setattr(splice_points, "SMALL_SHARE", 0.1)
    noise = random.Random(0).randbytes(100_000)  # repeated within the window, so that all of it is referred to
    raw = TEXT + noise * 30 + TEXT
    _, index = indexed(tmp_path, compressed(raw, 3, window_log=17))
    assert index.splice_counts.too_large > 0
    before, after = len(TEXT), len(TEXT) + 30 * len(noise)
    places = [found.raw_offset for found in index.splices]
    assert sum(place < before for place in places) >= 2
    assert sum(place > after for place in places) >= 2
    assert sum(found.packed_bytes for found in index.splices) <= 0.1 * index.stat.size


def test_a_member_without_entries_does_not_affect_the_next(tmp_path: Path) -> None:
    noise = random.Random(0).randbytes(6 << 20)
    _, alone = indexed(tmp_path, gzip.compress(TEXT))
    _, index = indexed(tmp_path, gzip.compress(noise, 0) + gzip.compress(TEXT))
    assert len(index.splices) == len(alone.splices) >= 3
