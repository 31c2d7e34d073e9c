"""The link's rate: of the time in which something waited to be sent."""

from __future__ import annotations

import pytest

from fastship.upload.meter import FIRST_S, LinkMeter

KILO = 1000


def test_nothing_is_known_before_a_window_of_busy_time() -> None:
    meter = LinkMeter()
    meter.sample(0.0, 0, busy=True)
    meter.sample(FIRST_S * 0.9, 900 * KILO, busy=True)
    assert meter.bytes_per_s is None
    meter.sample(FIRST_S, 1000 * KILO, busy=True)
    assert meter.bytes_per_s == pytest.approx(1000 * KILO / FIRST_S)


def test_a_connection_that_is_being_made_says_nothing_of_the_link() -> None:
    meter = LinkMeter()
    meter.sample(0.0, 0, busy=True)
    meter.sample(0.5, 0, busy=True)
    meter.sample(1.0, 1 * KILO, busy=True)
    assert meter.bytes_per_s is None
    meter.sample(1.1, 200 * KILO, busy=True)
    assert meter.bytes_per_s == pytest.approx(200 * KILO / 1.1)


def test_time_without_anything_to_send_does_not_count() -> None:
    meter = LinkMeter()
    now, moved = 0.0, 0
    for _ in range(40):
        meter.sample(now, moved, busy=True)
        now, moved = now + 0.05, moved + 50 * KILO
        meter.sample(now, moved, busy=False)
        now += 3.0
    assert meter.bytes_per_s == pytest.approx(1000 * KILO)


def test_a_change_of_the_link_shows_soon() -> None:
    meter = LinkMeter()
    now, moved = 0.0, 0
    for rate in (10_000 * KILO, 1000 * KILO, 10_000 * KILO):
        for _ in range(80):
            meter.sample(now, moved, busy=True)
            now, moved = now + 0.05, moved + rate // 20
        assert meter.bytes_per_s == pytest.approx(rate, rel=0.05)


def test_a_link_that_is_dead_has_nearly_no_rate_but_one() -> None:
    meter = LinkMeter()
    meter.sample(0.0, 0, busy=True)
    meter.sample(10.0, 0, busy=True)
    assert meter.bytes_per_s == pytest.approx(0.1)
