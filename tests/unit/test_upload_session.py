"""The session: several artifacts at once, from any thread, to their verdicts."""

from __future__ import annotations

import contextlib
import errno
import os
import queue
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from scripted_server import (
    GENEROUS_S,
    MEGABYTE,
    UPLOAD,
    Head,
    Keeper,
    Peer,
    Server,
    accept_all,
    make_artifact,
    ship_all,
    to,
    wait_until,
)

from fastship.episode import Outcome, Scope, Verdict
from fastship.upload import Artifact, Growing, Session, ship
from fastship.upload.curl import Transfers


@pytest.fixture
def small(tmp_path: Path) -> Artifact:
    return make_artifact(tmp_path, 50_000)


@pytest.fixture
def large(tmp_path: Path) -> Artifact:
    """More than the kernel's buffers on loopback hold."""
    return make_artifact(tmp_path, 24 * MEGABYTE)


# The artifact itself


def test_an_artifact_that_is_missing_or_of_another_size_is_packed_again(small: Artifact) -> None:
    with Server(accept_all) as server:
        small.path.write_bytes(b"short")
        assert ship(small, to(server), UPLOAD).outcome is Outcome.DAMAGED
        small.path.unlink()
        verdict = ship(small, to(server), UPLOAD)
    assert (verdict.outcome, verdict.scope) == (Outcome.DAMAGED, Scope.EPISODE)
    assert server.heads == []


@pytest.mark.parametrize("stored", [True, False])
def test_an_artifact_that_was_given_up_is_asked_for_and_not_sent(small: Artifact, stored: bool) -> None:
    keeper = Keeper(small)
    if stored:
        with Server(keeper) as server:
            assert ship(small, to(server), UPLOAD).outcome is Outcome.SHIPPED
    small.path.unlink()
    with Server(keeper) as server:
        verdict = ship(small, to(server), UPLOAD, first_attempt=False)
    assert verdict.outcome is (Outcome.SHIPPED if stored else Outcome.DAMAGED)
    assert [head.method for head in server.heads] == ["PUT"]


