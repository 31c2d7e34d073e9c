"""A receiver as a real process, and a client of it that is not fastship's own: http.client, curl and raw sockets."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import io
import json
import random
import select
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import msgspec
import psutil
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

    def begin_append(self, location: str, data: bytes, offset: int, send: int, **fields: str) -> socket.socket:
        """A PATCH of all of ``data`` of which only ``send`` bytes are sent."""
        connection = socket.create_connection((self.host, self.port), timeout=WAIT_S)
        head = (
            f"PATCH {location} HTTP/1.1\r\nHost: x\r\nContent-Type: application/partial-upload\r\n"
            f"Upload-Offset: {offset}\r\nUpload-Complete: ?1\r\nContent-Length: {len(data)}\r\n"
        )
        head += "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in fields.items()) + "\r\n"
        connection.sendall(head.encode() + data[:send])
        return connection

    def curl(self, *arguments: str, send: bytes = b"") -> tuple[int, bytes]:
        """Run curl, with ``send`` on its standard input; the final status and the output."""
        command = ["curl", "-sS", "-m", str(int(WAIT_S)), "-w", "\n%{http_code}", *arguments]
        done = subprocess.run(command, input=send, capture_output=True, check=True, timeout=2 * WAIT_S)
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


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.02)


def check_stored(server: Server, episode: str, data: bytes, **fields: str) -> None:
    """Artifact, receipt and what HTTP gives of both are of ``data``."""
    assert server.stored(episode) == data
    on_disk = json.loads((server.root / "episodes" / f"{episode}.receipt.json").read_bytes())
    del on_disk["seal"]
    on_disk.pop("owner", None)  # which is told to nobody
    assert on_disk["artifact"] == {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    assert server.request("GET", f"/v1/receipts/{episode}", **fields).json() == on_disk
    got = server.request("GET", f"/v1/episodes/{episode}", **fields)
    assert got.body == data
    assert got.headers["repr-digest"] == sha256_field(data)
