"""The channel on a real socket pair: every message there and back, both ends' deaths, a side that does not read."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

import msgspec
import pytest
from sample import manifest_of, shipped

from fastship import ipc
from fastship.episode import Outcome, Scope, Verdict
from fastship.lifecycle.events import Answered, PackBegan, Packed, PackFailed, Returned
from fastship.settings import Settings


@pytest.fixture
def channel() -> Iterator[tuple[ipc.SupervisorEnd, ipc.WorkerEnd, socket.socket]]:
    ours, theirs = ipc.pair()
    yield ours, ipc.WorkerEnd(theirs), theirs
    ours.close()
    theirs.close()


Ends = tuple[ipc.SupervisorEnd, ipc.WorkerEnd, socket.socket]

TO_WORKER: list[ipc.ToWorker] = [
    ipc.Welcome(3, Settings(), 8),
    ipc.Assignment("ep", True),
    ipc.Shares(threads=2),
    ipc.Shares(bandwidth=0),
    ipc.Recall(),
    ipc.Drain(),
]

FROM_WORKER: list[ipc.FromWorker] = [
    ipc.Ready(),
    ipc.Beat(),
    ipc.Beat([ipc.UnderWay("ep", True, 1, 2, 0.5)] * 40),
    PackBegan("ep"),
    Packed("ep", manifest_of("ep"), True),
    PackFailed("ep", "pack", "no"),
    Answered("ep", shipped(manifest_of("ep")), manifest_of("ep"), False),
    Returned("ep"),
]


@pytest.mark.parametrize("message", TO_WORKER, ids=lambda message: type(message).__name__)
def test_what_the_supervisor_says(channel: Ends, message: ipc.ToWorker) -> None:
    ours, theirs, _ = channel
    ours.send(message)
    assert theirs.receive(timeout_s=60.0) == message
    assert theirs.receive(timeout_s=0.0) is None


@pytest.mark.parametrize("message", FROM_WORKER, ids=lambda message: type(message).__name__)
def test_what_a_worker_says(channel: Ends, message: ipc.FromWorker) -> None:
    ours, theirs, _ = channel
    theirs.send(message)
    assert ours.receive() == message
    assert ours.receive() is None


def test_every_message_has_a_tag_of_its_own() -> None:
    for messages in (TO_WORKER, FROM_WORKER):
        kinds = {type(message) for message in messages}
        assert len({msgspec.structs.asdict(one).get("type", one.__struct_config__.tag) for one in messages}) == len(
            kinds
        )


def test_the_longest_body_passes(channel: Ends) -> None:
    """64 KiB of body are at most 64 Ki characters, of four bytes each."""
    ours, theirs, _ = channel
    verdict = Verdict(outcome=Outcome.REJECTED, scope=Scope.EPISODE, status=422, body="\U0001f600" * 65536)
    message = Answered("ep", verdict, manifest_of("ep"))
    theirs.send(message)
    assert ours.receive() == message


def test_messages_keep_their_order_and_edges(channel: Ends) -> None:
    ours, theirs, _ = channel
    names = [f"ep{number}" + "x" * number for number in range(50)]
    for name in names:
        theirs.send(PackBegan(name))
    received = [ours.receive() for _ in names]
    assert received == [PackBegan(name) for name in names]


def test_what_goes_in_one_packet_comes_one_by_one(channel: Ends) -> None:
    ours, theirs, sock = channel
    ours.send(ipc.Assignment("a", True), ipc.Shares(threads=1))
    ours.send(ipc.Drain())
    received = [theirs.receive(timeout_s=60.0) for _ in range(3)]
    assert received == [ipc.Assignment("a", True), ipc.Shares(threads=1), ipc.Drain()]
    theirs.send(Packed("a", manifest_of("a"), False), PackBegan("b"))
    theirs.send(Returned("c"))
    sock.close()
    assert [ours.receive() for _ in range(3)] == [
        Packed("a", manifest_of("a"), False),
        PackBegan("b"),
        Returned("c"),
    ]
    with pytest.raises(ipc.Closed):
        ours.receive()


def test_many_threads_may_send(channel: Ends) -> None:
    ours, theirs, _ = channel
    each = 200

    def say_all(number: int) -> None:
        for n in range(each):
            theirs.send(PackBegan(f"{number}-{n}"))

    threads = [threading.Thread(target=say_all, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    received: list[str] = []
    while len(received) < 4 * each:
        message = ours.receive()
        if message is not None:
            assert isinstance(message, PackBegan)
            received.append(message.episode)
    for thread in threads:
        thread.join()
    for number in range(4):
        assert [one for one in received if one.startswith(f"{number}-")] == [f"{number}-{n}" for n in range(each)]


def test_the_supervisors_death_is_heard_after_its_last_words(channel: Ends) -> None:
    ours, theirs, _ = channel
    ours.send(ipc.Drain())
    ours.close()
    assert theirs.receive(timeout_s=60.0) == ipc.Drain()
    with pytest.raises(ipc.Closed):
        theirs.receive(timeout_s=60.0)
    with pytest.raises(ipc.Closed):
        theirs.send(ipc.Ready())


def test_a_workers_death_is_heard_after_its_last_words(channel: Ends) -> None:
    ours, theirs, sock = channel
    theirs.send(Returned("ep"))
    sock.close()
    assert ours.receive() == Returned("ep")
    with pytest.raises(ipc.Closed):
        ours.receive()
    with pytest.raises(ipc.Closed):
        ours.send(ipc.Drain())


def test_a_killed_process_is_the_end_of_file(channel: Ends) -> None:
    ours, _, sock = channel
    program = (
        "import socket, sys, time; end = socket.socket(fileno=int(sys.argv[1])); print(flush=True); time.sleep(600)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(sock.fileno())], pass_fds=[sock.fileno()], stdout=subprocess.PIPE
    ) as process:
        try:
            sock.close()
            assert process.stdout is not None
            process.stdout.readline()
            assert ours.receive() is None
        finally:
            process.kill()
    with pytest.raises(ipc.Closed):
        ours.receive()


def test_a_worker_that_does_not_read_is_stuck_and_the_supervisor_does_not_block(channel: Ends) -> None:
    ours, theirs, _ = channel
    sent = 0
    message = ipc.Assignment("x" * 200, True)
    try:
        while sent < 1_000_000:
            ours.send(message)
            sent += 1
    except ipc.Stuck:
        pass
    assert 0 < sent < 1_000_000
    for _ in range(sent):  # nothing that was taken is lost
        assert theirs.receive(timeout_s=60.0) is not None
    ours.send(ipc.Drain())
    assert theirs.receive(timeout_s=60.0) == ipc.Drain()


def test_the_workers_socket_is_not_inherited_by_chance(channel: Ends) -> None:
    ours, _, sock = channel
    assert not os.get_inheritable(ours.fileno())
    assert not sock.get_inheritable()


def test_a_worker_that_cannot_tell_ends_the_channel(channel: Ends) -> None:
    """Its supervisor would wait for ever for what it was not told."""
    ours, theirs, _ = channel
    theirs.send(ipc.Ready())
    with pytest.raises(ipc.Closed):
        theirs.send(ipc.Beat([ipc.UnderWay("ep" * 2_000_000, True, 1, 2, 0.5)] * 2))  # the kernel takes no such packet
    with pytest.raises(ipc.Closed):
        theirs.receive(timeout_s=60.0)
    assert ours.receive() == ipc.Ready()
    with pytest.raises(ipc.Closed):
        ours.receive()
