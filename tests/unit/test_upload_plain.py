"""What plain servers and proxies say in their own words: whose fault it is, and how a directory comes to be there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from scripted_server import MEGABYTE, UPLOAD, Head, Peer, Server, make_artifact

from fastship.episode import Outcome, Scope, Verdict
from fastship.settings import DestinationSettings
from fastship.upload import ship
from fastship.upload.course import Answer
from fastship.upload.webdav import may_lack_directory

QUICK = msgspec.structs.replace(UPLOAD, retries=2)
PAGE = b"<html><head><title>400 No required SSL certificate was sent</title></head></html>"
Script = Callable[[Peer, Head], None]


def shipped_to(script: Script, directory: Path, size: int = 1000, proof: str = "status") -> tuple[Verdict, list[str]]:
    with Server(script) as server:
        to = msgspec.convert({"url": server.url, "proof": proof}, DestinationSettings)
        verdict = ship(make_artifact(directory, size), to, QUICK)
        return verdict, [f"{head.method} {head.target}" for head in server.heads]


class WebDav:
    """Knows directories, as RFC 4918 has them."""

    def __init__(self, *directories: str, body: bytes = b"Conflict") -> None:
        self.directories = {"", *directories}
        self.stored: dict[str, bytes] = {}
        self.body = body

    def __call__(self, peer: Peer, head: Head) -> None:
        path = head.target.rstrip("/")
        body = peer.body(head)
        if head.method == "HEAD":
            peer.answer(200 if path in self.stored else 404)
        elif head.method == "MKCOL" and path in self.directories:
            peer.answer(405)
        elif path.rpartition("/")[0] not in self.directories:
            peer.answer(409, self.body)
        elif head.method == "MKCOL":
            self.directories.add(path)
            peer.answer(201)
        else:
            self.stored[path] = body
            peer.answer(201)


@pytest.mark.parametrize("size", [1000, 3 * MEGABYTE])
@pytest.mark.parametrize("body", [b"Conflict", PAGE])
def test_a_directory_that_is_missing_is_made(tmp_path: Path, size: int, body: bytes) -> None:
    server = WebDav(body=body)
    verdict, asked = shipped_to(server, tmp_path, size)
    assert verdict.outcome is Outcome.SHIPPED
    put = "PUT /v1/episodes/ep1"
    assert asked == [put, "HEAD /v1/episodes/ep1", "MKCOL /v1/", "MKCOL /v1/episodes/", put]
    assert len(server.stored["/v1/episodes/ep1"]) == size


def test_one_that_half_is_there_and_one_that_another_made_meanwhile_are_used(tmp_path: Path) -> None:
    server = WebDav("/v1")
    assert shipped_to(server, tmp_path)[0].outcome is Outcome.SHIPPED

    def late(peer: Peer, head: Head) -> None:
        other(peer, head)
        other.directories |= {"/v1", "/v1/episodes"}

    other = WebDav()
    assert shipped_to(late, tmp_path)[0].outcome is Outcome.SHIPPED


@pytest.mark.parametrize("status", [403, 405, 409, 501])
def test_one_that_cannot_be_made_is_no_conflict_and_pauses_nobody_by_itself(tmp_path: Path, status: int) -> None:
    def script(peer: Peer, head: Head) -> None:
        peer.body(head)
        peer.answer({"HEAD": 404, "MKCOL": status}.get(head.method, 409), b"Conflict" if head.method != "HEAD" else b"")

    verdict, asked = shipped_to(script, tmp_path)
    assert (verdict.outcome, verdict.scope, verdict.status) == (Outcome.TRANSIENT, Scope.NETWORK, 409)
    assert "make the directory" in verdict.error
    assert sum(one.startswith("MKCOL") for one in asked) == 2


def test_to_a_receiver_no_directory_is_made(tmp_path: Path) -> None:
    verdict, asked = shipped_to(WebDav(), tmp_path, proof="receipt")
    assert (verdict.outcome, verdict.scope) == (Outcome.TRANSIENT, Scope.NETWORK)
    assert not any(one.startswith("MKCOL") for one in asked)


@pytest.mark.parametrize("proof", ["status", "receipt"])
@pytest.mark.parametrize(
    ("head_status", "outcome"),
    [
        *[(status, Outcome.CONFLICT) for status in (200, 204, 405, 501)],  # the last two: it does not know HEAD
        *[(status, Outcome.TRANSIENT) for status in (301, 400, 401, 403, 409, 429, 500, 502, 503)],
    ],
)
def test_a_409_is_a_conflict_only_where_something_is_stored(
    tmp_path: Path, head_status: int, outcome: Outcome, proof: str
) -> None:
    """Whatever its words. One that answers 409 to everything, or whatever else, says nothing of any episode."""

    def script(peer: Peer, head: Head) -> None:
        peer.body(head)
        peer.answer(head_status if head.method == "HEAD" else 409, b"" if head.method == "HEAD" else PAGE)

    verdict, asked = shipped_to(script, tmp_path, proof=proof)
    scope = Scope.EPISODE if outcome is Outcome.CONFLICT else Scope.NETWORK
    assert (verdict.outcome, verdict.scope, verdict.status, len(asked)) == (outcome, scope, 409, 2)


def test_a_line_that_breaks_between_is_no_verdict(tmp_path: Path) -> None:
    for cut_at in ("HEAD", "MKCOL"):

        def script(peer: Peer, head: Head, cut_at: str = cut_at) -> None:
            peer.body(head)
            if head.method == cut_at:
                peer.cut()
            elif head.method == "HEAD":
                peer.answer(404)
            else:
                peer.answer(409, b"Conflict")

        verdict, _ = shipped_to(script, tmp_path)
        assert (verdict.outcome, verdict.scope) == (Outcome.TRANSIENT, Scope.NETWORK)


@pytest.mark.parametrize(
    ("body", "may"),
    [
        (b"", False),
        (b" \n", False),
        (b'{"error": "another"}', False),
        (b"Conflict", True),
        (b"\xff", True),
        (PAGE, True),
    ],
)
def test_a_receivers_own_409_is_told_by_its_json_or_its_silence(body: bytes, may: bool) -> None:
    assert may_lack_directory(Answer(409, body=body)) is may
    assert not may_lack_directory(Answer(404, body=body))


@pytest.mark.parametrize("status", [400, 402, 406, 414, 415, 418, 422, 499])
def test_a_page_is_nobodys_verdict_on_an_episode(tmp_path: Path, status: int) -> None:
    """nginx says 400 to plain HTTP at its TLS port, and where it wants a client certificate: of every episode."""

    def script(peer: Peer, head: Head) -> None:
        peer.body(head)
        peer.answer(status, PAGE, Content_Type="text/html; charset=utf-8")

    verdict, asked = shipped_to(script, tmp_path)
    assert (verdict.outcome, verdict.scope, len(asked)) == (Outcome.TRANSIENT, Scope.NETWORK, 1)
    assert "destination.url" in verdict.error
    assert "No required SSL certificate was sent" in verdict.error


def test_plain_http_at_the_tls_port_of_a_go_server(tmp_path: Path) -> None:
    def script(peer: Peer, _head: Head) -> None:
        peer.sock.sendall(b"HTTP/1.0 400 Bad Request\r\n\r\nClient sent an HTTP request to an HTTPS server.\n")
        peer.cut()

    verdict, _ = shipped_to(script, tmp_path)
    assert (verdict.outcome, verdict.scope) == (Outcome.TRANSIENT, Scope.NETWORK)


def test_a_limit_of_a_server_on_the_way_lets_the_episode_wait_and_smaller_ones_pass(tmp_path: Path) -> None:
    def script(peer: Peer, head: Head) -> None:
        if "expect" not in head.fields:
            peer.body(head)
        peer.answer(413, PAGE, Content_Type="text/html", Connection="close")
        peer.cut()

    for size in (1000, 3 * MEGABYTE):
        verdict, _ = shipped_to(script, tmp_path, size)
        assert (verdict.outcome, verdict.scope) == (Outcome.TRANSIENT, Scope.EPISODE)
        assert "client_max_body_size" in verdict.error
    own = b'{"error": "too large", "code": "too-large"}'

    def receiver(peer: Peer, head: Head) -> None:
        peer.body(head)
        peer.answer(413, own)

    assert shipped_to(receiver, tmp_path)[0].outcome is Outcome.REJECTED


@pytest.mark.parametrize("status", [417, 426, 431])
def test_what_is_said_of_http_itself_is_the_destinations(tmp_path: Path, status: int) -> None:
    def script(peer: Peer, head: Head) -> None:
        peer.body(head)
        peer.answer(status)

    verdict, _ = shipped_to(script, tmp_path)
    assert (verdict.outcome, verdict.scope) == (Outcome.TRANSIENT, Scope.DESTINATION)


@pytest.mark.parametrize("closes", [False, True])
def test_a_server_that_refuses_expect_is_sent_to_without(tmp_path: Path, closes: bool) -> None:
    taken: list[int] = []

    def script(peer: Peer, head: Head) -> None:
        if "expect" in head.fields:
            peer.answer(417, Connection="close" if closes else "keep-alive")
            if closes:
                peer.cut()
        else:
            taken.append(len(peer.body(head)))
            peer.answer(201)

    verdict, _ = shipped_to(script, tmp_path, 3 * MEGABYTE)
    assert (verdict.outcome, taken) == (Outcome.SHIPPED, [3 * MEGABYTE])


def test_a_server_that_says_nothing_to_expect_is_sent_to_all_the_same(tmp_path: Path) -> None:
    def script(peer: Peer, head: Head) -> None:
        peer.read(head.length)
        peer.sock.sendall(b"HTTP/1.0 200 OK\r\n\r\n")
        peer.cut()

    assert shipped_to(script, tmp_path, 3 * MEGABYTE)[0].outcome is Outcome.SHIPPED
