"""The receiver as a real process, spoken to by curl, http.client and raw sockets (docs/protocol.md)."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import io
import json
import os
import random
import select
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import msgspec
import psutil
import pytest
import trustme
import zstandard

from fastship.settings import ReceiverSettings

WAIT_S = 30.0
LAUNCH = """
import sys, msgspec
from fastship.receiver import serve
from fastship.settings import ReceiverSettings
settings = msgspec.json.decode(sys.argv[1], type=ReceiverSettings)
sys.exit(serve(settings, announce=lambda url: print(url, flush=True)))
"""


def make_artifact(episode: str, size: int = 5000, seed: int = 0) -> bytes:
    """A .tar.zst of one file of incompressible bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        info = tarfile.TarInfo(f"{episode}/data.bin")
        info.size = size
        tar.addfile(info, io.BytesIO(random.Random(seed).randbytes(size)))
    return zstandard.ZstdCompressor(level=1, write_checksum=True).compress(buffer.getvalue())


def sha256_field(data: bytes) -> str:
    return f"sha-256=:{base64.b64encode(hashlib.sha256(data).digest()).decode()}:"


class Reply:
    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status = response.status
        self.body = response.read()
        self.headers = {name.lower(): value for name, value in response.getheaders()}

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def offset(self) -> int:
        return int(self.headers["upload-offset"])


