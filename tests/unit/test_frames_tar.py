"""The tar header reader, against archives that `tarfile` and GNU tar wrote, in whatever pieces, cut and damaged."""

from __future__ import annotations

import io
import itertools
import struct
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastship.frames import Kind, NotTar, TarReader
from fastship.frames.tar import header_sum

NAMES = ["short", "d/" + "n" * 95, "long/" + "x" * 120, "longer/" + "y/" * 130 + "z", "ä" * 30, "bad\udcff\udcfe"]


def archive(layout: int) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=layout) as tar:
        for number, name in enumerate(NAMES):
            if layout == tarfile.USTAR_FORMAT and len(name.encode("utf-8", "surrogateescape")) > 100:
                continue
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.uid, info.gid, info.mode = number * 300, 1_600_000_000 + number, 7, 8, 0o640
            tar.addfile(info, io.BytesIO(bytes([number]) * info.size))
            link = tarfile.TarInfo(f"link{number}")
            link.type, link.linkname = (tarfile.SYMTYPE, name) if number % 2 else (tarfile.LNKTYPE, name)
            tar.addfile(link)
        directory = tarfile.TarInfo("directory")
        directory.type, directory.mode = tarfile.DIRTYPE, 0o755
        tar.addfile(directory)
    return out.getvalue()


def read(chunks: list[bytes]) -> list[tuple[bytes, bytes, Kind, int, int, int, bytes]]:
    tar = TarReader(chunks)
    return [
        (h.name, h.link, h.kind, h.mode, h.uid, h.mtime_ns, b"".join(bytes(piece) for piece in tar.data())) for h in tar
    ]


def expected(data: bytes) -> Iterator[tuple[bytes, bytes, Kind, int, int, int, bytes]]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for info in tar:
            file = tar.extractfile(info) if info.isreg() else None
            yield (
                info.name.encode("utf-8", "surrogateescape"),
                info.linkname.encode("utf-8", "surrogateescape"),
                Kind(info.type[0]),
                info.mode,
                info.uid,
                int(info.mtime * 1_000_000_000),
                file.read() if file else b"",
            )


LAYOUTS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
ARCHIVES = [archive(layout) for layout in LAYOUTS]


@pytest.mark.parametrize("data", ARCHIVES, ids=["ustar", "gnu", "pax"])
def test_it_reads_what_tarfile_reads(data: bytes) -> None:
    wanted = [
        (name.rstrip(b"/"), link, kind, mode, uid, mtime, body)
        for name, link, kind, mode, uid, mtime, body in expected(data)
    ]
    assert [(name.rstrip(b"/"), *rest) for name, *rest in read([data])] == wanted


@given(st.sampled_from(ARCHIVES), st.lists(st.integers(0, 30_000), max_size=40))
@settings(max_examples=60, deadline=None)
def test_it_reads_the_same_at_any_splits(data: bytes, cuts: list[int]) -> None:
    edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    chunks = [data[start:end] for start, end in itertools.pairwise(edges)]
    assert read(chunks) == read([data])
    assert read([b"", *chunks, b""]) == read([data])


@pytest.mark.parametrize("data", ARCHIVES, ids=["ustar", "gnu", "pax"])
def test_it_reads_byte_by_byte(data: bytes) -> None:
    assert read([data[i : i + 1] for i in range(len(data))]) == read([data])


@given(st.sampled_from(ARCHIVES), st.integers(0, 1 << 20))
@settings(max_examples=100, deadline=None)
def test_a_cut_gives_the_members_before_it_or_not_tar(data: bytes, cut: int) -> None:
    whole = read([data])
    got = []
    try:
        tar = TarReader([data[: cut % len(data)]])
        for header in tar:
            for _ in tar.data():
                pass
            got.append(header.name)
    except NotTar:
        pass
    assert got == [member[0] for member in whole[: len(got)]]


@given(st.binary(max_size=2000))
def test_junk_is_not_tar(junk: bytes) -> None:
    try:
        assert read([junk]) == []
    except NotTar:
        return
    assert junk[:512] == bytes(512) or not junk


@given(st.sampled_from(ARCHIVES), st.integers(0, 1 << 20), st.binary(min_size=1, max_size=30))
@settings(max_examples=200, deadline=None)
def test_damage_gives_members_or_not_tar_and_nothing_else(data: bytes, at: int, junk: bytes) -> None:
    at %= len(data)
    damaged = data[:at] + junk + data[at + len(junk) :]
    try:
        for header in TarReader([damaged]):
            header.member()
    except NotTar:
        pass


@given(st.sampled_from(ARCHIVES), st.integers(0, 1 << 20), st.binary(max_size=30), st.none() | st.integers(0, 12))
@settings(max_examples=200, deadline=None)
def test_it_counts_what_it_would_read(data: bytes, at: int, junk: bytes, most: int | None) -> None:
    at %= len(data)
    damaged = [data[:at] + junk + data[at + len(junk) :]]
    try:
        members = sum(1 for _ in itertools.islice(TarReader(damaged), None if most is None else most + 1))
    except NotTar:
        with pytest.raises(NotTar):
            TarReader(damaged).count(most)
    else:
        assert TarReader(damaged).count(most) == members


