"""What one artifact may take of the disk: asked of a real file system, which says the same a moment later or not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fastship import durable
from fastship.errors import DiskShort
from fastship.spool import Headroom, Outbox, Ratio
from fastship.spool import headroom as headroom_module


class Space:
    """What the file system is said to have."""

    free_bytes = 1_000_000


@pytest.fixture
def space(monkeypatch: pytest.MonkeyPatch) -> Space:
    made = Space()
    monkeypatch.setattr(durable, "free_bytes", lambda _place: made.free_bytes)
    return made


@pytest.fixture
def outbox(tmp_path: Path) -> Outbox:
    return Outbox(tmp_path)


def put(outbox: Outbox, name: str, size: int) -> None:
    (outbox.directory / name).write_bytes(b"")
    os.truncate(outbox.directory / name, size)


def test_what_is_above_the_floor_may_be_taken_and_no_byte_more(outbox: Outbox, space: Space) -> None:
    room = Headroom(outbox, "ep", floor_bytes=400_000)
    assert room.most_bytes() == 600_000
    room.require(600_000)
    with pytest.raises(DiskShort, match="would take about 600001 bytes, there are 600000"):
        room.require(600_001)


def test_each_frame_is_held_against_the_space_of_that_moment(outbox: Outbox, space: Space) -> None:
    room = Headroom(outbox, "ep", floor_bytes=400_000)
    written = 0
    for _ in range(5):
        room.grow(written, 100_000)
        written += 100_000
        space.free_bytes -= 100_000
    room.grow(written, 100_000)
    space.free_bytes -= 1  # somebody else
    with pytest.raises(DiskShort, match="when 500000 bytes were packed"):
        room.grow(written, 100_000)
    space.free_bytes = 0
    with pytest.raises(DiskShort):
        room.require(0 + 1)


def test_what_an_interrupted_packing_left_is_written_over_for_nothing(outbox: Outbox, space: Space) -> None:
    put(outbox, "ep.tar.zst.partial", 300_000)
    space.free_bytes = 400_000
    room = Headroom(outbox, "ep", floor_bytes=400_000)
    room.require(300_000)
    room.grow(0, 200_000)
    room.grow(200_000, 100_000)
    with pytest.raises(DiskShort):
        room.grow(200_000, 100_001)


def test_the_outbox_has_a_limit_unless_one_is_alone(outbox: Outbox, space: Space) -> None:
    alone = Headroom(outbox, "ep", floor_bytes=0, outbox_limit_bytes=1000)
    alone.require(5000)
    alone.grow(4000, 1000)
    put(outbox, "other.tar.zst", 600)
    put(outbox, "other.manifest.json", 100)  # not counted
    room = Headroom(outbox, "ep", floor_bytes=0, outbox_limit_bytes=1000)
    room.require(400)
    room.grow(0, 400)
    with pytest.raises(DiskShort, match="for it"):
        room.require(401)
    with pytest.raises(DiskShort, match="the outbox became full"):
        room.grow(200, 201)


def test_an_artifact_is_taken_to_be_as_large_as_those_before_it_that_were_compressed_least() -> None:
    ratio = Ratio()
    assert ratio.estimate_bytes(1_000_000) == 1_000_000 + headroom_module.OVERHEAD_BYTES
    ratio.add(1_000_000, 100_000)
    ratio.add(1_000_000, 250_000)
    assert ratio.estimate_bytes(1_000_000) == 300_000 + headroom_module.OVERHEAD_BYTES
    for _ in range(headroom_module.RATIO_OF):
        ratio.add(1_000_000, 100_000)
    assert ratio.estimate_bytes(1_000_000) == 120_000 + headroom_module.OVERHEAD_BYTES
    ratio.add(0, 10)
    assert ratio.estimate_bytes(1_000_000) == 1_000_000 + headroom_module.OVERHEAD_BYTES


def test_the_outbox_says_how_large_it_is_and_what_is_in_it(outbox: Outbox) -> None:
    for name in ("a.tar.zst", "b.tar.zst.partial", "c.tar.zst.partial", "a.manifest.json", "stray"):
        put(outbox, name, 100)
    assert outbox.size_bytes() == 300
    assert outbox.size_bytes(but="a") == 200
    assert outbox.packed() == ["a"]
    assert outbox.partial_bytes("b") == 100
    assert outbox.partial_bytes("a") == 0
    assert outbox.drop_partials({"b"}) == ["c"]
    assert sorted(os.listdir(outbox.directory)) == ["a.manifest.json", "a.tar.zst", "b.tar.zst.partial", "stray"]
