"""What goes over the wire and what comes of it, against a server that does what servers and lines do to one."""

from __future__ import annotations

import logging
import os
import queue
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import trustme
from scripted_server import (
    GENEROUS_S,
    MEGABYTE,
    RESUMABLE,
    UPLOAD,
    Head,
    Keeper,
    Peer,
    Server,
    accept_all,
    hold,
    make_artifact,
    ship_all,
    stored,
    to,
)

from fastship.episode import Outcome, Scope, Verdict
from fastship.fields import format_digest
from fastship.settings import DestinationSettings
from fastship.upload import Artifact, Session, ship
from fastship.upload.course import BODY_LIMIT_BYTES, Answer, Body, Request
from fastship.upload.curl import Transfers
from fastship.upload.token import Token

SECRET = "s3cr3t-t0ken"


@pytest.fixture
def small(tmp_path: Path) -> Artifact:
    return make_artifact(tmp_path, 50_000)


@pytest.fixture
def large(tmp_path: Path) -> Artifact:
    """More than the kernel's buffers on loopback hold."""
    return make_artifact(tmp_path, 24 * MEGABYTE)


# The ways of an upload


def test_a_small_artifact_is_one_put_without_asking_first(small: Artifact) -> None:
    keeper = Keeper(small)
    with Server(keeper) as server:
        verdict = ship(small, to(server), UPLOAD)
    assert verdict.outcome is Outcome.SHIPPED
    assert verdict.sent_bytes == small.manifest.artifact_bytes
    assert keeper.right
    assert server.outline == ["PUT"]
    assert "expect" not in server.heads[0].fields
    assert server.heads[0].target == "/v1/episodes/ep1"


def test_a_large_artifact_is_created_and_appended_on_one_connection(large: Artifact) -> None:
    keeper = Keeper(large)
    with Server(keeper) as server:
        verdict = ship(large, to(server), UPLOAD)
    assert verdict.outcome is Outcome.SHIPPED
    assert keeper.right
    assert server.outline == ["PUT", "PATCH 0"]
    assert server.connections == 1
    assert server.heads[1].fields["expect"] == "100-continue"


@pytest.mark.parametrize("end", [Peer.cut, Peer.reset], ids=["cut", "reset"])
def test_a_broken_connection_is_taken_up_at_the_receivers_offset(large: Artifact, end: Callable[[Peer], None]) -> None:
    keeper = Keeper(large, None)
    keeper.faults += [keeper.keep_then(5_000_000, end), None, keeper.keep_then(4_000_000, end)]
    with Server(keeper) as server:
        verdict = ship(large, to(server), RESUMABLE)
    assert verdict.outcome is Outcome.SHIPPED
    assert keeper.right
    assert server.outline == ["PUT", "PATCH 0", "PUT", "PATCH 5000000", "PUT", "PATCH 9000000"]
    assert verdict.resumed_at == 9_000_000
    assert verdict.sent_bytes >= large.manifest.artifact_bytes


def test_a_receiver_that_stops_reading_is_left_and_gone_on_with(large: Artifact) -> None:
    released = threading.Event()
    keeper = Keeper(large, None)
    keeper.faults.append(keeper.keep_then(1_000_000, lambda _peer: hold(released)))
    upload = msgspec.structs.replace(RESUMABLE, stall_timeout_s=0.3)
    with Server(keeper) as server:
        try:
            verdict = ship(large, to(server), upload)
        finally:
            released.set()
    assert verdict.outcome is Outcome.SHIPPED
    assert keeper.right
    assert server.outline == ["PUT", "PATCH 0", "PUT", "PATCH 1000000"]


def test_a_slow_receiver_is_not_a_stall(tmp_path: Path) -> None:
    """All is in the kernel's buffers long before the other end has read it: its acknowledgements are what counts."""
    artifact = make_artifact(tmp_path, 2 * MEGABYTE)
    taken: list[int] = []

    def slowly(peer: Peer, head: Head) -> None:
        peer.go_on(head)
        while sum(taken) < head.length:
            taken.append(len(peer.read(min(128 << 10, head.length - sum(taken)))))
            time.sleep(0.1)
        stored(peer, head, artifact.manifest)

    upload = msgspec.structs.replace(UPLOAD, stall_timeout_s=0.8, answer_timeout_s=0.8)
    with Server(slowly, receive_buffer=128 << 10) as server:
        verdict = ship(artifact, to(server), upload)
    assert verdict.outcome is Outcome.SHIPPED
    assert server.outline == ["PUT"]


