"""How short the disk is and when it will be full: told readings and time, it answers a level and an estimate.

The reserve is what packing may not eat into: it is the recorder's. Below it the level is low (packing waits, but for
one artifact at a time while the destination takes it), below half of it critical: that is for the recorder to act on.

Pure: no I/O, no clock. Imports nothing of fastship; the supervisor imports it.
"""

from __future__ import annotations

import enum
import statistics

import msgspec

RISE = 1.1  # of a watermark: the level gets better only above that, so that it does not flutter
RESERVE_INODES = 10_000  # at most; `DiskLimits.reserve_percent` of all where that is less
FULL_BYTES = 1 << 20
"""A disk without a reserve is critical below this: the last blocks of a full one come and go, and none is of use."""
READINGS = 48
"""What the estimate is made from. There are 1,128 slopes between two of so many: about a millisecond."""
SPACING_S = (1.0, 10.0)
"""Between two readings that are kept, at first and at last: 48 s are looked back upon soon after the start, eight
minutes later on, in which a pack's comings and goings even out."""
FEWEST_READINGS = 5
LONGEST_S = 365 * 86400.0  # an estimate of more is none


class Level(enum.StrEnum):
    OK = "ok"
    LOW = "low"
    CRITICAL = "critical"


class DiskLimits(msgspec.Struct, frozen=True, kw_only=True):
    """The settings that the rule needs; in each 0 means: does not count."""

    reserve_bytes: int
    reserve_percent: float


class DiskReading(msgspec.Struct, frozen=True, kw_only=True):
    """What statvfs(3) says, for users without privileges. ``total_inodes`` 0: it makes them as needed."""

    free_bytes: int
    total_bytes: int
    free_inodes: int = 0
    total_inodes: int = 0


def reserve_bytes(limits: DiskLimits, total_bytes: int) -> int:
    """The smaller of both limits: a percentage is too much of a huge disk, a fixed size too much of a small one.

    At most half of the disk: one that could never have its reserve free would be short for ever.
    """
    part = int(total_bytes * limits.reserve_percent / 100)
    reserve = min((one for one in (limits.reserve_bytes, part) if one), default=0)
    return min(reserve, total_bytes // 2)


def low_bytes(limits: DiskLimits, total_bytes: int) -> int:
    """Free space below which the disk is low; below half of it, critical. The reserve, where there is one."""
    return reserve_bytes(limits, total_bytes) or 2 * FULL_BYTES


class Pressure:
    """The rule with its memory: one for a run of the supervisor."""

    def __init__(self, limits: DiskLimits) -> None:
        self.limits = limits
        self.level = Level.OK
        self._readings: list[tuple[float, int]] = []  # (time, free bytes), spaced
        self._spacing_s = SPACING_S[0]

    def look(self, reading: DiskReading, now: float) -> Level:
        """The level from now on. ``now``: seconds of a monotonic clock; call about once a second."""
        self._keep(reading.free_bytes, now)
        part = self._part_of_reserve(reading)
        if part < 0.5 or (self.level is Level.CRITICAL and part < 0.5 * RISE):
            self.level = Level.CRITICAL
        elif part < 1.0 or (self.level is not Level.OK and part < RISE):
            self.level = Level.LOW
        else:
            self.level = Level.OK
        return self.level

    def missing_bytes(self, reading: DiskReading) -> int:
        """So much must be freed for the level to be ok again; 0 where it is."""
        if self.level is Level.OK:
            return 0
        return max(0, int(low_bytes(self.limits, reading.total_bytes) * RISE) + 1 - reading.free_bytes)

    def seconds_to_full(self, free_bytes: int) -> float | None:
        """When the disk will be full if it goes on as it went; None: not for a year, or not known yet.

        The median of the slopes between any two readings (Theil and Sen): what a few of them have in common with no
        other, a pack that grows and goes, moves it little.
        """
        if len(self._readings) < FEWEST_READINGS:
            return None
        slopes = [
            (later_free - free) / (later - at)
            for number, (at, free) in enumerate(self._readings)
            for later, later_free in self._readings[number + 1 :]
        ]
        slope = statistics.median(slopes)
        if slope >= 0 or free_bytes > -slope * LONGEST_S:
            return None
        return free_bytes / -slope

    def _part_of_reserve(self, reading: DiskReading) -> float:
        """Free space in parts of the reserve, or free inodes in parts of theirs where those are shorter."""
        parts = [reading.free_bytes / low_bytes(self.limits, reading.total_bytes)]
        inodes = min(RESERVE_INODES, int(reading.total_inodes * self.limits.reserve_percent / 100))
        if inodes:
            parts.append(reading.free_inodes / inodes)
        return min(parts)

    def _keep(self, free_bytes: int, now: float) -> None:
        readings = self._readings
        if readings and now - readings[-1][0] < self._spacing_s:
            return
        readings.append((now, free_bytes))
        if len(readings) <= READINGS:
            return
        if self._spacing_s < SPACING_S[1]:
            self._spacing_s = min(2 * self._spacing_s, SPACING_S[1])
            del readings[-2::-2]  # every other one, the newest stays
        else:
            del readings[0]
