"""The token bucket, with a clock of the test's own."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastship.upload.bandwidth import BURST_MIN_BYTES, BURST_S, Bandwidth


def test_no_limit_grants_all() -> None:
    assert Bandwidth(0, now=5.0).take(1 << 40, 5.0) == 1 << 40


@settings(deadline=None)
@given(
    rate=st.integers(1, 10**9),
    steps=st.lists(st.tuples(st.floats(0, 2), st.integers(0, 1 << 22)), max_size=50),
)
def test_never_more_than_the_rate_and_one_burst(rate: int, steps: list[tuple[float, int]]) -> None:
    bandwidth = Bandwidth(rate, now=100.0)
    now, granted = 100.0, 0
    for pause_s, wanted in steps:
        now += pause_s
        got = bandwidth.take(wanted, now)
        assert 0 <= got <= wanted
        granted += got
        assert granted <= rate * (now - 100.0) + max(rate * BURST_S, BURST_MIN_BYTES) + 1


@settings(deadline=None)
@given(rate=st.integers(1, 10**9))
def test_whoever_waits_as_long_as_told_gets_something(rate: int) -> None:
    bandwidth = Bandwidth(rate, now=0.0)
    assert bandwidth.take(1 << 20, 0.0) == 0
    wait_s = bandwidth.ready_in_s(0.0)
    assert wait_s > 0
    assert bandwidth.take(1 << 20, wait_s + 1e-6) > 0


def test_the_whole_rate_is_reached_by_waiting_as_told() -> None:
    bandwidth = Bandwidth(1_000_000, now=0.0)
    now, granted = 0.0, 0
    while now < 10.0:
        now += bandwidth.ready_in_s(now) + 0.002  # woken a little late each time
        granted += bandwidth.take(2 << 20, now)
    assert granted == pytest.approx(1_000_000 * now, rel=0.02)


def test_a_new_rate_counts_from_now() -> None:
    bandwidth = Bandwidth(1000, now=0.0)
    bandwidth.set_rate(0, 1.0)
    assert bandwidth.take(5000, 1.0) == 5000
    bandwidth.set_rate(1_000_000, 2.0)
    assert bandwidth.take(5000, 2.0) == 0


def test_a_rate_that_changes_often_is_reached() -> None:
    """As a worker's share does, with each small episode that begins or ends to be sent."""
    bandwidth = Bandwidth(1_000_000, now=0.0)
    granted = 0
    for tick in range(1000):
        bandwidth.set_rate(500_000 + 1_000_000 * (tick % 2), now=tick / 100)
        granted += bandwidth.take(2 << 20, tick / 100)
    assert granted == pytest.approx(10_000_000, rel=0.02)


@settings(deadline=None)
@given(
    first=st.integers(0, 10**9),
    steps=st.lists(st.tuples(st.floats(0, 0.1), st.integers(0, 10**9), st.integers(0, 1 << 22)), max_size=50),
)
def test_never_more_than_the_rates_and_the_largest_burst(first: int, steps: list[tuple[float, int, int]]) -> None:
    rate, bandwidth = first, Bandwidth(first, now=0.0)
    now = due = burst = granted = 0.0
    for pause_s, then, wanted in steps:
        now, due = now + pause_s, due + rate * pause_s
        rate = then
        bandwidth.set_rate(rate, now)
        if rate:
            burst = max(burst, rate * BURST_S, BURST_MIN_BYTES)
            granted += bandwidth.take(wanted, now)
            assert granted <= due + burst + 1
        else:
            assert bandwidth.take_whole(wanted, now)
