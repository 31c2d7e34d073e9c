"""The member index: what is in an artifact and where, so that listing and restoring one member need not read the rest.

A skippable frame (RFC 8878, 3.1.2) of magic 0x184D2A5D after the last data frame and before the seek table; stock
``zstd -d`` ignores it. Its payload, all little endian:

    header   magic "FSmi", version u16 = 1, zero u16, members u64, blocks u32
    block    compressed bytes u32, raw bytes u32, then one zstd frame (with checksum) of records
    record   tar offset of the member's first header block u64, size u64, mtime s64 (seconds), uid u32, gid u32,
             mode u16, kind u8 (the tar type flag), name bytes u32, link bytes u32, then name and link

What always holds: records stand in tar order; a writer holds one raw block and the compressed rest, about 12 bytes
a member; a reader holds one block and about 1 MiB, and whatever it is fed it yields members or raises
`ArtifactError`, also for a flip in any byte, since each field is checked against another or by the zstd checksum.
Imports ``errors`` and zstandard; only ``fastship.frames`` imports it.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple

import zstandard

from fastship.errors import ArtifactError
from fastship.frames.seektable import SKIPPABLE_HEADER

INDEX_MAGIC = 0x184D2A5D

_HEADER = struct.Struct("<4sHHQI")
_BLOCK = struct.Struct("<II")
_RECORD = struct.Struct("<QQqIIHBII")
_MAGIC = b"FSmi"
_VERSION = 1

_BLOCK_BYTES = 256 << 10  # raw; small enough to hold, large enough for zstd to see the names' likeness
_MAX_BLOCK_BYTES = 8 << 20  # raw; only a name of megabytes comes near
_MAX_INDEX_BYTES = 1 << 30  # a quarter of what a skippable frame can hold: some 80 million members
_READ_AHEAD_BYTES = 1 << 20
_LEVEL = 3


class Kind(enum.IntEnum):
    """What a member is; the value is the tar type flag (POSIX.1-2017, pax, ustar typeflag)."""

    FILE = ord("0")
    HARD_LINK = ord("1")
    SYMLINK = ord("2")
    CHARACTER_DEVICE = ord("3")
    BLOCK_DEVICE = ord("4")
    DIRECTORY = ord("5")
    FIFO = ord("6")
    OTHER = ord("?")


class Member(NamedTuple):
    """One member as ``ls`` shows it. A directory's name ends in a slash; ``link`` is a link's target or empty."""

    tar_offset: int  # of its first header block (the extended header's, where there is one)
    size: int  # bytes of content
    mtime: int  # seconds since the epoch
    uid: int
    gid: int
    mode: int  # permission bits, 0 to 0o7777
    kind: Kind
    name: bytes
    link: bytes


def index_compressor() -> zstandard.ZstdCompressor:
    """For one thread's `IndexWriter`s, one after the other."""
    return zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True, write_content_size=True)


class IndexWriter:
    """Takes the members in tar order; `finish` gives the whole skippable frame.

    ``compressor`` comes from `index_compressor`; making one costs as much as packing ten small files, so it is kept.
    """

    def __init__(self, compressor: zstandard.ZstdCompressor) -> None:
        self._pending = bytearray()
        self._blocks: list[bytes] = []
        self._index_bytes = 0
        self._too_large = False
        self._compressor = compressor
        self.members = 0

    def add(
        self, tar_offset: int, size: int, mtime: int, uid: int, gid: int, mode: int, kind: int, name: bytes, link: bytes
    ) -> None:
        """One member; the arguments are `Member`'s fields. On the hot path: one pack, two appends."""
        self.members += 1
        pending = self._pending
        pending += _RECORD.pack(tar_offset, size, mtime, uid, gid, mode, kind, len(name), len(link))
        pending += name
        pending += link
        if len(pending) >= _BLOCK_BYTES:
            self._close_block()

    def finish(self) -> bytes | None:
        """The index as one skippable frame, or None where it would be too large to be worth its bytes."""
        if self._pending:
            self._close_block()
        if self._too_large:
            return None
        header = _HEADER.pack(_MAGIC, _VERSION, 0, self.members, len(self._blocks))
        payload_bytes = len(header) + self._index_bytes
        return b"".join((SKIPPABLE_HEADER.pack(INDEX_MAGIC, payload_bytes), header, *self._blocks))

    def _close_block(self) -> None:
        raw_bytes = len(self._pending)
        if raw_bytes > _MAX_BLOCK_BYTES or self._index_bytes > _MAX_INDEX_BYTES:
            self._too_large = True
            self._blocks.clear()
        if not self._too_large:
            compressed = self._compressor.compress(self._pending)
            block = _BLOCK.pack(len(compressed), raw_bytes) + compressed
            self._blocks.append(block)
            self._index_bytes += len(block)
        self._pending = bytearray()