def test_a_final_answer_that_does_not_come_is_asked_for_again(small: Artifact) -> None:
    released = threading.Event()
    keeper = Keeper(small)
    keeper.faults.append(keeper.keep_then(small.manifest.artifact_bytes, lambda _peer: hold(released)))
    upload = msgspec.structs.replace(UPLOAD, answer_timeout_s=0.3)
    with Server(keeper) as server:
        try:
            verdict = ship(small, to(server), upload)
        finally:
            released.set()
    assert (verdict.outcome, verdict.status) == (Outcome.SHIPPED, 200)
    assert server.outline == ["PUT", "PUT"]


def test_stalls_and_missing_answers_are_told_apart(tmp_path: Path) -> None:
    small, large = make_artifact(tmp_path, 50_000, "ep1"), make_artifact(tmp_path, 24 * MEGABYTE, "ep2")
    released = threading.Event()

    def stop(peer: Peer, head: Head) -> None:
        if head.creates:
            peer.answer(201, Location="/u", Upload_Complete="?0", Upload_Offset="0")
        else:
            peer.go_on(head)
            released.wait()

    once = msgspec.structs.replace(RESUMABLE, stall_timeout_s=0.2, answer_timeout_s=0.2, retries=0)
    with Server(stop) as server:
        try:
            unanswered = ship(small, to(server), once)
            stalled = ship(large, to(server), once)
        finally:
            released.set()
    assert "no answer" in unanswered.error
    assert "no byte moved" in stalled.error
    assert (stalled.outcome, stalled.scope) == (Outcome.TRANSIENT, Scope.NETWORK)


# Answers in odd shapes


@pytest.mark.parametrize(
    ("status", "outcome"), [(409, Outcome.CONFLICT), (412, Outcome.REJECTED), (401, Outcome.TRANSIENT)]
)
def test_an_early_refusal_saves_the_body(large: Artifact, status: int, outcome: Outcome) -> None:
    def refuse(peer: Peer, head: Head) -> None:
        peer.answer(status, b'{"remediation": "make install"}', Connection="close")
        peer.cut()

    whole = msgspec.structs.replace(UPLOAD, one_shot_bytes=1 << 40)
    with Server(refuse) as server:
        verdict = ship(large, to(server), whole)
    assert verdict.outcome is outcome
    assert verdict.body == '{"remediation": "make install"}'
    assert verdict.sent_bytes == 0
    assert server.outline == ["PUT"] * (2 if outcome is Outcome.REJECTED else 1)  # a refusal is asked for once more


def test_an_early_success_stops_the_upload(large: Artifact) -> None:
    def known(peer: Peer, head: Head) -> None:
        peer.go_on(head)
        peer.read(1_000_000)
        digest = format_digest("sha-256", large.manifest.artifact_sha256)
        peer.answer(200, Repr_Digest=digest, Connection="close")
        while peer.sock.recv(MEGABYTE):  # an end of connection with unread data would reset it
            pass

    whole = msgspec.structs.replace(UPLOAD, one_shot_bytes=1 << 40)
    with Server(known) as server:
        verdict = ship(large, to(server), whole)
    assert (verdict.outcome, verdict.status) == (Outcome.SHIPPED, 200)
    assert verdict.sent_bytes < large.manifest.artifact_bytes
    assert server.outline == ["PUT"]


