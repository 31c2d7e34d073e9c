"""The rules: single cases. In every order that is possible: crash/test_lifecycle_model.py."""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sample import manifest_of, shipped, verdict

from fastship.episode import Outcome, Scope, Verdict
from fastship.lifecycle import CLAIMED, Book, Policy, State, decide, next_wake, share_cores
from fastship.lifecycle import events as ev
from fastship.lifecycle.rules import CHANGES_BEFORE_HOLD
from fastship.lifecycle.sharing import MEASURE_AHEAD, QUEUE_DEPTH

FAULT = verdict(Outcome.TRANSIENT, Scope.DESTINATION, status=401)
NETWORK = verdict(Outcome.TRANSIENT, Scope.NETWORK)
CONFLICT = verdict(Outcome.CONFLICT, Scope.EPISODE, status=409)
REJECTED = verdict(Outcome.REJECTED, Scope.EPISODE, status=412)
DAMAGED = verdict(Outcome.DAMAGED, Scope.EPISODE)
RETRY_AFTER = verdict(Outcome.TRANSIENT, Scope.DESTINATION, status=429, retry_after_s=60.0)


def policy(**changes: Any) -> Policy:
    values: dict[str, Any] = {
        "cores": 2, "in_flight": 4, "poison_after": 3, "pause_min_s": 1.0, "pause_max_s": 8.0, "pause_after": 3,
    }  # fmt: skip
    return Policy(**(values | changes))


class Desk:
    """A book, a clock, and `Measure` answered at once, as the supervisor does."""

    def __init__(self, frames: int = 1, **changes: Any) -> None:
        self.book = Book(policy(**changes))
        self.now = 100.0
        self.frames = dict[str, int]()
        self.default_frames = frames

    def tell(self, *events: ev.Event) -> list[ev.Command]:
        commands: list[ev.Command] = []
        waiting = deque(events)
        while waiting:
            for command in decide(self.book, waiting.popleft(), self.now):
                commands.append(command)
                if isinstance(command, ev.Measure):
                    waiting.append(ev.Measured(command.episode, self.frames.get(command.episode, self.default_frames)))
        return commands

    def find(self, *episodes: str) -> list[ev.Command]:
        return self.tell(ev.Found([(one, one) for one in episodes]))

    def state(self, episode: str) -> State | None:
        entry = self.book.entries.get(episode)
        return None if entry is None else entry.state

    def ship(self, episode: str, answer: Verdict, *, unchanged: bool = True, unseen: str = "") -> list[ev.Command]:
        """All that a worker says of an episode it was given."""
        manifest = manifest_of(episode)
        return self.tell(
            ev.PackBegan(episode),
            ev.Packed(episode, manifest, False),
            ev.Answered(episode, answer, manifest, unchanged, unseen),
        )


def kinds(commands: list[ev.Command], *kinds_wanted: type) -> list[ev.Command]:
    return [command for command in commands if isinstance(command, kinds_wanted)]


def assigned(commands: list[ev.Command]) -> list[tuple[int, str]]:
    return [(command.worker, command.episode) for command in commands if isinstance(command, ev.Assign)]


# --- single cases ------------------------------------------------------------------------------------------------


def test_episodes_are_given_out_in_order_and_evenly() -> None:
    desk = Desk()
    assert assigned(desk.tell(ev.WorkerJoined(1), ev.WorkerJoined(2))) == []
    assert assigned(desk.find("d", "c", "a", "b")) == [(1, "a"), (2, "b"), (1, "c")]
    assert desk.state("a") is State.QUEUED


def test_nothing_is_given_out_while_more_is_to_be_told() -> None:
    """A batch of messages: what a worker may be given is decided once, with the last of them."""
    desk = Desk()
    desk.tell(ev.WorkerJoined(1))
    assert decide(desk.book, ev.Found([("a", "a"), ("b", "b")]), desk.now, more=True) == []
    assert assigned(desk.tell(ev.Tick())) == [(1, "a"), (1, "b")]


def test_the_next_episodes_are_measured_together() -> None:
    book = Book(policy())
    names = [f"ep{number:03}" for number in range(3 * MEASURE_AHEAD)]
    decide(book, ev.WorkerJoined(1), 1.0)
    commands = decide(book, ev.Found([(name, name) for name in names]), 1.0)
    assert commands == [ev.Measure(name) for name in names[:MEASURE_AHEAD]]
    decide(book, ev.Measured(names[1], 1), 1.0)  # in whatever order the answers come
    commands = decide(book, ev.Measured(names[0], 1), 1.0)
    assert assigned(commands) == [(1, names[0]), (1, names[1])]


