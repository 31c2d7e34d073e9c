"""Reading tar headers out of a stream of chunks: what verification, listing and extraction share.

Reads ustar, POSIX pax (``x``, ``g``) and GNU (``L``, ``K``, base-256 numbers, ``S`` headers are skipped over); names
are bytes, never decoded. `tarfile` is not used because its names are not byte-exact in every locale and it takes
five times as long a member.

What always holds: whatever the bytes are, memory is bounded (an extended header larger than 16 MiB is refused),
sizes are not believed beyond what the stream holds, and what is not tar raises `NotTar`. A stream may end without
its two zero blocks at a member's boundary, so that spans of members can be read as a stream of their own.
Sources: POSIX.1-2017 pax, "ustar Interchange Format" and "pax Extended Header"; GNU tar manual, "Basic Tar Format".
Imports ``errors`` and ``index`` (for `Kind`, `Member`); ``frames`` and ``pack.extract`` import it.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator
from typing import Final

from fastship.errors import ArtifactError
from fastship.frames.index import Kind, Member

BLOCK = 512
_ZERO_BLOCK = bytes(BLOCK)
_SPACES = b"        "
_MAX_EXTENDED_BYTES = 16 << 20
_WITH_DATA = b"0\x007"  # regular, regular in V7, contiguous; hard links and the rest carry none (as tarfile reads them)
_WITHOUT_DATA = b"123456"
_PAX_KEYS = frozenset((b"path", b"linkpath", b"size", b"mtime", b"uid", b"gid"))
_SPARSE = b"GNU.sparse."
_ADLER_MODULUS: Final = 65521
_KINDS = {int(kind): kind for kind in Kind}


class NotTar(ArtifactError):
    """The stream is not a tar stream, or it is cut."""


class Header:
    """One member as its header blocks tell it. Cheap to make: what is not asked for is not parsed."""

    __slots__ = ("_block", "_extended", "data_bytes", "is_sparse", "kind", "tar_offset")

    def __init__(self, block: bytes, extended: dict[bytes, bytes], tar_offset: int, data_bytes: int) -> None:
        self._block = block
        self._extended = extended
        self.tar_offset = tar_offset
        self.data_bytes = data_bytes  # of content in the stream, padding not counted
        flag = block[156]
        kind = Kind.FILE if flag in _WITH_DATA else _KINDS.get(flag, Kind.OTHER)
        if kind is Kind.FILE and self.name.endswith(b"/"):
            kind = Kind.DIRECTORY  # V7 had no type flags
        self.kind = kind
        self.is_sparse = flag == 0x53 or _SPARSE in extended

    @property
    def name(self) -> bytes:
        path = self._extended.get(b"path")
        if path is not None:
            return path
        name = self._block[:100].partition(b"\0")[0]
        if self._block[257:263] == b"ustar\0":  # GNU's own magic has no NUL here, and other things in the prefix field
            prefix = self._block[345:500].partition(b"\0")[0]
            return prefix + b"/" + name if prefix else name
        return name

    @property
    def link(self) -> bytes:
        link = self._extended.get(b"linkpath")
        return self._block[157:257].partition(b"\0")[0] if link is None else link

    @property
    def mode(self) -> int:
        return _number(self._block[100:108]) & 0o7777

    @property
    def uid(self) -> int:
        return self._decimal(b"uid", slice(108, 116))

    @property
    def gid(self) -> int:
        return self._decimal(b"gid", slice(116, 124))

    @property
    def mtime_ns(self) -> int:
        text = self._extended.get(b"mtime")
        if text is None:
            return _number(self._block[136:148]) * 1_000_000_000
        try:
            whole, _, fraction = text.partition(b".")
            nanoseconds = int((fraction + b"000000000")[:9])
            seconds = int(whole) * 1_000_000_000
        except ValueError:
            raise NotTar(f"an extended header has the time {text[:40]!r}") from None
        return seconds - nanoseconds if text.startswith(b"-") else seconds + nanoseconds

    def member(self) -> Member:
        name = self.name
        if self.kind is Kind.DIRECTORY and not name.endswith(b"/"):
            name += b"/"
        link = self.link if self.kind in (Kind.HARD_LINK, Kind.SYMLINK) else b""
        return Member(
            self.tar_offset,
            self.data_bytes,
            self.mtime_ns // 1_000_000_000,
            self.uid,
            self.gid,
            self.mode,
            self.kind,
            name,
            link,
        )

    def _decimal(self, key: bytes, field: slice) -> int:
        text = self._extended.get(key)
        return _number(self._block[field]) if text is None else _pax_integer(text)


class TarReader:
    """Iterates over the members of a tar stream given as chunks; between two members, `data` gives the content.

    Content that is not asked for is skipped. Raises `NotTar`, and what the chunks' iterator raises.
    """

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks = iter(chunks)
        self._chunk: memoryview = memoryview(b"")
        self._at = 0  # in the chunk
        self._base = 0  # offset in the stream of the chunk's first byte
        self._content_left = 0
        self._padding = 0
        self._global: dict[bytes, bytes] = {}

    def __iter__(self) -> Iterator[Header]:
        while (header := self.next()) is not None:
            yield header

    def next(self) -> Header | None:
        """The next member's header, or None at the end of the archive."""
        member = self._next()
        return None if member is None else Header(*member)

    def count(self, most: int | None = None) -> int:
        """How many members follow, to the end of the archive; with one more than ``most`` it stops. For who wants
        nothing else of them: making their headers is a third of what reading them costs."""
        members = 0
        while (most is None or members <= most) and self._next() is not None:
            members += 1
        return members

    def _next(self) -> tuple[bytes, dict[bytes, bytes], int, int] | None:
        """What makes the next `Header`."""
        self._skip(self._content_left + self._padding)
        self._content_left = self._padding = 0
        start = self._base + self._at
        extended: dict[bytes, bytes] | None = None
        while True:
            block = self._block(at_boundary=extended is None)
            if block is None:
                return None
            flag = block[156]
            if flag in b"xgLK":
                size = _number(block[124:136])
                if not 0 <= size <= _MAX_EXTENDED_BYTES:
                    raise NotTar(f"an extended header of {size} bytes")
                body = self._take(size)
                self._skip(-size % BLOCK)
                if flag == 0x67:  # g
                    self._global.update(_pax_records(body))
                    continue
                extended = {} if extended is None else extended
                if flag == 0x78:  # x
                    extended.update(_pax_records(body))
                else:
                    extended[b"path" if flag == 0x4C else b"linkpath"] = body.partition(b"\0")[0]
                continue
            records = {**self._global, **(extended or {})} if self._global else (extended or {})
            return block, records, start, self._begin_content(block, records)

    def data(self) -> Iterator[memoryview]:
        """The content of the current member in pieces, once. A piece is valid until the next one is asked for."""
        while self._content_left:
            if self._at == len(self._chunk) and not self._refill():
                raise NotTar("the tar stream ends in the middle of a member")
            piece = self._chunk[self._at : self._at + self._content_left]
            self._at += len(piece)
            self._content_left -= len(piece)
            yield piece

    def _begin_content(self, block: bytes, records: dict[bytes, bytes]) -> int:
        """How many bytes of it are in the stream."""
        flag = block[156]
        if flag in _WITHOUT_DATA:
            size = 0
        elif b"size" in records:
            size = _pax_integer(records[b"size"])
        else:
            size = _number(block[124:136])
        if size < 0:
            raise NotTar("a member of negative size")
        if flag == 0x53 and block[482]:  # old GNU sparse: more map blocks follow while their last flag says so
            while self._take(BLOCK)[504]:
                pass
        self._content_left, self._padding = size, -size % BLOCK
        return size

    def _block(self, *, at_boundary: bool) -> bytes | None:
        """The next header block, its sum verified; None at a zero block, or at the end where a member may end."""
        if self._at == len(self._chunk) and not self._refill():
            if at_boundary:
                return None
            raise NotTar("the tar stream ends after an extended header")
        block = self._take(BLOCK)
        if block == _ZERO_BLOCK:
            return None
        if not _sum_is_right(block):
            raise NotTar(f"no tar header at byte {self._base + self._at - BLOCK} of the stream")
        return block

    def _take(self, count: int) -> bytes:
        chunk, at = self._chunk, self._at
        if at + count <= len(chunk):
            self._at = at + count
            return bytes(chunk[at : at + count])
        pieces = []
        while count:
            if self._at == len(self._chunk) and not self._refill():
                raise NotTar("the tar stream is cut")
            piece = self._chunk[self._at : self._at + count]
            self._at += len(piece)
            count -= len(piece)
            pieces.append(bytes(piece))
        return b"".join(pieces)

    def _skip(self, count: int) -> None:
        while count:
            step = min(count, len(self._chunk) - self._at)
            self._at += step
            count -= step
            if count and not self._refill():
                raise NotTar("the tar stream ends in the middle of a member")

    def _refill(self) -> bool:
        for chunk in self._chunks:
            if chunk:
                self._base += len(self._chunk)
                self._chunk, self._at = memoryview(chunk), 0
                return True
        return False