def decode(read_at: Callable[[int, int], bytes], length: int) -> Iterator[Member]:
    """The members of an index payload of ``length`` bytes, read through ``read_at(offset in payload, length)``.

    Raises `ArtifactError`, possibly after some members: only a complete iteration has checked everything.
    """
    source = _Buffered(read_at, length)
    magic, version, zero, members, blocks = _HEADER.unpack(source.take(_HEADER.size))
    if magic != _MAGIC or zero:
        raise ArtifactError("the member index is damaged: its header is not one")
    if version != _VERSION:
        raise ArtifactError(
            f"the member index has version {version}, this fastship reads {_VERSION}", remedy="use a newer fastship"
        )
    decompressor = zstandard.ZstdDecompressor()
    seen = 0
    for _ in range(blocks):
        compressed_bytes, raw_bytes = _BLOCK.unpack(source.take(_BLOCK.size))
        if not 0 < raw_bytes <= _MAX_BLOCK_BYTES or compressed_bytes > raw_bytes + 1024:
            raise ArtifactError("the member index is damaged: impossible block size")
        for member in _records(_decompress(decompressor, source.take(compressed_bytes), raw_bytes)):
            seen += 1
            yield member
    if seen != members or source.left:
        raise ArtifactError(f"the member index is damaged: it says {members} members and holds {seen}")


def _decompress(decompressor: zstandard.ZstdDecompressor, compressed: bytes, raw_bytes: int) -> bytes:
    try:
        parameters = zstandard.get_frame_parameters(compressed)
        # Asked first: the decompressor would allocate whatever size the frame claims.
        if parameters.content_size != raw_bytes or not parameters.has_checksum:
            raise ArtifactError("the member index is damaged: a block is not of the size it says")
        raw = decompressor.decompress(compressed, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ArtifactError(f"the member index is damaged: {error}") from None
    if len(raw) != raw_bytes:
        raise ArtifactError("the member index is damaged: a block is not of the size it says")
    return raw


def _records(raw: bytes) -> Iterator[Member]:
    at, end = 0, len(raw)
    kinds = {int(kind): kind for kind in Kind}
    while at < end:
        if at + _RECORD.size > end:
            raise ArtifactError("the member index is damaged: a record is cut")
        tar_offset, size, mtime, uid, gid, mode, kind, name_bytes, link_bytes = _RECORD.unpack_from(raw, at)
        name_at = at + _RECORD.size
        link_at = name_at + name_bytes
        at = link_at + link_bytes
        if at > end:
            raise ArtifactError("the member index is damaged: a record is cut")
        yield Member(
            tar_offset, size, mtime, uid, gid, mode, kinds.get(kind, Kind.OTHER), raw[name_at:link_at], raw[link_at:at]
        )


class _Buffered:
    """Sequential reading through ``read_at`` in large pieces, so that an HTTP reader asks seldom."""

    def __init__(self, read_at: Callable[[int, int], bytes], length: int) -> None:
        self._read_at = read_at
        self._length = length
        self._buffer = b""
        self._at = 0  # in the buffer
        self._next = 0  # where in the payload the buffer ends

    @property
    def left(self) -> int:
        return self._length - self._next + len(self._buffer) - self._at

    def take(self, count: int) -> bytes:
        if count > self.left:
            raise ArtifactError("the member index is damaged: it ends too early")
        if self._at + count > len(self._buffer):
            rest = self._buffer[self._at :]
            want = min(max(count - len(rest), _READ_AHEAD_BYTES), self._length - self._next)
            more = self._read_at(self._next, want)
            if len(more) != want:
                raise ArtifactError("the artifact ends in the middle of its member index")
            self._buffer, self._at, self._next = rest + more, 0, self._next + want
        piece = self._buffer[self._at : self._at + count]
        self._at += count
        return piece