def test_shipped_is_retired_with_its_receipt() -> None:
    desk = Desk()
    desk.tell(ev.WorkerJoined(1))
    desk.find("ep")
    (command,) = kinds(desk.ship("ep", shipped(manifest_of("ep"))), ev.Retire)
    assert isinstance(command, ev.Retire)
    assert (command.episode, command.receipt.artifact.sha256) == ("ep", manifest_of("ep").artifact_sha256)
    assert desk.state("ep") is None
    assert desk.book.idle()


def test_shipped_but_changed_is_not_retired() -> None:
    desk = Desk()
    desk.tell(ev.WorkerJoined(1))
    desk.find("ep")
    commands = desk.ship("ep", shipped(manifest_of("ep")), unchanged=False)
    assert kinds(commands, ev.Retire, ev.Quarantine, ev.Hold) == []
    assert desk.state("ep") is State.WAITING
    assert "changed" in desk.book.entries["ep"].error


def test_shipped_but_not_to_be_looked_at_is_tried_again_and_no_change() -> None:
    desk = Desk()
    desk.tell(ev.WorkerJoined(1))
    desk.find("ep")
    for _ in range(CHANGES_BEFORE_HOLD + 1):
        told = desk.ship("ep", shipped(manifest_of("ep")), unchanged=False, unseen="ep/data: Input/output error")
        assert kinds(told, ev.Retire, ev.Quarantine, ev.Hold) == []
        entry = desk.book.entries["ep"]
        assert (entry.state, entry.changes) == (State.WAITING, 0)
        assert "changed" not in entry.error
        assert "ep/data: Input/output error" in entry.error
        assert not desk.book.breaker.paused
        desk.now = entry.not_before
        desk.tell(ev.Tick())
    assert kinds(desk.ship("ep", shipped(manifest_of("ep"))), ev.Retire)


@pytest.mark.parametrize("answer", [shipped(manifest_of("ep")), REJECTED, CONFLICT])
def test_what_the_disk_will_not_let_be_done_is_offered_again_later_and_later(answer: Verdict) -> None:
    desk = Desk()
    desk.tell(ev.WorkerJoined(1))
    desk.find("ep")
    for pause_s in (1.0, 2.0, 4.0, 8.0, 8.0):
        desk.ship("ep", answer)
        desk.tell(ev.Undone("ep", "ep", "busy"))
        assert desk.state("ep") is State.WAITING
        desk.find("ep")  # the look sees it there still
        assert next_wake(desk.book) == desk.now + pause_s
        desk.now += pause_s
        desk.tell(ev.Tick())
        assert desk.state("ep") is State.QUEUED
    desk.ship("ep", answer)
    desk.tell(ev.Found([]))
    assert not desk.book.undone


def test_what_was_not_done_and_was_found_anew_meanwhile_has_its_turn_already() -> None:
    desk = Desk()
    desk.tell(ev.WorkerJoined(1))
    desk.find("ep")
    desk.ship("ep", shipped(manifest_of("ep")))
    desk.find("ep")
    desk.tell(ev.Undone("ep", "ep", "busy"))
    assert desk.state("ep") is State.QUEUED


@pytest.mark.parametrize(
    ("answer", "command", "state"),
    [
        (CONFLICT, ev.Hold, State.HELD),
        (REJECTED, ev.Quarantine, None),
        (DAMAGED, ev.Discard, State.WAITING),
        (NETWORK, ev.Report, State.WAITING),
        (FAULT, ev.Report, State.WAITING),
    ],
)
def test_what_each_verdict_leads_to(answer: Verdict, command: type, state: State | None) -> None:
    desk = Desk()
    desk.tell(ev.WorkerJoined(1))
    desk.find("ep")
    commands = desk.ship("ep", answer)
    assert len(kinds(commands, ev.Retire, ev.Hold, ev.Quarantine, ev.Discard)) == (command is not ev.Report)
    assert kinds(commands, command)
    assert desk.state("ep") is state


