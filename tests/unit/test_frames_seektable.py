"""The seek table: reads back what was written, and whatever else it is fed gives None or an ArtifactError."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastship.errors import ArtifactError
from fastship.frames import seektable

sizes = st.tuples(st.integers(1, 40), st.integers(0, 1 << 30))


def reading(data: bytes) -> Callable[[int, int], bytes]:
    return lambda offset, length: data[offset : offset + length]


def file_of(entries: list[tuple[int, int]]) -> bytes:
    table = seektable.encode(array("I", [size for entry in entries for size in entry]))
    return bytes(sum(compressed for compressed, _ in entries)) + table


def decode(data: bytes) -> seektable.FrameTable | None:
    return seektable.decode(reading(data), len(data))


@given(st.lists(sizes, max_size=50))
def test_what_was_written_reads_back(entries: list[tuple[int, int]]) -> None:
    table = decode(file_of(entries))
    assert table is not None
    assert len(table) == len(entries)
    assert table.content_bytes == sum(content for _, content in entries)
    offset = content_offset = 0
    for number, (compressed, content) in enumerate(entries):
        assert list(table.compressed_offsets[number : number + 2]) == [offset, offset + compressed]
        assert list(table.content_offsets[number : number + 2]) == [content_offset, content_offset + content]
        offset += compressed
        content_offset += content


def test_the_bytes_are_the_specification_s() -> None:
    expected = bytes.fromhex("5e2a4d18 19000000 0a000000 64000000 0b000000 00000000 02000000 00 b1ea928f")
    assert seektable.encode(array("I", [10, 100, 11, 0])) == expected


def test_a_table_with_checksums_of_another_writer_is_read() -> None:
    body = struct.pack("<III", 7, 100, 0xDEADBEEF) + struct.pack("<IBI", 1, 0x80, seektable.SEEKABLE_MAGIC)
    table = decode(bytes(7) + struct.pack("<II", seektable.SEEK_TABLE_MAGIC, len(body)) + body)
    assert table is not None
    assert table.content_bytes == 100


@given(st.binary(max_size=200))
def test_junk_has_no_table(junk: bytes) -> None:
    assert decode(junk) is None or junk.endswith(b"\xb1\xea\x92\x8f")


@given(st.integers(0, 1 << 32), st.binary(min_size=8, max_size=64))
def test_junk_before_a_right_magic_is_refused(count: int, junk: bytes) -> None:
    data = junk + struct.pack("<IBI", count & 0xFFFFFFFF, 0, seektable.SEEKABLE_MAGIC)
    with pytest.raises(ArtifactError):
        decode(data)


@given(st.lists(sizes, min_size=1, max_size=5), st.data())
def test_a_flip_in_the_table_is_noticed_or_only_moves_content(
    entries: list[tuple[int, int]], data: st.DataObject
) -> None:
    good = file_of(entries)
    start = sum(compressed for compressed, _ in entries)
    at = data.draw(st.integers(start, len(good) - 1))
    bit = data.draw(st.integers(0, 7))
    bad = bytearray(good)
    bad[at] ^= 1 << bit
    in_content_size = start + 8 <= at < len(good) - 9 and (at - start) % 8 >= 4
    in_unused_bits = at == len(good) - 5 and bit < 2  # "Unused_Bits: the decoder shall ignore them"
    try:
        table = decode(bytes(bad))
    except ArtifactError:
        return
    # Content sizes are compared with each frame when it is read; no other flip may pass.
    assert in_content_size or in_unused_bits
    assert table is not None


@given(st.lists(sizes, min_size=1, max_size=5), st.integers(1, 100))
def test_a_cut_table_is_no_table(entries: list[tuple[int, int]], cut: int) -> None:
    good = file_of(entries)
    assert decode(good[: -min(cut, len(good))]) is None


@pytest.mark.parametrize(
    ("entries", "before"),
    [
        ([(10, 1 << 30), (10, (1 << 30) + 1)], 20),  # a frame over 1 GiB
        ([(10, 0xFFFFFFFF)], 10),
        ([(10, 5)], 9),  # more than the file has
        ([(10, 5)], 11),  # less
        ([(0, 5), (10, 5)], 10),  # content from no bytes
    ],
)
def test_impossible_sizes_are_refused(entries: list[tuple[int, int]], before: int) -> None:
    table = seektable.encode(array("I", [size for entry in entries for size in entry]))
    with pytest.raises(ArtifactError):
        decode(bytes(before) + table)


def test_a_count_beyond_all_reason_is_refused_before_anything_is_read() -> None:
    asked: list[int] = []
    footer = struct.pack("<IBI", seektable.MAX_ENTRIES + 1, 0, seektable.SEEKABLE_MAGIC)

    def read_at(offset: int, length: int) -> bytes:
        asked.append(length)
        return footer

    with pytest.raises(ArtifactError):
        seektable.decode(read_at, 1 << 40)
    assert max(asked) == len(footer)


def test_overlapping_frames_are_found() -> None:
    table = decode(file_of([(1, 100), (1, 100), (5, 0), (1, 50)]))
    assert table is not None
    assert list(table.overlapping(0, 1)) == [0]
    assert list(table.overlapping(99, 101)) == [0, 1]
    assert list(table.overlapping(100, 200)) == [1]
    assert 3 in table.overlapping(200, 201)
    assert list(table.overlapping(5, 5)) == []
