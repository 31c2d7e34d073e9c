"""What a receiver refuses, from the headers alone where it can."""

from __future__ import annotations

import http.client
import shutil
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hostility import bomb
from receiver_process import WAIT_S, Reply, Server, Start, check_stored, make_artifact, sha256_field, wait_for

COMMIT, OTHER = "ab" * 20, "cd" * 20


def test_commits(start: Start, tmp_path: Path) -> None:
    commits = tmp_path / "commits"
    commits.write_text(f"# ours\n#remediation: run fastship-update\n{COMMIT}\n")
    server = start(commits_file=str(commits))
    data = make_artifact("commit")
    missing = server.put("commit", data)
    assert (missing.status, missing.json()["code"]) == (400, "commit-missing")
    assert server.put("commit", data, X_Cis490_Code_Commit="short").status == 400
    refused = server.put("commit", data, X_Cis490_Code_Commit=OTHER)
    assert refused.status == 412
    told = refused.json()
    assert (told["your_commit"], told["head_commit"]) == (OTHER, COMMIT)
    assert told["remediation"] == "run fastship-update"
    assert server.put("commit", data, X_Cis490_Code_Commit=COMMIT.upper()).status == 201
    commits.write_text(f"{OTHER}\n{COMMIT}\n")  # in force at the next request
    assert server.put("commit2", data, X_Cis490_Code_Commit=OTHER).status == 201


