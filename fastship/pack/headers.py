"""Tar headers by hand, in the canonical form: ustar where it fits, else a POSIX pax header before it.

What always holds: the same member gives the same bytes on any host, in any locale; user and group names are empty;
a header block is ASCII. `tarfile` and GNU tar read what comes out (tests); a name that is not UTF-8 travels raw behind
``hdrcharset=BINARY``, as `tarfile` writes it and both restore it byte for byte (GNU tar says on stderr that it does
not know the keyword).

Source: POSIX.1-2017 pax, "ustar Interchange Format" and "pax Extended Header". Only ``pack.stream`` imports it.
"""

from __future__ import annotations

import functools
import zlib

BLOCK = 512
END_OF_ARCHIVE = bytes(2 * BLOCK)

_NAME_BYTES = 100
_MAX_OCTAL_7 = 0o7777777  # mode, uid, gid, device numbers: seven digits and a NUL
_MAX_OCTAL_11 = 0o77777777777  # size and mtime: 8 GiB - 1
_MAGIC = b"ustar\x0000"
_PAX_NAME = b"././@PaxHeader"  # the name tarfile gives it
_REGULAR = ord("0")


@functools.lru_cache(maxsize=64)
def _owner_fields(mode: int, uid: int, gid: int) -> bytes:
    return b"%07o\0%07o\0%07o\0" % (mode, uid, gid)


@functools.lru_cache(maxsize=64)
def _tail(kind: int) -> tuple[bytes, int]:
    """All after the sum for a member without link or device, and its sum of bytes with the blank sum field's."""
    tail = (b"%c%b%b" % (kind, bytes(100), _MAGIC)).ljust(BLOCK - 156, b"\0")
    return tail, sum(tail) + 8 * ord(" ")


def header(
    name: bytes,
    mode: int,
    uid: int,
    gid: int,
    size: int,
    mtime: int,
    kind: int = _REGULAR,
    link: bytes = b"",
    device: tuple[int, int] | None = None,
) -> bytes:
    """The header block or blocks of one member: a multiple of 512 bytes.

    ``mode`` has the permission bits only; ``mtime`` is in whole seconds, of any sign; ``kind`` is the type flag's byte.
    """
    if (
        len(name) > _NAME_BYTES
        or not name.isascii()
        or uid > _MAX_OCTAL_7
        or gid > _MAX_OCTAL_7
        or size > _MAX_OCTAL_11
        or not 0 <= mtime <= _MAX_OCTAL_11
        or link
        or device
    ):
        return _unusual_header(name, mode, uid, gid, size, mtime, kind, link, device)
    return _block(name, mode, uid, gid, size, mtime, kind)


def _block(name: bytes, mode: int, uid: int, gid: int, size: int, mtime: int, kind: int) -> bytes:
    head = b"%b%b%011o\0%011o\0" % (name.ljust(100, b"\0"), _owner_fields(mode, uid, gid), size, mtime)
    tail, tail_sum = _tail(kind)
    # The low half of Adler-32 is one plus the sum of bytes modulo 65521 (RFC 1950, 8.2); 148 bytes stay below that.
    return b"%b%06o\0 %b" % (head, (zlib.adler32(head) & 0xFFFF) - 1 + tail_sum, tail)


def _unusual_header(
    name: bytes,
    mode: int,
    uid: int,
    gid: int,
    size: int,
    mtime: int,
    kind: int,
    link: bytes,
    device: tuple[int, int] | None,
) -> bytes:
    records: list[tuple[bytes, bytes]] = []
    name_field, link_field = name, link
    if len(name) > _NAME_BYTES or not name.isascii():
        records.append((b"path", name))
        name_field = _ascii(name)
    if len(link) > _NAME_BYTES or not link.isascii():
        records.append((b"linkpath", link))
        link_field = _ascii(link)
    if uid > _MAX_OCTAL_7:
        records.append((b"uid", b"%d" % uid))
        uid = 0
    if gid > _MAX_OCTAL_7:
        records.append((b"gid", b"%d" % gid))
        gid = 0
    if size > _MAX_OCTAL_11:
        records.append((b"size", b"%d" % size))
        size = 0
    if not 0 <= mtime <= _MAX_OCTAL_11:
        records.append((b"mtime", b"%d" % mtime))
        mtime = 0
    if device and max(device) > _MAX_OCTAL_7:
        device = (0, 0)  # minor numbers have 20 bits and fit; a larger one is no device of Linux
    if any(not _is_utf8(value) for _, value in records):
        records.insert(0, (b"hdrcharset", b"BINARY"))
    body = b"".join(_record(key, value) for key, value in records)
    blocks = b""
    if body:
        blocks = _block(_PAX_NAME, 0o644, 0, 0, len(body), 0, ord("x")) + body + bytes(-len(body) % BLOCK)
    return blocks + _with_link(_block(name_field, mode, uid, gid, size, mtime, kind), link_field, device)


def _with_link(block: bytes, link: bytes, device: tuple[int, int] | None) -> bytes:
    """``block`` with a link's target or a device's numbers, summed again."""
    devices = b"%07o\0%07o\0" % device if device else block[329:345]
    body = b"%b%b%b%b%b%b" % (block[:148], b" " * 8, block[156:157], link.ljust(100, b"\0"), block[257:329], devices)
    body += block[345:]
    return b"%b%06o\0 %b" % (body[:148], sum(body), body[156:])


def _record(key: bytes, value: bytes) -> bytes:
    """``"%d %s=%s\\n"``, whose length counts its own digits."""
    rest = len(key) + len(value) + 3
    length = rest + len(str(rest))
    if len(str(length)) != len(str(rest)):
        length = rest + len(str(length))
    return b"%d %b=%b\n" % (length, key, value)


def _ascii(name: bytes) -> bytes:
    """What a reader that knows no pax shows: the first 100 bytes, others than ASCII as ``?``."""
    return bytes(byte if byte < 0x80 else 0x3F for byte in name[:_NAME_BYTES])


def _is_utf8(value: bytes) -> bool:
    try:
        value.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
