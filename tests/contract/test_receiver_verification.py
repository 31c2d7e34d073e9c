"""``POST /v1/verifications/{id}`` of a real receiver: what it answers, how long it may take, and who may ask."""

from __future__ import annotations

import asyncio
import hashlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from receiver_process import Server, make_artifact, sha256_field, wait_for

from fastship.receiver import verification
from fastship.receiver.app import create_app
from fastship.settings import ReceiverSettings


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path / "store")
    yield server
    server.kill()


def spoil(server: Server, episode: str) -> None:
    path = server.root / "episodes" / f"{episode}.tar.zst"
    data = path.read_bytes()
    with path.open("r+b") as file:
        file.seek(len(data) // 2)
        file.write(bytes([data[len(data) // 2] ^ 2]))


def test_what_is_right_is_read_again_and_told(server: Server) -> None:
    data = make_artifact("ep1", 3_000_000)
    stored = server.put("ep1", data).json()
    reply = server.request("POST", "/v1/verifications/ep1")
    assert reply.status == 200
    assert reply.headers["content-type"] == "application/json"
    found = reply.json()
    assert (found["verdict"], found["error"], found["set_aside"]) == ("sound", "", "")
    assert found["artifact_sha256"] == hashlib.sha256(data).hexdigest()
    assert (found["content_blake3"], found["content_bytes"]) == (
        stored["content"]["blake3"],
        stored["content"]["bytes"],
    )
    assert found["receipt"] == stored
    assert (found["read_from"] == "disk") == (found["cached_bytes"] == 0)
    assert "\n" not in reply.body.decode().strip()


def test_what_rotted_is_set_aside_and_can_be_stored_again(server: Server) -> None:
    data = make_artifact("ep1")
    server.put("ep1", data)
    spoil(server, "ep1")
    assert server.put("ep1", data, Repr_Digest=sha256_field(data)).status == 200  # the receipt is all that is asked
    found = server.request("POST", "/v1/verifications/ep1").json()
    assert (found["verdict"], found["set_aside"]) == ("rotted", "rotted/ep1.tar.zst")
    assert server.request("HEAD", "/v1/episodes/ep1").status == 404
    gone = server.request("POST", "/v1/verifications/ep1")
    assert (gone.status, gone.json()["code"]) == (404, "not-stored")
    assert server.put("ep1", data, Repr_Digest=sha256_field(data)).status == 201
    assert server.request("POST", "/v1/verifications/ep1").json()["verdict"] == "sound"
    assert os.listdir(server.root / "rotted") != []


def test_only_who_may_store_may_ask(tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text("a-token-of-some-length\n")
    server = Server(tmp_path / "store", token_file=str(tmp_path / "tokens"))
    try:
        assert server.request("POST", "/v1/verifications/ep1").status == 401
        allowed = {"Authorization": "Bearer a-token-of-some-length"}
        assert server.request("POST", "/v1/verifications/ep1", **allowed).status == 404
        assert server.request("POST", "/v1/verifications/..", **allowed).status == 400
        assert server.request("GET", "/v1/verifications/ep1", **allowed).status == 405
        assert server.request("POST", "/v1/verifications/ep1", b"body", **allowed).status == 400
    finally:
        server.kill()


def test_a_client_that_leaves_ends_its_reading_and_the_next_one_is_served(server: Server) -> None:
    data = make_artifact("ep1", 40_000_000)
    server.put("ep1", data)
    for _ in range(6):
        with socket.create_connection((server.host, server.port)) as connection:
            connection.sendall(b"POST /v1/verifications/ep1 HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
    assert server.request("POST", "/v1/verifications/ep1").json()["verdict"] == "sound"
    assert "Traceback" not in server.log.read_text()


def test_a_long_reading_shows_that_it_is_alive_and_too_many_are_told_to_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verification, "_ALIVE_S", 0.01)
    monkeypatch.setattr(verification, "_WAITING", 1)
    app = create_app(ReceiverSettings(root=str(tmp_path / "root")))
    (tmp_path / "root" / "episodes" / "ep1.tar.zst").write_bytes(make_artifact("ep1"))
    released = threading.Event()
    check = app._verifications._custody.check

    def slow(*args: object, **more: object) -> object:
        released.wait(30)
        return check(*args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(app._verifications._custody, "check", slow)

    async def ask(alive: asyncio.Event) -> tuple[int, bytes]:
        status, body = 0, b""

        async def receive() -> dict[str, object]:
            if receive.first:  # type: ignore[attr-defined]
                receive.first = False  # type: ignore[attr-defined]
                return {"type": "http.request", "body": b"", "more_body": False}
            await asyncio.Event().wait()
            raise AssertionError

        receive.first = True  # type: ignore[attr-defined]

        async def send(message: dict[str, object]) -> None:
            nonlocal status, body
            if message["type"] == "http.response.start":
                status = int(str(message["status"]))
            else:
                body += bytes(message["body"])  # type: ignore[call-overload]
                if body.startswith(b"\n\n\n"):
                    alive.set()

        scope = {"type": "http", "method": "POST", "path": "/v1/verifications/ep1", "headers": [], "extensions": {}}
        await app(scope, receive, send)  # type: ignore[arg-type]
        return status, body

    async def play() -> list[tuple[int, bytes]]:
        alive = [asyncio.Event() for _ in range(4)]
        asked = [asyncio.ensure_future(ask(one)) for one in alive[:3]]
        await asyncio.gather(*(one.wait() for one in alive[:3]))
        asked.append(asyncio.ensure_future(ask(alive[3])))
        await asked[3]
        released.set()
        return list(await asyncio.gather(*asked))

    replies = asyncio.run(play())
    app.close()
    assert [status for status, _ in replies] == [200, 200, 200, 503]
    for _, body in replies[:3]:
        assert body.startswith(b"\n\n\n")
        assert body.count(b"{") >= 1
        assert body.strip().endswith(b"}")


def test_a_scrub_beside_a_running_receiver_leaves_it_alone(server: Server, tmp_path: Path) -> None:
    for number in range(5):
        server.put(f"ep{number}", make_artifact(f"ep{number}", seed=number))
    spoil(server, "ep3")
    command = [sys.executable, "-m", "fastship", "scrub", "--root", str(server.root)]
    ran = subprocess.run(command, capture_output=True, cwd=tmp_path, text=True, check=False)
    assert ran.returncode == 1, ran.stderr
    assert ran.stdout.startswith("ep3: rotted: ")
    assert "4 sound, 0 mended, 1 rotted, 0 unchecked" in ran.stdout
    assert server.request("HEAD", "/v1/episodes/ep3").status == 404
    wait_for(lambda: server.request("GET", "/v1/receipts/ep2").status == 200)
    again = subprocess.run(command, capture_output=True, cwd=tmp_path, text=True, check=False)
    assert (again.returncode, again.stdout.count("\n")) == (0, 1)
