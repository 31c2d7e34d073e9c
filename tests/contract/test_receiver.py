"""Storing and reading: ways 1 and 2 of docs/protocol.md on a real receiver."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import zstandard
from receiver_process import WAIT_S, Server, Start, check_stored, make_artifact, sha256_field, wait_for

# --- way 1 and curl ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 100, 5_000_000])
def test_curl_stores_a_file_with_no_other_option(receiver: Server, tmp_path: Path, size: int) -> None:
    episode = f"curl-{size}"
    file = tmp_path / "a.tar.zst"
    file.write_bytes(make_artifact(episode, size))
    status, body = receiver.curl("-T", str(file), f"{receiver.url}/v1/episodes/{episode}")
    assert status == 201
    assert json.loads(body)["verified"] == "content"
    check_stored(receiver, episode, file.read_bytes())
    status, body = receiver.curl("-T", str(file), f"{receiver.url}/v1/episodes/{episode}")
    assert (status, json.loads(body)["episode"]) == (200, episode)


def test_curl_chunked(receiver: Server, tmp_path: Path) -> None:
    file = tmp_path / "a.tar.zst"
    file.write_bytes(make_artifact("chunked", 3_000_000))
    arguments = ["-H", "Transfer-Encoding: chunked", "-T", str(file), f"{receiver.url}/v1/episodes/chunked"]
    assert receiver.curl(*arguments)[0] == 201
    check_stored(receiver, "chunked", file.read_bytes())


def test_another_content_is_a_conflict_and_replaces_nothing(receiver: Server) -> None:
    first, other = make_artifact("conflict", seed=1), make_artifact("conflict", seed=2)
    assert receiver.put("conflict", first, Repr_Digest=sha256_field(first)).status == 201
    for fields in ({}, {"Repr_Digest": sha256_field(other)}):
        refused = receiver.put("conflict", other, **fields)
        assert (refused.status, refused.json()["code"]) == (409, "conflict")
        assert refused.json()["stored"]["artifact"]["sha256"] == hashlib.sha256(first).hexdigest()
    assert receiver.put("conflict", b"not even an artifact").status == 409
    check_stored(receiver, "conflict", first)


def test_the_same_content_packed_otherwise_is_present_already(receiver: Server) -> None:
    first = make_artifact("repacked", 50_000)
    content = zstandard.ZstdDecompressor().decompress(first)
    again = zstandard.ZstdCompressor(level=9).compress(content)
    assert again != first
    receipt = receiver.put("repacked", first).json()
    assert receiver.put("repacked", again).status == 200
    blake3 = f"blake3=:{base64.b64encode(bytes.fromhex(receipt['content']['blake3'])).decode()}:"
    early = receiver.create("repacked", again, Fastship_Content_Digest=blake3)
    assert early.status == 200
    assert early.headers["repr-digest"] == sha256_field(first)


def test_a_wrong_digest_stores_nothing(receiver: Server) -> None:
    data = make_artifact("wrong")
    refused = receiver.put("wrong", data, Repr_Digest=sha256_field(b"other"))
    assert (refused.status, refused.json()["code"]) == (400, "digest-mismatch")
    assert refused.headers["upload-complete"] == "?1"
    refused = receiver.put("wrong", data, Content_Digest=sha256_field(b"other"))
    assert (refused.status, refused.json()["code"]) == (400, "digest-mismatch")
    blake3 = f"blake3=:{base64.b64encode(bytes(32)).decode()}:"
    refused = receiver.put("wrong", data, Fastship_Content_Digest=blake3)
    assert (refused.status, refused.json()["code"]) == (422, "content-mismatch")
    refused = receiver.put("wrong", data, Fastship_Content_Length="1")
    assert refused.status == 422
    assert receiver.request("GET", "/v1/episodes/wrong").status == 404
    assert not list((receiver.root / "uploads").rglob("one-*"))
    assert receiver.put("wrong", data, Repr_Digest=sha256_field(data)).status == 201


def test_what_is_no_artifact_is_refused(receiver: Server) -> None:
    whole = make_artifact("cut-short", 100_000)
    for data in (b"", b"plain text", whole[:-1000]):
        refused = receiver.put("no-artifact", data)
        assert (refused.status, refused.json()["code"]) == (422, "artifact-invalid")
    assert receiver.request("HEAD", "/v1/episodes/no-artifact").status == 404


def test_verify_artifact_takes_any_bytes(start: Start) -> None:
    server = start(verify="artifact")
    reply = server.put("anything", b"plain text")
    assert reply.status == 201
    assert (reply.json()["verified"], reply.json()["content"]) == ("artifact", None)
    check_stored(server, "anything", b"plain text")


# --- way 2 -------------------------------------------------------------------------------------------------------


def test_a_resumable_upload_by_hand(receiver: Server) -> None:
    data = make_artifact("by-hand", 1_000_000)
    created = receiver.create("by-hand", data)
    assert (created.status, created.offset, created.headers["upload-complete"]) == (201, 0, "?0")
    location = created.headers["location"]
    assert receiver.append(location, data[:400_000], 0).offset == 400_000
    looked = receiver.request("HEAD", location)
    assert (looked.offset, looked.headers["upload-length"]) == (400_000, str(len(data)))

    wrong = receiver.append(location, data[:10], 0)
    assert (wrong.status, wrong.offset, wrong.headers["upload-complete"]) == (409, 400_000, "?0")
    assert wrong.headers["content-type"] == "application/problem+json"
    assert wrong.json()["expected-offset"] == 400_000

    again = receiver.create("by-hand", data)
    assert (again.headers["location"], again.offset) == (location, 400_000)
    last = receiver.append(location, data[400_000:], 400_000, last=True)
    assert (last.status, last.headers["upload-complete"]) == (201, "?1")
    assert last.headers["repr-digest"] == sha256_field(data)
    check_stored(receiver, "by-hand", data)
    assert receiver.create("by-hand", data).status == 200


def test_curl_resumes(receiver: Server) -> None:
    """The commands of docs/protocol.md, Way 2."""
    data = make_artifact("curl-resume", 2_000_000)
    url = f"{receiver.url}/v1/episodes/curl-resume"
    declared = ["-H", "Upload-Complete: ?0", "-H", f"Upload-Length: {len(data)}"]
    digest = ["-H", f"Repr-Digest: {sha256_field(data)}"]
    status, head = receiver.curl("-i", "-X", "PUT", url, "-H", "Content-Length: 0", *declared, *digest)
    assert status == 201
    location = next(line.split(b": ")[1].decode() for line in head.splitlines() if line.startswith(b"location"))
    append = ["-X", "PATCH", f"{receiver.url}{location}", "-H", "Content-Type: application/partial-upload", "-T", "-"]
    part = ["-H", "Upload-Offset: 0", "-H", "Upload-Complete: ?0"]
    assert receiver.curl(*append, *part, send=data[:700_000])[0] == 204
    part = ["-H", "Upload-Offset: 700000", "-H", "Upload-Complete: ?1"]
    assert receiver.curl(*append, *part, send=data[700_000:])[0] == 201
    check_stored(receiver, "curl-resume", data)


def test_an_ended_upload_gives_its_final_answer_again(receiver: Server) -> None:
    data = make_artifact("tombstone")
    location = receiver.create("tombstone", data).headers["location"]
    first = receiver.append(location, data, 0, last=True)
    again = receiver.append(location, data, 0, last=True)
    assert (first.status, again.status) == (201, 201)
    assert again.json() == first.json()
    looked = receiver.request("HEAD", location)
    assert (looked.status, looked.headers["upload-complete"], looked.offset) == (204, "?1", len(data))


def test_the_final_answer_is_not_given_again_when_the_episode_was_taken_out(receiver: Server) -> None:
    data = make_artifact("taken-out")
    location = receiver.create("taken-out", data).headers["location"]
    assert receiver.append(location, data, 0, last=True).status == 201
    for kind in ("tar.zst", "receipt.json"):
        (receiver.root / "episodes" / f"taken-out.{kind}").unlink()
    assert receiver.append(location, data, 0, last=True).json()["code"] == "unknown-upload"
    assert receiver.create("taken-out", data).offset == 0
    assert receiver.append(location, data, 0, last=True).status == 201


def test_a_failed_upload_begins_again_at_0(receiver: Server) -> None:
    data = make_artifact("spoilt", 100_000)
    spoilt = data[:-1] + bytes([data[-1] ^ 1])
    location = receiver.create("spoilt", data).headers["location"]
    refused = receiver.append(location, spoilt, 0, last=True)
    assert (refused.status, refused.headers["upload-complete"]) == (400, "?1")
    assert receiver.create("spoilt", data).offset == 0
    assert receiver.append(location, data, 0, last=True).status == 201
    check_stored(receiver, "spoilt", data)


def test_a_spoilt_append_appends_nothing(receiver: Server) -> None:
    data = make_artifact("append-digest", 2_000_000)
    location = receiver.create("append-digest", data).headers["location"]
    receiver.append(location, data[:1000], 0)
    refused = receiver.append(location, data[1000:-1], 1000, Content_Digest=sha256_field(b"other"))
    assert (refused.status, refused.offset, refused.headers["upload-complete"]) == (400, 1000, "?0")
    rest = data[1000:]
    assert receiver.append(location, rest, 1000, last=True, Content_Digest=sha256_field(rest)).status == 201
    check_stored(receiver, "append-digest", data)


def test_an_upload_of_unknown_length_and_digest(receiver: Server) -> None:
    data = make_artifact("streamed", 300_000)
    created = receiver.request("PUT", "/v1/episodes/streamed", data[:1000], Upload_Complete="?0")
    assert (created.status, created.offset) == (201, 1000)
    location = created.headers["location"]
    told = receiver.append(location, data[1000:], 1000, Want_Repr_Digest="sha-256=10")
    assert (told.status, told.headers["repr-digest"]) == (204, sha256_field(data))
    done = receiver.append(location, b"", len(data), last=True, Upload_Length=str(len(data)))
    assert done.status == 201
    check_stored(receiver, "streamed", data)


def test_a_content_digest_that_is_told_at_the_end_is_compared(receiver: Server) -> None:
    data = make_artifact("told-late", 300_000)
    wrong = f"blake3=:{base64.b64encode(bytes(32)).decode()}:"
    location = receiver.request("PUT", "/v1/episodes/told-late", data, Upload_Complete="?0").headers["location"]
    unread = receiver.append(location, b"", len(data), last=True, Fastship_Content_Digest="blake3=:?:")
    assert (unread.status, unread.headers["upload-complete"]) == (400, "?0")
    refused = receiver.append(location, b"", len(data), last=True, Fastship_Content_Digest=wrong)
    assert (refused.status, refused.json()["code"]) == (422, "content-mismatch")
    assert receiver.put("told-late", data).status == 201


def test_lengths_that_cannot_be(receiver: Server) -> None:
    data = make_artifact("lengths", 10_000)
    location = receiver.create("lengths", data).headers["location"]
    for refused in (
        receiver.append(location, data[:-5], 0, last=True),
        receiver.append(location, data + b"more", 0),
        receiver.append(location, data, 0, Upload_Length="7"),
    ):
        assert (refused.status, refused.json()["code"]) == (400, "inconsistent-length")
    reached = receiver.request("HEAD", location).offset
    assert receiver.append(location, data[reached : reached + 100], reached).status == 204
    refused = receiver.create("lengths", data, Upload_Length="7")
    assert (refused.status, refused.json()["code"]) == (400, "inconsistent-length")
    assert receiver.create("lengths", data, Upload_Length="12345").offset == reached + 100
    assert receiver.append(location, data[reached + 100 :], reached + 100, last=True).status == 400
    reached = receiver.create("lengths", data).offset
    assert receiver.append(location, data[reached:], reached, last=True).status == 201


def test_cancel(receiver: Server) -> None:
    location = receiver.create("cancelled", b"x" * 100).headers["location"]
    assert receiver.request("DELETE", location).status == 204
    for reply in (
        receiver.request("HEAD", location),
        receiver.append(location, b"x", 0),
        receiver.request("DELETE", location),
        receiver.request("HEAD", "/v1/uploads/nonsense"),
    ):
        assert (reply.status, reply.headers["upload-complete"]) == (404, "?0")


def body_bytes(server: Server) -> int:
    """Of one-shot bodies on their way."""
    return sum(path.stat().st_size for path in server.root.glob("uploads/bodies/*"))


@pytest.mark.parametrize("cut", [True, False], ids=["cut", "open still"])
def test_a_newer_request_takes_over_from_a_one_shot(start: Start, cut: bool) -> None:
    """Whether the receiver has noticed that the client is gone or not, and whichever process the newer one comes to."""
    server = start(workers=2)
    for number in range(6):
        name = f"taken{number}"
        data = make_artifact(name, 6_000_000, seed=number)
        with socket.create_connection((server.host, server.port), timeout=WAIT_S) as connection:
            head = f"PUT /v1/episodes/{name} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n"
            connection.sendall(f"{head}Repr-Digest: {sha256_field(data)}\r\n\r\n".encode() + data[:5_000_000])
            if cut:
                connection.close()
            else:
                wait_for(lambda: body_bytes(server) > 2_000_000)
            created = server.create(name, data)
            assert (created.status, created.headers["upload-complete"]) == (201, "?0")
            assert cut or created.offset > 2_000_000
            half = (created.offset + len(data)) // 2
            appended = server.append(created.headers["location"], data[created.offset : half], created.offset)
            assert (appended.status, appended.offset) == (204, half)
            if not cut:  # what comes late of the older one is nobody's
                with contextlib.suppress(OSError):
                    connection.sendall(data[5_000_000:])
                assert int(connection.recv(4096).split()[1]) == 503
            assert server.append(created.headers["location"], data[half:], half, last=True).status == 201
        check_stored(server, name, data)
    wait_for(lambda: not list(server.root.glob("uploads/**/*.part")))


def test_a_cut_connection_keeps_its_bytes(receiver: Server) -> None:
    data = make_artifact("cut", 6_000_000)
    location = receiver.create("cut", data).headers["location"]
    receiver.begin_append(location, data, 0, 3_000_000).close()
    wait_for(lambda: receiver.request("HEAD", location).offset > 2_500_000)
    created = receiver.create("cut", data)
    assert created.headers["location"] == location
    rest = data[created.offset :]
    assert receiver.append(location, rest, created.offset, last=True).status == 201
    check_stored(receiver, "cut", data)


def test_a_cut_one_shot_can_be_resumed(receiver: Server) -> None:
    data = make_artifact("cut-put", 4_000_000)
    with socket.create_connection((receiver.host, receiver.port), timeout=WAIT_S) as connection:
        head = f"PUT /v1/episodes/cut-put HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n"
        connection.sendall(f"{head}Repr-Digest: {sha256_field(data)}\r\n\r\n".encode() + data[:3_000_000])
    wait_for(lambda: any(record.read_bytes().count(b'"cut-put"') for record in receiver.root.glob("uploads/*.json")))
    wait_for(lambda: not list(receiver.root.glob("uploads/**/one-*")))
    created = receiver.create("cut-put", data)
    assert created.offset > 2_500_000
    assert receiver.put("cut-put", data, Repr_Digest=sha256_field(data)).status == 201  # from 0 is as good
    check_stored(receiver, "cut-put", data)
    assert receiver.request("HEAD", created.headers["location"]).status == 404


def test_a_new_request_takes_over_and_a_look_does_not(receiver: Server) -> None:
    data = make_artifact("takeover", 6_000_000)
    location = receiver.create("takeover", data).headers["location"]
    with receiver.begin_append(location, data, 0, 3_000_000) as old:
        seen = [0]

        def look() -> bool:
            seen.append(receiver.request("HEAD", location).offset)
            return seen[-1] > 2_000_000

        wait_for(look)
        assert seen == sorted(seen)
        old.sendall(data[3_000_000:4_500_000])  # the look did not end it
        wait_for(lambda: receiver.request("HEAD", location).offset > 3_500_000)

        taken = receiver.create("takeover", data).offset
        with contextlib.suppress(OSError):
            old.sendall(data[4_500_000:])
        answer = old.recv(4096)
        assert answer == b"" or b" 503 " in answer.split(b"\r\n")[0]
        assert receiver.request("HEAD", location).offset == taken
    assert receiver.append(location, data[taken:], taken, last=True).status == 201
    check_stored(receiver, "takeover", data)


def test_ranges(receiver: Server) -> None:
    data = make_artifact("ranges", 100_000)
    receiver.put("ranges", data)
    path = "/v1/episodes/ranges"
    size = len(data)
    etag = receiver.request("HEAD", path).headers["etag"]
    for value, expected in (
        ("bytes=0-0", data[:1]),
        ("bytes=10-19", data[10:20]),
        (f"bytes={size - 5}-", data[-5:]),
        ("bytes=-7", data[-7:]),
        (f"bytes=5-{size * 2}", data[5:]),
    ):
        reply = receiver.request("GET", path, Range=value, If_Range=etag)
        assert (reply.status, reply.body) == (206, expected)
        assert reply.headers["content-range"].endswith(f"/{size}")
    for value in ("bytes=0-1,5-6", "lines=1-2", "bytes=-", "bytes=5-4"):
        assert receiver.request("GET", path, Range=value).status == 200
    assert receiver.request("GET", path, Range="bytes=0-1", If_Range='"other"').body == data
    beyond = receiver.request("GET", path, Range=f"bytes={size}-")
    assert (beyond.status, beyond.headers["content-range"]) == (416, f"bytes */{size}")
    assert receiver.request("GET", path, If_None_Match=etag).status == 304
    head = receiver.request("HEAD", path)
    assert (head.body, head.headers["content-length"]) == (b"", str(size))


# --- small artifacts of declared content -------------------------------------------------------------------------


def small_fields(data: bytes) -> dict[str, str]:
    content_bytes = zstandard.get_frame_parameters(data).content_size
    return {"Repr_Digest": sha256_field(data), "Fastship_Content_Length": str(content_bytes)}


def test_small_artifacts_are_stored_like_others(receiver: Server) -> None:
    artifacts = {f"little-{number}": make_artifact(f"little-{number}", 4000 + number) for number in range(40)}
    with ThreadPoolExecutor(20) as clients:
        replies = list(
            clients.map(lambda item: receiver.put(item[0], item[1], **small_fields(item[1])), artifacts.items())
        )
    assert [reply.status for reply in replies] == [201] * 40
    for episode, data in artifacts.items():
        check_stored(receiver, episode, data)
        assert receiver.put(episode, data, **small_fields(data)).status == 200
    assert not list((receiver.root / "uploads").rglob("one-*"))


def test_a_small_artifact_that_is_not_what_it_says_is_refused(receiver: Server) -> None:
    data = make_artifact("little")
    for fields, status, code in (
        ({"Repr_Digest": sha256_field(b"other")}, 400, "digest-mismatch"),
        ({"Content_Digest": sha256_field(b"other")}, 400, "digest-mismatch"),
        ({"Fastship_Content_Length": "1"}, 422, "artifact-invalid"),
        ({"Fastship_Content_Digest": f"blake3=:{base64.b64encode(bytes(32)).decode()}:"}, 422, "content-mismatch"),
    ):
        refused = receiver.put("little", data, **{**small_fields(data), **fields})
        assert (refused.status, refused.json()["code"]) == (status, code)
    assert receiver.request("GET", "/v1/episodes/little").status == 404


def test_a_cut_small_artifact_can_be_resumed(receiver: Server) -> None:
    data = make_artifact("little-cut", 50_000)
    fields = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in small_fields(data).items())
    with socket.create_connection((receiver.host, receiver.port), timeout=WAIT_S) as connection:
        head = f"PUT /v1/episodes/little-cut HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n"
        connection.sendall(f"{head}{fields}\r\n".encode() + data[:30_000])
    wait_for(lambda: any(record.read_bytes().count(b'"little-cut"') for record in receiver.root.glob("uploads/*.json")))
    wait_for(lambda: not list(receiver.root.glob("uploads/**/one-*")))
    assert receiver.create("little-cut", data).offset == 30_000
    assert receiver.put("little-cut", data, **small_fields(data)).status == 201
    assert not list(receiver.root.glob("uploads/*.part"))
    check_stored(receiver, "little-cut", data)
