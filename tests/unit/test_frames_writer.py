"""The whole artifact: frames, index, seek table in this order; left early, the pool is free again."""

from __future__ import annotations

import io
import struct

import pytest

from fastship.frames import ArtifactReader, ArtifactWriter, FramePool, Kind, writer
from fastship.frames.index import INDEX_MAGIC
from fastship.frames.seektable import SEEK_TABLE_MAGIC, SEEKABLE_MAGIC

FRAME = 4096


def write(pool: FramePool, content: bytes) -> bytes:
    out = io.BytesIO()
    with ArtifactWriter(pool, out.write, level=3, frame_bytes=FRAME) as artifact:
        artifact.index.add(0, 0, 0, 0, 0, 0o644, Kind.FILE, b"name", b"")
        while len(content) >= FRAME:
            artifact.buffer[:] = content[:FRAME]
            content = content[FRAME:]
            artifact.submit(FRAME)
        artifact.buffer[: len(content)] = content
        artifact.finish(len(content))
        assert artifact.artifact_bytes == len(out.getvalue())
    return out.getvalue()


def over(data: bytes) -> ArtifactReader:
    return ArtifactReader(lambda offset, length: data[offset : offset + length], len(data))


@pytest.mark.parametrize("length", [1, FRAME - 1, FRAME, FRAME + 1, 3 * FRAME])
def test_the_parts_stand_in_their_order(length: int) -> None:
    with FramePool(2) as pool:
        data = write(pool, bytes(length))
    frames = -(-length // FRAME)
    reader = over(data)
    assert reader.frames == frames
    assert reader.content_bytes == length
    table = struct.pack("<II", SEEK_TABLE_MAGIC, 8 * (frames + 1) + 9)
    assert data[-len(table) - 8 * (frames + 1) - 9 :].startswith(table)
    assert data.endswith(struct.pack("<IBI", frames + 1, 0, SEEKABLE_MAGIC))
    assert data.count(struct.pack("<I", INDEX_MAGIC)) == 1
    assert [member.name for member in reader.members()] == [b"name"]


def test_each_frame_is_written_by_itself() -> None:
    pieces: list[bytes] = []
    with FramePool(1) as pool, ArtifactWriter(pool, pieces.append, level=3, frame_bytes=FRAME) as artifact:
        artifact.submit(FRAME)
        artifact.submit(FRAME)
        artifact.finish(10)
    assert len(pieces) == 5  # three frames, the index, the seek table
    assert artifact.frames == 3


@pytest.mark.parametrize("threads", [1, 3])
def test_left_early_the_pool_takes_the_next_artifact(threads: int) -> None:
    with FramePool(threads) as pool:
        expected = write(pool, bytes(5 * FRAME))
        for submitted in range(4):
            with ArtifactWriter(pool, lambda data: None, level=3, frame_bytes=FRAME) as artifact:
                for _ in range(submitted):
                    artifact.submit(FRAME)
        assert write(pool, bytes(5 * FRAME)) == expected


def test_too_many_frames_for_a_seek_table_are_a_plain_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "MAX_ENTRIES", 3)
    with FramePool(1) as pool:
        data = write(pool, b"x" * 4 * FRAME)
    reader = over(data)
    assert reader.frames is None
    assert b"".join(reader.stream()) == b"x" * 4 * FRAME