def test_tokens(start: Start, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("# lab 1\nsecret-one\nsecret-two\n")
    server = start(token_file=str(tokens))
    data = make_artifact("token")
    for fields in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic secret-one"}):
        refused = server.put("token", data, **fields)
        assert (refused.status, refused.headers["www-authenticate"]) == (401, 'Bearer realm="fastship"')
        assert server.request("GET", "/v1/episodes/token", **fields).status == 401
    assert server.put("token", data, Authorization="Bearer secret-two").status == 201
    tokens.write_text("rotated\n")
    assert server.put("token", data, Authorization="Bearer secret-two").status == 401
    assert server.put("token", data, Authorization="bearer rotated").status == 200
    assert server.request("GET", "/healthz").status == 200
    log = server.log.read_text()
    assert not [secret for secret in ("secret-one", "secret-two", "rotated", "wrong") if secret in log]


def test_limits(start: Start) -> None:
    server = start(max_bytes=1000, max_requests=1)
    large = make_artifact("large", 5000)
    refused = server.put("large", large)
    assert (refused.status, refused.json()["max_bytes"]) == (413, 1000)
    assert server.create("large", large).status == 413
    assert server.request("PUT", "/v1/episodes/large", iter([large]), Transfer_Encoding="chunked").status == 413
    small = make_artifact("small", 100)
    location = server.create("small", small).headers["location"]
    with server.begin_append(location, small, 0, 10):
        wait_for(lambda: b"open_bodies 1.0" in server.request("GET", "/metrics").body)
        busy = server.put("other", small)
        assert (busy.json()["code"], busy.headers["retry-after"]) == ("overloaded", "2")
    wait_for(lambda: server.put("other", small).status in (200, 201))


def test_no_room(start: Start) -> None:
    server = start(reserve_bytes=1 << 60)
    refused = server.put("room", make_artifact("room"))
    assert (refused.status, refused.json()["code"]) == (507, "no-room")


def test_a_body_that_does_not_say_its_length_leaves_the_reserve(start: Start) -> None:
    server = start()
    location = server.request("PUT", "/v1/episodes/unsaid", None, Upload_Complete="?0").headers["location"]
    assert server.append(location, b"x" * 1000, 0).offset == 1000
    server.kill()
    server = start(reserve_bytes=1 << 60)
    chunked: dict[str, Any] = {"Transfer_Encoding": "chunked"}
    for fields in ({}, chunked):
        body: Any = iter([b"y" * 1000]) if fields else b"y" * 1000
        refused = server.append(location, body, 1000, **fields)
        assert (refused.status, refused.json()["code"], refused.headers["upload-complete"]) == (507, "no-room", "?0")
    assert server.request("HEAD", location).offset == 1000


def test_a_bomb_is_refused_and_keeps_nobody_waiting(start: Start) -> None:
    server = start()
    data = bomb(1100 << 20)
    with ThreadPoolExecutor(6) as clients:
        bombs = [clients.submit(server.put, f"bomb{number}", data) for number in range(6)]
        small = make_artifact("meanwhile")
        content = str(len(zstandard.ZstdDecompressor().decompress(small)))
        assert server.put("meanwhile", small, Fastship_Content_Length=content).status == 201
        for each in bombs:
            refused = each.result()
            assert (refused.status, refused.json()["code"]) == (422, "artifact-invalid")
            assert "receiver.max_ratio" in refused.json()["error"]


def test_a_full_disk_keeps_what_is_durable(start: Start) -> None:
    limit = shutil.which("prlimit")
    if limit is None:
        pytest.skip("prlimit (util-linux) is what makes the disk full here")
    data = make_artifact("full", 3_000_000)
    server = start(prefix=(limit, "--fsize=1000000"))
    location = server.create("full", data).headers["location"]
    refused = server.append(location, data, 0, last=True)
    assert (refused.status, refused.headers["upload-complete"]) == (507, "?0")
    server.kill()
    server = start()
    offset = server.create("full", data).offset
    assert offset <= 1_000_000
    assert server.append(location, data[offset:], offset, last=True).status == 201
    check_stored(server, "full", data)


def test_an_early_answer_reaches_a_client_that_only_sends(receiver: Server) -> None:
    data = make_artifact("early")
    assert receiver.put("early", data).status == 201
    length = 50_000_000
    with socket.create_connection((receiver.host, receiver.port), timeout=WAIT_S) as connection:
        head = f"PUT /v1/episodes/early HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n"
        connection.sendall(f"{head}Repr-Digest: {sha256_field(data)}\r\n\r\n".encode())
        for _ in range(20):
            connection.sendall(bytes(1_000_000))
        answer = connection.recv(65536)
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert b"connection: close" in answer.lower()
    assert b'"episode":"early"' in answer


def test_no_100_continue_before_a_refusal(receiver: Server) -> None:
    data = make_artifact("expect")
    receiver.put("expect", data)
    for digest, first in ((sha256_field(data), b"HTTP/1.1 200 "), (sha256_field(b"other"), b"HTTP/1.1 409 ")):
        with socket.create_connection((receiver.host, receiver.port), timeout=WAIT_S) as connection:
            head = "PUT /v1/episodes/expect HTTP/1.1\r\nHost: x\r\nContent-Length: 9999999\r\n"
            connection.sendall(f"{head}Expect: 100-continue\r\nRepr-Digest: {digest}\r\n\r\n".encode())
            assert connection.recv(65536).startswith(first)


BAD_REQUESTS: list[tuple[str, str, dict[str, str], int]] = [
    ("PUT", "/v1/episodes/..%2f..%2fetc", {}, 404),
    ("PUT", "/v1/episodes/.hidden", {}, 400),
    ("PUT", "/v1/episodes/" + "x" * 201, {}, 400),
    ("PUT", "/v1/episodes/", {}, 400),
    ("PUT", "/v1/episodes/a%00b", {}, 400),
    ("PUT", "/v1/episodes/a%0ab", {}, 400),
    ("PUT", "/v1/episodes/%ff", {}, 400),
    ("PUT", "/v1/episodes/a b", {}, 400),
    ("PUT", "/v1/episodes/a/b", {}, 404),
    ("PUT", "/", {}, 404),
    ("POST", "/v1/episodes/x", {}, 405),
    ("DELETE", "/v1/episodes/x", {}, 405),
    ("PUT", "/v1/receipts/x", {}, 405),
    ("GET", "/v1/uploads/" + "0" * 64, {}, 405),
    ("HEAD", "/v1/uploads/" + "0" * 64, {}, 404),
    ("PATCH", "/v1/uploads/..", {"Content-Type": "application/partial-upload"}, 404),
    ("GET", "/v1/episodes/absent", {}, 404),
    ("GET", "/v1/receipts/absent", {}, 404),
    ("PUT", "/v1/episodes/x", {"Repr-Digest": "sha-256=:AAAA:"}, 400),
    ("PUT", "/v1/episodes/x", {"Repr-Digest": "sha-256=nonsense"}, 400),
    ("PUT", "/v1/episodes/x", {"Fastship-Content-Digest": "blake3=:?:"}, 400),
    ("PUT", "/v1/episodes/x", {"Fastship-Content-Length": "-1"}, 400),
    ("PUT", "/v1/episodes/x", {"Upload-Complete": "yes"}, 400),
    ("PUT", "/v1/episodes/x", {"Upload-Length": "1e9"}, 400),
    ("PUT", "/v1/episodes/x", {"Content-Range": "bytes 0-1/2"}, 400),
    ("PUT", "/v1/episodes/x", {"Content-Encoding": "gzip"}, 415),
    ("PUT", "/v1/episodes/x", {"Upload-Complete": "?0", "Upload-Length": "9" * 15}, 507),
]


@pytest.mark.parametrize(("method", "path", "fields", "status"), BAD_REQUESTS)
def test_bad_requests_are_answered(
    receiver: Server, method: str, path: str, fields: dict[str, str], status: int
) -> None:
    with socket.create_connection((receiver.host, receiver.port), timeout=WAIT_S) as connection:
        lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        target = path.replace(" ", "%20")
        connection.sendall(f"{method} {target} HTTP/1.1\r\nHost: x\r\n{lines}Content-Length: 0\r\n\r\n".encode())
        response = http.client.HTTPResponse(connection, method=method)
        response.begin()
        reply = Reply(response)
    assert reply.status == status
    if method != "HEAD":
        assert {"error", "code"} <= set(reply.json())


def test_bad_appends_are_answered(receiver: Server) -> None:
    data = make_artifact("bad-append")
    location = receiver.create("bad-append", data).headers["location"]
    for fields, status in (
        ({"Content_Type": "text/plain"}, 415),
        ({"Upload_Offset": "x"}, 400),
        ({"Upload_Complete": "1"}, 400),
        ({"Upload_Length": "x"}, 400),
        ({"Content_Digest": "sha-256=:x:"}, 400),
    ):
        reply = receiver.append(location, b"abc", 0, last=False, **fields)
        assert reply.status == status
        assert reply.json()["code"] == "bad-field"
    assert receiver.request("HEAD", location).offset == 0