@pytest.mark.parametrize("status", [401, 403, 404, 407, 408, 421, 425, 429])
def test_a_rotated_token_quarantines_nothing_and_all_goes_on_when_it_is_well(status: int) -> None:
    desk = Desk()
    desk.tell(ev.WorkerJoined(1))
    names = [f"ep{number}" for number in range(9)]
    desk.find(*names)
    commands: list[ev.Command] = []
    while under_way := [name for name in names if desk.state(name) in CLAIMED]:
        commands += desk.ship(under_way[0], verdict(Outcome.TRANSIENT, Scope.DESTINATION, status=status))
    assert kinds(commands, ev.Quarantine, ev.Hold, ev.Retire) == []
    assert len([one for one in kinds(commands, ev.Report) if getattr(one, "event", "") == "destination-paused"]) == 1
    assert desk.book.count(*CLAIMED) == 0
    pauses = []
    for _ in range(5):  # the probe fails: a longer pause each time, one episode at a time
        wake = next_wake(desk.book)
        assert wake is not None
        desk.now = max(desk.book.breaker.until, desk.now)
        ((_, probe),) = assigned(desk.tell(ev.Tick()))
        assert assigned(desk.tell(ev.Tick(), ev.WorkerJoined(2))) == []
        desk.tell(ev.WorkerLeft(2, False))
        desk.ship(probe, verdict(Outcome.TRANSIENT, Scope.DESTINATION, status=status))
        pauses.append(desk.book.breaker.until - desk.now)
    assert pauses == [2.0, 4.0, 8.0, 8.0, 8.0]
    desk.now = desk.book.breaker.until
    ((_, probe),) = assigned(desk.tell(ev.Tick()))
    commands = desk.ship(probe, shipped(manifest_of(probe)))
    assert kinds(commands, ev.Retire)
    assert len(assigned(commands)) > 1
    assert not desk.book.breaker.paused


def test_what_is_not_begun_is_taken_back_once_when_the_destination_is_paused() -> None:
    desk = Desk()
    desk.tell(ev.WorkerJoined(1), ev.WorkerJoined(2), ev.WorkerJoined(3))
    desk.tell(ev.WorkerLeaving(3))
    desk.find(*(f"ep{number}" for number in range(20)))
    queued = [name for name in desk.book.entries if desk.state(name) is State.QUEUED]
    commands = desk.ship(queued[0], FAULT)
    assert kinds(commands, ev.Recall) == [ev.Recall(1), ev.Recall(2)]
    assert kinds(desk.ship(queued[1], FAULT), ev.Recall) == []
    desk.tell(ev.PackBegan(queued[2]), ev.Packed(queued[2], manifest_of(queued[2]), False))
    assert assigned(desk.tell(*(ev.Returned(name) for name in queued[2:]))) == []
    assert desk.book.count(*CLAIMED) == 0
    assert all(desk.book.entries[name].attempts == 0 for name in queued[2:])
    desk.now = desk.book.breaker.until
    ((_, probe),) = assigned(desk.tell(ev.Tick()))
    assert kinds(desk.ship(probe, FAULT), ev.Recall) == []  # the pause goes on


@pytest.mark.parametrize("answer", [FAULT, NETWORK])
def test_an_episode_that_is_always_refused_is_not_all_that_is_tried(answer: Verdict) -> None:
    """It is first in order, and ready again whenever a pause ends."""
    desk = Desk()
    desk.tell(ev.WorkerJoined(1))
    desk.find("a")
    for _ in range(3):
        if desk.state("a") is State.WAITING:
            desk.now = desk.book.entries["a"].not_before
            desk.tell(ev.Tick())
        desk.ship("a", answer)
    assert desk.book.breaker.paused
    desk.tell(ev.Found([("b", "b"), ("c", "c")], complete=False))
    desk.now = max(desk.book.breaker.until, desk.book.entries["a"].not_before)
    ((_, probe),) = assigned(desk.tell(ev.Tick()))
    assert probe == "b"
    assert len(assigned(desk.ship("b", shipped(manifest_of("b"))))) == 2


def test_one_that_was_let_in_before_the_pause_does_not_end_it() -> None:
    """A token is rotated: what was sent with the old one may come to its end with 201 all the same."""
    desk = Desk()
    desk.tell(ev.WorkerJoined(1))
    desk.find(*"abcdef")
    desk.tell(ev.PackBegan("a"), ev.Packed("a", manifest_of("a"), False))
    desk.ship("b", FAULT)
    desk.tell(*(ev.Returned(name) for name in "cdef" if desk.state(name) is State.QUEUED))
    commands = desk.tell(ev.Answered("a", shipped(manifest_of("a")), manifest_of("a"), True))
    assert kinds(commands, ev.Retire)
    ((_, probe),) = assigned(commands)  # at once, and alone
    assert desk.book.breaker.paused
    desk.ship(probe, FAULT)
    assert desk.book.breaker.pause_s == 2.0


