"""What is one token's is no other's, and how much of it there may be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from receiver_process import Server, Start, check_stored, make_artifact, wait_for

A: dict[str, Any] = {"Authorization": "Bearer token-a"}
B: dict[str, Any] = {"Authorization": "Bearer token-b"}


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    path = tmp_path / "tokens"
    path.write_text("token-a name=a\ntoken-b\n")
    return path


def test_an_upload_is_its_owners(start: Start, tokens: Path) -> None:
    server: Server = start(token_file=str(tokens))
    data = make_artifact("mine", 3000)
    location = server.create("mine", data, **A).headers["location"]
    assert server.append(location, data[:1000], 0, **A).offset == 1000
    for method in ("HEAD", "DELETE"):
        assert server.request(method, location, **B).status == 404
    for last in (False, True):
        taken = server.append(location, data[1000:], 1000, last=last, **B)
        assert (taken.status, taken.json()["code"], taken.headers["upload-complete"]) == (404, "unknown-upload", "?0")
    theirs = server.create("mine", data, **B)  # the same artifact: an upload of their own
    assert (theirs.offset, theirs.headers["location"] == location) == (0, False)
    assert server.request("HEAD", location, **A).offset == 1000
    assert server.append(location, data[1000:], 1000, last=True, **A).status == 201
    assert server.request("HEAD", location, **A).headers["upload-complete"] == "?1"  # the tombstone is theirs, too
    assert server.request("HEAD", location, **B).status == 404
    assert server.request("DELETE", location, **B).status == 404
    assert server.append(theirs.headers["location"], data, 0, last=True, **B).status == 200
    assert server.request("DELETE", location, **A).status == 204


def test_a_new_token_of_the_same_name_goes_on(start: Start, tokens: Path) -> None:
    server: Server = start(token_file=str(tokens))
    data = make_artifact("rotated", 3000)
    location = server.create("rotated", data, **A).headers["location"]
    server.append(location, data[:1000], 0, **A)
    tokens.write_text("token-new name=a\ntoken-b\n")
    new = {"Authorization": "Bearer token-new"}
    assert server.create("rotated", data, **new).offset == 1000
    assert server.append(location, data[1000:], 1000, last=True, **new).status == 201


def test_requests_a_second(start: Start, tokens: Path) -> None:
    tokens.write_text("token-a rate=0.001/s\ntoken-b\n")
    server: Server = start(token_file=str(tokens))
    assert server.request("GET", "/v1/episodes/x", **A).status == 404
    for _ in range(3):
        limited = server.put("x", make_artifact("x"), **A)
        assert (limited.status, limited.json()["code"]) == (429, "rate-limited")
        assert 900 < int(limited.headers["retry-after"]) <= 1000
        assert "upload-complete" not in limited.headers
    for number in range(20):
        assert server.request("GET", f"/v1/episodes/{number}", **B).status == 404
    assert server.request("GET", "/healthz").status == 200


def test_unfinished_uploads(start: Start, tokens: Path) -> None:
    server: Server = start(token_file=str(tokens), token_uploads=2, max_uploads=3)
    data = [make_artifact(f"u{number}", 1000, number) for number in range(4)]
    locations = [server.create(f"u{number}", data[number], **A).headers["location"] for number in range(2)]
    limited = server.create("u2", data[2], **A)
    assert (limited.status, limited.json()["code"], limited.headers["retry-after"]) == (429, "too-many-uploads", "60")
    assert server.create("u1", data[1], **A).status == 201  # what there is goes on
    assert server.put("u3", data[3], **A).status == 201  # and this makes none
    assert server.create("b1", data[2], **B).status == 201
    assert server.append(locations[0], data[0], 0, last=True, **A).status == 201
    assert server.create("u2", data[2], **A).status == 201
    assert server.request("DELETE", locations[1], **A).status == 204
    assert server.create("b2", data[2], **B).status == 201
    full = server.create("u1", data[1], **A)
    assert (full.status, full.json()["code"]) == (503, "overloaded")


def test_bytes_of_unfinished_uploads(start: Start, tokens: Path) -> None:
    server: Server = start(token_file=str(tokens), token_upload_bytes=5000)
    data = make_artifact("bytes", 3000)
    location = server.create("bytes", data, **A).headers["location"]
    other = make_artifact("other", 3000, 1)
    for answer in (
        server.create("other", other, **A),
        server.append(
            server.request("PUT", "/v1/episodes/way3", None, Upload_Complete="?0", **A).headers["location"],
            other,
            0,
            **A,
        ),
        server.create("bytes", data, Upload_Length="5001", **A),
    ):
        assert (answer.status, answer.json()["code"]) == (507, "quota")
    assert server.create("bytes", data, Upload_Length="4999", **A).status == 201
    assert server.create("bytes", data, **A).status == 201
    assert server.create("other", other, **B).status == 201
    assert server.append(location, data, 0, last=True, **A).status == 201
    assert server.create("other", other, **A).status == 201


def test_a_length_that_there_is_no_room_for_is_not_declared_with_an_append_either(start: Start) -> None:
    server: Server = start(max_bytes=1 << 60)
    location = server.request("PUT", "/v1/episodes/lying", None, Upload_Complete="?0").headers["location"]
    refused = server.append(location, b"x", 0, Upload_Length="999999999999999")
    assert (refused.status, refused.json()["code"], refused.headers["upload-complete"]) == (507, "no-room", "?0")
    data = make_artifact("after", 1 << 20)
    assert server.create("after", data).status == 201  # else nobody would have had room for a week
    server.kill()
    server = start(max_bytes=1000)
    location = server.request("PUT", "/v1/episodes/lying2", None, Upload_Complete="?0").headers["location"]
    assert server.append(location, b"x", 0, Upload_Length="1001").status == 413


def test_one_token_leaves_others_a_quarter_of_the_bodies(start: Start, tokens: Path) -> None:
    server: Server = start(token_file=str(tokens), max_requests=4)
    data = make_artifact("slow", 1 << 20)
    waiting = []
    try:
        for number in range(3):
            location = server.create(f"slow{number}", data, **A).headers["location"]
            waiting.append(server.begin_append(location, data, 0, 10, **A))
        wait_for(lambda: b"open_bodies 3.0" in server.request("GET", "/metrics", **A).body)
        busy = server.put("slow", data, **A)
        assert (busy.status, busy.json()["code"]) == (503, "overloaded")
        assert server.put("other", data, **B).status == 201
        check_stored(server, "other", data, **B)
    finally:
        for each in waiting:
            each.close()
