"""The content of an artifact that comes once, in pieces: the same as `verify_content` finds, or where it is damaged."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import zstandard
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from fastship.errors import ArtifactError
from fastship.frames import ArrivingContent, FramePool, VerifiedContent, verify_content
from fastship.pack import PackOptions, pack

ONE, OTHER = os.urandom(5000), b"telemetry " * 4000
STREAM = ONE + OTHER + ONE


def frames() -> bytes:
    compressor = zstandard.ZstdCompressor(level=1, write_checksum=True)
    skippable = (0x184D2A51).to_bytes(4, "little") + (10).to_bytes(4, "little") + b"x" * 10
    return compressor.compress(ONE) + compressor.compress(OTHER) + skippable + compressor.compress(ONE)


DATA = frames()


def found(*pieces: bytes) -> VerifiedContent:
    content = ArrivingContent()
    for piece in pieces:
        content.take(piece)
    return content.end()


@settings(deadline=None, max_examples=50)
@given(step=st.integers(1, len(DATA) + 1))
def test_it_does_not_matter_in_what_pieces_it_comes(step: int) -> None:
    pieces = [DATA[at : at + step] for at in range(0, len(DATA), step)]
    assert found(*pieces) == VerifiedContent(blake3(STREAM).hexdigest(), len(STREAM), None)


@settings(deadline=None, max_examples=200)
@given(end=st.integers(0, len(DATA) - 1))
def test_a_cut_is_noticed_but_between_two_frames(end: int) -> None:
    try:
        content = found(DATA[:end])
    except ArtifactError:
        return
    assert content.bytes in (len(ONE), len(ONE + OTHER))


def test_damage_is_told_by_where_its_frame_begins_and_what_follows_is_dropped() -> None:
    second = len(zstandard.ZstdCompressor(level=1, write_checksum=True).compress(ONE))
    at = second + 20
    with pytest.raises(ArtifactError, match=f"begins at its byte {second} is damaged"):
        found(DATA[:at] + bytes([DATA[at] ^ 0x55]) + DATA[at + 1 :], DATA)


@pytest.mark.parametrize("data", [b"", b"<html>an error page</html>", os.urandom(3) * 1000])
def test_what_is_none_is_none(data: bytes) -> None:
    with pytest.raises(ArtifactError):
        found(data)


def test_it_finds_what_the_whole_file_is_found_to_have(tmp_path: Path) -> None:
    (tmp_path / "ep1").mkdir()
    (tmp_path / "ep1" / "data").write_bytes(STREAM)
    (tmp_path / "ep1" / "done.marker").touch()
    with open(tmp_path / "ep1.tar.zst", "wb") as sink, FramePool() as pool:
        manifest = pack(tmp_path / "ep1", sink, PackOptions(level=3, frame_bytes=8192), pool)
    data = (tmp_path / "ep1.tar.zst").read_bytes()
    whole = verify_content(tmp_path / "ep1.tar.zst")
    arriving = ArrivingContent()
    arriving.take(data)
    assert (arriving.end().blake3, arriving.end().bytes) == (whole.blake3, whole.bytes)
    assert whole.blake3 == manifest.content_blake3
    assert arriving.has_table
    cut = ArrivingContent()
    cut.take(data[:-1])
    assert not cut.has_table


def test_of_a_little_that_makes_much_not_much_is_held_at_once() -> None:
    """A megabyte of zeros is 40 bytes; the decoder gives back all it makes of what it is given."""
    zeros = zstandard.ZstdCompressor(level=19).compress(bytes(1 << 20)) * 300
    assert found(zeros).bytes == 300 << 20
