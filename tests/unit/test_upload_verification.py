"""Asking a destination to read again: what each answer means, and what is never taken for an answer."""

from __future__ import annotations

import threading
from collections.abc import Callable

import msgspec
import pytest
from scripted_server import UPLOAD, Head, Peer, Server, to

from fastship.errors import EXIT_NOT_SHIPPED, DestinationError
from fastship.upload import Reread, reread

QUICK = msgspec.structs.replace(UPLOAD, retries=2)


def document(episode: str, verdict: str = "sound") -> bytes:
    return msgspec.json.encode(Reread(episode=episode, verdict=verdict, artifact_sha256="00", error="so it is"))


def asked(head: Head) -> str:
    assert (head.method, head.length) == ("POST", 0)
    return head.target.rpartition("/")[2]


def ask(script: Callable[[Peer, Head], None], *episodes: str) -> tuple[list[Reread], Server]:
    with Server(script) as server:
        return list(reread(episodes, to(server), QUICK)), server


def test_each_episode_has_its_answer() -> None:
    found, server = ask(lambda peer, head: peer.answer(200, document(asked(head))), "a", "b", "c", "d")
    assert sorted(one.episode for one in found) == ["a", "b", "c", "d"]
    assert {head.target for head in server.heads} == {f"/v1/verifications/{name}" for name in "abcd"}


def test_an_answer_may_take_its_time_in_line_feeds() -> None:
    def slow(peer: Peer, head: Head) -> None:
        body = b"\n" * 50 + document(asked(head))
        peer.sock.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for byte in range(0, len(body), 10):
            piece = body[byte : byte + 10]
            peer.sock.sendall(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
        peer.sock.sendall(b"0\r\n\r\n")

    found, _ = ask(slow, "a")
    assert found[0].verdict == "sound"


def test_one_that_is_to_be_asked_later_keeps_no_other_waiting() -> None:
    patient = msgspec.structs.replace(UPLOAD, retries=2, retry_min_s=30.0, retry_max_s=30.0)
    refused = threading.Event()

    def script(peer: Peer, head: Head) -> None:
        if asked(head) == "a":
            peer.answer(503)
            refused.set()
        else:
            refused.wait(30.0)  # their connections may be quicker than its
            peer.answer(200, document(asked(head)))

    with Server(script) as server:
        found = reread("abcd", to(server), patient)
        assert sorted(next(found).episode for _ in range(3)) == ["b", "c", "d"]
        assert sorted(asked(head) for head in server.heads) == ["a", "b", "c", "d"]
        found.close()


def test_what_is_not_stored_is_missing() -> None:
    found, _ = ask(lambda peer, _head: peer.answer(404, b'{"error": "...", "code": "not-stored"}'), "a")
    assert (found[0].episode, found[0].verdict) == ("a", "missing")


def test_a_busy_or_failing_destination_is_asked_again() -> None:
    replies: list[tuple[int, bytes]] = [(503, b""), (200, document("a", "failed")), (200, document("a", "rotted"))]

    def script(peer: Peer, _head: Head) -> None:
        status, body = replies.pop(0)
        peer.answer(status, body)

    found, _ = ask(script, "a")
    assert (found[0].verdict, replies) == ("rotted", [])


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (404, b'{"error": "...", "code": "not-found"}', "cannot read again"),
        (404, b"<html>", "cannot read again"),
        (405, b"", "cannot read again"),
        (501, b"", "cannot read again"),
        (200, b"<html>", "cannot read again"),
        (200, document("b"), "cannot read again"),
        (200, b"\xff", "cannot read again"),
        (204, b"", "cannot read again"),
        (401, b"", "token"),
        (403, b"", "access"),
        (302, b"", "redirect"),
        (503, b"", "cannot be asked"),
    ],
)
def test_what_is_no_answer_ends_the_asking_with_a_sentence(status: int, body: bytes, said: str) -> None:
    with Server(lambda peer, _head: peer.answer(status, body)) as server, pytest.raises(DestinationError) as caught:
        list(reread(["a"], to(server), QUICK))
    assert said in caught.value.message
    assert caught.value.remedy
    assert caught.value.exit_code == EXIT_NOT_SHIPPED


def test_what_the_receiver_cannot_tell_of_one_is_no_reason_not_to_ask_for_the_others() -> None:
    def script(peer: Peer, head: Head) -> None:
        episode = asked(head)
        peer.answer(200, document(episode, "failed" if episode == "b" else "sound"))

    found, server = ask(script, "a", "b", "c")
    assert {one.episode: one.verdict for one in found} == {"a": "sound", "b": "failed", "c": "sound"}
    assert len(server.heads) == 3 + QUICK.retries


def test_nobody_there_is_told_so() -> None:
    with Server(lambda peer, _head: peer.cut()) as server:
        with pytest.raises(DestinationError, match="cannot be asked about a"):
            list(reread(["a"], to(server), QUICK))
        assert len(server.heads) == 1 + QUICK.retries


def test_nothing_asked_is_nothing_answered() -> None:
    found, server = ask(lambda peer, _head: peer.cut())
    assert (found, server.heads) == ([], [])