def test_an_artifact_whose_sending_failed_while_it_was_packed_still_gets_its_verdict(
    small: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    verdicts: queue.SimpleQueue[tuple[str, Verdict]] = queue.SimpleQueue()

    def unreadable(_: int) -> os.stat_result:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with Server(accept_all) as server:
        with Session(to(server), UPLOAD, on_verdict=lambda *told: verdicts.put(told)) as session:
            with monkeypatch.context() as patch:
                patch.setattr(os, "fstat", unreadable)
                advance = session.stream(Growing(small.manifest.episode, small.path), 10_000)
                wait_until(lambda: session.queued == session.in_flight == 0)
            advance(20_000)
            session.submit(small, first_attempt=True)
            _, verdict = verdicts.get(timeout=GENEROUS_S)
        assert verdict.outcome is Outcome.SHIPPED


def test_an_artifact_that_shrinks_while_it_is_sent_is_packed_again(large: Artifact) -> None:
    def shrink(peer: Peer, head: Head) -> None:
        os.truncate(large.path, 1000)
        peer.body(head)

    keeper = Keeper(large, None, shrink)
    with Server(keeper) as server:
        verdict = ship(large, to(server), UPLOAD)
    assert verdict.outcome is Outcome.DAMAGED


@pytest.mark.parametrize("damaged", [True, False])
def test_a_digest_mismatch_is_settled_by_reading_the_artifact_again(small: Artifact, damaged: bool) -> None:
    def mismatch(peer: Peer, head: Head) -> None:
        peer.body(head)
        peer.answer(400, Upload_Complete="?1")

    if damaged:
        data = bytearray(small.path.read_bytes())
        data[100] ^= 1
        small.path.write_bytes(data)
    keeper = Keeper(small, mismatch)
    with Server(keeper) as server:
        verdict = ship(small, to(server), UPLOAD)
    assert verdict.outcome is (Outcome.DAMAGED if damaged else Outcome.SHIPPED)
    assert server.outline == ["PUT"] * (1 if damaged else 2)


@contextlib.contextmanager
def held_server() -> Iterator[tuple[Server, threading.Event]]:
    """A server that answers nothing until the event is set."""
    release = threading.Event()

    def hold(peer: Peer, head: Head) -> None:
        body = peer.body(head)
        release.wait()
        assert len(body) == head.length
        peer.answer(201, Repr_Digest=head.fields["repr-digest"])

    with Server(hold) as server:
        try:
            yield server, release
        finally:
            release.set()


def test_as_many_in_flight_as_connections_and_the_rest_in_order(tmp_path: Path) -> None:
    artifacts = [make_artifact(tmp_path, 1000, f"ep{number}") for number in range(6)]
    upload = msgspec.structs.replace(UPLOAD, connections=2)
    verdicts: list[str] = []
    with (
        held_server() as (server, release),
        Session(to(server), upload, on_verdict=lambda episode, _verdict: verdicts.append(episode)) as session,
    ):
        for artifact in artifacts:
            session.submit(artifact, first_attempt=True)
        wait_until(lambda: len(server.heads) == 2)
        assert (session.in_flight, session.queued) == (2, 4)
        release.set()
        wait_until(lambda: len(verdicts) == 6)
    begun = [head.target for head in server.heads]
    assert sorted(begun[:2]) == ["/v1/episodes/ep0", "/v1/episodes/ep1"]
    assert sorted(begun) == [f"/v1/episodes/ep{number}" for number in range(6)]


def test_drain_waits_for_those_under_way_and_begins_no_more(tmp_path: Path) -> None:
    artifacts = [make_artifact(tmp_path, 1000, f"ep{number}") for number in range(3)]
    upload = msgspec.structs.replace(UPLOAD, connections=1)
    verdicts: list[str] = []
    with held_server() as (server, release):
        session = Session(to(server), upload, on_verdict=lambda episode, _verdict: verdicts.append(episode))
        with session:
            for artifact in artifacts:
                session.submit(artifact, first_attempt=True)
            wait_until(lambda: len(server.heads) == 1)
            assert not session.drain(0.01)
            release.set()
            assert session.drain(GENEROUS_S)
            assert verdicts == ["ep0"]
            with pytest.raises(RuntimeError):
                session.submit(artifacts[1], first_attempt=True)
    assert len(server.heads) == 1
    assert session.drain(0.0)


def test_recall_takes_back_what_has_not_begun(tmp_path: Path) -> None:
    artifacts = [make_artifact(tmp_path, 1000, f"ep{number}") for number in range(4)]
    upload = msgspec.structs.replace(UPLOAD, connections=1)
    verdicts: list[str] = []
    with (
        held_server() as (server, release),
        Session(to(server), upload, on_verdict=lambda episode, _verdict: verdicts.append(episode)) as session,
    ):
        for artifact in artifacts:
            session.submit(artifact, first_attempt=True)
        wait_until(lambda: len(server.heads) == 1)
        assert session.recall() == ["ep1", "ep2", "ep3"]
        assert session.recall() == []
        assert (session.in_flight, session.queued) == (1, 0)
        session.submit(artifacts[2], first_attempt=True)
        release.set()
        wait_until(lambda: len(verdicts) == 2)
    assert verdicts == ["ep0", "ep2"]


def test_drain_ends_a_wait_for_a_retry_with_what_it_was_for(small: Artifact) -> None:
    patient = msgspec.structs.replace(UPLOAD, retry_min_s=3600.0, retry_max_s=3600.0)
    verdicts: list[Verdict] = []

    def fail(peer: Peer, head: Head) -> None:
        peer.body(head)
        peer.answer(502)

    with Server(fail) as server, Session(to(server), patient, on_verdict=lambda _e, v: verdicts.append(v)) as session:
        session.submit(small, first_attempt=True)
        wait_until(lambda: len(server.heads) == 1)
        assert session.drain(GENEROUS_S)
    assert [(verdict.outcome, verdict.status) for verdict in verdicts] == [(Outcome.TRANSIENT, 502)]


def test_close_cuts_at_once_without_a_verdict_and_may_be_repeated(tmp_path: Path) -> None:
    artifacts = [make_artifact(tmp_path, 1000, f"ep{number}") for number in range(3)]
    verdicts: list[str] = []
    before = open_descriptors()
    with held_server() as (server, _release):
        session = Session(
            to(server),
            msgspec.structs.replace(UPLOAD, connections=1),
            on_verdict=lambda episode, _verdict: verdicts.append(episode),
        )
        for artifact in artifacts:
            session.submit(artifact, first_attempt=True)
        wait_until(lambda: len(server.heads) == 1)
        session.close()
        session.close()
        session.set_bandwidth(1)
        assert (session.in_flight, session.queued) == (0, 0)
    assert verdicts == []
    assert open_descriptors() == before


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_nothing_is_left_open_after_many_uploads_good_and_bad(tmp_path: Path) -> None:
    artifacts = [make_artifact(tmp_path, 1000, f"ep{number}") for number in range(20)]

    def moody(peer: Peer, head: Head) -> None:
        if head.target.endswith(("1", "3")):
            peer.reset()
        else:
            accept_all(peer, head)

    before = open_descriptors()
    with Server(moody) as server:
        verdicts = ship_all(artifacts, to(server), msgspec.structs.replace(UPLOAD, retries=1))
    assert sum(verdict.outcome is Outcome.SHIPPED for verdict in verdicts.values()) == 16
    assert open_descriptors() == before


def test_what_a_callback_raises_stops_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    artifacts = [make_artifact(tmp_path, 1000, f"ep{number}") for number in range(3)]
    told: list[str] = []

    def refuse(episode: str, _verdict: Verdict) -> None:
        told.append(episode)
        raise ZeroDivisionError("in the callback")

    def choke(*_: object) -> None:
        raise ZeroDivisionError("in the progress")

    with Server(accept_all) as server, Session(to(server), UPLOAD, on_verdict=refuse, on_progress=choke) as session:
        for artifact in artifacts:
            session.submit(artifact, first_attempt=True)
        wait_until(lambda: len(told) == 3)
    assert "in the callback" in caplog.text
    assert "in the progress" in caplog.text


def test_a_fault_of_ours_in_one_course_is_its_verdict_and_no_other_ones(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = make_artifact(tmp_path, 1000, "ep1")
    bad = Artifact(msgspec.structs.replace(good.manifest, episode="ep2", artifact_sha256="not hex"), good.path)
    with Server(accept_all) as server:
        verdicts = ship_all([bad, good], to(server), UPLOAD)
    assert verdicts["ep1"].outcome is Outcome.SHIPPED
    assert (verdicts["ep2"].outcome, verdicts["ep2"].scope) == (Outcome.TRANSIENT, Scope.NETWORK)
    assert "Traceback" in caplog.text


def test_a_fault_that_ends_the_session_leaves_nobody_waiting(
    small: Artifact, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("in the loop")

    verdicts: queue.SimpleQueue[Verdict] = queue.SimpleQueue()
    with held_server() as (server, _release):
        upload = msgspec.structs.replace(UPLOAD, connections=1)
        with Session(to(server), upload, on_verdict=lambda _episode, verdict: verdicts.put(verdict)) as session:
            session.submit(small, first_attempt=True)
            wait_until(lambda: len(server.heads) == 1)
            monkeypatch.setattr(Transfers, "poll", fail)
            session.submit(small, first_attempt=True)  # the one under way and the one in line
            for _ in range(2):
                assert verdicts.get(timeout=GENEROUS_S).outcome is Outcome.TRANSIENT
            assert session.drain(GENEROUS_S)
            with pytest.raises(RuntimeError):
                session.submit(small, first_attempt=True)
    assert "in the loop" in caplog.text


def test_progress_never_passes_the_whole_and_starts_at_the_receivers_offset(large: Artifact) -> None:
    total = large.manifest.artifact_bytes
    told: list[tuple[str, int, int]] = []
    keeper = Keeper(large)
    keeper.kept += large.path.read_bytes()[:5_000_000]
    with Server(keeper) as server:
        limited = msgspec.structs.replace(UPLOAD, bandwidth=40_000_000)
        verdict = ship(large, to(server), limited, first_attempt=False, on_progress=lambda *args: told.append(args))
    assert verdict.resumed_at == 5_000_000
    assert verdict.sent_bytes == total - 5_000_000
    assert len(told) > 1
    assert all(episode == "ep1" and 5_000_000 <= done <= total == of for episode, done, of in told)
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)


def test_many_threads_may_submit(tmp_path: Path) -> None:
    def submit(session: Session, part: list[Artifact]) -> None:
        for artifact in part:
            session.submit(artifact, first_attempt=True)

    artifacts = [make_artifact(tmp_path, 100, f"ep{number}") for number in range(60)]
    verdicts: queue.SimpleQueue[str] = queue.SimpleQueue()
    with (
        Server(accept_all) as server,
        Session(to(server), UPLOAD, on_verdict=lambda episode, _verdict: verdicts.put(episode)) as session,
    ):
        threads = [threading.Thread(target=submit, args=(session, artifacts[start::6])) for start in range(6)]
        for thread in threads:
            thread.start()
        told = {verdicts.get(timeout=GENEROUS_S) for _ in artifacts}
        for thread in threads:
            thread.join()
    assert told == {artifact.manifest.episode for artifact in artifacts}


def test_a_callback_may_submit_the_next(tmp_path: Path) -> None:
    rest = [make_artifact(tmp_path, 100, f"ep{number}") for number in range(5)]
    told: list[str] = []

    def next_one(episode: str, _verdict: Verdict) -> None:
        told.append(episode)
        if rest:
            session.submit(rest.pop(0), first_attempt=True)

    with Server(accept_all) as server, Session(to(server), UPLOAD, on_verdict=next_one) as session:
        session.submit(rest.pop(0), first_attempt=True)
        wait_until(lambda: len(told) == 5)


def test_the_bandwidth_limit_shapes_what_all_transfers_send_together(tmp_path: Path) -> None:
    """Never faster than the limit, and, beside the same without one, much slower."""
    artifacts = [make_artifact(tmp_path, 1_000_000, f"ep{number}") for number in range(3)]
    seconds: dict[int, float] = {}
    with Server(accept_all) as server:
        for rate in (0, 0, 0, 2_000_000):  # the fastest of three: another program may have the machine for a moment
            began = time.monotonic()
            verdicts = ship_all(artifacts, to(server), msgspec.structs.replace(UPLOAD, bandwidth=rate))
            seconds[rate] = min(time.monotonic() - began, seconds.get(rate, 60.0))
            assert {verdict.outcome for verdict in verdicts.values()} == {Outcome.SHIPPED}
    assert 3_000_000 / seconds[2_000_000] <= 2_000_000 * 1.15
    assert seconds[2_000_000] > 3 * seconds[0]


def test_the_bandwidth_may_be_changed_while_bytes_move(large: Artifact) -> None:
    verdicts: queue.SimpleQueue[Verdict] = queue.SimpleQueue()
    keeper = Keeper(large)
    crawl = msgspec.structs.replace(UPLOAD, bandwidth=1000, stall_timeout_s=0.2)
    with (
        Server(keeper) as server,
        Session(to(server), crawl, on_verdict=lambda _episode, verdict: verdicts.put(verdict)) as session,
    ):
        session.submit(large, first_attempt=True)
        wait_until(lambda: len(server.heads) == 2)
        with pytest.raises(queue.Empty):
            verdicts.get(timeout=0.8)  # held back by the limit is not stalled
        session.set_bandwidth(0)
        assert verdicts.get(timeout=GENEROUS_S).outcome is Outcome.SHIPPED
    assert keeper.right
