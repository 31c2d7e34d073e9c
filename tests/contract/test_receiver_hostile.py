"""Clients that mean ill or are broken: what they may not cost others, and what they may not be told."""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import os
import socket
import ssl
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import trustme
import zstandard
from receiver_process import WAIT_S, Reply, Server, Start, check_stored, make_artifact, sha256_field, wait_for

from fastship.receiver import server
from fastship.receiver.server import serve_socket
from fastship.receiver.wire import connection, reading
from fastship.settings import ReceiverSettings


def raw(server: Server, head: str, body: bytes = b"") -> Reply:
    with socket.create_connection((server.host, server.port), timeout=WAIT_S) as sock:
        sock.sendall(head.replace("\n", "\r\n").encode() + body)
        response = http.client.HTTPResponse(sock)
        response.begin()
        return Reply(response)


def test_a_length_beyond_all_is_refused_before_the_body(receiver: Server) -> None:
    refused = raw(receiver, "PUT /v1/episodes/long HTTP/1.1\nHost: x\nContent-Length: 9999999999999999\n\n", b"x")
    assert (refused.status, refused.json()["field"]) == (400, "Content-Length")


def test_a_body_that_the_parser_drops_is_no_empty_artifact(receiver: Server) -> None:
    data = make_artifact("upgrade")
    upgrade = f"Connection: upgrade\nUpgrade: h2c\nContent-Length: {len(data)}\n\n"
    refused = raw(receiver, f"PUT /v1/episodes/upgrade HTTP/1.1\nHost: x\n{upgrade}", data)
    assert (refused.status, refused.json()["field"], refused.headers["connection"]) == (400, "Upgrade", "close")


@pytest.mark.parametrize("said", [100, 10**6])
def test_a_chunked_body_is_as_long_as_it_says(receiver: Server, said: int) -> None:
    data = make_artifact(f"chunked{said}")
    fields = {"Transfer_Encoding": "chunked", "Upload_Length": str(said)}
    refused = receiver.request("PUT", f"/v1/episodes/chunked{said}", iter([data]), **fields)
    assert (refused.status, refused.json()["code"]) == (400, "inconsistent-length")
    assert receiver.stored(f"chunked{said}") is None


def test_an_upload_of_length_0_takes_nothing(receiver: Server) -> None:
    location = receiver.create("nothing", b"").headers["location"]
    refused = receiver.append(location, b"x" * 100_000, 0)
    assert (refused.status, refused.json()["code"], refused.offset) == (400, "inconsistent-length", 0)


def test_an_append_at_a_wrong_offset_spoils_nothing(receiver: Server) -> None:
    data = make_artifact("wrong", 5000)
    location = receiver.request("PUT", "/v1/episodes/wrong", None, Upload_Complete="?0").headers["location"]
    assert receiver.append(location, data[:10], 7, last=True).status == 409
    assert receiver.append(location, data, 0, last=True).status == 201
    check_stored(receiver, "wrong", data)


@pytest.mark.parametrize("before", [b"GET /healthz HTTP/1.1\r\nX: ", b"GET /", b"", b"trailer"])
def test_endless_fields_are_cut(receiver: Server, before: bytes) -> None:
    if before == b"trailer":
        before = b"PUT /v1/episodes/t HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\nT: "
    process = psutil.Process(receiver.process.pid)
    resident = process.memory_info().rss
    with socket.create_connection((receiver.host, receiver.port), timeout=WAIT_S) as sock, pytest.raises(OSError):  # noqa: PT011, PT012
        sock.sendall(before)
        for _ in range(100):
            sock.sendall(b"a" * (1 << 20))
        assert process.memory_info().rss - resident < 20 << 20
        sock.recv(1 << 20)
        raise ConnectionError  # an answer, and then the end
    assert receiver.request("GET", "/healthz").status == 200


@contextlib.contextmanager
def served_here(tmp_path: Path, **settings: Any) -> Iterator[tuple[str, int]]:
    """A receiver in a thread, where its limits of time can be made short; its address."""
    chosen = ReceiverSettings(root=str(tmp_path / "root"), reserve_bytes=0, **settings)
    ready, stop = threading.Event(), threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        kinds = {"ready": ready.set, "orphaned": stop.is_set}
        serving = threading.Thread(target=serve_socket, args=(chosen, listening), kwargs=kinds)
        serving.start()
        try:
            assert ready.wait(WAIT_S)
            yield listening.getsockname()
        finally:
            stop.set()
            serving.join(WAIT_S)


HEALTH = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"


def test_a_request_that_does_not_come_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEAD_TIMEOUT_S", 0.2)
    with served_here(tmp_path) as address:
        for beginning in (b"", b"GET /healthz HTTP/1.1\r\nX: y"):
            with socket.create_connection(address, timeout=WAIT_S) as sock:
                sock.sendall(beginning)
                assert sock.recv(1) == b""
        with socket.create_connection(address, timeout=WAIT_S) as sock:
            for _ in range(2):
                sock.sendall(HEALTH)
                assert sock.recv(4096).startswith(b"HTTP/1.1 200 ")