@given(st.binary(min_size=512, max_size=512).map(lambda block: bytes(byte & 0x7F for byte in block)))
def test_the_sum_by_adler_is_the_sum_of_ascii(block: bytes) -> None:
    assert header_sum(block) == sum(block) % 65521
    assert header_sum(b"\x7f" * 512) == 512 * 127


def test_a_member_count_ignores_extended_headers() -> None:
    for data in ARCHIVES:
        assert sum(1 for _ in TarReader([data])) == sum(1 for _ in expected(data))


def test_pax_sizes_count_and_so_do_global_ones() -> None:
    out = io.BytesIO()
    with tarfile.open(
        fileobj=out, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "all", "uid": "77"}
    ) as tar:
        info = tarfile.TarInfo("a")
        info.pax_headers = {"size": "5"}
        tar.addfile(tarfile.TarInfo("b"))
        info.size = 5
        tar.addfile(info, io.BytesIO(b"hello"))
        tar.addfile(tarfile.TarInfo("c"))
    reader = TarReader([out.getvalue()])
    assert [(header.name, header.data_bytes, header.uid) for header in reader] == [
        (b"b", 0, 77),
        (b"a", 5, 77),
        (b"c", 0, 77),
    ]


def test_numbers_beyond_octal_are_read() -> None:
    info = tarfile.TarInfo("big")
    info.size, info.uid, info.mtime = 10 << 30, 1 << 28, -5
    for layout in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        header = TarReader([info.tobuf(layout)]).next()
        assert header is not None
        assert (header.data_bytes, header.uid, header.mtime_ns) == (10 << 30, 1 << 28, -5_000_000_000)


def test_what_gnu_tar_writes_is_read(tmp_path: Path) -> None:
    top = tmp_path / "ep"
    top.mkdir()
    (top / ("q" * 200)).write_bytes(b"1" * 600)
    (top / "one").write_bytes(b"2")
    (top / "two").hardlink_to(top / "one")
    (top / "sym").symlink_to("r" * 150)
    for layout in ("gnu", "pax", "ustar", "v7", "oldgnu"):
        done = subprocess.run(
            ["tar", "c", f"--format={layout}", "-C", tmp_path, "ep"], capture_output=True, check=False
        )
        names = {member[0]: member for member in read([done.stdout])}
        assert names[b"ep/one" if b"ep/one" in names else b"ep/two"][-1] == b"2"
        assert names[b"ep/"][2] is Kind.DIRECTORY
        if layout in ("gnu", "pax", "oldgnu"):
            assert names[b"ep/" + b"q" * 200][-1] == b"1" * 600
            assert names[b"ep/sym"][1] == b"r" * 150


def test_a_sparse_member_of_gnu_tar_is_stepped_over_and_marked(tmp_path: Path) -> None:
    with open(tmp_path / "sparse", "wb") as file:
        for hole in range(40):  # more pieces than one header block holds
            file.seek(hole << 20)
            file.write(b"x" * 4096)
    (tmp_path / "zz").write_text("after")
    for layout in ("gnu", "pax"):
        command = ["tar", "cS", f"--format={layout}", "-C", str(tmp_path), "sparse", "zz"]
        data = subprocess.run(command, capture_output=True, check=True).stdout
        headers = list(TarReader([data]))
        assert [header.is_sparse for header in headers] == [True, False]
        assert headers[1].name == b"zz"


def test_an_extended_header_of_gigabytes_is_refused_unread() -> None:
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, 1 << 32
    block = info.tobuf(tarfile.USTAR_FORMAT)

    def endless() -> Iterator[bytes]:
        yield block
        raise AssertionError("read on")

    with pytest.raises(NotTar):
        TarReader(endless()).next()


def test_signed_sums_of_old_writers_are_taken() -> None:
    block = bytearray(tarfile.TarInfo("caf").tobuf(tarfile.USTAR_FORMAT))
    block[3] = 0xE9
    signed = sum(struct.unpack_from("148b8x356b", block)) + 256
    block[148:156] = b"%06o\0 " % signed
    header = TarReader([bytes(block)]).next()
    assert header is not None
    assert header.name == b"caf\xe9"


def test_global_headers_cannot_fill_memory() -> None:
    reader = TarReader([global_header(number) for number in range(50)])
    assert reader.next() is None
    assert len(reader._global) == 2


def global_header(number: int) -> bytes:
    records = {f"GNU.sparse.{number}.{i}": "x" for i in range(20)} | {"uid": str(number), f"comment{number}": "y"}
    return tarfile.TarInfo.create_pax_global_header(records)
