"""Receivers, lines and surroundings that mean ill or are broken: what they may not do to an upload."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import threading
from pathlib import Path

import msgspec
import pytest
import trustme
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)
from scripted_server import GENEROUS_S, RESUMABLE, UPLOAD, Head, Peer, Server, accept_all, make_artifact, stored, to

from fastship.episode import Outcome, Scope
from fastship.settings import DestinationSettings
from fastship.upload import Artifact, ship

SECRET = "s3cr3t-t0ken"


@pytest.fixture
def small(tmp_path: Path) -> Artifact:
    return make_artifact(tmp_path, 50_000)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_no_proxy_is_asked_for_this_machine_itself(small: Artifact, monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    for name in ("http_proxy", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://proxy.invalid:3128")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with Server(accept_all) as server:
        verdict = ship(small, DestinationSettings(url=f"http://{host}:{server.port}"), UPLOAD)
    assert verdict.outcome is Outcome.SHIPPED
    there = ship(small, DestinationSettings(url="http://receiver.invalid"), UPLOAD)
    assert "resolve proxy" in there.error  # elsewhere the environment counts, as for every other program


@pytest.mark.parametrize("beginning", [b"", b"Content-Length: 1000\r\n\r\n"], ids=["fields", "body"])
def test_an_answer_that_trickles_is_none(small: Artifact, beginning: bytes) -> None:
    released = threading.Event()

    def trickle(peer: Peer, head: Head) -> None:
        peer.body(head)
        peer.sock.sendall(b"HTTP/1.1 201 Whatever\r\n" + beginning)
        while not released.wait(0.05):
            peer.sock.sendall(b"x" if beginning else b"A: x\r\n")

    upload = msgspec.structs.replace(UPLOAD, answer_timeout_s=0.4, retries=0)
    with Server(trickle) as server:
        ended = threading.Timer(
            GENEROUS_S / 2, released.set
        )  # so that the test ends, and fails, where it is waited for
        ended.start()
        verdict = ship(small, to(server), upload)
        assert not released.is_set()
        released.set()
        ended.cancel()
    assert (verdict.outcome, verdict.scope) == (Outcome.TRANSIENT, Scope.NETWORK)
    assert "no answer" in verdict.error


def test_an_upload_behind_a_proxy_that_takes_a_prefix_off(small: Artifact) -> None:
    """The receiver does not know of the prefix: its Location has none."""

    def behind(peer: Peer, head: Head) -> None:
        if not head.target.startswith("/lab/v1/"):
            peer.body(head)
            peer.answer(404)
        elif head.creates:
            peer.answer(201, Location="/v1/uploads/1", Upload_Complete="?0", Upload_Offset="0")
        else:
            peer.body(head)
            stored(peer, head, small.manifest)

    for end in ("", "/"):
        with Server(behind) as server:
            verdict = ship(small, DestinationSettings(url=f"{server.url}/lab{end}"), RESUMABLE)
        assert verdict.outcome is Outcome.SHIPPED
        assert [head.target for head in server.heads] == ["/lab/v1/episodes/ep1", "/lab/v1/uploads/1"]


def test_a_token_that_is_echoed_is_taken_out_of_the_answer(small: Artifact, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(SECRET)

    def echo(peer: Peer, head: Head) -> None:
        peer.body(head)
        peer.answer(422, f"you sent {head.fields['authorization']}".encode())

    with Server(echo) as server:
        verdict = ship(small, DestinationSettings(url=server.url, token_file=str(tmp_path / "token")), UPLOAD)
    assert verdict.outcome is Outcome.REJECTED
    assert verdict.body.startswith("you sent Bearer ")
    assert SECRET not in repr(verdict)


SHIP = """
import os, sys, msgspec
os.open(sys.argv[1], os.O_RDWR)  # the terminal becomes this session's own
from fastship.settings import DestinationSettings, UploadSettings
from fastship.upload import Artifact, ship
artifact = msgspec.json.decode(sys.argv[2], type=Artifact, dec_hook=lambda kind, text: kind(text))
verdict = ship(artifact, msgspec.json.decode(sys.argv[3], type=DestinationSettings), UploadSettings(retries=0))
print(verdict.outcome, verdict.scope, verdict.error)
"""


def test_a_key_with_a_passphrase_is_not_asked_for_at_the_terminal(small: Artifact, tmp_path: Path) -> None:
    issued = trustme.CA().issue_cert("lab@example.org")
    cert, locked = tmp_path / "cert.pem", tmp_path / "key.pem"
    issued.cert_chain_pems[0].write_to_path(cert)
    key = load_pem_private_key(issued.private_key_pem.bytes(), None)
    locked.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret")))
    settings = DestinationSettings(url="https://127.0.0.1", client_cert=str(cert), client_key=str(locked))
    master, slave = pty.openpty()
    try:
        with Server(accept_all) as server:
            there = msgspec.structs.replace(settings, url=f"https://127.0.0.1:{server.port}")
            values = [msgspec.json.encode(value, enc_hook=str).decode() for value in (small, there)]
            done = subprocess.run(
                [sys.executable, "-c", SHIP, os.ttyname(slave), *values],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                start_new_session=True,
                timeout=GENEROUS_S,
                check=True,
            )
    finally:
        os.close(master)
        os.close(slave)
    assert done.stdout.startswith("transient destination")
    assert "key" in done.stdout
