"""What the patrol finds on a real disk and tells the book; the loop around it is shown in tests/system."""

from __future__ import annotations

import os
import selectors
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from sample import hold_record, make_episode, put_artifact
from structlog.testing import capture_logs

from fastship.lifecycle import Book, State, decide
from fastship.lifecycle.events import Event, Found, Gone, Released
from fastship.pack import fingerprint
from fastship.settings import Settings
from fastship.spool import HoldRecord, Look, Spool, requests
from fastship.spool import store as spool_store
from fastship.supervisor import patrol as patrol_module
from fastship.supervisor.loop import policy_of
from fastship.supervisor.patrol import Patrol


def held_as(reason: str, fingerprint: str) -> HoldRecord:
    return msgspec.structs.replace(hold_record("ep"), reason=reason, fingerprint=fingerprint)


class Beat:
    """A patrol, with all that it told."""

    def __init__(self, root: Path) -> None:
        self.settings = Settings.load(profile="ci", values={"spool": {"root": root}})
        self.spool = Spool(root)
        self.spool.create()
        self.book = Book(policy_of(self.settings, once=False))
        self.selector = selectors.DefaultSelector()
        self.told: list[Event] = []
        self.settled = 0
        self.proven: list[str] = []  # to be retired when settled
        self.patrol = Patrol(self.settings, self.spool, self.book, self.selector, feed=self._feed, settle=self._settle)

    def _feed(self, event: Event) -> None:
        self.told.append(event)
        decide(self.book, event, time.monotonic())

    def _settle(self) -> None:
        self.settled += 1
        for name in self.proven:
            (self.spool.paths.episodes / name).rename(self.spool.paths.shipped / name)

    def wait_for_notice(self) -> None:
        end = time.monotonic() + 30.0
        before = len(self.told)
        while len(self.told) == before and time.monotonic() < end:
            for key, _ in self.selector.select(0.05):
                key.data()
            self.patrol.turn(None)


@pytest.fixture
def beat(tmp_path: Path) -> Iterator[Beat]:
    made = Beat(tmp_path / "spool")
    yield made
    made.patrol.close()
    made.selector.close()


@pytest.fixture(autouse=True)
def _look_at_holds_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patrol_module, "HOLD_LOOK_S", 0.0)


def test_a_look_settles_first_and_tells_all(beat: Beat) -> None:
    make_episode(beat.spool.paths.episodes, "ready")
    make_episode(beat.spool.paths.episodes, "recording", marker=False)
    make_episode(beat.spool.paths.episodes, "no id")
    beat.patrol.look()
    assert beat.settled == 1
    assert beat.told == [Found([("ready", "ready")], [], ["no id"])]
    assert beat.patrol.recording == 1


def test_a_look_tells_what_an_earlier_run_packed(beat: Beat) -> None:
    make_episode(beat.spool.paths.episodes, "ready")
    put_artifact(beat.spool, "ready")
    beat.patrol.look()
    assert beat.book.packed == {"ready"}


@pytest.mark.parametrize(
    ("cpu_s", "wall_s", "spacing_s"), [(0.001, 0.002, 1.0), (0.05, 0.05, 10.0), (0.001, 5.0, 50.0)]
)
def test_looks_are_spaced_by_what_they_cost_and_less_by_what_they_wait(
    beat: Beat, monkeypatch: pytest.MonkeyPatch, cpu_s: float, wall_s: float, spacing_s: float
) -> None:
    clock = {"monotonic": 100.0, "thread_time": 1.0}
    real = beat.spool.look

    def look() -> Look:
        clock["monotonic"] += wall_s
        clock["thread_time"] += cpu_s
        return real()

    monkeypatch.setattr(beat.spool, "look", look)
    monkeypatch.setattr(time, "monotonic", lambda: clock["monotonic"])
    monkeypatch.setattr(time, "thread_time", lambda: clock["thread_time"])
    beat.patrol.look()
    due = beat.patrol._next_look
    monkeypatch.undo()
    assert due == pytest.approx(100.0 + wall_s + spacing_s)


def test_a_marker_is_noticed_without_a_look(beat: Beat) -> None:
    episode = make_episode(beat.spool.paths.episodes, "ep", marker=False)
    beat.patrol.watch()
    beat.patrol.look()
    beat.patrol._next_look = beat.patrol._next_pass = time.monotonic() + 3600.0
    beat.told.clear()
    (episode / "done.marker").touch()
    beat.wait_for_notice()
    assert beat.told == [Found([("ep", "ep")], complete=False)]
    assert beat.patrol.recording == 0


def test_a_marker_that_is_noticed_after_its_episode_was_shipped_does_not_begin_it_again(beat: Beat) -> None:
    """It was found by a look, and is proven: on disk it is in episodes/ until the next group commit."""
    beat.patrol.watch()
    make_episode(beat.spool.paths.episodes, "ep")
    put_artifact(beat.spool, "ep")
    beat.proven = ["ep"]
    beat.patrol.notice()
    assert beat.settled == 1
    assert beat.told == []


@pytest.mark.parametrize("reason", ["conflict", "changing"])
def test_a_conflict_is_released_by_change_and_a_changing_one_by_rest(beat: Beat, reason: str) -> None:
    episode = make_episode(beat.spool.paths.episodes, "ep")
    now = fingerprint(episode, owner="keep")
    beat.spool.hold(held_as(reason, now))
    if reason == "conflict":
        beat.patrol.look()
        assert beat.spool.find_hold("ep") is not None
        (episode / "more").write_bytes(b"changed")
    beat.patrol.look()
    assert beat.spool.find_hold("ep") is None
    assert beat.told[-1] == Released("ep", "ep")