def test_in_a_single_pass_one_that_was_let_in_ends_the_pause() -> None:
    desk = Desk(once=True)
    desk.tell(ev.WorkerJoined(1))
    desk.find(*"abc")
    desk.tell(ev.PackBegan("a"), ev.Packed("a", manifest_of("a"), False))
    assert kinds(desk.ship("b", FAULT), ev.Recall) == []  # each is attempted once, whatever comes of it
    desk.tell(ev.Answered("a", shipped(manifest_of("a")), manifest_of("a"), True))
    assert not desk.book.breaker.paused


def test_retry_after_is_obeyed_where_it_is_longer() -> None:
    desk = Desk()
    desk.tell(ev.WorkerJoined(1))
    desk.find("a", "b")
    desk.ship("a", RETRY_AFTER)
    assert desk.book.breaker.until == desk.now + 60.0
    assert desk.book.entries["a"].not_before == desk.now + 60.0


def test_network_faults_pause_only_after_several_in_a_row() -> None:
    desk = Desk(in_flight=10)
    desk.tell(ev.WorkerJoined(1))
    for number in range(2):
        desk.find(*(f"ep{one}" for one in range(number + 1)))
        desk.ship(f"ep{number}", NETWORK)
        assert not desk.book.breaker.paused
    desk.tell(ev.Found([("well", "well")], complete=False))
    desk.ship("well", CONFLICT)  # proves the destination well: the count begins anew
    for number, paused in ((5, False), (6, False), (7, True)):
        desk.tell(ev.Found([(f"ep{number}", f"ep{number}")], complete=False))
        desk.ship(f"ep{number}", NETWORK)
        assert desk.book.breaker.paused is paused


def test_a_probe_that_tells_nothing_makes_room_for_another() -> None:
    for end in ("died", "pack-failed", "returned"):
        desk = Desk()
        desk.tell(ev.WorkerJoined(1))
        desk.find("a")
        desk.ship("a", FAULT)
        desk.tell(ev.Found([("b", "b"), ("c", "c")], complete=False))
        desk.now += 1.0
        ((_, probe),) = [one for one in assigned(desk.tell(ev.Tick())) if one[1] == desk.book.breaker.probe]
        if end == "died":
            desk.tell(ev.PackBegan(probe), ev.WorkerLeft(1, True, "killed"))
        elif end == "pack-failed":
            desk.tell(ev.PackBegan(probe), ev.PackFailed(probe, "pack", "cannot"))
        else:
            desk.tell(ev.WorkerLeaving(1), ev.Returned(probe), ev.WorkerLeft(1, False))
        desk.tell(ev.WorkerJoined(2))
        assert desk.book.breaker.probe is not None, end
        assert desk.book.count(*CLAIMED) == 1, end


def test_an_episode_that_kills_workers_is_quarantined_and_convicts_no_other() -> None:
    desk = Desk()
    number = 0
    desk.tell(ev.WorkerJoined(0))
    desk.find("bad", "good1", "good2")
    quarantined: list[ev.Command] = []
    while desk.state("bad") is not None:
        assert number < 10
        if desk.state("bad") is State.QUEUED:
            commands = desk.tell(ev.PackBegan("bad"), ev.WorkerLeft(number, True, "killed by signal 9"))
            quarantined += kinds(commands, ev.Quarantine)
            number += 1
            desk.tell(ev.WorkerJoined(number))
        else:
            claimed = [name for name in ("good1", "good2") if desk.state(name) in CLAIMED]
            desk.ship(claimed[0], shipped(manifest_of(claimed[0])))
    (command,) = quarantined
    assert isinstance(command, ev.Quarantine)
    assert command.episode == "bad"
    assert "3 workers died" in command.error
    assert "signal 9" in command.error
    assert number == 3
    for name in ("good1", "good2"):
        entry = desk.book.entries.get(name)
        assert entry is None or entry.kills == 0


def test_a_worker_that_drains_gives_back_and_is_not_suspect() -> None:
    desk = Desk()
    desk.tell(ev.WorkerJoined(1))
    desk.find("a", "b")
    desk.tell(ev.PackBegan("a"), ev.WorkerLeaving(1), ev.Returned("b"))
    assert desk.state("b") is State.READY
    desk.tell(ev.Packed("a", manifest_of("a"), False), ev.WorkerLeft(1, False))
    assert desk.state("a") is State.READY
    assert desk.book.entries["a"].kills == 0


def test_nothing_new_for_a_worker_that_drains() -> None:
    desk = Desk()
    desk.tell(ev.WorkerJoined(1), ev.WorkerLeaving(1))
    assert assigned(desk.find("a")) == []
    assert assigned(desk.tell(ev.WorkerJoined(2))) == [(2, "a")]


