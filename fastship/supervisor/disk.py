"""The disk under the spool, watched: what packing is told of it, what recorders and operators are.

What always holds: packing hears of a disk that is short before it is given another episode; `state/pressure.json` is
replaced at least every `PUBLISH_S`, also where there is no room for a new file; no fault here stops the daemon. Nothing
is decided here (`lifecycle.Pressure` does).

Imports ``lifecycle``, ``settings``, ``spool``, ``status``; ``tally`` and the loop import it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

from fastship import logs, status
from fastship.lifecycle import Book, DiskLimits, DiskReading, Level, Pressure, low_bytes, reserve_bytes
from fastship.lifecycle.events import Room
from fastship.settings import Settings
from fastship.spool import Spool

log = logs.Logger(__name__)

LOOK_S = 1.0
PUBLISH_S = 5.0
OUTBOX_LOOK_SHARE = 0.005  # of a core, for adding up the outbox
LENT_PART = 4  # one artifact may take a quarter of what is left of a disk that is short
_REMEDY = "free space there: see docs/operations.md, When the disk is short"


def unavailable(settings: Settings) -> Iterator[str]:
    """As `host.unavailable`, of the spool's file system: what packing will wait for."""
    try:
        reading = _read(settings.spool.root)
    except OSError:
        return  # said elsewhere
    reserve, free = reserve_bytes(_limits(settings), reading.total_bytes), reading.free_bytes
    if free < reserve:
        told = f"disk.reserve_bytes and disk.reserve_percent keep {reserve >> 20} MiB free, {free >> 20} MiB are"
        yield f"{told}: one episode at a time is packed until there is more"


class DiskWatch:
    """Looks about once a second, publishes, and says when packing is to hear of it."""

    def __init__(self, settings: Settings, spool: Spool, book: Book) -> None:
        self._spool = spool
        self._book = book
        self._limit_bytes = settings.disk.outbox_limit_bytes
        self.rule = Pressure(_limits(settings))
        self._reading: DiskReading | None = None  # the last one
        self._said = Room()
        self._said_level = Level.OK
        self._next_look = self._next_publish = self._next_outbox = 0.0
        self._outbox_bytes = 0
        self.status: status.DiskStatus | None = None  # for eyes; None before the first look

    def turn(self) -> Room | None:
        """What packing may take from now on, when that is something else; looks when it is time to."""
        now = time.monotonic()
        if now < self._next_look:
            return None
        self._next_look = now + LOOK_S
        try:
            reading = _read(self._spool.paths.outbox)
            self._measure_outbox(now)
        except OSError as error:
            log.error("disk-not-read", error=str(error))
            return None
        self._reading = reading
        level = self.rule.look(reading, now)
        room = self._room(level, reading)
        self.status = self._describe(level, reading, room)
        if level is not self._said_level:
            self._say(level)
        if now >= self._next_publish or level is not self._said_level:
            self._next_publish = now + (LOOK_S if level is not Level.OK else PUBLISH_S)
            self._publish(reading)
        self._said_level = level
        changed = room != self._said
        self._said = room
        return room if changed else None

    @property
    def missing_bytes(self) -> int:
        """As `Pressure.missing_bytes`, as of the last look."""
        return self.rule.missing_bytes(self._reading) if self._reading is not None else 0

    def _measure_outbox(self, now: float) -> None:
        if now < self._next_outbox:
            return
        self._outbox_bytes = self._spool.outbox.size_bytes()
        self._next_outbox = now + (time.monotonic() - now) / OUTBOX_LOOK_SHARE

    def _room(self, level: Level, reading: DiskReading) -> Room:
        reserve = reserve_bytes(self.rule.limits, reading.total_bytes)
        full = bool(self._limit_bytes) and self._outbox_bytes >= self._limit_bytes
        if level is Level.OK and not full:
            return Room(floor_bytes=reserve)
        lent_floor = min(reserve, reading.free_bytes - reading.free_bytes // LENT_PART)
        return Room(short=True, floor_bytes=reserve, lent_floor_bytes=lent_floor)

    def _describe(self, level: Level, reading: DiskReading, room: Room) -> status.DiskStatus:
        return status.DiskStatus(
            level=str(level),
            free_bytes=reading.free_bytes,
            total_bytes=reading.total_bytes,
            reserve_bytes=room.floor_bytes,
            outbox_bytes=self._outbox_bytes,
            outbox_limit_bytes=self._limit_bytes,
            short=room.short,
            seconds_to_full=self.rule.seconds_to_full(reading.free_bytes),
        )

    def _say(self, level: Level) -> None:
        found = self.status
        assert found is not None
        told: dict[str, object] = {
            "free_bytes": found.free_bytes,
            "reserve_bytes": found.reserve_bytes,
            "outbox_bytes": found.outbox_bytes,
            "seconds_to_full": None if found.seconds_to_full is None else round(found.seconds_to_full),
        }
        match level:
            case Level.OK:
                log.info("disk-ok", **told)
            case Level.LOW:
                log.warning("disk-low", **told, remedy=_REMEDY)
            case Level.CRITICAL:
                log.error("disk-critical", **told, remedy=_REMEDY)
                dropped = self._spool.outbox.drop_partials({one for had in self._book.workers.values() for one in had})
                if dropped:
                    log.info("partials-dropped", episodes=len(dropped))

    def _publish(self, reading: DiskReading) -> None:
        found = self.status
        assert found is not None
        status.publish_pressure(
            self._spool.paths.state,
            status.DiskPressure(
                updated_at=time.time(),
                level=found.level,
                free_bytes=found.free_bytes,
                total_bytes=found.total_bytes,
                reserve_bytes=found.reserve_bytes,
                critical_bytes=low_bytes(self.rule.limits, reading.total_bytes) // 2,
                free_inodes=reading.free_inodes if reading.total_inodes else None,
                waiting_bytes=found.outbox_bytes,
                waiting_episodes=len(self._book.ready) + len(self._book.waiting),
                seconds_to_full=found.seconds_to_full,
            ),
        )


def _limits(settings: Settings) -> DiskLimits:
    return DiskLimits(reserve_bytes=settings.disk.reserve_bytes, reserve_percent=settings.disk.reserve_percent)


def _read(path: Path | str) -> DiskReading:
    disk = os.statvfs(path)
    return DiskReading(
        free_bytes=disk.f_bavail * disk.f_frsize,
        total_bytes=disk.f_blocks * disk.f_frsize,
        free_inodes=disk.f_favail,
        total_inodes=disk.f_files,
    )
