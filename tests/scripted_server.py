"""A raw-socket HTTP server for tests: it does, on purpose, what servers and lines do to an upload.

A script is called for each request with the server's end of the connection; it may answer early, late, in pieces or
not at all. Only on loopback, on a port the kernel chooses.
"""

from __future__ import annotations

import contextlib
import hashlib
import queue
import random
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from fastship.episode import Manifest, Verdict
from fastship.fields import format_digest
from fastship.settings import DestinationSettings, UploadSettings
from fastship.upload import Artifact, Session

GENEROUS_S = 30.0
UPLOAD = UploadSettings(retries=4, retry_min_s=0.01, retry_max_s=0.05, connect_timeout_s=GENEROUS_S)
RESUMABLE = msgspec.structs.replace(UPLOAD, one_shot_bytes=0)
MEGABYTE = 1 << 20


class Head:
    """A request's line and fields."""

    def __init__(self, raw: bytes) -> None:
        lines = raw.decode("latin-1").split("\r\n")
        self.method, self.target, _ = lines[0].split(" ")
        self.fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
        self.length = int(self.fields.get("content-length", 0))

    @property
    def creates(self) -> bool:
        return self.method == "PUT" and self.fields.get("upload-complete") == "?0"


class Peer:
    """The server's end of one connection."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._ahead = b""

    def head(self) -> Head | None:
        while b"\r\n\r\n" not in self._ahead:
            piece = self.sock.recv(65536)
            if not piece:
                return None
            self._ahead += piece
        raw, _, self._ahead = self._ahead.partition(b"\r\n\r\n")
        return Head(raw)

    def read(self, count: int) -> bytes:
        """Exactly ``count`` bytes of a body, fewer when the client is gone."""
        body = bytearray(self._ahead[:count])
        self._ahead = self._ahead[count:]
        while len(body) < count:
            piece = self.sock.recv(min(MEGABYTE, count - len(body)))
            if not piece:
                break
            body += piece
        return bytes(body)

    def go_on(self, head: Head) -> None:
        if head.fields.get("expect") == "100-continue":
            self.sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")

    def body(self, head: Head) -> bytes:
        self.go_on(head)
        return self.read(head.length)

    def answer(self, status: int, body: bytes = b"", /, **fields: str) -> None:
        lines = [f"HTTP/1.1 {status} Whatever", f"Content-Length: {len(body)}"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in fields.items()]
        self.sock.sendall("\r\n".join([*lines, "", ""]).encode("latin-1") + body)

    def cut(self) -> None:
        self.sock.shutdown(socket.SHUT_RDWR)

    def reset(self) -> None:
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()


Script = Callable[[Peer, Head], None]


class Server:
    """Runs the script for each request, a thread a connection; what the script raises fails the test."""

    def __init__(self, script: Script, tls: ssl.SSLContext | None = None, *, receive_buffer: int = 0) -> None:
        self.heads: list[Head] = []
        self.connections = 0
        self.errors: list[BaseException] = []
        self._script = script
        self._tls = tls
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        if receive_buffer:  # inherited by the connections
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.port: int = self._listener.getsockname()[1]
        self.url = f"http{'s' if tls else ''}://127.0.0.1:{self.port}"
        self._acceptor = threading.Thread(target=self._accept)
        self._acceptor.start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            self._sockets.append(sock)
            thread = threading.Thread(target=self._serve, args=(sock,))
            self._threads.append(thread)
            thread.start()

    def _serve(self, sock: socket.socket) -> None:
        with contextlib.ExitStack() as stack:
            raw = stack.enter_context(sock.dup()) if self._tls else None
            self._serve_on(sock, raw)

    def _serve_on(self, sock: socket.socket, raw: socket.socket | None) -> None:
        """``raw``: what is beneath TLS, which outlives it."""
        try:
            if self._tls:
                sock = self._tls.wrap_socket(sock, server_side=True)
                self._sockets.append(sock)
            peer = Peer(sock)
            while head := peer.head():
                self.heads.append(head)
                self._script(peer, head)
        except ssl.SSLError:
            # Closed with the client's request unread, the connection would be reset, and the alert lost with it.
            with contextlib.suppress(OSError):
                assert raw is not None
                raw.shutdown(socket.SHUT_WR)
                while raw.recv(65536):
                    pass
        except OSError:
            pass  # the client went away, or the script closed the connection
        except BaseException as error:
            self.errors.append(error)
        finally:
            sock.close()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._acceptor.join()
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        for thread in self._threads:
            thread.join()
        if self.errors:
            raise self.errors[0]

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def outline(self) -> list[str]:
        return [f"{head.method} {head.fields.get('upload-offset', '')}".strip() for head in self.heads]


class Keeper:
    """A script that is a right receiver of one episode; ``faults``, one a request, are played instead."""

    def __init__(self, artifact: Artifact, *faults: Script | None) -> None:
        self.manifest = artifact.manifest
        self.kept = bytearray()
        self.faults = list(faults)

    def __call__(self, peer: Peer, head: Head) -> None:
        fault = self.faults.pop(0) if self.faults else None
        if fault:
            fault(peer, head)
        elif head.creates and len(self.kept) < self.manifest.artifact_bytes:
            peer.answer(201, Location="/v1/uploads/1", Upload_Complete="?0", Upload_Offset=str(len(self.kept)))
        elif head.creates:
            stored(peer, head, self.manifest, 200)
        else:
            assert head.method == "PUT" or int(head.fields["upload-offset"]) == len(self.kept)
            self.kept += peer.body(head)
            stored(peer, head, self.manifest)

    def keep_then(self, count: int, end: Callable[[Peer], None]) -> Script:
        def script(peer: Peer, head: Head) -> None:
            peer.go_on(head)
            self.kept += peer.read(count)
            end(peer)

        return script

    @property
    def right(self) -> bool:
        return hashlib.sha256(self.kept).hexdigest() == self.manifest.artifact_sha256


def stored(peer: Peer, head: Head, manifest: Manifest, status: int = 201) -> None:
    peer.answer(status, Upload_Complete="?1", Repr_Digest=format_digest("sha-256", manifest.artifact_sha256))


def accept_all(peer: Peer, head: Head) -> None:
    """Take any artifact, and name the digest that the request announced."""
    peer.body(head)
    peer.answer(201, Repr_Digest=head.fields["repr-digest"])


def hold(released: threading.Event) -> None:
    """Do nothing until the test lets go."""
    released.wait()


def make_artifact(directory: Path, size: int, episode: str = "ep1") -> Artifact:
    data = random.Random(episode).randbytes(size)
    path = directory / f"{episode}.tar.zst"
    path.write_bytes(data)
    manifest = Manifest(
        episode=episode,
        artifact_sha256=hashlib.sha256(data).hexdigest(),
        artifact_bytes=size,
        content_blake3="22" * 32,
        content_bytes=size * 3,
        members=1,
        frames=1,
        frame_bytes=8 * MEGABYTE,
        levels={3: 1},
        fingerprint="00",
    )
    return Artifact(manifest, path)


def to(server: Server) -> DestinationSettings:
    return DestinationSettings(url=server.url)


def ship_all(artifacts: list[Artifact], to: DestinationSettings, upload: UploadSettings) -> dict[str, Verdict]:
    verdicts: queue.SimpleQueue[tuple[str, Verdict]] = queue.SimpleQueue()
    with Session(to, upload, on_verdict=lambda *told: verdicts.put(told)) as session:
        for artifact in artifacts:
            session.submit(artifact, first_attempt=True)
        return dict(verdicts.get(timeout=GENEROUS_S) for _ in artifacts)


def wait_until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + GENEROUS_S
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)