def test_an_episode_that_goes_on_changing_is_held() -> None:
    desk = Desk()
    desk.tell(ev.WorkerJoined(1))
    desk.find("ep")
    holds = []
    for _ in range(CHANGES_BEFORE_HOLD):
        assert desk.state("ep") is State.QUEUED
        commands = desk.tell(ev.PackBegan("ep"), ev.PackFailed("ep", "episode-changed", "it grew", "f00d"))
        holds += kinds(commands, ev.Hold)
        desk.now += 100.0
        desk.tell(ev.Tick())
    (hold,) = holds
    assert isinstance(hold, ev.Hold)
    assert (hold.reason, hold.fingerprint) == ("changing", "f00d")
    assert desk.state("ep") is State.HELD


def test_a_held_one_is_left_alone_until_released() -> None:
    desk = Desk()
    desk.tell(ev.WorkerJoined(1), ev.Found([], held=["ep"]))
    desk.now += 1000.0
    assert assigned(desk.tell(ev.Tick(), ev.Found([], held=["ep"]))) == []
    assert assigned(desk.tell(ev.Released("ep", "ep"))) == [(1, "ep")]


def test_a_hold_that_was_removed_by_hand_ends_and_the_episode_takes_its_turn_by_its_key() -> None:
    desk = Desk()
    desk.tell(ev.Found([("2", "b")], held=["a"]))
    desk.tell(ev.Found([("2", "b"), ("3", "a")]))
    assert desk.book.ready == [("2", "b"), ("3", "a")]


def test_another_order_is_that_of_what_waits_already() -> None:
    desk = Desk()
    desk.tell(ev.Found([("a", "a"), ("b", "b"), ("c", "c")]))
    desk.book.begin_afresh(policy())
    desk.tell(ev.Found([("1", "c"), ("2", "d"), ("3", "b"), ("4", "a")]))
    assert desk.book.ready == [("1", "c"), ("2", "d"), ("3", "b"), ("4", "a")]


def test_retries_come_later_and_later() -> None:
    desk = Desk()
    desk.tell(ev.WorkerJoined(1))
    desk.find("ep")
    pauses = []
    for _ in range(6):
        desk.tell(ev.PackBegan("ep"), ev.PackFailed("ep", "outbox-full", "no room"))
        pauses.append(desk.book.entries["ep"].not_before - desk.now)
        assert next_wake(desk.book) == desk.book.entries["ep"].not_before
        desk.now = desk.book.entries["ep"].not_before
        desk.tell(ev.Tick())
        assert desk.state("ep") is State.QUEUED
    assert pauses == [1.0, 2.0, 4.0, 8.0, 8.0, 8.0]


def test_new_settings_try_again_at_once_what_waits() -> None:
    desk = Desk()
    desk.tell(ev.WorkerJoined(1))
    desk.find("a", "b")
    for name in "ab":
        desk.ship(name, FAULT)
    desk.book.begin_afresh(policy(in_flight=8))
    assert next_wake(desk.book) == 0.0
    assert [name for _, name in assigned(desk.tell(ev.Tick()))] == ["a", "b"]
    assert not desk.book.breaker.paused


def test_a_single_pass_attempts_each_once() -> None:
    desk = Desk(once=True)
    desk.tell(ev.WorkerJoined(1))
    desk.find("a", "b")
    desk.tell(ev.PackBegan("a"), ev.PackFailed("a", "outbox-full", "no room"))
    desk.now += 1e6
    desk.tell(ev.Tick())
    assert desk.state("a") is State.WAITING
    assert not desk.book.idle()
    desk.ship("b", shipped(manifest_of("b")))
    assert desk.book.idle()


def test_a_single_pass_ends_where_the_destination_is_paused() -> None:
    desk = Desk(once=True, in_flight=1)
    desk.tell(ev.WorkerJoined(1))
    desk.find(*"abcdefghijkl")
    while claimed := [entry.episode for entry in desk.book.entries.values() if entry.state in CLAIMED]:
        desk.ship(claimed[0], FAULT)
    assert desk.book.ready
    assert desk.book.idle()


def test_large_episodes_are_not_queued_and_small_ones_are() -> None:
    desk = Desk(frames=1)
    desk.tell(ev.WorkerJoined(1))
    assert len(assigned(desk.find(*(f"ep{number}" for number in range(3 * QUEUE_DEPTH))))) == QUEUE_DEPTH
    desk = Desk(frames=9)
    desk.tell(ev.WorkerJoined(1))
    assert len(assigned(desk.find(*"abcdefghij"))) == 1


