"""The seek table: where each frame of an artifact lies, in the zstd seekable format, version 0.1.0.

Source: facebook/zstd, contrib/seekable_format/zstd_seekable_compression_format.md. A skippable frame at the
very end of the file, which every zstd decoder ignores: entries of (compressed size, content size), then a
footer that is recognised from the file's last four bytes. A frame with content size 0 is a skippable frame
(our member index). Our entries carry no checksum: every zstd frame of ours has its own XXH64 of its content.

What always holds: `decode` believes nothing. Whatever bytes it is given, it returns a table whose sizes add up
to the file and fit the limits below, or None where there is no seek table, or raises `ArtifactError`; and it
never holds more than a small multiple of the table. Imports ``errors``; only ``fastship.frames`` imports it.
"""

from __future__ import annotations

import bisect
import struct
import sys
from array import array
from collections.abc import Callable, Iterable

from fastship.errors import ArtifactError

SEEK_TABLE_MAGIC = 0x184D2A5E  # skippable frame magic, section "Skippable_Magic_Number" of the format
SEEKABLE_MAGIC = 0x8F92EAB1  # last four bytes of the file
SKIPPABLE_HEADER = struct.Struct("<II")  # magic, bytes that follow (RFC 8878, 3.1.2)
FOOTER = struct.Struct("<IBI")  # entries, descriptor, seekable magic

MAX_ENTRIES = 1 << 22
"""At 8 MiB a frame 32 TiB of tar stream; a table of 32 MiB. More is refused by readers and not written."""
MAX_FRAME_CONTENT_BYTES = 1 << 30
"""The largest ``pack.frame_bytes`` there is (settings)."""

_CHECKSUM_FLAG = 0x80
_RESERVED_BITS = 0x7C


class FrameTable:
    """The decoded table: frame ``i`` is ``compressed_offsets[i:i+2]`` of the file, ``content_offsets[i:i+2]`` of the
    tar stream (both half open, in bytes). ``content_bytes`` is the length of the tar stream."""

    __slots__ = ("compressed_offsets", "content_bytes", "content_offsets")

    def __init__(self, sizes: Iterable[tuple[int, int]]) -> None:
        compressed, content = array("Q", [0]), array("Q", [0])
        end = content_end = 0
        for compressed_bytes, content_bytes in sizes:
            end += compressed_bytes
            content_end += content_bytes
            compressed.append(end)
            content.append(content_end)
        self.compressed_offsets = compressed
        self.content_offsets = content
        self.content_bytes: int = content_end

    def __len__(self) -> int:
        return len(self.compressed_offsets) - 1

    def content_size(self, number: int) -> int:
        return self.content_offsets[number + 1] - self.content_offsets[number]

    def overlapping(self, start: int, end: int) -> range:
        """The numbers of the entries that hold tar stream bytes ``start`` to ``end``."""
        if end <= start:
            return range(0)
        first = bisect.bisect_right(self.content_offsets, start) - 1
        return range(first, min(bisect.bisect_left(self.content_offsets, end), len(self)))


def encode(entries: array[int]) -> bytes:
    """The seek table of ``entries``: compressed and content size of each frame in turn, all below 4 GiB."""
    table = array("I", entries)
    if sys.byteorder == "big":
        table.byteswap()
    body = table.tobytes()
    footer = FOOTER.pack(len(table) // 2, 0, SEEKABLE_MAGIC)
    return SKIPPABLE_HEADER.pack(SEEK_TABLE_MAGIC, len(body) + len(footer)) + body + footer


def decode(read_at: Callable[[int, int], bytes], total_bytes: int) -> FrameTable | None:
    """The table of a file of ``total_bytes``, read through ``read_at(offset, length)``; None where there is none.

    Raises `ArtifactError` for a table that is damaged, too large, or does not add up to the file.
    """
    if total_bytes < SKIPPABLE_HEADER.size + FOOTER.size:
        return None
    count, descriptor, magic = FOOTER.unpack(_exactly(read_at, total_bytes - FOOTER.size, FOOTER.size))
    entry_bytes = 12 if descriptor & _CHECKSUM_FLAG else 8
    body_bytes = count * entry_bytes
    start = total_bytes - FOOTER.size - body_bytes - SKIPPABLE_HEADER.size
    header = None
    if start >= 0 and count <= MAX_ENTRIES:
        header = SKIPPABLE_HEADER.unpack(_exactly(read_at, start, SKIPPABLE_HEADER.size))
    framed = header == (SEEK_TABLE_MAGIC, body_bytes + FOOTER.size)
    if magic != SEEKABLE_MAGIC:
        if framed and count:
            raise ArtifactError("the seek table's footer is damaged")
        return None
    if not framed or descriptor & _RESERVED_BITS:
        raise ArtifactError("the seek table is damaged: its frame and its footer do not agree")
    table = array("I", _exactly(read_at, start + SKIPPABLE_HEADER.size, body_bytes))
    if sys.byteorder == "big":
        table.byteswap()
    step = entry_bytes // 4
    compressed, content = table[0::step], table[1::step]
    if sum(compressed) != start:
        raise ArtifactError(f"the seek table speaks of {sum(compressed)} bytes of frames, the file has {start}")
    if compressed and min(compressed) == 0:
        raise ArtifactError("the seek table has a frame of no bytes")
    if content and max(content) > MAX_FRAME_CONTENT_BYTES:
        raise ArtifactError(f"the seek table claims a frame of {max(content)} bytes; at most 1 GiB is read")
    return FrameTable(zip(compressed, content, strict=True))


def _exactly(read_at: Callable[[int, int], bytes], offset: int, length: int) -> bytes:
    data = read_at(offset, length)
    if len(data) != length:
        raise ArtifactError(f"the artifact ends at byte {offset + len(data)} in the middle of its seek table")
    return data