def test_a_handshake_that_does_not_end_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_HANDSHAKE_S", 0.2)
    authority = trustme.CA()
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(tmp_path / "pem")
    files = {"tls_cert": str(tmp_path / "pem"), "tls_key": str(tmp_path / "pem")}
    with served_here(tmp_path, **files) as address:
        for beginning in (b"", b"\x16\x03\x01\x02\x00\x01", HEALTH):
            with socket.create_connection(address, timeout=WAIT_S) as sock:
                sock.sendall(beginning)
                with contextlib.suppress(ConnectionError):
                    while sock.recv(4096):
                        pass
        trusting = ssl.create_default_context()
        authority.configure_trust(trusting)
        sock = socket.create_connection(address, timeout=WAIT_S)
        with trusting.wrap_socket(sock, server_hostname="127.0.0.1") as secure:
            secure.sendall(HEALTH)
            assert secure.recv(4096).startswith(b"HTTP/1.1 200 ")


def test_who_does_not_read_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_STALL_S", 0.2)
    data = make_artifact("large", 32 << 20)
    with served_here(tmp_path) as address:
        with contextlib.closing(http.client.HTTPConnection(*address, timeout=WAIT_S)) as client:
            client.request("PUT", "/v1/episodes/large", data)
            assert client.getresponse().status == 201
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
            sock.settimeout(WAIT_S)
            sock.connect(address)
            sock.sendall(b"GET /v1/episodes/large HTTP/1.1\r\nHost: x\r\n\r\n")
            process = psutil.Process()

            def is_open() -> bool:
                return sock.getsockname() in {tuple(one.raddr) for one in process.net_connections() if one.fd != -1}

            wait_for(is_open)
            wait_for(lambda: not is_open())


def test_connections_that_ask_for_nothing_keep_nobody_out(start: Start) -> None:
    receiver = start(max_connections=10)
    process = psutil.Process(receiver.process.pid)
    before = process.num_fds()
    with contextlib.ExitStack() as open_ones:
        for number in range(50):
            sock = open_ones.enter_context(socket.create_connection((receiver.host, receiver.port), timeout=WAIT_S))
            with contextlib.suppress(ConnectionError):
                sock.sendall([b"", b"GET / HTTP/1.1\r\nX:", HEALTH][number % 3])

        def is_served() -> bool:
            try:
                return receiver.put("kept-out", make_artifact("kept-out")).status in (200, 201)
            except OSError:  # it is cut where the others came in this second
                return False

        wait_for(is_served)
        assert process.num_fds() < before + 30
    assert receiver.log.read_text().count("there are too many") <= 10


def test_a_client_that_has_gone_is_no_error(receiver: Server) -> None:
    """Behind a request that is being answered comes nonsense, or the end."""
    data = make_artifact("gone", 100_000)
    put = f"PUT /v1/episodes/gone HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data
    for behind in (b"\0\0", b"", HEALTH + HEALTH, HEALTH + b"nonsense\r\n\r\n"):
        for _ in range(20):
            with socket.create_connection((receiver.host, receiver.port), timeout=WAIT_S) as sock:
                sock.sendall(put + behind)
                sock.shutdown(socket.SHUT_WR)
                with contextlib.suppress(ConnectionError):
                    while sock.recv(1 << 16):
                        pass
    assert receiver.request("GET", "/healthz").status == 200
    assert "Traceback" not in receiver.log.read_text()


def test_many_fields_cost_little(receiver: Server) -> None:
    process = psutil.Process(receiver.process.pid)
    resident = process.memory_info().rss
    for size in (12_000, 60_000):
        for _ in range(100):
            head = b"PUT /v1/episodes/fields HTTP/1.1\r\nHost: x\r\n" + b"a: \r\n" * size + b"\r\n"
            sock = socket.create_connection((receiver.host, receiver.port), timeout=WAIT_S)
            with sock, contextlib.suppress(ConnectionError):
                sock.sendall(head)
                assert sock.recv(1 << 16).startswith(b"HTTP/1.1 400 ")
    assert process.memory_info().rss - resident < 50 << 20


def test_many_that_wait_for_one_upload_hold_nobody_else_up(receiver: Server) -> None:
    """As while a large artifact is verified: the test holds the upload's lock as the verification would."""
    location = receiver.create("held", b"x" * 1000).headers["location"]
    fd = os.open(receiver.root / "uploads" / f"{location.rpartition('/')[2]}.lock", os.O_RDWR)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        with ThreadPoolExecutor(40) as clients:
            waiting = [clients.submit(receiver.request, "HEAD", location) for _ in range(40)]
            wait_for(lambda: sum(future.running() for future in waiting) == 40)
            for number in range(10):
                assert receiver.put(f"meanwhile{number}", make_artifact(f"meanwhile{number}")).status == 201
            assert not any(future.done() for future in waiting)
            fcntl.flock(fd, fcntl.LOCK_UN)
            assert {future.result().status for future in waiting} == {204}
    finally:
        os.close(fd)


def test_long_verifications_hold_nobody_else_up(receiver: Server) -> None:
    content_bytes = 1 << 29
    compressor = zstandard.ZstdCompressor(level=1).compressobj()
    piece = bytes(1 << 20)
    data = b"".join([compressor.compress(piece) for _ in range(content_bytes >> 20)]) + compressor.flush()
    fields = {"Fastship_Content_Length": str(content_bytes)}
    with ThreadPoolExecutor(12) as clients:
        large = [
            clients.submit(receiver.put, f"large{number}", data, Repr_Digest=sha256_field(data), **fields)
            for number in range(12)
        ]
        wait_for(lambda: len(list((receiver.root / "uploads").rglob("one-*.part"))) >= 10)
        assert receiver.put("small", make_artifact("small")).status == 201
        assert sum(future.done() for future in large) < 6
        assert {future.result().status for future in large} == {201}
