"""The link's rate: of the time in which something waited to be sent."""

from __future__ import annotations

import pytest

from fastship.upload.meter import WINDOW_S, LinkMeter


def test_nothing_is_known_before_a_window_of_busy_time() -> None:
    meter = LinkMeter()
    meter.sample(0.0, 0, busy=True)
    meter.sample(WINDOW_S * 0.9, 900, busy=True)
    assert meter.bytes_per_s is None
    meter.sample(WINDOW_S, 1000, busy=True)
    assert meter.bytes_per_s == pytest.approx(1000 / WINDOW_S)


def test_time_without_anything_to_send_does_not_count() -> None:
    meter = LinkMeter()
    now, moved = 0.0, 0
    for _ in range(40):
        meter.sample(now, moved, busy=True)
        now, moved = now + 0.05, moved + 50
        meter.sample(now, moved, busy=False)
        now += 3.0
    assert meter.bytes_per_s == pytest.approx(1000)


def test_a_change_of_the_link_shows_soon() -> None:
    meter = LinkMeter()
    now, moved = 0.0, 0
    for rate in (1000, 100, 1000):
        for _ in range(80):
            meter.sample(now, moved, busy=True)
            now, moved = now + 0.05, moved + rate // 20
        assert meter.bytes_per_s == pytest.approx(rate, rel=0.05)


def test_a_link_that_is_dead_has_nearly_no_rate_but_one() -> None:
    meter = LinkMeter()
    meter.sample(0.0, 0, busy=True)
    meter.sample(10.0, 0, busy=True)
    assert meter.bytes_per_s == pytest.approx(0.1)
