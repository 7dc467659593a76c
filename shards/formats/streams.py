"""xz and bzip2 streams -> raw bytes, with their checks verified. base -> streams -> formats.

A file is one stream or several, one after another (pbzip2, lbzip2, `cat`). Only the start of a stream is an entry: in
one of a file's length, reading from a place costs decoding all before it. Sources: the .xz file format 1.2.1, and
bzip2's manual.
"""

from __future__ import annotations

import bz2
import lzma
from collections.abc import Iterator

from shards.errors import DamageError, ShardError
from shards.formats.base import Chunk, Input, Readable, Start

XZ_MAGIC = b"\xfd7zXZ\x00"
BZIP2_MAGIC = b"BZh"
MAX_OUTPUT_BYTES = 1 << 20
_BZIP2_BYTES = 4 << 20  # memory of a decoder, whatever the level
_XZ_HEADER_BYTES = 12 + 2 + 9 + 9 + 3  # of the stream, and of a block up to its dictionary's size
_XZ_DECODER_BYTES = 1 << 20  # beside the dictionary


def chunks(file: Readable, compression: str, path: str, max_window: int, start: Start) -> Iterator[Chunk]:
    """Yield the chunks of all streams from `start` on; see `formats.chunks`. Args: compression: "xz" or "bzip2"."""
    source, raw_offset = Input(file, start.offset), start.raw_offset
    while head := _head_of_stream(source, compression):
        if not head.startswith(XZ_MAGIC if compression == "xz" else BZIP2_MAGIC):
            raise DamageError(
                f"{path}: byte {source.offset} should begin a stream of {compression} but holds {head[:4].hex(' ')}; "
                f"the file is damaged after raw byte {raw_offset}, copy it again"
            )
        window = _dictionary_bytes(head) if compression == "xz" else _BZIP2_BYTES
        if window > max_window:
            raise ShardError(
                f"{path}: the xz stream at byte {source.offset} needs a dictionary of {window} bytes; "
                f"data.max_decoder_window is {max_window}; raise it to {window} (that much memory per open shard)"
            )
        yield Chunk(source.offset, raw_offset, b"", b"", window, True)
        for chunk in _stream(source, compression, path, window, raw_offset):
            raw_offset = chunk.raw_offset + len(chunk.raw)
            yield chunk


def _head_of_stream(source: Input, compression: str) -> bytes:
    """Peek at the next stream's first bytes, past the zeros that may pad xz's; b"" at the file's end."""
    while data := source.available():
        rest = data.lstrip(b"\0") if compression == "xz" else data
        source.pass_over(len(data) - len(rest))
        if rest:
            return source.peek(_XZ_HEADER_BYTES)
    return b""


def _stream(source: Input, compression: str, path: str, window: int, raw_offset: int) -> Iterator[Chunk]:
    """Yield the chunks of a stream."""
    decoder: lzma.LZMADecompressor | bz2.BZ2Decompressor
    # Later blocks may have larger dictionaries than the first; the limit is for what no encoder's presets reach.
    memory = max(2 * window, 128 << 20) + _XZ_DECODER_BYTES
    decoder = lzma.LZMADecompressor(lzma.FORMAT_XZ, memory) if compression == "xz" else bz2.BZ2Decompressor()
    fed = b""  # what the decoder has, of which it may not have taken all yet
    while not decoder.eof:
        data = b""
        if decoder.needs_input:
            source.pass_over(len(fed))
            fed = data = source.available()
            if not data:
                raise DamageError(
                    f"{path}: the file ends at byte {source.offset} inside a stream of {compression}, after raw byte "
                    f"{raw_offset}; it is truncated, copy it again"
                )
        try:
            raw = decoder.decompress(data, MAX_OUTPUT_BYTES)
        except (lzma.LZMAError, OSError, EOFError) as error:
            raise DamageError(
                f"{path}: damaged {compression} data near byte {source.offset}, raw byte {raw_offset} ({error}); copy "
                "it again"
            ) from None
        yield Chunk(source.offset, raw_offset, data, raw, window, False)
        raw_offset += len(raw)
    source.pass_over(len(fed) - len(decoder.unused_data))


def _dictionary_bytes(head: bytes) -> int:
    """Return the size of the first block's LZMA2 dictionary (section 5.3.1); the decoder's least where it is hidden."""
    flags, at = head[13:14], 14
    for present in (0x40, 0x80):  # sizes that a block's header may have first: integers of 7 bits a byte
        if flags and flags[0] & present:
            while at < len(head) and head[at] & 0x80:
                at += 1
            at += 1
    found = head[at : at + 3]
    if len(found) < 3 or found[:2] != b"\x21\x01" or found[2] > 39:  # no block, or another filter comes first
        return _XZ_DECODER_BYTES
    return (2 | found[2] & 1) << (found[2] // 2 + 11)
