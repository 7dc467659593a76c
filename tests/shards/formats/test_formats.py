"""Every compression yields its raw bytes, completely or not at all."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import subprocess
import tarfile
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from shards import ShardError, formats
from tests.shards.corpora import compress, record

MAX_WINDOW = 128 << 20


def decode(data: bytes, path: str = "x.jsonl.zst", max_window: int = MAX_WINDOW) -> bytes:
    file = formats.Peeked(io.BytesIO(data), formats.MAX_HEADER_BYTES)
    return b"".join(formats.decode(file, formats.detect(file.head, path), path, max_window))


@given(raw=st.binary(min_size=1, max_size=5000), frames=st.integers(1, 5), suffix=st.sampled_from([".zst", ".gz"]))
def test_consecutive_frames_and_members_are_decoded(raw: bytes, frames: int, suffix: str) -> None:
    assert decode(compress(raw, suffix, frames)) == raw


@given(cut=st.integers(1, 400), frames=st.integers(1, 3), suffix=st.sampled_from([".jsonl.zst", ".json.gz"]))
def test_a_truncated_file_is_an_error_that_names_it(cut: int, frames: int, suffix: str) -> None:
    raw = bytes(i * i % 251 for i in range(3000))
    whole = compress(raw, suffix, frames)
    ends = {len(compress(raw[: len(raw) * i // frames], suffix, max(i, 1))) for i in range(frames)}
    data = whole[: max(1, len(whole) - cut)]
    if len(data) in ends or data in (b"\x1f", b"\x28"):
        return  # cut between two frames, hence a valid file; or too short to be told from a plain one
    with pytest.raises(ShardError, match=f"shard{suffix}"):
        decode(data, f"shard{suffix}")


def test_truncation_at_a_block_end_is_detected() -> None:
    raw = bytes(i * i % 251 for i in range(1 << 20))
    compressor = zstandard.ZstdCompressor(write_content_size=False).compressobj()
    blocks = compressor.compress(raw) + compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    with pytest.raises(ShardError, match="truncated"):
        decode(blocks)


@pytest.mark.parametrize("checksum", [True, False])
def test_flipped_bits_give_an_error_or_other_bytes_but_never_fewer_bytes(checksum: bool) -> None:
    raw = b"".join(b"%d the quick brown fox\n" % i for i in range(4000))
    data = zstandard.ZstdCompressor(write_checksum=checksum, write_content_size=False).compress(raw)
    for at in range(20, len(data) - 8, len(data) // 40):
        broken = bytearray(data)
        broken[at] ^= 0x10
        try:
            got = decode(bytes(broken))
        except ShardError:
            continue
        assert got == raw or (not checksum and len(got) == len(raw))
    broken_gzip = bytearray(gzip.compress(raw))
    broken_gzip[-6] ^= 1
    with pytest.raises(ShardError, match="damaged gzip"):
        decode(bytes(broken_gzip), "x.json.gz")


def test_skippable_frames_and_zero_padding_are_skipped() -> None:
    skippable = b"\x5a\x2a\x4d\x18" + (300_000).to_bytes(4, "little") + bytes(300_000)
    frame = compress(b"one\n", ".zst")
    assert decode(skippable + frame + skippable + frame + skippable) == b"one\none\n"
    with pytest.raises(ShardError, match="truncated"):
        decode(frame + skippable[:-1])
    assert decode(gzip.compress(b"one\n") + bytes(600_000) + gzip.compress(b"two\n")) == b"one\ntwo\n"


def test_only_a_frame_may_follow_a_frame() -> None:
    for data in (compress(b"one\n", ".zst") + b"junk", gzip.compress(b"one\n") + b"junk"):
        with pytest.raises(ShardError, match="damaged"):
            decode(data)


def test_a_window_beyond_the_limit_names_the_setting() -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=27, enable_ldm=True, write_content_size=False)
    data = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    blob = data.compress(b"long\n" * 1000) + data.flush()
    assert decode(blob) == b"long\n" * 1000
    with pytest.raises(ShardError, match=r"data\.max_decoder_window is 1048576; raise it to 134217728"):
        decode(blob, max_window=1 << 20)


def header(window_log: int) -> bytes:
    """Return the magic and header of a frame without content size or checksum (RFC 8878, section 3.1.1)."""
    return b"\x28\xb5\x2f\xfd\x00" + bytes([(window_log - 10) << 3])


def test_a_31_bit_window_is_decoded_if_allowed_and_otherwise_names_the_setting() -> None:
    blob = header(31) + (1 | 5 << 3).to_bytes(3, "little") + b"long\n"  # one last raw block
    with pytest.raises(ShardError, match=r"max_decoder_window is 134217728; raise it to 2147483648 "):
        decode(blob)
    assert decode(blob, max_window=1 << 31) == b"long\n"  # the decoder reserves 2 GiB, but touches none of it
    beyond = header(33) + (1 | 5 << 3).to_bytes(3, "little") + b"long\n" + bytes(9)
    with pytest.raises(ShardError, match=r"byte 0 .*--long=31, with data\.max_decoder_window: 2147483648"):
        decode(beyond, max_window=1 << 40)


@pytest.mark.parametrize("kind", [zstandard.DICT_TYPE_AUTO, zstandard.DICT_TYPE_RAWCONTENT])
def test_a_needed_dictionary_is_reported_and_the_printed_command_removes_the_need(tmp_path: Path, kind: int) -> None:
    lines = [record(f"{i * i} of some length, so that there is something to learn") for i in range(900)]
    trained = zstandard.train_dictionary(2000, lines).as_bytes()
    learnt = zstandard.ZstdCompressionDict(trained, dict_type=kind)
    (tmp_path / "d").write_bytes(trained)
    path = tmp_path / "a b.jsonl.zst"
    path.write_bytes(zstandard.ZstdCompressor(dict_data=learnt).compress(b"".join(lines[:9])))
    with pytest.raises(ShardError, match=r"compressed with (a )?dictionary") as caught:
        decode(path.read_bytes(), str(path))
    if kind == zstandard.DICT_TYPE_AUTO:
        assert "damaged" not in str(caught.value)
        command = str(caught.value).partition("without one: ")[2]
        command = command.replace("DICTIONARY", "d").replace("NEW", "new.zst")
        subprocess.run(command, shell=True, cwd=tmp_path, check=True)
        assert decode((tmp_path / "new.zst").read_bytes()) == b"".join(lines[:9])


def test_other_compressions_are_named(tmp_path: Path) -> None:
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("0.json"))
    with pytest.raises(ShardError, match=r"x\.tar: is a tar archive.*unpack it"):
        decode(tar.getvalue(), "x.tar")
    line = b'{"text": "' + b"a" * 247 + b'ustar"}\n'
    assert decode(line, "x.jsonl") == line, "of a line with the letters where tar has them"
    for data, name in ((b"\x04\x22\x4d\x18....", "lz4"), (b"PK\x03\x04....", "zip"), (b"PAR1....", "Parquet")):
        with pytest.raises(ShardError, match=f"a.jsonl.more: is {name}[;,] .*(convert|rename) it"):
            decode(data, "a.jsonl.more")


def test_compression_is_recognized_by_content_not_by_name() -> None:
    assert decode(gzip.compress(b'{"text": "a"}\n'), "named.jsonl.zst") == b'{"text": "a"}\n'
    assert decode(b'\xef\xbb\xbf {"text": "a"}\n', "named.jsonl.zst").endswith(b"}\n")
    with pytest.raises(ShardError, match="neither zstd, gzip, xz, bzip2 nor"):
        decode(b"\x00\x01\x02\x03", "named.jsonl.zst")
    with pytest.raises(ShardError, match="empty"):
        decode(b"")


def test_highly_compressed_gzip_is_unpacked_in_bounded_chunks() -> None:
    raw = b"a" * (16 << 20)
    file = formats.Peeked(io.BytesIO(compress(raw, ".gz")), 18)
    sizes = [len(chunk) for chunk in formats.decode(file, formats.detect(file.head, "x"), "x", MAX_WINDOW)]
    assert sum(sizes) == len(raw)
    assert max(sizes) <= formats.gzip.MAX_OUTPUT_BYTES


@pytest.mark.parametrize("compression", ["xz", "bzip2"])
def test_streams_are_entries_and_damage_is_named(compression: str) -> None:
    """Hold for one stream and several, at presets of small and of large dictionaries, with padding in between."""
    pack = {"xz": lambda raw, level: lzma.compress(raw, preset=level), "bzip2": bz2.compress}[compression]
    parts = [b"".join(b"%d the quick brown fox %d\n" % (i, i * i) for i in range(n)) for n in (10_000, 1, 40_000)]
    streams = [pack(part, level) for part, level in zip(parts, (6, 1, 9), strict=True)]
    gap = bytes(8) if compression == "xz" else b""
    data, raw = gap.join(streams), b"".join(parts)
    name = f"a.jsonl.{compression}"
    assert decode(data, name) == raw
    starts = [
        (chunk.offset, chunk.raw_offset)
        for chunk in formats.chunks(io.BytesIO(data), compression, name, 1 << 27)
        if chunk.begins
    ]
    assert len(starts) == 3
    for offset, raw_offset in starts:
        file = io.BytesIO(data)
        file.seek(offset)
        found = formats.decode(file, compression, name, 1 << 27, formats.Start(offset, raw_offset))
        assert b"".join(found) == raw[raw_offset:]
    for cut in (1, 9, len(streams[2]) // 2, len(streams[2]) - 5):
        with pytest.raises(ShardError, match=rf"{name}: .*(truncated|damaged)"):
            decode(data[:-cut], name)
    broken = bytearray(data)
    broken[len(streams[0]) // 2] ^= 1
    with pytest.raises(ShardError, match=rf"{name}: damaged {compression} data near byte"):
        decode(bytes(broken), name)


def test_a_large_dictionary_of_xz_names_the_setting() -> None:
    blob = lzma.compress(b"long\n" * 1000, preset=9)
    assert decode(blob, "a.jsonl.xz") == b"long\n" * 1000
    with pytest.raises(
        ShardError, match=r"dictionary of 67108864 bytes; data\.max_decoder_window is 1048576; raise it"
    ):
        decode(blob, "a.jsonl.xz", max_window=1 << 20)