def test_what_ships_bounds_what_is_packed() -> None:
    desk = Desk(frames=9, in_flight=2)
    desk.tell(ev.WorkerJoined(1))
    desk.find(*"abcd")
    for name in "ab":
        desk.tell(ev.PackBegan(name), ev.Packed(name, manifest_of(name), False))
    assert desk.state("c") is State.READY
    assert assigned(desk.tell(ev.Answered("a", shipped(manifest_of("a")), manifest_of("a")))) == [(1, "c")]


def test_the_core_budget_follows_the_backlog() -> None:
    desk = Desk(cores=4)
    desk.frames = {"huge": 100}
    desk.tell(ev.WorkerJoined(1), ev.WorkerJoined(2))
    (share,) = kinds(desk.find("huge"), ev.Share)
    assert share == ev.Share(1, 4)
    shares = kinds(desk.tell(ev.Found([("small", "small")], complete=False)), ev.Share)
    assert sorted((one.worker, one.threads) for one in shares if isinstance(one, ev.Share)) == [(1, 3), (2, 1)]


def test_impossible_names_are_quarantined_and_printable() -> None:
    name = "bad\n\udcff"
    (command,) = Desk().tell(ev.Found([], impossible=[name]))
    assert isinstance(command, ev.Quarantine)
    assert command.episode == name
    command.error.encode()  # no surrogate in it
    assert "\n" not in command.error


def test_operators_words_on_what_is_not_there_change_nothing() -> None:
    desk = Desk()
    assert desk.tell(ev.Gone("nothing")) == []
    assert desk.tell(ev.Measured("nothing", 3)) == []
    desk.tell(ev.WorkerJoined(1))
    desk.find("ep")
    desk.tell(ev.Gone("ep"), ev.Released("ep", "ep"))  # claimed: its worker will say
    assert desk.state("ep") is State.QUEUED


# --- cost --------------------------------------------------------------------------------------------------------


class Counting(dict[str, Any]):
    """Entries that count how often one of them is looked at."""

    touched = 0

    def __getitem__(self, key: str) -> Any:
        self.touched += 1
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.touched += 1
        return super().get(key, default)

    def __iter__(self) -> Any:
        for key in super().__iter__():
            self.touched += 1
            yield key

    def values(self) -> Any:
        self.touched += len(self)
        return super().values()


def crowded(many: int) -> tuple[Desk, Counting]:
    """A desk with so many ready episodes, two workers, and counted entries. What is counted is not timed."""
    desk = Desk()
    desk.find(*(f"ep{number:06d}" for number in range(many)))
    desk.book.entries = entries = Counting(desk.book.entries)
    desk.tell(ev.WorkerJoined(1), ev.WorkerJoined(2))
    return desk, entries


def test_a_hundred_thousand_ready_episodes_cost_no_more_each_than_a_few() -> None:
    desk, entries = crowded(100_000)
    for _ in range(3000):
        entries.touched = 0
        name = next(iter(desk.book.workers[1] or desk.book.workers[2]))
        desk.ship(name, shipped(manifest_of(name)))
        assert entries.touched < 300
    assert len(entries) == 97_000


def test_many_waiting_episodes_do_not_make_each_event_dear() -> None:
    """A full outbox sends everything to wait: each event then looks at the next alarm, not at all of them."""
    many = 5_000
    desk, entries = crowded(many)
    for _ in range(many):
        entries.touched = 0
        name = next(iter(desk.book.workers[1] or desk.book.workers[2]))
        desk.tell(ev.PackBegan(name), ev.PackFailed(name, "outbox-full", "no room"))
        assert next_wake(desk.book) == desk.now + 1.0
        assert entries.touched < 300
    assert len(desk.book.waiting) == many
    desk.now += 1.0
    desk.tell(ev.Tick())
    assert desk.book.count(State.WAITING) == 0


# --- sharing the cores -------------------------------------------------------------------------------------------


@given(st.integers(1, 64), st.dictionaries(st.integers(0, 20), st.integers(1, 300), max_size=12))
def test_shares_of_the_cores(cores: int, frames: dict[int, int]) -> None:
    shares = share_cores(cores, frames)
    assert shares.keys() == frames.keys()
    assert all(threads >= 1 for threads in shares.values())
    assert sum(shares.values()) <= max(cores, len(frames))
    assert all(threads <= max(1, frames[worker]) for worker, threads in shares.items())
    if frames:  # no core idles while a worker could use it
        assert sum(shares.values()) >= min(max(cores, len(frames)), sum(frames.values()))
    for one in frames:  # more frames, no fewer threads
        for other in frames:
            if frames[one] > frames[other]:
                assert shares[one] >= shares[other]


