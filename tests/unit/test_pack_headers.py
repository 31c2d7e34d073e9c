"""Header blocks by hand, read by `tarfile`, by GNU tar (in test_pack_packing) and by our own reader."""

from __future__ import annotations

import io
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastship.frames import Kind, TarReader
from fastship.pack.headers import END_OF_ARCHIVE, header

names = st.one_of(
    st.binary(min_size=1, max_size=400).map(lambda raw: raw.replace(b"\0", b"-").strip(b"/") or b"n"),
    st.text("ab/é.", min_size=1, max_size=150).map(lambda text: text.encode().strip(b"/") or b"n"),
)
numbers = st.one_of(st.integers(0, 4000), st.integers(0, (1 << 32) - 2))
times = st.one_of(st.integers(1_500_000_000, 1_900_000_000), st.integers(-(1 << 40), 1 << 40))


def by_tarfile(blocks: bytes) -> tarfile.TarInfo:
    with tarfile.open(fileobj=io.BytesIO(blocks + END_OF_ARCHIVE), errorlevel=2) as tar:
        info = tar.next()
    assert info is not None
    return info


@given(names, st.integers(0, 0o7777), numbers, numbers, times, st.sampled_from(Kind), names)
def test_every_field_reads_back(
    name: bytes, mode: int, uid: int, gid: int, mtime: int, kind: Kind, target: bytes
) -> None:
    if kind is Kind.OTHER:
        kind = Kind.FILE
    link = target if kind in (Kind.HARD_LINK, Kind.SYMLINK) else b""
    device = (8, 300_000) if kind in (Kind.BLOCK_DEVICE, Kind.CHARACTER_DEVICE) else None
    if kind is Kind.DIRECTORY:
        name += b"/"
    blocks = header(name, mode, uid, gid, 0, mtime, kind, link, device)
    assert len(blocks) % 512 == 0
    assert blocks[-512:].isascii()
    info = by_tarfile(blocks)
    assert info.name.encode("utf-8", "surrogateescape") == name.rstrip(b"/")
    assert (info.mode, info.uid, info.gid, info.mtime, info.type[0]) == (mode, uid, gid, mtime, int(kind))
    assert info.linkname.encode("utf-8", "surrogateescape") == link.rstrip(b"/") or link.endswith(b"/")
    assert (info.uname, info.gname) == ("", "")
    if device:
        assert (info.devmajor, info.devminor) == device
    ours = TarReader([blocks]).next()
    assert ours is not None
    assert (ours.name, ours.link, ours.mode, ours.uid, ours.gid) == (name, link, mode, uid, gid)
    assert (ours.mtime_ns, ours.kind) == (mtime * 1_000_000_000, kind)


@pytest.mark.parametrize("size", [0, 1, (8 << 30) - 1, 8 << 30, 9 << 30, 1 << 50])
def test_every_size_reads_back(size: int) -> None:
    blocks = header(b"ep/file", 0o644, 0, 0, size, 0)
    assert by_tarfile(blocks).size == size
    ours = TarReader([blocks]).next()
    assert ours is not None
    assert ours.data_bytes == size
    assert (len(blocks) > 512) == (size >= 8 << 30)


def test_an_ordinary_member_is_one_block_as_tarfile_would_write_it() -> None:
    blocks = header(b"ep/file.jsonl", 0o640, 1000, 100, 12345, 1_700_000_000)
    info = tarfile.TarInfo("ep/file.jsonl")
    info.mode, info.uid, info.gid, info.size, info.mtime = 0o640, 1000, 100, 12345, 1_700_000_000
    theirs = info.tobuf(tarfile.USTAR_FORMAT)
    # tarfile writes the device numbers of what is no device as zeros; POSIX leaves them open.
    assert blocks[:148] + blocks[156:329] == theirs[:148] + theirs[156:329]


@pytest.mark.parametrize("length", range(95, 106))
def test_the_edge_of_the_name_field(length: int) -> None:
    for unit in (b"n", "é".encode()):
        name = (unit * length)[:length] if unit == b"n" else unit * (length // 2)
        info = by_tarfile(header(name, 0o644, 0, 0, 0, 0))
        assert info.name.encode("utf-8", "surrogateescape") == name


@pytest.mark.parametrize("length", [*range(80, 110), *range(980, 1010), 9_990, 70_000])
def test_extended_records_count_their_own_length(length: int) -> None:
    assert by_tarfile(header(b"x" * length, 0o644, 0, 0, 0, 0)).name == "x" * length


def test_only_undecodable_names_declare_their_bytes() -> None:
    assert b"hdrcharset=BINARY" in header(b"bad\xff", 0o644, 0, 0, 0, 0)
    assert b"hdrcharset" not in header("é".encode(), 0o644, 0, 0, 0, 0)
    assert len(header(b"plain", 0o644, 0, 0, 0, 0)) == 512
