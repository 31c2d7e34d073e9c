"""Frames of an interrupted packing: taken again where they hold the same bytes, whatever else the file holds."""

from __future__ import annotations

import io
import os
import random
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from fastship.frames import ArtifactReader, ArtifactWriter, FramePool, KeptFrames

FRAME = 16 << 10


def content(frames: int, seed: int = 1) -> bytes:
    rng = random.Random(seed)
    words = [rng.randbytes(rng.randrange(2, 9)) for _ in range(100)]
    return b"".join(rng.choices(words, k=frames * FRAME))[: frames * FRAME]


def frames_of(data: bytes, level: int) -> list[bytes]:
    compressor = zstandard.ZstdCompressor(level=level, write_checksum=True)
    return [compressor.compress(data[at : at + FRAME]) for at in range(0, len(data), FRAME)]


def write_artifact(data: bytes, path: Path, *, threads: int = 1, level: int = 3) -> ArtifactWriter:
    """Pack ``data`` over what is in the file, as the worker does."""
    with open(path, "r+b", buffering=0) as file, FramePool(threads) as pool:
        kept = KeptFrames(file.fileno())
        writer = ArtifactWriter(pool, file.write, level=level, frame_bytes=FRAME, kept=kept)
        with writer:
            buffer = writer.buffer
            rest = memoryview(data)
            while len(rest) >= FRAME:
                buffer[:] = rest[:FRAME]
                rest = rest[FRAME:]
                buffer = writer.submit(FRAME)
            buffer[: len(rest)] = rest
            writer.finish(len(rest))
        file.truncate()
    return writer


def read(path: Path) -> bytes:
    with ArtifactReader.open(path) as reader:
        return b"".join(reader.stream())


def test_frames_are_offered_in_order_and_none_after_one_that_differs(tmp_path: Path) -> None:
    data = content(4)
    made = frames_of(data, 9)
    path = tmp_path / "partial"
    path.write_bytes(b"".join(made))
    with open(path, "rb") as file:
        kept = KeptFrames(file.fileno())
        view = memoryview(data)
        assert kept.take(view[:FRAME]) == made[0]
        assert kept.take(view[FRAME : 2 * FRAME]) == made[1]
        assert kept.left
        assert kept.take(view[:FRAME]) is None
        assert (kept.left, kept.taken_all) == (False, False)
        assert kept.take(view[2 * FRAME : 3 * FRAME]) is None


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("whole", [0, 1, 5, 8])
def test_an_interrupted_packing_goes_on(tmp_path: Path, threads: int, whole: int) -> None:
    data = content(8)
    made = frames_of(data, 9)
    path = tmp_path / "partial"
    path.write_bytes(b"".join(made[:whole]) + (made[whole][:-1] if whole < len(made) else b""))
    writer = write_artifact(data, path, threads=threads)
    assert writer.levels == {level: count for level, count in ((0, whole), (3, 8 - whole)) if count}
    assert path.read_bytes().startswith(b"".join(made[:whole] + frames_of(data, 3)[whole:]))
    assert path.stat().st_size == writer.artifact_bytes
    assert read(path) == data


def test_what_was_packed_whole_is_taken_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "partial"
    path.touch()
    write_artifact(content(3), path)
    before = path.read_bytes()
    assert write_artifact(content(3), path, level=1).levels == {0: 3}
    assert path.read_bytes() == before


def test_the_episode_changed_in_its_middle(tmp_path: Path) -> None:
    path = tmp_path / "partial"
    path.touch()
    data = bytearray(content(6))
    write_artifact(bytes(data), path)
    data[3 * FRAME + 17] ^= 1
    assert write_artifact(bytes(data), path).levels == {0: 3, 3: 3}
    assert read(path) == data


@pytest.mark.parametrize("block", [b"\0" * 64, b"\x28\xb5\x2f\xfd", b"\x28\xb5\x2f\xfd" + b"\xff" * 30])
def test_what_is_no_frame_is_no_frame(tmp_path: Path, block: bytes) -> None:
    path = tmp_path / "partial"
    path.write_bytes(block * 50)
    assert write_artifact(content(2), path).levels == {3: 2}
    assert read(path) == content(2)


def test_a_frame_that_claims_the_size_and_goes_on_is_not_read_to_its_end(tmp_path: Path) -> None:
    """Blocks behind blocks: no more is read than a frame of that content can have."""
    path = tmp_path / "partial"
    frame = frames_of(content(1), 3)[0]
    head = frame[: zstandard.frame_header_size(frame)]
    block = (100_000 << 3).to_bytes(3, "little") + bytes(100_000)
    path.write_bytes(head + block * 50)
    with open(path, "rb") as file:
        kept = KeptFrames(file.fileno())
        assert kept.take(memoryview(content(1))) is None
        assert kept.taken_all


def test_stock_frames_with_runs_and_without_checksum(tmp_path: Path) -> None:
    data = bytes(FRAME)
    frame = zstandard.ZstdCompressor(level=3, write_checksum=False).compress(data)
    path = tmp_path / "partial"
    path.write_bytes(frame * 2)
    with open(path, "rb") as file:
        kept = KeptFrames(file.fileno())
        assert [kept.take(memoryview(data)) for _ in range(3)] == [frame, frame, None]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_whatever_is_in_the_file_the_artifact_is_right(data: st.DataObject) -> None:
    whole = content(3)
    old = bytearray(b"".join(frames_of(whole, data.draw(st.sampled_from([1, 9])))))
    for _ in range(data.draw(st.integers(0, 3))):
        old[data.draw(st.integers(0, len(old) - 1))] ^= data.draw(st.integers(1, 255))
    cut = data.draw(st.integers(0, len(old)))
    out = io.BytesIO()
    fd = os.memfd_create("partial")
    try:
        os.write(fd, old[:cut] + data.draw(st.binary(max_size=40)))
        kept = KeptFrames(fd)
        with FramePool(1) as pool, ArtifactWriter(pool, out.write, level=3, frame_bytes=FRAME, kept=kept) as writer:
            for at in range(0, len(whole), FRAME):
                writer.buffer[:] = whole[at : at + FRAME]
                writer.submit(FRAME)
            writer.finish(0)
    finally:
        os.close(fd)
    made = out.getvalue()
    reader = ArtifactReader(lambda offset, length: made[offset : offset + length], len(made))
    assert b"".join(reader.stream()) == whole