def test_one_huge_episode_gets_every_core() -> None:
    assert share_cores(16, {3: 1000}) == {3: 16}
    assert share_cores(4, dict.fromkeys(range(8), 1)) == dict.fromkeys(range(8), 1)
    assert share_cores(4, {1: 1000, 2: 1}) == {1: 3, 2: 1}


# --- giving way --------------------------------------------------------------------------------------------------


def shared(commands: list[ev.Command]) -> dict[int, int]:
    return {command.worker: command.threads for command in commands if isinstance(command, ev.Share)}


def test_a_smaller_budget_takes_threads_first_then_workers_then_all() -> None:
    desk = Desk(frames=100, cores=4)
    desk.tell(ev.WorkerJoined(1), ev.WorkerJoined(2))
    desk.find("a", "b", "c")
    assert desk.book.shares == {1: 2, 2: 2}
    assert shared(desk.tell(ev.Budget(3, "busy"))) == {2: 1}
    assert shared(desk.tell(ev.Budget(1, "busy"))) == {1: 1, 2: 0}
    assert shared(desk.tell(ev.Budget(0, "busy"))) == {1: 0}
    assert shared(desk.tell(ev.Budget(4))) == {1: 2, 2: 2}


def test_what_is_begun_goes_on_first() -> None:
    """With one core for two workers, the one that packs keeps it until its episode is packed."""
    desk = Desk(frames=100, cores=2)
    desk.tell(ev.WorkerJoined(1), ev.WorkerJoined(2))
    desk.find("a", "b")
    desk.tell(ev.Budget(0, "busy"))
    desk.tell(ev.Budget(1, "busy"))
    assert desk.book.shares == {1: 1, 2: 0}
    desk.tell(ev.PackBegan("a"))
    assert shared(desk.tell(ev.Packed("a", manifest_of("a"), False))) == {2: 1}


def test_while_paused_nothing_is_given_out_but_what_is_packed() -> None:
    desk = Desk()
    desk.tell(ev.WorkerJoined(1))
    assert assigned(desk.find("b")) == [(1, "b")]
    desk.ship("b", NETWORK)
    desk.tell(ev.Budget(0, "busy"))
    assert assigned(desk.find("a", "b")) == []
    desk.now += 1.0  # b's retry
    assert assigned(desk.tell(ev.Tick())) == [(1, "b")]
    assert kinds(desk.ship("b", shipped(manifest_of("b"))), ev.Retire)
    assert assigned(desk.tell(ev.Budget(1, "busy"))) == [(1, "a")]


def test_an_artifact_that_is_damaged_or_gone_has_to_be_packed_again() -> None:
    desk = Desk()
    desk.tell(ev.WorkerJoined(1))
    desk.find("a")
    desk.ship("a", NETWORK)
    assert desk.book.packed == {"a"}
    desk.now += 1.0
    desk.tell(ev.Tick())
    desk.ship("a", DAMAGED)
    assert desk.book.packed == set()
    desk.now += 10.0
    desk.tell(ev.Tick())
    desk.ship("a", NETWORK)
    desk.tell(ev.Gone("a"))
    assert desk.book.packed == set()


def test_fewer_cores_than_workers_are_given_to_so_many_workers() -> None:
    desk = Desk(cores=4)
    desk.tell(*(ev.WorkerJoined(number) for number in range(1, 5)), ev.Budget(2, "busy"))
    commands = desk.find(*(f"ep{number:02}" for number in range(20)))
    assert {worker for worker, _ in assigned(commands)} == {1, 2}


def test_draining_gives_way_to_nobody() -> None:
    desk = Desk(frames=100)
    desk.tell(ev.WorkerJoined(1))
    desk.find("a")
    desk.tell(ev.Budget(0, "busy"))
    desk.book.draining = True
    assert shared(desk.tell(ev.WorkerLeaving(1))) == {1: 2}


def test_giving_way_is_logged_when_it_begins_pauses_and_ends() -> None:
    desk = Desk(cores=4)
    told = [
        [(one.event, one.fields) for one in desk.tell(ev.Budget(cores, why)) if isinstance(one, ev.Report)]
        for cores, why in ((3, "busy"), (2, "busier"), (0, "full"), (1, "busier"), (2, "busy"), (4, ""))
    ]
    assert told == [
        [("giving-way", {"cores": 3, "of": 4, "why": "busy"})],
        [],
        [("packing-paused", {"cores": 0, "of": 4, "why": "full"})],
        [("giving-way", {"cores": 1, "of": 4, "why": "busier"})],
        [],
        [("no-longer-giving-way", {"cores": 4})],
    ]


