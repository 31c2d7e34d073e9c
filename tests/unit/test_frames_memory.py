"""What a frame pool takes."""

from __future__ import annotations

from fastship.frames import pool_bytes


def test_frames_and_tables_are_counted() -> None:
    frame = 8 << 20
    assert pool_bytes(2, level=1, frame_bytes=frame) >= 8 * frame
    assert pool_bytes(3, level=3, frame_bytes=frame) - pool_bytes(2, level=3, frame_bytes=frame) >= 2 * frame
    assert pool_bytes(1, level=19, frame_bytes=frame) > pool_bytes(1, level=3, frame_bytes=frame) + (32 << 20)