class Server:
    """A receiver process on a free port; ``prefix`` is put before its command line (strace)."""

    def __init__(self, root: Path, *, prefix: tuple[str, ...] = (), **settings: Any) -> None:
        chosen = ReceiverSettings(
            root=str(root), listen="127.0.0.1:0", **{"sync_bytes": 1 << 18, "reserve_bytes": 0, **settings}
        )
        command = [*prefix, sys.executable, "-c", LAUNCH, msgspec.json.encode(chosen).decode()]
        self.root = root
        self.log = root.parent / f"{root.name}.log"
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log)
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], WAIT_S)
        line = self.process.stdout.readline().decode().strip() if ready else ""
        if not line:
            self.kill()
            raise AssertionError(f"the receiver did not start: {self.log.read_text()}")
        self.url = line
        self.host, self.port = urlparse(line).hostname, urlparse(line).port

    def request(self, method: str, path: str, body: Any = None, **fields: str) -> Reply:
        connection = http.client.HTTPConnection(self.host or "", self.port, timeout=WAIT_S)
        try:
            headers = {name.replace("_", "-"): value for name, value in fields.items()}
            if body is None and method in ("PUT", "PATCH"):
                body = b""
            connection.request(method, path, body, headers, encode_chunked="Transfer-Encoding" in headers)
            return Reply(connection.getresponse())
        finally:
            connection.close()

    def put(self, episode: str, data: bytes, **fields: str) -> Reply:
        return self.request("PUT", f"/v1/episodes/{episode}", data, **fields)

    def create(self, episode: str, data: bytes, **fields: str) -> Reply:
        declared = {"Upload_Complete": "?0", "Upload_Length": str(len(data)), "Repr_Digest": sha256_field(data)}
        return self.request("PUT", f"/v1/episodes/{episode}", None, **{**declared, **fields})

    def append(self, location: str, data: bytes, offset: int, *, last: bool = False, **fields: str) -> Reply:
        declared = {
            "Content_Type": "application/partial-upload",
            "Upload_Offset": str(offset),
            "Upload_Complete": "?1" if last else "?0",
        }
        return self.request("PATCH", location, data, **{**declared, **fields})

    def begin_append(self, location: str, data: bytes, offset: int, send: int) -> socket.socket:
        """A PATCH of all of ``data`` of which only ``send`` bytes are sent."""
        connection = socket.create_connection((self.host, self.port), timeout=WAIT_S)
        head = (
            f"PATCH {location} HTTP/1.1\r\nHost: x\r\nContent-Type: application/partial-upload\r\n"
            f"Upload-Offset: {offset}\r\nUpload-Complete: ?1\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        connection.sendall(head.encode() + data[:send])
        return connection

    def curl(self, *arguments: str) -> tuple[int, bytes]:
        """Run curl; the final status and the body."""
        command = ["curl", "-sS", "-m", str(int(WAIT_S)), "-w", "\n%{http_code}", *arguments]
        done = subprocess.run(command, capture_output=True, check=True, timeout=2 * WAIT_S)
        body, _, status = done.stdout.rpartition(b"\n")
        return int(status), body

    def kill(self) -> None:
        """Kill -9, with everything it started."""
        with contextlib.suppress(psutil.NoSuchProcess):
            everything = [*psutil.Process(self.process.pid).children(recursive=True)]
            for process in everything:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        self.process.kill()
        self.process.wait(WAIT_S)
        if self.process.stdout is not None:
            self.process.stdout.close()

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        self.process.terminate()
        code = self.process.wait(WAIT_S)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code

    def stored(self, episode: str) -> bytes | None:
        path = self.root / "episodes" / f"{episode}.tar.zst"
        return path.read_bytes() if path.exists() else None


Start = Callable[..., Server]


@pytest.fixture(scope="module")
def receiver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("receiver") / "root")
    yield server
    server.kill()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start receivers on one root; all are killed at the end."""
    servers: list[Server] = []

    def begin(**options: Any) -> Server:
        servers.append(Server(tmp_path / "root", **options))
        return servers[-1]

    yield begin
    for server in servers:
        server.kill()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.02)


def check_stored(server: Server, episode: str, data: bytes) -> None:
    """Artifact, receipt and what HTTP gives of both are of ``data``."""
    assert server.stored(episode) == data
    on_disk = json.loads((server.root / "episodes" / f"{episode}.receipt.json").read_bytes())
    assert on_disk["artifact"] == {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    assert server.request("GET", f"/v1/receipts/{episode}").json() == on_disk
    got = server.request("GET", f"/v1/episodes/{episode}")
    assert got.body == data
    assert got.headers["repr-digest"] == sha256_field(data)


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
    assert not list((receiver.root / "uploads").glob("one-*"))
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


def test_an_ended_upload_gives_its_final_answer_again(receiver: Server) -> None:
    data = make_artifact("tombstone")
    location = receiver.create("tombstone", data).headers["location"]
    first = receiver.append(location, data, 0, last=True)
    again = receiver.append(location, data, 0, last=True)
    assert (first.status, again.status) == (201, 201)
    assert again.json() == first.json()
    looked = receiver.request("HEAD", location)
    assert (looked.status, looked.headers["upload-complete"], looked.offset) == (204, "?1", len(data))


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


def test_lengths_that_cannot_be(receiver: Server) -> None:
    data = make_artifact("lengths", 10_000)
    location = receiver.create("lengths", data).headers["location"]
    for refused in (
        receiver.append(location, data[:-5], 0, last=True),
        receiver.append(location, data + b"more", 0),
        receiver.append(location, data, 0, Upload_Length="7"),
        receiver.create("lengths", data, Upload_Length="7"),
    ):
        assert (refused.status, refused.json()["code"]) == (400, "inconsistent-length")
    reached = receiver.request("HEAD", location).offset
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
    wait_for(lambda: not list(receiver.root.glob("uploads/one-*")))
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


# --- several processes, deaths -----------------------------------------------------------------------------------


def test_a_killed_receiver_goes_on_from_its_offset(start: Start) -> None:
    data = make_artifact("killed", 6_000_000)
    server = start(workers=2)
    location = server.create("killed", data).headers["location"]
    told = server.append(location, data[:1_000_000], 0).offset
    with server.begin_append(location, data[told:], told, 3_000_000):
        wait_for(lambda: server.request("HEAD", location).offset > 3_000_000)
        server.kill()
    server = start()
    created = server.create("killed", data)
    assert created.headers["location"] == location
    assert created.offset > 3_000_000
    assert server.append(location, data[created.offset :], created.offset, last=True).status == 201
    check_stored(server, "killed", data)
    assert server.stop() == 0


@pytest.mark.parametrize("same", [False, True])
def test_racing_uploads_of_one_id(start: Start, same: bool) -> None:
    server = start(workers=2)
    artifacts = [make_artifact("race", 2_000_000, seed=0 if same else seed) for seed in range(6)]
    replies: list[int] = []

    def run(index: int) -> None:
        fields = {"Repr_Digest": sha256_field(artifacts[index])} if index % 2 else {}
        replies.append(server.put("race", artifacts[index], **fields).status)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(replies) == ([200] * 5 + [201] if same else [201] + [409] * 5)
    stored = server.stored("race")
    assert stored in artifacts
    check_stored(server, "race", stored)


def test_processes_are_watched_over(start: Start) -> None:
    server = start(workers=2)
    children = psutil.Process(server.process.pid).children()
    assert len(children) == 2
    children[0].kill()
    wait_for(lambda: "starting another" in server.log.read_text())
    wait_for(lambda: len([c for c in psutil.Process(server.process.pid).children() if c.is_running()]) == 2)
    for _ in range(10):
        assert server.request("GET", "/healthz").status == 200
    metrics = server.request("GET", "/metrics").body.decode()
    assert 'fastship_receiver_requests_total{method="GET",status="200"} 10.0' in metrics
    everything = psutil.Process(server.process.pid).children(recursive=True)
    assert server.stop() == 0
    assert not [process for process in everything if process.is_running()]


def test_processes_end_with_the_first(start: Start) -> None:
    server = start(workers=2)
    children = psutil.Process(server.process.pid).children()
    server.process.kill()
    wait_for(lambda: not any(child.is_running() and child.status() != "zombie" for child in children))


def test_an_end_lets_the_request_finish(start: Start) -> None:
    server = start()
    data = make_artifact("ending", 500_000)
    location = server.create("ending", data).headers["location"]
    with server.begin_append(location, data, 0, 100_000) as connection:
        wait_for(lambda: server.request("HEAD", location).status == 204)
        server.process.terminate()
        time.sleep(0.3)
        connection.sendall(data[100_000:])
        assert connection.recv(4096).startswith(b"HTTP/1.1 201 ")
    assert server.process.wait(WAIT_S) == 0
    assert server.stored("ending") == data


def test_a_restart_knows_everything(start: Start) -> None:
    data, half = make_artifact("known"), make_artifact("half", 100_000)
    server = start()
    assert server.put("known", data).status == 201
    location = server.create("half", half).headers["location"]
    server.append(location, half[:5000], 0)
    ended = server.create("tomb", data).headers["location"]
    server.append(ended, data, 0, last=True)
    assert server.stop() == 0
    server = start()
    assert server.put("known", data, Repr_Digest=sha256_field(data)).status == 200
    assert server.create("half", half).offset == 5000
    assert server.append(ended, data, 0, last=True).status == 201
    assert server.append(location, half[5000:], 5000, last=True).status == 201  # its digest is read from the file
    check_stored(server, "half", half)


STEPS = [
    ("fsync", 1),
    ("fsync", 2),
    ("fsync", 3),
    ("fsync", 4),
    ("rename", 1),
    ("rename", 2),
    ("link", 1),
    ("unlink", 1),
]


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is what stops the receiver at a system call")
@pytest.mark.parametrize(("call", "number"), STEPS)
@pytest.mark.parametrize("way", [1, 2])
def test_killed_at_each_step_of_publishing(start: Start, call: str, number: int, way: int) -> None:
    """Stopped before the system call of that number, the receiver then stores or has stored the episode whole."""
    data = make_artifact("step", 200_000)
    server = start()
    location = server.create("step", data).headers["location"]
    if way == 2:
        server.append(location, data[:-1], 0)
    server.kill()

    # Python calls the older or the newer of a call's forms, as the architecture has them; "?" allows for both.
    calls = f"?{call},?{call}at" + (",?renameat2" if call == "rename" else "")
    trace = ("-e", f"trace={calls}", "-e", f"inject={calls}:signal=SIGKILL:when={number}")
    try:
        server = start(prefix=("strace", "-f", "-qq", "-o", "/dev/null", *trace))
    except AssertionError as error:
        if "not permitted" in str(error):
            pytest.skip("this machine lets nobody trace processes")
        raise
    killed = False
    try:
        if way == 1:
            server.put("step", data, Repr_Digest=sha256_field(data))
        else:
            server.append(location, data[-1:], len(data) - 1, last=True)
    except (OSError, http.client.HTTPException):
        killed = True
    assert killed, "the publishing does not have this step any more: correct the list"
    server.kill()

    server = start()
    before = server.stored("step")
    assert before in (None, data)
    if before is not None:
        wait_for((server.root / "episodes" / "step.receipt.json").exists)
        check_stored(server, "step", data)
    again = server.create("step", data)
    if before is not None:
        assert again.status == 200
    else:
        # The other way's upload is still there, or begins anew; either way it ends well.
        assert again.status == 201
        done = server.append(again.headers["location"], data[again.offset :], again.offset, last=True)
        assert done.status == 201
    check_stored(server, "step", data)


# --- decisions from the headers ----------------------------------------------------------------------------------

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
        wait_for(lambda: server.put("other", small).status == 503)
        busy = server.put("other", small)
        assert (busy.json()["code"], busy.headers["retry-after"]) == ("overloaded", "2")
    wait_for(lambda: server.put("other", small).status in (200, 201))


def test_no_room(start: Start) -> None:
    server = start(reserve_bytes=1 << 60)
    refused = server.put("room", make_artifact("room"))
    assert (refused.status, refused.json()["code"]) == (507, "no-room")


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


# --- starting ----------------------------------------------------------------------------------------------------


def test_tls_with_client_certificates(start: Start, tmp_path: Path) -> None:
    ca = trustme.CA()
    cert, key, ca_file, mine = (tmp_path / name for name in ("cert.pem", "key.pem", "ca.pem", "client.pem"))
    issued = ca.issue_cert("localhost", "127.0.0.1")
    issued.cert_chain_pems[0].write_to_path(cert)
    issued.private_key_pem.write_to_path(key)
    ca.cert_pem.write_to_path(ca_file)
    ca.issue_cert("lab@example.org").private_key_and_cert_chain_pem.write_to_path(mine)
    server = start(tls_cert=str(cert), tls_key=str(key), client_ca=str(ca_file))
    assert server.url.startswith("https://")
    file = tmp_path / "a"
    file.write_bytes(make_artifact("tls"))
    options = ["--cacert", str(ca_file), "-T", str(file), f"{server.url}/v1/episodes/tls"]
    assert server.curl("--cert", str(mine), *options)[0] == 201
    context = ssl.create_default_context(cafile=str(ca_file))
    connection = http.client.HTTPSConnection(server.host or "", server.port, context=context, timeout=WAIT_S)
    with contextlib.closing(connection), pytest.raises(OSError):  # noqa: PT011, PT012 - no certificate of the client
        connection.request("GET", "/healthz")  # with TLS 1.3 the refusal may come only with the answer
        connection.getresponse()


def test_a_start_that_cannot_be(tmp_path: Path) -> None:
    taken = socket.create_server(("127.0.0.1", 0))
    port = taken.getsockname()[1]
    missing = str(tmp_path / "missing")
    code = LAUNCH.replace("sys.exit(serve(", "from fastship.errors import ReceiverError\ntry: serve(").replace(
        "flush=True)))", "flush=True))\nexcept ReceiverError as e: print(e.message, '->', e.remedy)"
    )
    with taken:
        for settings, told in (
            (ReceiverSettings(root=""), "receiver.root is not set"),
            (ReceiverSettings(root="/proc/nowhere"), "cannot be used"),
            (ReceiverSettings(root=str(tmp_path / "r"), listen=f"127.0.0.1:{port}"), "cannot listen"),
            (ReceiverSettings(root=str(tmp_path / "r"), listen="nonsense"), "is not an address"),
            (ReceiverSettings(root=str(tmp_path / "r"), token_file=missing), "cannot be read"),
            (ReceiverSettings(root=str(tmp_path / "r"), commits_file=missing), "cannot be read"),
            (ReceiverSettings(root=str(tmp_path / "r"), tls_cert=missing, tls_key=missing), "TLS files"),
        ):
            command = [sys.executable, "-c", code, msgspec.json.encode(settings).decode()]
            done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False)
            assert told in done.stdout
            assert done.stdout.strip().split("->")[1]
            assert "Traceback" not in done.stderr


def test_nothing_is_written_outside_the_root(start: Start, tmp_path: Path) -> None:
    server = start(workers=2)
    server.put("inside", make_artifact("inside"))
    server.create("other", b"x")
    assert server.stop() == 0
    assert {entry.name for entry in tmp_path.iterdir()} == {"root", "root.log"}
    assert {entry.name for entry in (tmp_path / "root").iterdir()} == {"episodes", "uploads", "secret"}
    assert os.stat(tmp_path / "root" / "secret").st_mode & 0o077 == 0


def test_a_signal_while_starting_ends_it(start: Start) -> None:
    server = start(workers=2)
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(WAIT_S) == 0