def header_sum(block: bytes) -> int:
    """The sum of bytes of ``block`` modulo 65521, in C: the low half of Adler-32 is one plus that sum (RFC 1950, 8.2).

    For a header of ASCII bytes, at most 512 x 127, it is the sum itself.
    """
    return ((zlib.adler32(block) & 0xFFFF) - 1) % _ADLER_MODULUS


def _sum_is_right(block: bytes) -> bool:
    stored = _number(block[148:156])
    without = zlib.adler32(block[156:], zlib.adler32(_SPACES, zlib.adler32(block[:148])))
    if ((without & 0xFFFF) - 1) % _ADLER_MODULUS == stored % _ADLER_MODULUS:
        return True
    # Some old writers summed signed characters.
    signed: int = sum(struct.unpack_from("148b8x356b", block)) + sum(_SPACES)
    return stored == signed


def _number(field: bytes) -> int:
    """Octal text, or GNU's base-256 with the top bit set."""
    if field[0] & 0x80:
        value = int.from_bytes(field, "big") & ((1 << (8 * len(field) - 1)) - 1)
        return value - (1 << (8 * len(field) - 1)) if field[0] & 0x40 else value
    try:
        return int(field.partition(b"\0")[0].strip(b" ") or b"0", 8)
    except ValueError:
        raise NotTar(f"a tar header has the number {field!r}") from None


def _pax_integer(text: bytes) -> int:
    try:
        return int(text)
    except ValueError:
        raise NotTar(f"an extended header has the number {text[:40]!r}") from None


def _pax_records(body: bytes) -> dict[bytes, bytes]:
    """``"30 mtime=1321711775.972059463\\n"`` each; only what is used here is kept. Later records win."""
    records = {}
    at = 0
    while at < len(body) and body[at]:
        space = body.find(b" ", at, at + 20)
        try:
            length = int(body[at:space]) if space > 0 else 0
        except ValueError:
            length = 0
        record = body[at : at + length]
        key, equals, value = record[space + 1 - at :].partition(b"=")
        if space < 0 or len(record) != length or not equals or not value.endswith(b"\n"):
            raise NotTar("an extended header has a record that is not one")
        if key in _PAX_KEYS:
            records[key] = value[:-1]
        elif key.startswith(_SPARSE):
            records[_SPARSE] = b""  # that there is one says enough; keeping each would be the archive's to fill memory
        at += length
    return records
