"""The member index: what was added comes back, through any reads; damage anywhere is an ArtifactError."""

from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastship.errors import ArtifactError
from fastship.frames import index
from fastship.frames.index import IndexWriter, Kind, Member, index_compressor

COMPRESSOR = index_compressor()

members = st.builds(
    Member,
    st.integers(0, (1 << 64) - 1),
    st.integers(0, (1 << 64) - 1),
    st.integers(-(1 << 62), 1 << 62),
    st.integers(0, (1 << 32) - 1),
    st.integers(0, (1 << 32) - 1),
    st.integers(0, 0o7777),
    st.sampled_from(Kind),
    st.binary(max_size=300),
    st.binary(max_size=30),
)


def payload_of(items: list[Member]) -> bytes:
    writer = IndexWriter(COMPRESSOR)
    for item in items:
        writer.add(*item)
    frame = writer.finish()
    assert frame is not None
    assert struct.unpack("<II", frame[:8]) == (index.INDEX_MAGIC, len(frame) - 8)
    return frame[8:]


def reading(data: bytes) -> Callable[[int, int], bytes]:
    return lambda offset, length: data[offset : offset + length]


def decode(payload: bytes) -> list[Member]:
    return list(index.decode(reading(payload), len(payload)))


@given(st.lists(members, max_size=60))
def test_what_was_added_comes_back(items: list[Member]) -> None:
    assert decode(payload_of(items)) == items


@given(st.lists(members, min_size=1, max_size=20), st.integers(1, 64))
@settings(max_examples=50)
def test_it_comes_back_whatever_the_pieces_it_is_read_in(items: list[Member], step: int) -> None:
    payload = payload_of(items)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "_READ_AHEAD_BYTES", step)
        assert decode(payload) == items


def test_many_members_take_several_blocks() -> None:
    items = [Member(i * 1024, i, i, 0, 0, 0o644, Kind.FILE, b"ep/%012d" % i, b"") for i in range(20_000)]
    payload = payload_of(items)
    assert struct.unpack_from("<I", payload, 16)[0] > 3
    assert decode(payload) == items
    assert len(payload) < 20 * len(items)


@given(st.binary(max_size=300))
def test_junk_is_refused(junk: bytes) -> None:
    with pytest.raises(ArtifactError):
        decode(junk)


ITEMS = [Member(i * 1024, i, i, 0, 0, 0o644, Kind.FILE, b"ep/%d" % i, b"") for i in range(9000)]
PAYLOAD = payload_of(ITEMS)


@given(st.integers(0, len(PAYLOAD) - 1), st.integers(0, 7))
@settings(deadline=None)
def test_a_flip_anywhere_is_noticed_or_changes_nothing(at: int, bit: int) -> None:
    bad = bytearray(PAYLOAD)
    bad[at] ^= 1 << bit
    try:
        assert decode(bytes(bad)) == ITEMS  # zstd has unused bits
    except ArtifactError:
        return
    assert at > 28  # neither the header nor a block's sizes


@given(st.integers(0, len(PAYLOAD) - 1))
@settings(deadline=None)
def test_a_cut_is_noticed(length: int) -> None:
    with pytest.raises(ArtifactError):
        decode(PAYLOAD[:length])
    with pytest.raises(ArtifactError):
        list(index.decode(reading(PAYLOAD[:length]), len(PAYLOAD)))


def test_trailing_junk_is_noticed() -> None:
    with pytest.raises(ArtifactError):
        decode(PAYLOAD + b"x")


def test_a_newer_version_says_so() -> None:
    with pytest.raises(ArtifactError, match="version 2") as caught:
        decode(PAYLOAD[:4] + b"\x02\x00" + PAYLOAD[6:])
    assert caught.value.remedy


def test_a_block_that_claims_gigabytes_is_refused_unread() -> None:
    header = struct.pack("<4sHHQI", b"FSmi", 1, 0, 1, 1)
    asked: list[int] = []

    def read_at(offset: int, length: int) -> bytes:
        asked.append(length)
        return (header + struct.pack("<II", 1 << 31, 1 << 31) + bytes(length))[offset : offset + length]

    with pytest.raises(ArtifactError):
        list(index.decode(read_at, 1 << 40))
    assert max(asked) <= 1 << 20


def test_an_index_that_grows_too_large_is_left_out() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "_MAX_INDEX_BYTES", 10_000)
        writer = IndexWriter(COMPRESSOR)
        for number in range(100_000):
            writer.add(number, 0, 0, 0, 0, 0, Kind.FILE, b"%x" % (number * 0x9E3779B97F4A7C15 % (1 << 64)), b"")
        assert writer.finish() is None
        assert writer.members == 100_000


def test_a_million_members_are_written_and_read_in_bounded_memory() -> None:
    script = """
def peak_kib():  # not ru_maxrss: a process started by vfork begins with its parent's
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
from fastship.frames.index import IndexWriter, decode, index_compressor
before = peak_kib()
writer = IndexWriter(index_compressor())
for i in range(1_000_000):
    writer.add(i * 1024, 512, 1700000000 + i, 1000, 1000, 0o644, 48, b"episode/some/directory/%09d.jsonl" % i, b"")
payload = writer.finish()[8:]
assert sum(1 for _ in decode(lambda o, n: payload[o : o + n], len(payload))) == 1_000_000
print((peak_kib() - before) // 1024)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=100)
    assert int(done.stdout) < 100  # MiB; the records themselves are 80 MB, the objects would be 300