def test_interim_answers_are_dropped_with_their_fields(small: Artifact) -> None:
    def chatty(peer: Peer, head: Head) -> None:
        if head.method == "HEAD":
            peer.answer(404)
            return
        peer.sock.sendall(b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\nRepr-Digest: sha-256=:AAAA:\r\n\r\n")
        peer.body(head)
        digest = format_digest("sha-256", small.manifest.artifact_sha256)
        peer.sock.sendall(f"HTTP/1.1 104 Upload Resumption\r\nRepr-Digest: {digest}\r\n\r\n".encode())
        peer.answer(201)

    with Server(chatty) as server:
        verdict = ship(small, to(server), UPLOAD)
    assert server.outline == ["PUT", "HEAD"]  # the proof in an interim answer is none
    assert verdict.outcome is Outcome.TRANSIENT


def test_a_chunked_answer_with_trailers_is_read_whole(small: Artifact) -> None:
    def chunked(peer: Peer, head: Head) -> None:
        peer.body(head)
        peer.sock.sendall(
            b"HTTP/1.1 422 No\r\nTransfer-Encoding: chunked\r\nX-Two: a\r\nx-two: b\r\n\r\n"
            b"3\r\nnot\r\n7\r\n a tar!\r\n0\r\nX-Two: trailer\r\n\r\n"
        )

    with Server(chunked) as server:
        verdict = ship(small, to(server), UPLOAD)
    assert (verdict.outcome, verdict.body) == (Outcome.REJECTED, "not a tar!")


def test_a_truncated_answer_is_no_answer(small: Artifact) -> None:
    def truncated(peer: Peer, head: Head) -> None:
        peer.body(head)
        peer.sock.sendall(b"HTTP/1.1 422 No\r\nContent-Length: 100\r\n\r\nonly so much")
        peer.cut()

    keeper = Keeper(small, truncated)
    with Server(keeper) as server:
        verdict = ship(small, to(server), UPLOAD)
    assert verdict.outcome is Outcome.SHIPPED
    assert server.outline == ["PUT", "PUT", "PATCH 0"]


@pytest.mark.parametrize("before", [b"", b"HTTP/1.1 100 Continue\r\n\r\n"], ids=["", "after 100"])
def test_an_answer_that_is_cut_within_its_fields_is_no_answer(small: Artifact, before: bytes) -> None:
    """The rest of these fields says that it is about the upload: without them it would be a hold. libcurl ends well."""
    answer = before + b"HTTP/1.1 409 Conflict\r\nUpload-Complete: ?0\r\nUpload-Offset: 0\r\nContent-Length: 0\r\n\r\n"
    for count in range(len(answer)):

        def truncated(peer: Peer, head: Head, count: int = count) -> None:
            peer.body(head)
            peer.sock.sendall(answer[:count])
            peer.cut()

        with Server(Keeper(small, truncated)) as server:
            verdict = ship(small, to(server), UPLOAD)
        assert verdict.outcome is Outcome.SHIPPED, answer[:count]


@pytest.mark.parametrize("noise", [b"SSH-2.0-OpenSSH_9.6\r\n", b"\x00\xff\x00", b"HTTP/1.1 \r\n\r\n"])
def test_what_is_no_http_is_the_destinations_fault(small: Artifact, noise: bytes) -> None:
    def babble(peer: Peer, head: Head) -> None:
        peer.body(head)
        peer.sock.sendall(noise)
        peer.cut()

    with Server(babble) as server:
        verdict = ship(small, to(server), UPLOAD)
    assert (verdict.outcome, verdict.scope, verdict.status) == (Outcome.TRANSIENT, Scope.DESTINATION, None)
    assert "not HTTP" in verdict.error
    assert len(server.heads) == 1


def test_a_long_answer_is_kept_in_part_and_an_endless_one_is_cut(small: Artifact) -> None:
    def long(peer: Peer, head: Head) -> None:
        peer.body(head)
        peer.answer(413, b"\xff" * 500_000)

    def endless(peer: Peer, head: Head) -> None:
        peer.body(head)
        peer.sock.sendall(b"HTTP/1.1 413 No\r\nConnection: close\r\n\r\n")
        while True:
            peer.sock.sendall(b"z" * 65536)

    with Server(long) as server:
        verdict = ship(small, to(server), UPLOAD)
    assert verdict.outcome is Outcome.REJECTED
    assert verdict.body == "\N{REPLACEMENT CHARACTER}" * BODY_LIMIT_BYTES
    with Server(endless) as server:
        verdict = ship(small, to(server), msgspec.structs.replace(UPLOAD, retries=0))
    assert (verdict.outcome, verdict.scope) == (Outcome.TRANSIENT, Scope.NETWORK)


def test_a_redirect_is_not_followed(small: Artifact, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(SECRET)
    with Server(accept_all) as thief:

        def redirect(peer: Peer, head: Head) -> None:
            peer.body(head)
            peer.answer(307, Location=f"{thief.url}/v1/episodes/ep1")

        with Server(redirect) as server:
            destination = DestinationSettings(url=server.url, token_file=str(tmp_path / "token"))
            verdict = ship(small, destination, UPLOAD)
    assert (verdict.outcome, verdict.scope, verdict.status) == (Outcome.TRANSIENT, Scope.DESTINATION, 307)
    assert thief.url in verdict.error
    assert thief.connections == 0


# Connections


def test_connections_are_kept_and_used_again(tmp_path: Path) -> None:
    artifacts = [make_artifact(tmp_path, 1000, f"ep{number}") for number in range(40)]
    upload = msgspec.structs.replace(UPLOAD, connections=3)
    with Server(accept_all) as server:
        verdicts = ship_all(artifacts, to(server), upload)
    assert [verdict.outcome for verdict in verdicts.values()] == [Outcome.SHIPPED] * 40
    assert server.connections <= 3


def test_a_kept_connection_that_died_meanwhile_is_no_fault(tmp_path: Path) -> None:
    artifacts = [make_artifact(tmp_path, 1000, f"ep{number}") for number in range(4)]

    def once(peer: Peer, head: Head) -> None:
        accept_all(peer, head)
        peer.cut()  # without having said Connection: close

    strict = msgspec.structs.replace(UPLOAD, retries=0, connections=1)
    with Server(once) as server:
        verdicts = ship_all(artifacts, to(server), strict)
    assert [verdict.outcome for verdict in verdicts.values()] == [Outcome.SHIPPED] * 4


def test_nobody_listening_and_no_such_name(small: Artifact) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    refused = ship(small, DestinationSettings(url=f"http://127.0.0.1:{port}"), UPLOAD)
    assert (refused.outcome, refused.scope) == (Outcome.TRANSIENT, Scope.NETWORK)
    unknown = ship(small, DestinationSettings(url="http://receiver.invalid"), UPLOAD)  # RFC 6761: never resolves
    assert (unknown.outcome, unknown.scope) == (Outcome.TRANSIENT, Scope.DESTINATION)
    assert "receiver.invalid" in unknown.error


# TLS and the token


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def ca_file(authority: trustme.CA, tmp_path: Path) -> str:
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    return str(tmp_path / "ca.pem")


def server_context(authority: trustme.CA, name: str = "127.0.0.1") -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(name).configure_cert(context)
    return context


def test_tls_with_the_own_authority(large: Artifact, authority: trustme.CA, ca_file: str) -> None:
    keeper = Keeper(large)
    with Server(keeper, server_context(authority)) as server:
        verdict = ship(large, DestinationSettings(url=server.url, ca_file=ca_file), UPLOAD)
    assert verdict.outcome is Outcome.SHIPPED
    assert keeper.right


@pytest.mark.parametrize("wrong", ["unknown authority", "system's authorities", "another host"])
def test_a_certificate_that_does_not_fit_is_the_destinations_fault(
    small: Artifact, authority: trustme.CA, ca_file: str, tmp_path: Path, wrong: str
) -> None:
    context = server_context(authority, "other.example" if wrong == "another host" else "127.0.0.1")
    if wrong == "unknown authority":
        trustme.CA().cert_pem.write_to_path(tmp_path / "ca.pem")
    with Server(accept_all, context) as server:
        chosen = "" if wrong == "system's authorities" else ca_file
        verdict = ship(small, DestinationSettings(url=server.url, ca_file=chosen), UPLOAD)
    assert (verdict.outcome, verdict.scope) == (Outcome.TRANSIENT, Scope.DESTINATION)
    assert "TLS" in verdict.error
    assert server.heads == []


def test_a_client_certificate_is_shown_and_its_lack_is_the_destinations_fault(
    small: Artifact, authority: trustme.CA, ca_file: str, tmp_path: Path
) -> None:
    context = server_context(authority)
    context.verify_mode = ssl.CERT_REQUIRED
    authority.configure_trust(context)
    client = authority.issue_cert("host.lab.example")
    client.cert_chain_pems[0].write_to_path(tmp_path / "client.pem")
    client.private_key_pem.write_to_path(tmp_path / "client.key")
    with Server(accept_all, context) as server:
        without = DestinationSettings(url=server.url, ca_file=ca_file)
        refused = ship(small, without, UPLOAD)
        shown = msgspec.structs.replace(
            without, client_cert=str(tmp_path / "client.pem"), client_key=str(tmp_path / "client.key")
        )
        assert ship(small, shown, UPLOAD).outcome is Outcome.SHIPPED
    assert (refused.outcome, refused.scope) == (Outcome.TRANSIENT, Scope.DESTINATION)
    assert "TLS" in refused.error


@pytest.mark.parametrize("how", ["closed", "reset"])
def test_a_handshake_that_is_cut_is_the_networks_fault_and_tried_again(small: Artifact, how: str) -> None:
    cut = 0
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def cut_all() -> None:
            nonlocal cut
            for _ in range(1 + UPLOAD.retries):
                connection, _ = listening.accept()
                with connection:
                    connection.recv(1 << 16)
                    linger_s = struct.pack("ii", 1, 0) if how == "reset" else struct.pack("ii", 0, 0)
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger_s)
                    cut += 1

        cutting = threading.Thread(target=cut_all, daemon=True)
        cutting.start()
        verdict = ship(small, DestinationSettings(url=f"https://127.0.0.1:{listening.getsockname()[1]}"), UPLOAD)
        cutting.join()
    assert (verdict.outcome, verdict.scope) == (Outcome.TRANSIENT, Scope.NETWORK)
    assert cut == 1 + UPLOAD.retries


@pytest.mark.parametrize("setting", ["ca_file", "client_cert"])
def test_a_certificate_file_that_is_none_is_said_clearly(small: Artifact, tmp_path: Path, setting: str) -> None:
    (tmp_path / "none.pem").write_text("not a certificate")
    destination = msgspec.convert(
        {"url": "https://127.0.0.1:1", "client_key": str(tmp_path / "none.pem"), setting: str(tmp_path / "none.pem")},
        DestinationSettings,
    )
    with Server(accept_all) as server:
        there = msgspec.structs.replace(destination, url=f"https://127.0.0.1:{server.port}")
        verdict = ship(small, there, UPLOAD)
    assert (verdict.outcome, verdict.scope) == (Outcome.TRANSIENT, Scope.DESTINATION)
    assert verdict.error


def test_the_token_is_sent_and_read_again_when_it_changes(tmp_path: Path) -> None:
    first, second = (make_artifact(tmp_path, 1000, name) for name in ("ep1", "ep2"))
    token = tmp_path / "token"
    token.write_text(f"{SECRET}\n")
    verdicts: queue.SimpleQueue[Verdict] = queue.SimpleQueue()
    with Server(accept_all) as server:
        destination = DestinationSettings(url=server.url, token_file=str(token))
        with Session(destination, UPLOAD, on_verdict=lambda _episode, verdict: verdicts.put(verdict)) as session:
            session.submit(first, first_attempt=True)
            verdicts.get(timeout=GENEROUS_S)
            token.write_text("rotated-token")
            session.submit(second, first_attempt=True)
            verdicts.get(timeout=GENEROUS_S)
    assert [head.fields["authorization"] for head in server.heads] == [f"Bearer {SECRET}", "Bearer rotated-token"]


@pytest.mark.parametrize("content", [None, "", "two words", "bro\r\nken: yes", "\u00e9"])
def test_a_token_file_that_cannot_be_used_is_said_without_showing_it(
    small: Artifact, tmp_path: Path, content: str | None
) -> None:
    if content is not None:
        (tmp_path / "token").write_text(content)
    with Server(accept_all) as server:
        destination = DestinationSettings(url=server.url, token_file=str(tmp_path / "token"))
        verdict = ship(small, destination, UPLOAD)
    assert (verdict.outcome, verdict.scope) == (Outcome.TRANSIENT, Scope.DESTINATION)
    assert "destination.token_file" in verdict.error
    assert server.heads == []
    assert not content or content not in verdict.error


def test_the_token_is_in_no_log_and_no_repr(
    small: Artifact, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "token").write_text(SECRET)
    told: list[object] = []

    def refuse(peer: Peer, head: Head) -> None:
        told.append(head.fields["authorization"])
        peer.body(head)
        peer.answer(500 if len(told) < 3 else 401)

    with caplog.at_level(logging.DEBUG), Server(refuse) as server:
        destination = DestinationSettings(url=server.url, token_file=str(tmp_path / "token"))
        verdict = ship(small, destination, UPLOAD)
    assert told == [f"Bearer {SECRET}"] * 3
    token = Token(str(tmp_path / "token"))
    assert token.read() == SECRET
    seen = caplog.text + repr(verdict) + repr(token) + repr(destination) + "".join(capfd.readouterr())
    assert "again in" in seen
    assert SECRET not in seen


# The transfers alone


def test_an_idle_poll_sleeps_until_it_is_woken() -> None:
    transfers: Transfers[str] = Transfers(DestinationSettings(url="http://127.0.0.1:1"), UPLOAD)
    waker = threading.Timer(0.2, transfers.wake)
    waker.start()
    assert transfers.poll(None) == []  # blocks for ever if it is not woken
    waker.join()
    transfers.close()
    transfers.close()


def test_a_url_that_is_none_is_a_fault_of_the_settings(small: Artifact) -> None:
    transfers: Transfers[str] = Transfers(DestinationSettings(url="http://127.0.0.1:1"), UPLOAD)
    fd = os.open(small.path, os.O_RDONLY)
    for url in ("gopher://127.0.0.1/", "file:///etc/passwd", "http://\u00e9/", "http://h:99999999/"):
        transfers.start(url, Request(method="PUT", url=url, body=Body(0, 10), answer_timeout_s=5), fd)
        ended = transfers.poll(GENEROUS_S) or transfers.poll(GENEROUS_S)
        assert [(one.key, type(one.result).__name__) for one in ended] == [(url, "Fault")]
        assert not isinstance(ended[0].result, Answer)
        assert ended[0].result.kind == "settings"
    os.close(fd)
    transfers.close()
