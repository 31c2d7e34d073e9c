"""What the system and crash tests work with: a lab host's spool and the destinations it ships to.

All of it is real: directories on disk, HTTP over loopback on ports the kernel chooses, processes. `Destination` is a
server whose answers a test sets; `Receiver` is ``fastship receive`` in a process of its own; `Wire` is a line that can
be cut. Waiting is always for a condition, with a limit that only a fault reaches.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import psutil
import pytest
import zstandard
from relay import Relay

from fastship import PassResult, Settings, Shipper, status
from fastship.episode import ARTIFACT_SUFFIX, MARKER
from fastship.fields import REPR_DIGEST, format_digest, parse_digest
from fastship.status import Snapshot

GENEROUS_S = 60.0
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def wait_until(true: Callable[[], Any], what: str, limit_s: float = GENEROUS_S) -> None:
    end = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < end, f"waited in vain for: {what}"
        time.sleep(0.002)


# --- the spool ---------------------------------------------------------------------------------------------------


Sections = Mapping[str, Mapping[str, Any]]


class Lab:
    """A spool below ``directory`` and the settings to ship from it."""

    def __init__(self, directory: Path, url: str, sections: Sections) -> None:
        self.root = directory / "spool"
        self.episodes = self.root / "episodes"
        self.outbox = self.root / "outbox"
        self.shipped = self.root / "shipped"
        self.quarantine = self.root / "quarantine"
        self.state = self.root / "state"
        self.url = url
        self._sections = {name: dict(section) for name, section in sections.items()}
        self.episodes.mkdir(parents=True)

    def values(self, sections: Sections | None = None) -> dict[str, dict[str, Any]]:
        """One worker with one thread, unless said otherwise."""
        values: dict[str, dict[str, Any]] = {
            "spool": {"root": str(self.root)},
            "destination": {"url": self.url},
            "workers": {"count": 1},
            "pack": {"threads": 1},
        }
        for layer in (self._sections, sections or {}):
            for name, section in layer.items():
                values.setdefault(name, {}).update(section)
        return values

    def settings(self, sections: Sections | None = None) -> Settings:
        return Settings.load(profile="ci", values=self.values(sections))

    def settings_file(self, sections: Sections | None = None) -> Path:
        """(Over)write a fastship.toml with the same."""
        path = self.root.parent / "fastship.toml"
        lines = ['profile = "ci"']
        for name, section in self.values(sections).items():
            lines += [
                f"[{name}]",
                *(f"{key} = {msgspec.json.encode(value).decode()}" for key, value in section.items()),
            ]
        path.write_text("\n".join(lines) + "\n")
        return path

    def once(self, sections: Sections | None = None) -> PassResult:
        return Shipper(self.settings(sections)).run_once()

    def episode(
        self, name: str = "ep1", files: Mapping[str, bytes] | None = None, *, meta: Any = None, marker: bool = True
    ) -> Path:
        """Record an episode, the marker last."""
        directory = self.episodes / name
        directory.mkdir()
        meta = {"code_version": {"commit": COMMIT}} if meta is None else meta
        (directory / "meta.json").write_bytes(meta if isinstance(meta, bytes) else msgspec.json.encode(meta))
        for path, data in (files or {"telemetry.jsonl": f'{{"episode": "{name}"}}\n'.encode() * 50}).items():
            (directory / path).parent.mkdir(parents=True, exist_ok=True)
            (directory / path).write_bytes(data)
        if marker:
            (directory / MARKER).touch()
        return directory

    def names(self, directory: str) -> list[str]:
        """What is in one of the spool's directories; nothing while it is not there yet."""
        with contextlib.suppress(FileNotFoundError):
            return sorted(os.listdir(self.root / directory))
        return []

    def artifact(self, name: str = "ep1") -> Path:
        return self.outbox / (name + ARTIFACT_SUFFIX)

    def snapshot(self) -> Snapshot | None:
        return status.read(self.state)


def noise(size: int, seed: object = 1) -> bytes:
    """Bytes that do not compress: an artifact of them is as large as they are."""
    return random.Random(str(seed)).randbytes(size)


