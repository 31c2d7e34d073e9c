"""Workers as the supervisor hears them: silence and standstill are told from a host that stood still itself."""

from __future__ import annotations

import errno
import selectors
import subprocess
import sys
from collections.abc import Iterator

import pytest

from fastship import ipc
from fastship.errors import WorkerCannotStart
from fastship.settings import Settings
from fastship.supervisor import crew as crew_module
from fastship.supervisor.crew import Crew, Hand


class Clock:
    """``time.monotonic`` of the module under test."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(crew_module, "time", made)
    return made


@pytest.fixture
def hand(clock: Clock) -> Iterator[Hand]:
    ours, theirs = ipc.pair()
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield Hand(1, process, ours)
    process.kill()
    process.wait()
    ours.close()
    theirs.close()


@pytest.fixture
def crew(clock: Clock, hand: Hand) -> Crew:
    made = Crew(Settings(), -1, selectors.DefaultSelector())
    made.hands[hand.number] = hand
    return made


def pass_time(crew: Crew, clock: Clock, seconds: float, step_s: float = 0.25) -> list[Hand]:
    """Turns of the loop for so long; who was found silent in them."""
    found: list[Hand] = []
    end = clock.now + seconds
    while clock.now < end:
        clock.now += step_s
        found += crew.silent(30.0)
    return found


def test_a_worker_that_says_nothing_while_we_listen_is_silent(crew: Crew, clock: Clock, hand: Hand) -> None:
    assert pass_time(crew, clock, 29.0) == []
    assert pass_time(crew, clock, 2.0)[0] is hand


def test_a_host_that_stood_still_has_no_silent_workers(crew: Crew, clock: Clock, hand: Hand) -> None:
    pass_time(crew, clock, 20.0)
    clock.now += 7 * 86400.0  # every process stopped, or the loop held by a disk
    assert crew.silent(30.0) == []
    assert pass_time(crew, clock, 9.0) == []
    assert pass_time(crew, clock, 5.0)[0] is hand  # what it owed before, it owes still


def test_turns_that_a_slow_disk_makes_long_count_for_what_was_listened(crew: Crew, clock: Clock) -> None:
    assert pass_time(crew, clock, 200.0, step_s=5.0) == []
    assert pass_time(crew, clock, 200.0, step_s=5.0) != []


def beat(hand: Hand, clock: Clock, done_bytes: int, *, shipping: bool = False, paused: bool = False) -> float:
    clock.now += 0.5
    hand.beat([ipc.UnderWay("ep", shipping, done_bytes, 0, 0.0)], paused=paused)
    return hand.still_s.get("ep", 0.0)


def test_a_pack_of_which_no_byte_moves_is_still(clock: Clock, hand: Hand) -> None:
    assert beat(hand, clock, 0) == 0.0
    assert [beat(hand, clock, 0) for _ in range(3)] == [0.5, 1.0, 1.5]
    assert beat(hand, clock, 1) == 0.0
    assert beat(hand, clock, 1) == 0.5


def test_neither_a_pause_nor_shipping_nor_a_host_that_stood_still_is_a_still_pack(clock: Clock, hand: Hand) -> None:
    beat(hand, clock, 5)
    assert beat(hand, clock, 5, paused=True) == 0.0
    assert beat(hand, clock, 5, shipping=True) == 0.0
    beat(hand, clock, 5)
    clock.now += 3600.0
    assert beat(hand, clock, 5) <= crew_module.LISTENING_S


def reap_one(crew: Crew, *, leaving: bool) -> None:
    """A worker that ends before it says that it is ready."""
    ours, theirs = ipc.pair()
    theirs.close()
    ended = Hand(7, subprocess.Popen(["true"]), ours)
    ended.gone, ended.leaving = True, leaving
    crew.hands[7] = ended
    crew._selector.register(ours, selectors.EVENT_READ)
    crew.reap()


def test_workers_that_were_told_to_leave_while_they_started_do_not_count_as_failures() -> None:
    """Settings that were read anew twice within a moment ended the daemon."""
    crew = Crew(Settings(), -1, selectors.DefaultSelector())
    for leaving in (True, True, False, True, True, False, True):
        reap_one(crew, leaving=leaving)
    with pytest.raises(WorkerCannotStart):
        reap_one(crew, leaving=False)


def test_those_that_did_not_start_count_until_one_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that was out of processes for a while, and a week later one worker that was killed while it started, ended
    the daemon."""
    crew = Crew(Settings(), -1, selectors.DefaultSelector())
    ours, theirs = ipc.pair()
    crew.hands[1] = there = Hand(1, subprocess.Popen(["true"]), ours)

    def refused(*_: object, **__: object) -> None:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", refused)
        patch.setattr(crew_module, "HIRE_AGAIN_S", 0.0)
        for _ in range(5):
            assert crew.hire(threads=1) is None
    crew.begins(there)
    for _ in range(2):
        reap_one(crew, leaving=False)
    with pytest.raises(WorkerCannotStart):
        reap_one(crew, leaving=False)
    there.process.wait()
    ours.close()
    theirs.close()


def test_where_the_kernel_holds_a_process_that_sleeps_is_nowhere(hand: Hand) -> None:
    assert hand.waits_in() == ""
