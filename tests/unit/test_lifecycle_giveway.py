"""The rule of giving way: told a host's readings, second by second."""

from __future__ import annotations

import itertools
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from fastship.lifecycle import GiveWay, Limits, Reading
from fastship.lifecycle.events import Budget


class Host:
    """A clock and a rule."""

    def __init__(self, cores: int = 4, **limits: Any) -> None:
        self.now = 1000.0
        values: dict[str, Any] = {"cores": cores, "threads": cores, "pause_max_s": 0.0}
        self.rule = GiveWay(Limits(**(values | limits)))

    def goes_on(self, seconds: int, others: float = 0.0, **readings: float) -> list[Budget]:
        told = []
        for _ in range(seconds):
            self.now += 1.0
            told.append(self.rule.look(Reading(others_cores=others, **readings), self.now))
        return told

    def cores(self, seconds: int, others: float = 0.0, **readings: float) -> int:
        return self.goes_on(seconds, others, **readings)[-1].cores


def test_a_host_that_nobody_else_uses_is_packings() -> None:
    assert Host().goes_on(60) == [Budget(4)] * 60


def test_others_get_the_cores_that_they_want() -> None:
    host = Host(cores=8)
    assert [host.cores(20, others) for others in (1.0, 2.0, 5.0, 8.0)] == [7, 6, 3, 0]
    [last] = host.goes_on(1, 8.0)
    assert last == Budget(0, "others want 8.0 of 8 cores")


def test_it_takes_seconds_to_give_way_and_a_burst_is_not_enough() -> None:
    assert Host().cores(1, 1.0) == 4
    assert Host().cores(5, 4.0) == 0
    host = Host()
    assert [host.cores(1, 0.9), host.cores(10)] == [4, 4]


def test_half_a_core_is_left_to_the_scheduler() -> None:
    assert Host(cores=2).cores(60, 0.45) == 2
    assert Host(cores=2).cores(60, 0.6) == 1


def test_it_comes_back_one_core_at_a_time() -> None:
    host = Host()
    host.goes_on(20, 4.0)
    back = [budget.cores for budget in host.goes_on(20)]
    assert back[-1] == 4
    assert all(0 <= after - before <= 1 for before, after in itertools.pairwise(back))
    changes = [second for second in range(1, 20) if back[second] != back[second - 1]]
    assert min(b - a for a, b in itertools.pairwise(changes)) >= 3


def test_a_neighbour_at_the_edge_does_not_make_it_swing() -> None:
    host = Host()
    host.goes_on(30, 1.6)
    assert {budget.cores for _ in range(30) for budget in host.goes_on(1, 1.6) + host.goes_on(1, 1.4)} == {2}


def test_fewer_threads_than_cores_give_way_only_where_room_is_short() -> None:
    host = Host(cores=8, threads=2)
    assert [host.cores(20, others) for others in (5.0, 7.0, 8.0)] == [2, 1, 0]
    assert host.cores(60) == 2


def test_more_threads_than_cores_are_kept_while_nobody_else_wants_any() -> None:
    host = Host(cores=2, threads=6)
    assert host.cores(20) == 6
    assert host.cores(20, 1.0) == 1
    assert host.cores(60) == 6


def test_pressure_takes_one_core_each_two_seconds_and_holds_it() -> None:
    host = Host(memory_pressure=10.0)
    falling = [budget.cores for budget in host.goes_on(10, memory_pressure=40.0)]
    assert falling == sorted(falling, reverse=True)
    assert falling[-1] == 0
    assert host.goes_on(1, memory_pressure=40.0)[0].why == "memory pressure of 40 %, limit 10 %"
    assert host.cores(60, memory_pressure=9.0) == 0  # not over, and not eased either
    assert host.cores(60, memory_pressure=1.0) == 4


def test_what_has_no_limit_or_cannot_be_told_does_not_count() -> None:
    assert Host().cores(60, memory_pressure=99.0, io_pressure=99.0, load=99.0) == 4
    assert Host(memory_pressure=1.0, io_pressure=1.0, load=1.0).cores(60) == 4


def test_load_and_io_pressure_count_where_they_have_a_limit() -> None:
    host = Host(load=5.0)
    assert host.cores(30, load=6.0) == 0
    assert host.goes_on(1, load=6.0)[0].why == "load of 6, limit 5"
    assert Host(io_pressure=50.0).cores(30, io_pressure=60.0) == 0


def test_after_the_longest_pause_one_thread_goes_on() -> None:
    host = Host(pause_max_s=100.0)
    told = host.goes_on(300, 4.0)
    assert [budget.cores for budget in told[:5]][-1] == 0
    assert {budget.cores for budget in told[10:99]} == {0}
    assert {budget.cores for budget in told[110:]} == {1}
    assert told[-1].why == "others want 4.0 of 4 cores, for longer than host.pause_max_s"
    assert host.cores(60) == 4
    assert host.cores(10, 4.0) == 0  # and a new pause begins


@given(st.lists(st.floats(0, 20, allow_nan=False), max_size=80), st.integers(1, 16), st.integers(1, 16))
def test_whatever_comes(others: list[float], cores: int, threads: int) -> None:
    host = Host(cores=cores, threads=threads)
    for one in others:
        [budget] = host.goes_on(1, one)
        assert 0 <= budget.cores <= threads
        assert bool(budget.why) == (budget.cores < threads)
        assert budget.cores <= max(
            threads if host.rule.others_cores <= 0.5 else 0, cores + 0.5 - host.rule.others_cores
        )
    assert host.cores(20 + 4 * threads) == threads