def telemetry(size: int, seed: object = 1) -> bytes:
    """Bytes that compress as telemetry does, and take zstd some time."""
    source = random.Random(str(seed))
    lines = [f'{{"t": {source.random():.6f}, "cpu": {source.gauss(50, 9):.3f}}}\n' for _ in range(4000)]
    piece = "".join(source.choices(lines, k=20000)).encode()
    return (piece * (size // len(piece) + 1))[:size]


def tree(directory: Path) -> dict[str, Any]:
    """Everything below ``directory`` that a tar carries: kind, permissions, whole-second mtime, content."""
    found: dict[str, Any] = {}
    for path in sorted(directory.rglob("*")):
        facts = path.lstat()
        content: Any = None
        if path.is_symlink():
            content = os.readlink(path)
        elif path.is_file():
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        seconds = None if path.is_symlink() else int(facts.st_mtime)
        found[str(path.relative_to(directory))] = (oct(facts.st_mode), seconds, content)
    return found


def contents_of(artifact: bytes) -> dict[str, str | None]:
    """Digest of each file of a stored artifact, without the episode's id."""
    reader = zstandard.ZstdDecompressor().stream_reader(artifact, read_across_frames=True)
    found: dict[str, str | None] = {}
    with tarfile.open(fileobj=io.BytesIO(reader.read())) as tar:
        for member in tar.getmembers()[1:]:
            file = tar.extractfile(member)
            found[member.name.partition("/")[2]] = hashlib.sha256(file.read()).hexdigest() if file else None
    return found


def contents(facts: dict[str, Any]) -> dict[str, str | None]:
    return {path: digest for path, (_, _, digest) in facts.items()}


# --- processes ---------------------------------------------------------------------------------------------------


class Daemon:
    """`Shipper.run_forever` in a thread of the test."""

    def __init__(self, settings: Settings, heartbeat: Callable[[], None] | None = None) -> None:
        self.told = threading.Event()
        self.beats = 0
        self.result: PassResult | None = None
        self.error: BaseException | None = None
        self._heartbeat = heartbeat
        self._settings = settings
        self._thread = threading.Thread(target=self._run, name="daemon")
        self._thread.start()

    def _run(self) -> None:
        try:
            self.result = Shipper(self._settings).run_forever(stop_check=self.told.is_set, heartbeat=self._beat)
        except BaseException as error:
            self.error = error

    def _beat(self) -> None:
        self.beats += 1
        if self._heartbeat is not None:
            self._heartbeat()

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def stop(self) -> PassResult:
        self.told.set()
        self._thread.join(GENEROUS_S)
        assert not self._thread.is_alive(), "the daemon did not end"
        if self.error is not None:
            raise self.error
        assert self.result is not None
        return self.result

    def __enter__(self) -> Daemon:
        return self

    def __exit__(self, *_: object) -> None:
        self.told.set()
        self._thread.join(GENEROUS_S)


def fastship(*arguments: str | Path) -> list[str]:
    """The command line."""
    return [sys.executable, "-m", "fastship", *map(str, arguments)]


class Command:
    """``fastship ...`` in a process of its own, its log kept."""

    def __init__(
        self, *arguments: str | Path, log: Path, env: Mapping[str, str] | None = None, prefix: tuple[str, ...] = ()
    ) -> None:
        self.log_path = log
        with log.open("wb") as stderr:
            self.process = subprocess.Popen(
                [*prefix, *fastship(*arguments)],
                stdout=subprocess.PIPE,
                stderr=stderr,
                stdin=subprocess.DEVNULL,
                cwd=log.parent,
                env={**os.environ, **(env or {})},
            )

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self) -> int:
        return self.process.wait(GENEROUS_S)

    def end(self) -> None:
        """SIGKILL it and its workers, whatever they are at."""
        ended = workers_of(self.process.pid) if self.process.poll() is None else []
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        if self.process.stdout:
            self.process.stdout.close()
        for worker in ended:
            with contextlib.suppress(psutil.NoSuchProcess):
                worker.kill()
                worker.wait(GENEROUS_S)

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


def workers_of(pid: int | None = None) -> list[psutil.Process]:
    """The worker processes of a supervisor (None: this process is it)."""
    found = []
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(pid).children():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                if "fastship.worker" in child.cmdline() and child.status() != psutil.STATUS_ZOMBIE:
                    found.append(child)
    return found


# --- destinations ------------------------------------------------------------------------------------------------


class Heard(NamedTuple):
    """One request as it came."""

    method: str
    episode: str
    fields: dict[str, str]  # names in lower case
    body: bytes

    @property
    def creates(self) -> bool:
        return self.method == "PUT" and self.fields.get("upload-complete") == "?0"


class Reply(NamedTuple):
    status: int  # 0: cut the connection instead
    body: bytes = b""
    fields: Mapping[str, str] = {}


STORE = Reply(201)  # store it, with proof


class Destination:
    """A server that stores what it is sent, or answers what a test tells it to.

    ``says[episode]`` (or ``says["*"]``) are the replies to the next offers of it; the last one stays.
    """

    def __init__(self) -> None:
        self.heard: list[Heard] = []
        self.stored: dict[str, bytes] = {}
        self.says: dict[str, list[Reply]] = {}
        self.gate = threading.Event()  # closed, an offer waits for its answer
        self.gate.set()
        self._partials: dict[str, bytearray] = {}
        self._announced: dict[str, str] = {}
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True
            wbufsize = -1

            def do_PUT(self) -> None:
                outer._serve(self)

            do_PATCH = do_HEAD = do_POST = do_PUT

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64

            def handle_error(self, *_: object) -> None:
                pass  # the client went away: some tests see to that

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def say(self, episode: str, *replies: Reply) -> None:
        self.says[episode] = list(replies)

    def offers(self, episode: str | None = None) -> list[Heard]:
        """The requests that offered an episode (not the appends to an upload)."""
        return [one for one in self.heard if one.method == "PUT" and episode in (None, one.episode)]

    def _serve(self, request: BaseHTTPRequestHandler) -> None:
        fields = {name.lower(): value for name, value in request.headers.items()}
        body = request.rfile.read(int(fields.get("content-length", 0)))
        heard = Heard(request.command, request.path.rpartition("/")[2], fields, body)
        with self._lock:
            self.heard.append(heard)
        self.gate.wait(GENEROUS_S)
        with self._lock:
            reply = self._decide(heard)
        if reply.status == 0:
            request.close_connection = True
            request.connection.shutdown(socket.SHUT_RDWR)
            return
        request.send_response(reply.status)
        for name, value in {"Content-Length": str(len(reply.body)), **reply.fields}.items():
            request.send_header(name, value)
        request.end_headers()
        if heard.method != "HEAD":
            request.wfile.write(reply.body)
        request.wfile.flush()

    def _decide(self, heard: Heard) -> Reply:
        episode = heard.episode
        if heard.method in ("PUT", "POST"):
            script = self.says.get(episode) or self.says.get("*")
            if script:
                reply = script.pop(0) if len(script) > 1 else script[0]
                if reply is not STORE:
                    return reply
        if heard.method == "POST":
            return Reply(501)  # as servers do that cannot read again
        if heard.method == "PUT":
            if episode in self.stored:
                return self._proven(200, episode)
            self._announced[episode] = heard.fields.get("repr-digest", "")
            if heard.creates:
                partial = self._partials.setdefault(episode, bytearray())
                place = {"Location": f"/v1/uploads/{episode}", "Upload-Offset": str(len(partial))}
                return Reply(201, fields={"Upload-Complete": "?0", **place})
            return self._store(episode, heard.body)
        if heard.method == "PATCH":
            self._partials[episode] += heard.body
            if heard.fields.get("upload-complete") == "?1":
                return self._store(episode, bytes(self._partials.pop(episode)))
            offset = str(len(self._partials[episode]))
            return Reply(204, fields={"Upload-Complete": "?0", "Upload-Offset": offset})
        return self._proven(200, episode) if episode in self.stored else Reply(404)

    def _store(self, episode: str, data: bytes) -> Reply:
        if parse_digest(self._announced[episode], "sha-256") != hashlib.sha256(data).hexdigest():
            return Reply(400, b'{"error": "wrong digest"}', {"Upload-Complete": "?1"})
        self.stored[episode] = data
        return self._proven(201, episode)

    def _proven(self, status: int, episode: str) -> Reply:
        digest = hashlib.sha256(self.stored[episode]).hexdigest()
        return Reply(status, fields={"Upload-Complete": "?1", REPR_DIGEST: format_digest("sha-256", digest)})

    def close(self) -> None:
        self.gate.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class Receiver:
    """``fastship receive`` on loopback, in a process of its own."""

    def __init__(
        self, root: Path, *options: str | Path, listen: str = "127.0.0.1:0", prefix: Sequence[str] = ()
    ) -> None:
        """``prefix`` is put before the command line (strace)."""
        self.root = root
        self.options = options
        self.prefix = prefix
        root.mkdir(parents=True, exist_ok=True)
        self._log = (root.parent / f"{root.name}.log").open("ab")
        self.url = ""
        self.start(listen)

    def start(self, listen: str | None = None) -> None:
        """Start it, again on the same port unless said otherwise."""
        listen = listen or self.url.removeprefix("http://")
        self.process = subprocess.Popen(
            [*self.prefix, *fastship("receive", "--root", self.root, "--listen", listen, *self.options)],
            stdout=subprocess.PIPE,
            stderr=self._log,
            stdin=subprocess.DEVNULL,
        )
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().decode().strip()
        assert re.fullmatch(r"http://127\.0\.0\.1:[0-9]+", self.url), "the receiver did not start"

    def kill(self) -> None:
        """SIGKILL."""
        self._signal(signal.SIGKILL)
        self._reap()

    def _signal(self, number: int) -> None:
        """To the receiver; what stands before it ends with it."""
        own = psutil.Process(self.process.pid)
        for process in own.children() if self.prefix else [own]:
            process.send_signal(number)

    def _reap(self) -> None:
        self.process.wait(GENEROUS_S)
        if self.process.stdout:
            self.process.stdout.close()

    def artifact(self, episode: str) -> Path:
        return self.root / "episodes" / (episode + ARTIFACT_SUFFIX)

    def stored(self) -> set[str]:
        """The ids it has published."""
        return {path.name.removesuffix(ARTIFACT_SUFFIX) for path in self.root.glob(f"episodes/*{ARTIFACT_SUFFIX}")}

    def arrived_bytes(self) -> int:
        """Bytes of the uploads in the making."""
        total = 0
        for path in (self.root / "uploads").rglob("*"):
            with contextlib.suppress(FileNotFoundError):
                total += path.stat().st_size if path.is_file() else 0
        return total

    def close(self) -> None:
        if self.process.poll() is None:
            self._signal(signal.SIGTERM)
        self._reap()
        self._log.close()


class Wire(Relay):
    """A line to ``url`` that is cut once, when so many bytes of requests have gone over it."""

    def __init__(self, url: str, cut_after_bytes: int) -> None:
        self._rest: int | None = cut_after_bytes
        self.cuts = 0
        super().__init__(int(url.rpartition(":")[2]))

    def carry(self, number: int, source: socket.socket, sink: socket.socket, *, outward: bool) -> None:
        while data := source.recv(1 << 16):
            if outward and self._rest is not None:
                self._rest -= len(data)
                if self._rest <= 0:
                    self._rest = None
                    self.cuts += 1
                    return
            sink.sendall(data)


# --- what came of it -------------------------------------------------------------------------------------------------


def results(lab: Lab) -> dict[str, status.EpisodeResult]:
    snapshot = lab.snapshot()
    assert snapshot is not None
    return {one.episode: one for one in snapshot.recent if one.outcome == "shipped"}


def read_back(receiver: Receiver, episode: str, target: Path, *, stock: bool = True) -> dict[str, object]:
    """What is stored at the receiver, extracted: by ``zstd -d | tar x``, or by ``fastship extract``."""
    target.mkdir(exist_ok=True)
    artifact = receiver.artifact(episode)
    if stock:
        if not (shutil.which("zstd") and shutil.which("tar")):
            pytest.skip("no zstd and tar programs here")
        with subprocess.Popen(["zstd", "-dcq", artifact], stdout=subprocess.PIPE) as unpacking:
            subprocess.run(["tar", "xpf", "-", "-C", target], stdin=unpacking.stdout, check=True)
        assert unpacking.returncode == 0
    else:
        subprocess.run(fastship("extract", artifact, "-C", target, "--quiet"), check=True)
    return tree(target / episode)
