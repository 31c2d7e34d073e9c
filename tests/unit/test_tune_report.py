"""What is told of the link: measured, given, limited by a setting, or unknown."""

from __future__ import annotations

from fastship.tune.report import LinkRate, link_part, link_rate
from fastship.upload import LinkSpeed, LinkUnknown

MEASURED = LinkSpeed(bytes_per_s=20e6, connections=2, sent_bytes=40_000_000, cpu_s_per_byte=1e-9)
UNKNOWN = LinkUnknown("the server keeps no unfinished uploads")


def test_the_one_that_was_measured_counts() -> None:
    rate = link_rate(MEASURED, None)
    assert rate == LinkRate(20e6, "160 Mbit/s, measured over 2 connections")
    part = link_part("link", MEASURED, rate, 3.0)
    assert (part.mb_per_s, part.cpu_s_per_gb) == (60.0, 0.333)
    assert part.how.endswith("times 3.00; sent, made durable there, cancelled")


def test_the_one_that_was_given_goes_before_it() -> None:
    rate = link_rate(MEASURED, 1.25e6)
    assert rate == LinkRate(1.25e6, "10 Mbit/s, as given")
    part = link_part("link", MEASURED, rate, 3.0)
    assert (part.mb_per_s, part.cpu_s_per_gb, part.how) == (3.8, None, "10 Mbit/s, as given, times 3.00")


def test_unknown() -> None:
    rate = link_rate(UNKNOWN, None)
    assert rate.bytes_per_s is None
    part = link_part("link", UNKNOWN, rate, 3.0)
    assert (part.mb_per_s, part.how) == (None, "not measured: the server keeps no unfinished uploads")


def test_a_bandwidth_limit_bounds_all() -> None:
    """Of a plain server it is all that is known."""
    assert link_rate(UNKNOWN, None, 5_000_000).bytes_per_s == 5e6
    assert link_rate(UNKNOWN, 1.25e6, 5_000_000).bytes_per_s == 1.25e6
    assert link_rate(MEASURED, 125e6, 5_000_000) == LinkRate(5e6, "40 Mbit/s by upload.bandwidth (1 Gbit/s, as given)")
