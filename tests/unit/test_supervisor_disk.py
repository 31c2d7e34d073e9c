"""The watch over the disk, on a real one: what it tells packing, and what it publishes."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from sample import put_artifact

from fastship import durable, status
from fastship.lifecycle import Book, DiskReading, Level
from fastship.lifecycle.events import Room
from fastship.settings import Settings
from fastship.spool import Spool
from fastship.supervisor import disk as disk_module
from fastship.supervisor.disk import DiskWatch
from fastship.supervisor.loop import policy_of

Make = Callable[..., DiskWatch]


@pytest.fixture(autouse=True)
def _look_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_module, "LOOK_S", 0.0)
    monkeypatch.setattr(disk_module, "PUBLISH_S", 0.0)
    monkeypatch.setattr(disk_module, "OUTBOX_LOOK_SHARE", 1e9)


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def make(**disk: object) -> DiskWatch:
        settings = Settings.load(profile="ci", values={"spool": {"root": tmp_path}, "disk": disk})
        spool = Spool(tmp_path)
        spool.create()
        return DiskWatch(settings, spool, Book(policy_of(settings, once=False)))

    return make


def short(watch: DiskWatch, monkeypatch: pytest.MonkeyPatch) -> DiskWatch:
    """The same, on a disk of 100,000 bytes with 400 left."""
    monkeypatch.setattr(disk_module, "_read", lambda _path: DiskReading(free_bytes=400, total_bytes=100_000))
    return watch


def published(watch: DiskWatch) -> status.DiskPressure:
    path = watch._spool.paths.state / "pressure.json"
    return msgspec.json.decode(path.read_bytes(), type=status.DiskPressure)


def test_with_room_packing_hears_once_where_the_reserve_begins(make: Make) -> None:
    watch = make(reserve_bytes=1000, reserve_percent=0)
    assert watch.turn() == Room(floor_bytes=1000)
    assert watch.turn() is None
    assert watch.missing_bytes == 0
    found = published(watch)
    assert (found.level, found.reserve_bytes, found.critical_bytes, found.waiting_bytes) == ("ok", 1000, 500, 0)
    assert 0 < found.free_bytes <= found.total_bytes


def test_a_disk_that_is_short_lends_a_quarter_of_what_is_left(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = short(make(reserve_bytes=1000, reserve_percent=0), monkeypatch)
    assert watch.turn() == Room(short=True, floor_bytes=1000, lent_floor_bytes=300)
    assert published(watch).level == Level.CRITICAL
    assert watch.missing_bytes == 701


def test_an_outbox_at_its_limit_makes_packing_wait_and_no_recorder(make: Make) -> None:
    watch = make(reserve_bytes=0, reserve_percent=0, outbox_limit_bytes=8)
    assert watch.turn() is None
    put_artifact(watch._spool, "ep", b"12345678")
    room = watch.turn()
    assert room is not None
    assert room.short
    found = published(watch)
    assert (found.level, found.waiting_bytes) == ("ok", 8)


def test_what_interrupted_packings_left_goes_when_it_is_critical(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = short(make(reserve_bytes=1000, reserve_percent=0), monkeypatch)
    with watch._spool.outbox.begin("left") as partial:
        partial.write(b"of a pack")
    with watch._spool.outbox.begin("under way") as partial:
        partial.write(b"of a pack")
    watch._book.workers[1] = {"under way"}
    watch.turn()
    assert os.listdir(watch._spool.paths.outbox) == ["under way.tar.zst.partial"]


def test_pressure_is_published_where_there_is_no_room_for_a_file(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = make()
    watch.turn()
    before = published(watch)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(durable, "write_file", full)
    time.sleep(0.001)
    watch.turn()
    assert published(watch).updated_at > before.updated_at


def test_a_reserve_that_is_not_free_is_told_before_it_matters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings.load(values={"spool": {"root": tmp_path}, "disk": {"reserve_percent": 0}})
    assert list(disk_module.unavailable(Settings.load(values={"spool": {"root": tmp_path / "none"}}))) == []
    free = os.statvfs_result((4096, 4096, 1 << 30, 1 << 20, 1 << 20, 0, 0, 0, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda _: free)
    (note,) = disk_module.unavailable(settings)
    assert "keep 10240 MiB free, 4096 MiB are" in note
