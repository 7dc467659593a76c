"""The structure of zstd data (RFC 8878) that Headrace relies on beyond the library. zstd_blocks -> zstd, splice_points.

    section        what                           layout, little-endian
    3.1.1          frame                          Magic_Number (4), Frame_Header, blocks, Content_Checksum (0 or 4)
    3.1.1.1.1      Frame_Header_Descriptor (1)    bits 7-6 Frame_Content_Size_flag, 5 Single_Segment_flag,
                                                  2 Content_Checksum_flag, 1-0 Dictionary_ID_flag
    3.1.1.1.2      Window_Descriptor (0 or 1)     bits 7-3 exponent, 2-0 mantissa;
                                                  (1 + mantissa / 8) * 2^(10 + exponent) bytes;
                                                  absent with Single_Segment_flag
    3.1.1.1.3, .4  Dictionary_ID (0 to 4), Frame_Content_Size (0 to 8)
    3.1.1.2        Block_Header (3)               bit 0 Last_Block, 2-1 Block_Type, 23-3 Block_Size
                                                  type 0 raw, 1 RLE (one byte follows), 2 compressed, 3 reserved
    3.1.1.2.4      Block_Maximum_Size             the smaller of window and 128 KiB: most bytes a block unpacks to
    3.1.1.3.1.1    Literals_Section_Header        bits 1-0 Literals_Block_Type, 3-2 Size_Format (1 to 5 bytes in all)
                                                  type 0 raw, 1 RLE, 2 compressed, 3 treeless: the last Huffman tree
    3.1.1.3.2.1    Sequences_Section_Header       Number_of_Sequences (1 to 3); unless 0, Symbol_Compression_Modes (1):
                                                  bits 7-6 literals lengths, 5-4 offsets, 3-2 match lengths
                                                  mode 0 predefined, 1 RLE, 2 FSE, 3 repeat: the last table
    3.1.1.5        Repeat Offsets                 three, 1, 4 and 8 at a frame's start, carried from block to block
    3.1.2          skippable frame                magic 0x184D2A5? (4), Frame_Size (4), that many bytes
    5              dictionary                     without Magic_Number: raw content, which a frame may refer to

A decoder carries the window, the Huffman tree, three FSE tables and three offsets from block to block. So decoding can
start at a block inside a frame, with a made-up header and the window as a raw dictionary, if no block from there on
refers to an earlier tree, table or offset. A block's own headers show whether it refers to earlier trees and tables;
for offsets and for later blocks, only decoding shows it: see shards/index/splice_points.py.
"""

from __future__ import annotations

MAGIC = b"\x28\xb5\x2f\xfd"
SKIPPABLE_MAGICS = tuple(bytes([low, 0x2A, 0x4D, 0x18]) for low in range(0x50, 0x60))
MAX_HEADER_BYTES = 18  # magic and frame header
BLOCK_HEADER_BYTES = 3
MAX_BLOCK_BYTES = 1 << 17
CHECKSUM_BYTES = 4
RAW, _RLE, _COMPRESSED, RESERVED = range(4)  # Block_Type
_TREELESS = 3  # Literals_Block_Type
_REPEAT = 3  # one of Symbol_Compression_Modes


def frame_header_bytes(head: bytes) -> int:
    """Return the size of a frame's magic and header, given its `head`. Raises: IndexError if that is truncated."""
    descriptor = head[4]
    single_segment = descriptor >> 5 & 1
    dictionary = (0, 1, 2, 4)[descriptor & 3]
    content_size = (single_segment, 2, 4, 8)[descriptor >> 6]
    return 4 + 1 + (1 - single_segment) + dictionary + content_size


def has_checksum(head: bytes) -> bool:
    """Return whether Content_Checksum follows the last block of the frame that begins with `head`."""
    return bool(head[4] & 4)


def block_header(head: bytes) -> tuple[bool, int, int, int]:
    """Read a Block_Header: (Last_Block, Block_Type, bytes of content that follow, bytes it unpacks to at most)."""
    value = int.from_bytes(head[:BLOCK_HEADER_BYTES], "little")
    kind, size = value >> 1 & 3, value >> 3
    return bool(value & 1), kind, 1 if kind == _RLE else size, MAX_BLOCK_BYTES if kind == _COMPRESSED else size


def stands_alone(block: bytes) -> bool:
    """Return whether a block, given from its Block_Header on, refers to no earlier tree or table in its headers."""
    _, kind, size, _ = block_header(block)
    if kind != _COMPRESSED:
        return True
    content = memoryview(block)[BLOCK_HEADER_BYTES : BLOCK_HEADER_BYTES + size]
    try:
        literals, size_format = content[0] & 3, content[0] >> 2 & 3
        if literals == _TREELESS:
            return False
        if literals == _COMPRESSED:
            header, bits = ((3, 10), (3, 10), (4, 14), (5, 18))[size_format]
            compressed_size = int.from_bytes(content[:header], "little") >> (4 + bits)
            content = content[header + compressed_size :]
        else:
            header, shift = ((1, 3), (2, 4), (1, 3), (3, 4))[size_format]
            regenerated_size = int.from_bytes(content[:header], "little") >> shift
            content = content[header + (regenerated_size if literals == RAW else 1) :]
        if content[0] == 0:
            return True
        modes = content[1 if content[0] < 128 else 2 if content[0] < 255 else 3]
    except IndexError:  # the block is damaged
        return False
    return _REPEAT not in (modes >> 6, modes >> 4 & 3, modes >> 2 & 3)


def made_header(window_log: int) -> bytes:
    """Make a frame header for blocks inside a frame: no content size, no checksum, a window of 2^window_log bytes."""
    return MAGIC + bytes([0, (window_log - 10) << 3])
