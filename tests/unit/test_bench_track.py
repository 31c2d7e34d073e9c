"""What the tracking of ratios calls a loss."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bench.track import LEAST_TOLERANCE, REPEATS, compare, tolerance

BASELINE = {"ratios": {"pack": {"value": 1.0, "tolerance": 0.1}}}


def gives(*values: float) -> tuple[Callable[[], float], list[float]]:
    left = list(values)
    return lambda: left.pop(0), left


def test_a_ratio_within_its_tolerance_is_measured_once_and_not_lost() -> None:
    take, left = gives(0.91, 9.0)
    found = compare({"pack": take}, BASELINE)["pack"]
    assert (found["lost"], found["value"], left) == (False, 0.91, [9.0])


def test_a_bad_moment_is_forgiven() -> None:
    take, left = gives(0.5, 0.95, 9.0)
    found = compare({"pack": take}, BASELINE)["pack"]
    assert (found["lost"], found["measured"], left) == (False, [0.5, 0.95], [9.0])


def test_a_loss_that_is_there_each_time_is_a_loss() -> None:
    take, _ = gives(*[0.89] * (REPEATS + 1))
    found = compare({"pack": take}, BASELINE)["pack"]
    assert found["lost"]
    assert len(found["measured"]) == REPEATS + 1


def test_a_ratio_that_the_baseline_does_not_know_is_reported_and_never_lost() -> None:
    take, _ = gives(0.01)
    found = compare({"new": take}, BASELINE)["new"]
    assert (found["lost"], found["baseline"]) == (False, None)


@pytest.mark.parametrize(
    ("runs", "expected"),
    [([1.0, 1.0, 1.0], LEAST_TOLERANCE), ([0.8, 1.0, 1.1], 0.3), ([1.0, 1.0, 3.0], LEAST_TOLERANCE)],
)
def test_the_tolerance_comes_from_the_way_down_from_the_median(runs: list[float], expected: float) -> None:
    assert tolerance(runs) == pytest.approx(expected)
