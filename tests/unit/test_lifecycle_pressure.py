"""How short the disk is, and when it will be full: disks that fill, empty and flutter."""

from __future__ import annotations

import random

import pytest

from fastship.lifecycle import DiskLimits, DiskReading, Level, Pressure, reserve_bytes

GIB = 1 << 30
LIMITS = DiskLimits(reserve_bytes=10 * GIB, reserve_percent=5.0)


@pytest.mark.parametrize(
    ("limits", "total", "expected"),
    [
        (LIMITS, 20 * GIB, GIB),  # a small disk: the percentage
        (LIMITS, 100_000 * GIB, 10 * GIB),  # a huge one: the size
        (DiskLimits(reserve_bytes=0, reserve_percent=10.0), 100 * GIB, 10 * GIB),
        (DiskLimits(reserve_bytes=GIB, reserve_percent=0.0), 100 * GIB, GIB),
        (DiskLimits(reserve_bytes=0, reserve_percent=0.0), 100 * GIB, 0),
        (DiskLimits(reserve_bytes=10 * GIB, reserve_percent=0.0), 2 * GIB, GIB),  # never more than half
    ],
)
def test_the_reserve_is_the_smaller_of_both(limits: DiskLimits, total: int, expected: int) -> None:
    assert reserve_bytes(limits, total) == expected


def levels(pressure: Pressure, *frees: float) -> list[Level]:
    """Of a disk of 200 GiB, whose reserve is 10."""
    return [
        pressure.look(DiskReading(free_bytes=int(free * GIB), total_bytes=200 * GIB), float(now))
        for now, free in enumerate(frees)
    ]


def test_levels_fall_at_the_watermarks_and_rise_a_bit_above_them() -> None:
    found = levels(Pressure(LIMITS), 11, 10, 9.9, 10.5, 5, 4.9, 5.4, 5.6, 10.9, 11.1)
    assert "".join(level[0] for level in found) == "oolllccllo"


def test_a_disk_without_inodes_is_as_full_as_one_without_bytes() -> None:
    pressure = Pressure(LIMITS)
    plenty = {"free_bytes": 100 * GIB, "total_bytes": 200 * GIB}
    assert pressure.look(DiskReading(**plenty, free_inodes=20_000, total_inodes=1_000_000), 0.0) is Level.OK
    assert pressure.look(DiskReading(**plenty, free_inodes=9_000, total_inodes=1_000_000), 1.0) is Level.LOW
    assert pressure.look(DiskReading(**plenty, free_inodes=0, total_inodes=1_000_000), 2.0) is Level.CRITICAL
    assert Pressure(LIMITS).look(DiskReading(**plenty, free_inodes=0, total_inodes=0), 2.0) is Level.OK


def test_without_a_reserve_only_a_full_disk_is_critical() -> None:
    pressure = Pressure(DiskLimits(reserve_bytes=0, reserve_percent=0.0))
    few_blocks, some_mib = 16 << 10, 4 << 20
    told = [pressure.look(DiskReading(free_bytes=free, total_bytes=GIB), 0.0) for free in (some_mib, few_blocks, 0)]
    assert told == [Level.OK, Level.CRITICAL, Level.CRITICAL]
    full = DiskReading(free_bytes=few_blocks, total_bytes=GIB)
    room = pressure.missing_bytes(full)
    assert pressure.look(DiskReading(free_bytes=few_blocks + room - 2, total_bytes=GIB), 1.0) is not Level.OK
    assert pressure.look(DiskReading(free_bytes=few_blocks + room, total_bytes=GIB), 2.0) is Level.OK
    assert pressure.missing_bytes(full) == 0


def fill(pressure: Pressure, bytes_per_s: float, seconds: int, *, noise: float = 0.0) -> int:
    """A disk that changes by so much; now and then a pack has some of it."""
    draw = random.Random(1)
    free = 0
    for now in range(seconds):
        free = int(100 * GIB + bytes_per_s * now)
        seen = free - (int(draw.random() * noise) if draw.random() < 0.2 else 0)
        pressure.look(DiskReading(free_bytes=seen, total_bytes=200 * GIB), float(now))
    return free


@pytest.mark.parametrize("seconds", [10, 60, 300, 4000])
def test_a_disk_that_fills_is_full_when_it_will_be(seconds: int) -> None:
    pressure = Pressure(LIMITS)
    free = fill(pressure, -1e6, seconds)
    assert pressure.seconds_to_full(free) == pytest.approx(free / 1e6, rel=0.01)


def test_what_packs_take_and_give_back_does_not_move_the_estimate() -> None:
    pressure = Pressure(LIMITS)
    free = fill(pressure, -1e6, 400, noise=5e9)
    assert pressure.seconds_to_full(free) == pytest.approx(free / 1e6, rel=0.2)


@pytest.mark.parametrize("bytes_per_s", [0.0, 1e6, -1.0])
def test_one_that_does_not_fill_within_a_year_is_never_full(bytes_per_s: float) -> None:
    pressure = Pressure(LIMITS)
    free = fill(pressure, bytes_per_s, 100)
    assert pressure.seconds_to_full(free) is None


def test_a_few_readings_tell_nothing() -> None:
    pressure = Pressure(LIMITS)
    assert pressure.seconds_to_full(fill(pressure, -1e9, 4)) is None