def test_one_that_goes_on_changing_stays_held(beat: Beat) -> None:
    episode = make_episode(beat.spool.paths.episodes, "ep")
    beat.spool.hold(held_as("changing", "of before"))
    beat.patrol.look()
    hold = beat.spool.find_hold("ep")
    assert hold is not None
    assert hold.fingerprint == fingerprint(episode, owner="keep")


def test_one_that_changed_also_while_it_was_held_is_released_once_it_is_still(beat: Beat) -> None:
    """Its fingerprint could not be told then."""
    make_episode(beat.spool.paths.episodes, "ep")
    beat.spool.hold(held_as("changing", ""))
    beat.patrol.look()
    assert beat.spool.find_hold("ep") is not None
    beat.patrol.look()
    assert beat.spool.find_hold("ep") is None


def test_an_unreadable_hold_holds_until_an_operator_decides(beat: Beat) -> None:
    make_episode(beat.spool.paths.episodes, "ep")
    (beat.spool.paths.holds / "ep.json").write_bytes(b"{")
    beat.patrol.look()
    beat.patrol.look()
    assert (beat.spool.paths.holds / "ep.json").exists()


def test_operators_are_served_each_pass(beat: Beat) -> None:
    episode = make_episode(beat.spool.paths.episodes, "ep")
    beat.spool.hold(held_as("conflict", fingerprint(episode, owner="keep")))
    beat.patrol.look()
    directory = beat.spool.paths.requests
    path = directory / "1.json"
    path.write_bytes(b'{"action":"drop-local","episode":"ep"}')
    (directory / "2.json").write_bytes(b"not json")
    beat.patrol.turn(None)
    assert beat.told[-1] == Gone("ep")
    assert (beat.spool.paths.quarantine / "ep").is_dir()
    assert not list(directory.glob("*.json"))
    assert msgspec.json.decode(path.with_suffix(".answer").read_bytes())["ok"] is True
    assert msgspec.json.decode((directory / "2.answer").read_bytes())["ok"] is False


def test_a_request_that_cannot_be_answered_keeps_nothing_from_its_turn(beat: Beat) -> None:
    beat.patrol.watch()
    directory = beat.spool.paths.requests
    (directory / "stray.json").mkdir()
    (directory / "1.answer").mkdir()
    (directory / "1.json").write_bytes(b'{"action":"drop","episode":"nothing"}')
    make_episode(beat.spool.paths.episodes, "ep")
    beat.wait_for_notice()
    assert beat.told[0] == Found([("ep", "ep")], complete=False)
    assert not (directory / "1.json").exists()
    for _ in range(3):  # what it wrote itself wakes it once and leads to no more
        for key, _ in beat.selector.select(0.05):
            key.data()
        time.sleep(2 * patrol_module.NOTICE_S)
        beat.patrol.turn(None)
    assert beat.selector.select(0.05) == []


def test_links_and_closed_episodes_are_told_once(beat: Beat, tmp_path: Path) -> None:
    (beat.spool.paths.episodes / "link").symlink_to(make_episode(tmp_path, "outside"))
    for number in range(patrol_module.TOLD_AT_ONCE):
        (beat.spool.paths.episodes / f"link{number}").symlink_to(tmp_path / "outside")
    make_episode(beat.spool.paths.episodes, "recording", marker=False)
    with capture_logs() as logs:
        beat.patrol.look()
        beat.patrol.look()
    told = [line for line in logs if line["event"] == "not-shipped"]
    assert len(told) == patrol_module.TOLD_AT_ONCE + 1
    assert told[0]["episode"] == "'link'"
    assert "move the directory" in told[0]["remedy"]
    assert told[-1]["episodes"] == 1


def test_a_claimed_episode_is_not_taken_from_its_worker(beat: Beat) -> None:
    make_episode(beat.spool.paths.episodes, "ep")
    beat.patrol.look()
    beat.book.entries["ep"].state = State.PACKING
    reply = beat.patrol._serve(requests.Request(action="drop-local", episode="ep"))
    assert not reply.ok
    assert (beat.spool.paths.episodes / "ep").is_dir()


def test_a_heartbeat_that_raises_does_not_end_the_pass(beat: Beat) -> None:
    os.close(os.open(beat.spool.paths.outbox / "gone.tar.zst", os.O_CREAT | os.O_WRONLY))

    def heartbeat() -> None:
        raise ValueError("of the caller's making")

    beat.patrol.turn(heartbeat)
    assert not (beat.spool.paths.outbox / "gone.tar.zst").exists()


def test_a_quarantine_that_a_fault_of_the_disk_interrupted_is_completed_without_a_restart(
    beat: Beat, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_episode(beat.spool.paths.episodes, "ep")
    beat.patrol.repair()
    with monkeypatch.context() as patch:
        patch.setattr(spool_store, "put_reason", lambda *_: os.listdir("/nowhere"))
        with pytest.raises(OSError, match="nowhere"):
            beat.spool.quarantine("ep", status_code=422, error="no", body="")
    beat.patrol.turn(None)
    assert sorted(os.listdir(beat.spool.paths.quarantine)) == ["ep"]
    assert (beat.spool.paths.quarantine / "ep" / "quarantine_reason.json").exists()