def test_a_worker_gets_no_more_threads_than_its_memory_allows() -> None:
    assert share_cores(16, {1: 1000, 2: 1000}, 3) == {1: 3, 2: 3}


SHORT = ev.Room(short=True, floor_bytes=1000, lent_floor_bytes=75)


def test_a_disk_that_is_short_has_artifacts_shipped_first_and_one_packed_at_a_time() -> None:
    desk = Desk()
    desk.tell(SHORT, ev.WorkerJoined(1), ev.WorkerJoined(2))
    names = ["a", "b", "c", "d"]
    found = desk.tell(ev.Found([(one, one) for one in names], packed=("c", "b", "no episode")))
    assert assigned(found) == [(1, "b"), (2, "c")]
    assert [one.floor_bytes for one in found if isinstance(one, ev.Assign)] == [1000, 1000]
    assert kinds(desk.ship("b", shipped(manifest_of("b"))), ev.Assign) == []
    (lent,) = kinds(desk.ship("c", shipped(manifest_of("c"))), ev.Assign)
    assert isinstance(lent, ev.Assign)
    assert (lent.episode, lent.floor_bytes) == ("a", 75)
    desk.tell(ev.PackBegan("a"), ev.Packed("a", manifest_of("a"), False))
    assert desk.state("d") is State.READY  # while a is in the outbox, and for as long as the destination is away
    assert assigned(desk.tell(ev.Answered("a", FAULT, manifest_of("a")))) == []


def test_room_again_and_all_goes_on_with_what_had_none_first_to_try_again() -> None:
    desk = Desk()
    desk.tell(SHORT, ev.WorkerJoined(1))
    desk.find("a", "b")
    desk.tell(ev.PackBegan("a"), ev.PackFailed("a", "disk-short", "no room"))
    desk.tell(ev.PackBegan("b"), ev.PackFailed("b", "episode-unreadable", "no permission"))
    assert (desk.state("a"), desk.state("b")) == (State.WAITING, State.WAITING)
    assert assigned(desk.tell(ev.Room(floor_bytes=1000))) == [(1, "a")]
    assert desk.state("b") is State.WAITING


def test_new_settings_may_keep_less_of_the_disk_free() -> None:
    desk = Desk()
    desk.tell(SHORT, ev.WorkerJoined(1))
    desk.find("a", "b", "c")
    assert desk.state("b") is State.READY
    desk.book.begin_afresh(policy())
    assert assigned(desk.tell(ev.Tick())) == [(1, "b")]


def test_what_is_held_does_not_keep_others_from_being_lent_room() -> None:
    desk = Desk()
    desk.tell(SHORT, ev.WorkerJoined(1))
    found = desk.tell(ev.Found([("a", "a")], held=["h"], packed=("h",)))
    assert assigned(found) == [(1, "a")]


@pytest.mark.parametrize("why", ["too large", "unreadable", "immovable"])
def test_what_is_kept_in_the_outbox_by_itself_does_not_keep_others_from_being_lent_room(why: str) -> None:
    """A proxy takes none so large, or it cannot be read or moved any more: on a short disk all shipping stopped."""
    desk = Desk()
    desk.tell(SHORT, ev.WorkerJoined(1))
    desk.tell(ev.Found([("a", "a"), ("b", "b"), ("c", "c")], packed=("a",)))
    if why == "too large":
        desk.ship("a", verdict(Outcome.TRANSIENT, Scope.EPISODE, status=413))
    elif why == "unreadable":
        desk.tell(ev.PackBegan("a"), ev.PackFailed("a", "episode-unreadable", "no permission"))
    else:
        desk.ship("a", shipped(manifest_of("a")))
        desk.tell(ev.Undone("a", "a", "busy"))
    desk.tell(ev.Found([("a", "a"), ("b", "b"), ("c", "c")], packed=("a",)))
    assert desk.state("a") is State.WAITING
    assert [desk.state("b"), desk.state("c")] == [State.QUEUED, State.READY]
    assert assigned(desk.ship("b", NETWORK)) == []  # and that may be the destination's


def test_a_single_pass_ends_where_the_disk_is_short_and_nothing_leaves_it() -> None:
    desk = Desk(once=True)
    desk.tell(SHORT, ev.WorkerJoined(1))
    desk.find("a", "b")
    desk.ship("a", NETWORK)
    assert desk.state("b") is State.READY
    assert desk.book.idle()
