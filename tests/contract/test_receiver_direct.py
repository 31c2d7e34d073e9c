"""Large bodies, which the receiver takes from the socket itself: all that holds for others holds for them."""

from __future__ import annotations

import hashlib
import http.client
import json
import random
import re
import socket
import threading
import time

import blake3
import psutil
import pytest
import zstandard
from receiver_process import WAIT_S, Server, Start, check_stored, make_artifact, sha256_field, wait_for

DATA = random.Random(1).randbytes(24_000_000)


@pytest.fixture
def server(start: Start) -> Server:
    return start(verify="artifact", sync_bytes=1 << 22)


def head_of(episode: str, length: int, *fields: str) -> bytes:
    lines = [f"PUT /v1/episodes/{episode} HTTP/1.1", "Host: x", f"Content-Length: {length}", *fields, "", ""]
    return "\r\n".join(lines).encode()


def connect(server: Server) -> socket.socket:
    return socket.create_connection((server.host, server.port), timeout=WAIT_S)


def reply_of(sock: socket.socket) -> tuple[int, bytes]:
    response = http.client.HTTPResponse(sock)
    response.begin()
    return response.status, response.read()


def counted(server: Server) -> float:
    text = server.request("GET", "/metrics").body.decode()
    return float(text.partition("\nfastship_receiver_body_bytes_total ")[2].split()[0])


def test_requests_follow_each_other_on_one_connection(server: Server) -> None:
    with connect(server) as sock:
        for number in range(3):
            sock.sendall(head_of(f"kept{number}", len(DATA)) + DATA)
            status, body = reply_of(sock)
            assert (status, json.loads(body)["artifact"]["sha256"]) == (201, hashlib.sha256(DATA).hexdigest())
            sock.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            assert reply_of(sock)[0] == 200
    assert counted(server) == 3 * len(DATA)
    check_stored(server, "kept2", DATA)


def test_a_request_sent_behind_a_large_body_is_answered(server: Server) -> None:
    following = b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    with connect(server) as sock:
        sock.sendall(head_of("piped", len(DATA)) + DATA + head_of("piped2", len(DATA)) + DATA + following)
        said = b""
        while piece := sock.recv(1 << 16):
            said += piece
    statuses = re.findall(rb"HTTP/1.1 (\d+) ", said)
    assert statuses == [b"201", b"201", b"200"]
    check_stored(server, "piped2", DATA)


def test_a_client_may_falter(server: Server) -> None:
    """Fast, nothing, crumbs, fast again: the loop and the thread hand the body to each other at any byte."""
    with connect(server) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.sendall(head_of("falters", len(DATA), f"Content-Digest: {sha256_field(DATA)}"))
        at = 0
        for size in (5_000_001, 1, 3, 6_000_000, 70_000, 65_536, 9_000_000, len(DATA)):
            sock.sendall(DATA[at : at + size])
            at += size
            time.sleep(0.05)
        assert reply_of(sock)[0] == 201
    check_stored(server, "falters", DATA)


def test_nothing_beyond_the_declared_length_is_taken(server: Server) -> None:
    location = server.create("short", DATA[:8_000_000]).headers["location"]
    with server.begin_append(location, DATA, 0, len(DATA)) as sock:
        assert reply_of(sock)[0] == 400
    assert server.request("HEAD", location).offset <= 8_000_000
    declared = {"Upload_Complete": "?0", "Repr_Digest": sha256_field(DATA)}
    location = server.request("PUT", "/v1/episodes/long", None, **declared).headers["location"]
    assert server.append(location, DATA[:8_000_000], 0).status == 204
    assert server.append(location, DATA[8_000_000:], 8_000_000, Content_Digest=sha256_field(b"")).status == 400
    assert server.append(location, DATA[8_000_000:], 8_000_000, last=True).status == 201
    check_stored(server, "long", DATA)


def test_where_no_descriptor_is_to_be_had_the_loop_takes_it(server: Server) -> None:
    process = psutil.Process(server.process.pid)

    def come(count: int) -> bool:
        return sum(path.stat().st_size for path in (server.root / "uploads").glob("one-*.part")) >= count

    with connect(server) as sock:
        sock.sendall(head_of("short-of-them", len(DATA)) + DATA[:3_000_000])
        wait_for(lambda: come(2_000_000))
        limits = process.rlimit(psutil.RLIMIT_NOFILE)
        process.rlimit(psutil.RLIMIT_NOFILE, (3, limits[1]))  # what is open stays so
        sock.sendall(DATA[3_000_000:20_000_000])
        wait_for(lambda: come(18_000_000))
        process.rlimit(psutil.RLIMIT_NOFILE, limits)
        sock.sendall(DATA[20_000_000:])
        assert reply_of(sock)[0] == 201
    check_stored(server, "short-of-them", DATA)


def test_a_cut_and_a_takeover_leave_what_came(server: Server) -> None:
    location = server.create("cut", DATA).headers["location"]
    server.begin_append(location, DATA, 0, 10_000_000).close()
    wait_for(lambda: server.request("HEAD", location).offset == 10_000_000)
    with server.begin_append(location, DATA[10_000_000:], 10_000_000, 8_000_000) as old:
        wait_for(lambda: server.request("HEAD", location).offset > 16_000_000)
        taken = server.create("cut", DATA).offset
        assert 16_000_000 < taken <= 18_000_000
        old.sendall(DATA[18_000_000:])
        assert reply_of(old)[0] == 503
    assert server.append(location, DATA[taken:], taken, last=True).status == 201
    check_stored(server, "cut", DATA)


def test_more_bodies_than_threads_are_all_taken(server: Server) -> None:
    statuses = []

    def run(number: int) -> None:
        statuses.append(server.put(f"many{number}", DATA, Repr_Digest=sha256_field(DATA)).status)

    clients = [threading.Thread(target=run, args=(number,)) for number in range(12)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    assert statuses == [201] * 12
    process = psutil.Process(server.process.pid)
    wait_for(lambda: sum(connection.status == "ESTABLISHED" for connection in process.net_connections()) == 0)


def test_an_upload_that_grows_over_many_requests_is_verified(start: Start) -> None:
    """Each request has its own descriptor of the upload; between two of them another upload may get its number."""
    data = {episode: make_artifact(episode, 9_000_000) for episode in ("grows", "other")}
    server = start()
    locations = {episode: server.create(episode, body).headers["location"] for episode, body in data.items()}
    for at in range(0, 9_000_000, 1_500_000):
        for episode, body in data.items():
            end = at + 1_500_000
            last = end >= 9_000_000
            reply = server.append(locations[episode], body[at : None if last else end], at, last=last)
            assert reply.status == (201 if last else 204)
    for episode, body in data.items():
        check_stored(server, episode, body)
        content = zstandard.ZstdDecompressor().decompress(body)
        receipt = server.request("GET", f"/v1/receipts/{episode}").json()
        assert receipt["content"]["blake3"] == blake3.blake3(content).hexdigest()


def test_contents_are_verified_whatever_way_they_came(start: Start) -> None:
    data = make_artifact("verified", 16_000_000)
    server = start()
    assert server.put("spoilt", data[:-100_000] + bytes(100_000)).status == 422
    assert server.put("verified", data).json()["verified"] == "content"
    check_stored(server, "verified", data)
