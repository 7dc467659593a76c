"""zstd frames (RFC 8878, section 3) -> raw bytes, block by block. zstd_blocks -> zstd -> formats.

Each frame gets a decompressor of its own, because the library's streaming readers end silently on a truncated file and
stop after the first frame; only the decompressor knows that a frame is complete. Feeding whole blocks bounds the output
of one call (repeats unpack ten-thousandfold) and makes every block boundary a place where decoding might start.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator

import zstandard

from shards.errors import DamageError, ShardError
from shards.formats import zstd_blocks
from shards.formats.base import READ_BYTES, Chunk, Input, Readable, Start

_CHUNK_BYTES = 1 << 15  # compressed bytes; small blocks are decoded several at a time
MAX_OUTPUT_BYTES = 1 << 20  # raw bytes per chunk
_MIN_WINDOW_BYTES = 1 << 10
_MIN_WINDOW_LOG = 10


def starts_frame(head: bytes) -> bool:
    """Return whether `head` begins a zstd frame or a skippable frame."""
    return head.startswith((zstd_blocks.MAGIC, *zstd_blocks.SKIPPABLE_MAGICS))


def window_bytes(head: bytes) -> int:
    """Return how far back, in decoded bytes, the frame that begins with `head` may refer.

    Raises: zstandard.ZstdError if the header is truncated or asks for more than any decoder allows.
    """
    return max(_MIN_WINDOW_BYTES, zstandard.get_frame_parameters(head).window_size)


def restart_state(header: bytes) -> int:
    """Return `Start.state` for places inside the frame with this header.

    It encodes the window size, rounded up, and whether a checksum ends the frame.
    """
    window_log = max(_MIN_WINDOW_LOG, (window_bytes(header) - 1).bit_length())
    return window_log << 1 | zstd_blocks.has_checksum(header)


def restart(history: bytes | memoryview, state: int) -> zstandard.ZstdDecompressionObj:
    """Make a decompressor that takes blocks from inside a frame.

    Args:
        history: raw bytes before the first block, at most the frame's window.
        state: from `restart_state`.
    """
    dictionary = zstandard.ZstdCompressionDict(history, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    frame = zstandard.ZstdDecompressor(dict_data=dictionary, max_window_size=1 << (state >> 1)).decompressobj()
    frame.decompress(zstd_blocks.made_header(state >> 1))
    return frame


def chunks(file: Readable, path: str, max_window: int, start: Start) -> Iterator[Chunk]:
    """Yield the chunks of all frames from `start` on; see `formats.chunks`."""
    source = Input(file, start.offset)
    raw_offset = start.raw_offset
    if start.history:
        frame = restart(start.history, start.state)
        for chunk in _blocks(source, path, frame, 1 << (start.state >> 1), raw_offset, bool(start.state & 1)):
            raw_offset = chunk.raw_offset + len(chunk.raw)
            yield chunk
    while head := source.peek(zstd_blocks.MAX_HEADER_BYTES):
        if head.startswith(zstd_blocks.SKIPPABLE_MAGICS):
            _skip(source, path, raw_offset)
            continue
        if not head.startswith(zstd_blocks.MAGIC):
            raise DamageError(
                f"{path}: byte {source.offset} should begin a zstd frame but holds {head[:4].hex(' ')}; "
                f"the file is damaged or cut short after raw byte {raw_offset}, copy it again"
            )
        window = _window(source, path, max_window, raw_offset)
        offset, header = source.offset, source.take(zstd_blocks.frame_header_bytes(head))
        frame = zstandard.ZstdDecompressor(max_window_size=window).decompressobj()
        _decompress(frame, header, path, offset, raw_offset)
        yield Chunk(offset, raw_offset, header, b"", window, True)
        for chunk in _blocks(source, path, frame, window, raw_offset, zstd_blocks.has_checksum(header)):
            raw_offset = chunk.raw_offset + len(chunk.raw)
            yield chunk


def _window(source: Input, path: str, max_window: int, raw_offset: int) -> int:
    """Read the window size of the next frame, in bytes. Raises: ShardError if it is more than allowed."""
    head = source.peek(zstd_blocks.MAX_HEADER_BYTES)
    try:
        window = window_bytes(head)
    except zstandard.ZstdError as error:
        if len(head) < zstd_blocks.MAX_HEADER_BYTES:
            raise _truncated(source, path, raw_offset) from None
        raise DamageError(
            f"{path}: the header of the zstd frame at byte {source.offset} cannot be used ({error}); windows of up to "
            f"2 GiB can be decoded (zstd --long=31, with data.max_decoder_window: {1 << 31}); the file is damaged, "
            "or has to be compressed again"
        ) from None
    if dictionary := zstandard.get_frame_parameters(head).dict_id:
        raise ShardError(
            f"{path}: the zstd frame at byte {source.offset} was compressed with dictionary {dictionary}, which it "
            "cannot be read without; compress the shard again without one: "
            f"zstd -dc -D DICTIONARY {shlex.quote(path)} | zstd -o NEW"
        )
    if window > max_window:
        raise ShardError(
            f"{path}: the zstd frame at byte {source.offset} needs a window of {window} bytes; "
            f"data.max_decoder_window is {max_window}; raise it to {window} (that much memory per open shard)"
        )
    return window


def _blocks(
    source: Input, path: str, frame: zstandard.ZstdDecompressionObj, window: int, raw_offset: int, checksum: bool
) -> Iterator[Chunk]:
    """Yield the chunks of the rest of a frame, from the next block of `source` on."""
    while not frame.eof:
        offset = source.offset
        size = raw_limit = 0
        last = False
        while not last and size < _CHUNK_BYTES and raw_limit + zstd_blocks.MAX_BLOCK_BYTES <= MAX_OUTPUT_BYTES:
            head = source.peek(zstd_blocks.BLOCK_HEADER_BYTES, size)
            last, kind, content, limit = zstd_blocks.block_header(head)
            if len(head) == zstd_blocks.BLOCK_HEADER_BYTES and (
                kind == zstd_blocks.RESERVED or max(content, limit) > zstd_blocks.MAX_BLOCK_BYTES
            ):
                raise _damaged(path, source.offset + size, raw_offset, "no block has such a header")
            wanted = zstd_blocks.BLOCK_HEADER_BYTES + content + (zstd_blocks.CHECKSUM_BYTES if last and checksum else 0)
            if not source.has(size + wanted):
                if size:  # yield the complete blocks first; the next chunk raises the error
                    last = False
                    break
                source.take(wanted)
                raise _truncated(source, path, raw_offset)
            size, raw_limit = size + wanted, raw_limit + limit
        data = source.take(size)
        raw = _decompress(frame, data, path, offset, raw_offset)
        yield Chunk(offset, raw_offset, data, raw, window, False)
        raw_offset += len(raw)
        if last != frame.eof:
            raise _damaged(path, source.offset, raw_offset, "the frame does not end with its last block")


def _decompress(frame: zstandard.ZstdDecompressionObj, data: bytes, path: str, offset: int, raw_offset: int) -> bytes:
    try:
        return frame.decompress(data)
    except zstandard.ZstdError as error:
        raise _damaged(path, offset, raw_offset, str(error)) from None


def _skip(source: Input, path: str, raw_offset: int) -> None:
    """Skip a skippable frame: magic, 4 bytes of size (little-endian), that many bytes."""
    header = source.take(8)
    left = int.from_bytes(header[4:8], "little")
    if len(header) < 8:
        raise _truncated(source, path, raw_offset)
    while left:
        taken = source.take(min(left, READ_BYTES))
        if not taken:
            raise _truncated(source, path, raw_offset)
        left -= len(taken)


def _damaged(path: str, offset: int, raw_offset: int, reason: str) -> DamageError:
    remedy = "copy it again"
    if raw_offset == 0:  # a frame does not name a dictionary that has no id
        remedy += ", or, if it was compressed with a dictionary, compress it again without one"
    return DamageError(f"{path}: damaged zstd data near byte {offset}, raw byte {raw_offset} ({reason}); {remedy}")


def _truncated(source: Input, path: str, raw_offset: int) -> DamageError:
    return DamageError(
        f"{path}: the file ends at byte {source.offset} inside a zstd frame, after raw byte {raw_offset}; "
        "it is truncated, copy it again"
    )
