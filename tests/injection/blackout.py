"""One run of everything that a loss of power could spoil, under strace: what the tests of durability read.

Run as a program it is the run: a receiver, clients that are not fastship's, a pass of ``fastship once`` over all ways
to upload with a conflict and a refusal, an operator's words on both, another pass. `record` has it run under strace,
once for all processes of a test run. What an operator was told is told by directories made in it.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import functools
import hashlib
import http.client
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlparse

import syscalls
from lab import COMMIT, GENEROUS_S, Lab, Receiver, fastship, noise, telemetry
from receiver_process import make_artifact, sha256_field
from syscalls import Call

from fastship import Settings, Shipper
from fastship.shipper import operate

EPISODES: Mapping[str, bytes] = {
    # Stored together with others; at once, on its own; by appends; sent while it is packed.
    **{f"small{number}": noise(2_000, number) for number in range(4)},
    "whole": noise(600_000, "whole"),
    "appended": noise(800_000, "appended"),
    "streamed": telemetry(12_000_000, "streamed"),  # hard to pack: the sending begins long before all of it is
    "conflict": telemetry(5_000, "conflict"),
    "refused": telemetry(5_000, "refused"),
}
OTHERS: Mapping[str, bytes] = {
    "conflict": make_artifact("conflict", 3_000),
    "twins": make_artifact("twins", 3_000, 1),
    "chunked": make_artifact("chunked", 300_000, 2),
    "pieces": make_artifact("pieces", 300_000, 3),
    "direct": make_artifact("direct", 3_500_000, 4),
}
"""Artifacts that clients send which are not fastship's."""

VALUES: Mapping[str, Mapping[str, Any]] = {
    "upload": {"one_shot_bytes": 700_000, "stream_bytes": 900_000},
    "pack": {"frame_bytes": 65536, "threads": 1, "level": 15},
    "workers": {"count": 2},
}
RECEIVER = ("receiver.sync_bytes=128KiB", "receiver.reserve_bytes=0")


def settings(root: Path, url: str) -> Settings:
    return Settings.load(profile="ci", values={**VALUES, "spool": {"root": str(root)}, "destination": {"url": url}})


def receiver_options(top: Path) -> list[str]:
    return ["--commits", str(top / "commits"), *(word for one in RECEIVER for word in ("--set", one))]


def run(top: Path) -> None:
    """All of it. Each step that an operator was told of is told in the trace."""

    def told(what: str) -> None:
        (top / "told" / what).mkdir()

    spool = top / "spool"
    with contextlib.closing(Receiver(top / "store", *receiver_options(top))) as receiver:
        send(receiver.url)
        chosen = settings(spool, receiver.url)
        words = [
            f"{name}.{key}={value}" for name, section in chosen_values(spool, receiver.url) for key, value in section
        ]
        command = fastship("once", "--profile", "ci", "--quiet", *(word for one in words for word in ("--set", one)))
        ended = subprocess.run(command, capture_output=True, text=True)
        assert "quarantined" in ended.stderr, ended.stderr
        told("retry?")
        operate(chosen, "retry", "refused")
        told("retry")
        told("keep-local?")
        operate(chosen, "keep-local", "conflict", new_id="another")
        told("keep-local")
        result = Shipper(chosen).run_once()
        assert (result.shipped, result.fatal) == (1, 1), result
        told("drop?")
        operate(chosen, "drop", "refused")
        told("drop")


def chosen_values(root: Path, url: str) -> Iterator[tuple[str, list[tuple[str, Any]]]]:
    for name, section in {**VALUES, "spool": {"root": str(root)}, "destination": {"url": url}}.items():
        yield name, list(section.items())


# --- clients that are not fastship's -----------------------------------------------------------------------------


class Said(NamedTuple):
    status: int
    fields: Mapping[str, str]
    body: bytes


def ask(
    url: str,
    method: str,
    path: str,
    body: bytes | None = None,
    fields: Mapping[str, str] | None = None,
    *,
    chunked: bool = False,
) -> Said:
    parts = urlparse(url)
    headers = {"X-Cis490-Code-Commit": COMMIT, **(fields or {})}
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=GENEROUS_S)
    try:
        if chunked:
            assert body is not None
            pieces = (body[at : at + 50_000] for at in range(0, len(body), 50_000))
            connection.request(method, path, pieces, {"Transfer-Encoding": "chunked", **headers}, encode_chunked=True)
        else:
            connection.request(method, path, body if body is not None or method == "HEAD" else b"", headers)
        answer = connection.getresponse()
        return Said(answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read())
    finally:
        connection.close()


def send(url: str) -> None:
    """What fastship does not do: chunked bodies, ends before the declared length, wrong digests, several at once."""
    put = functools.partial(ask, url, "PUT")
    assert put("/v1/episodes/conflict", OTHERS["conflict"]).status == 201
    for name, more in (("twins", {"Fastship-Content-Length": "10240"}), ("chunked", {})):
        answers: list[int] = []

        def one(name: str = name, more: Mapping[str, str] = more, answers: list[int] = answers) -> None:
            data = OTHERS[name]
            fields = {"Repr-Digest": sha256_field(data), **more}
            answers.append(put(f"/v1/episodes/{name}", data, fields, chunked=name == "chunked").status)

        threads = [threading.Thread(target=one) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert 201 in answers, answers
    data = OTHERS["pieces"]
    declared = {"Upload-Length": str(len(data)), "Repr-Digest": sha256_field(data), "Upload-Complete": "?0"}
    place = put("/v1/episodes/pieces", None, declared).fields["location"]

    def append(first: int, end: int, complete: str, status: int, body_digest: str = "") -> None:
        fields = {"Content-Type": "application/partial-upload", "Upload-Offset": str(first)}
        fields |= {"Upload-Complete": complete} | ({"Content-Digest": body_digest} if body_digest else {})
        said = ask(url, "PATCH", place, data[first:end], fields, chunked=True)
        assert said.status == status, said

    append(0, 70_000, "?0", 204)
    append(70_000, 140_000, "?0", 400, sha256_field(b"another"))
    append(70_000, 210_000, "?0", 204, sha256_field(data[70_000:210_000]))
    append(210_000, 250_000, "?1", 400)  # too short
    assert ask(url, "HEAD", place).fields["upload-offset"] == "250000"
    append(250_000, len(data), "?1", 201)
    assert ask(url, "HEAD", place).fields["upload-complete"] == "?1"
    assert put("/v1/episodes/pieces", None, declared).status == 200
    digest = {"Repr-Digest": sha256_field(OTHERS["direct"])}
    assert put("/v1/episodes/direct", OTHERS["direct"], digest).status == 201


# --- recorded ----------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """What was recorded, and what was there before."""

    top: Path
    calls: list[Call]
    spool_before: Path
    store_before: Path
    artifacts: Mapping[str, bytes]  # by episode, as the receiver has them at the end

    @property
    def spool(self) -> Path:
        return self.top / "spool"

    @property
    def store(self) -> Path:
        return self.top / "store"


def record(directory: Path) -> Run:
    """Run it under strace below ``directory``, where it was not yet done; processes that ask together wait."""
    directory.mkdir(parents=True, exist_ok=True)
    top, trace = directory / "run", directory / "trace"
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (directory / "done").exists():
            top.mkdir()
            (top / "told").mkdir()
            (top / "store").mkdir()
            (top / "commits").write_text(f"{COMMIT}\n")
            lab = Lab(top, "", {})
            for name, data in EPISODES.items():
                meta = {"code_version": {"commit": "f" * 40}} if name == "refused" else None
                lab.episode(name, {"data": data}, meta=meta)
            shutil.copytree(top / "spool", directory / "spool-before", symlinks=True)
            (directory / "store-before").mkdir()
            command = [*syscalls.strace(trace), sys.executable, __file__, str(top)]
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}  # pytest's: what it imports is there
            ended = subprocess.run(command, env=environment, capture_output=True, text=True)
            assert ended.returncode == 0, ended.stderr
            (directory / "done").touch()
    calls = syscalls.read(trace, [top])
    stored = {path.name.removesuffix(".tar.zst"): path.read_bytes() for path in top.glob("store/episodes/*.tar.zst")}
    return Run(top, calls, directory / "spool-before", directory / "store-before", stored)


# --- what was said on the wire -----------------------------------------------------------------------------------


class Exchange(NamedTuple):
    """A request and its final answer; ``at`` is where in the trace the answer left."""

    at: int
    method: str
    path: str
    asked: Mapping[str, str]
    status: int
    answered: Mapping[str, str]

    @property
    def stored_sha256(self) -> str | None:
        """Of the artifact that the receiver says it has, when that is what the answer says."""
        told = self.answered.get("repr-digest", "")
        about_episode = self.answered.get("upload-complete") == "?1" or self.path.startswith("/v1/episodes/")
        if self.status not in (200, 201) or not told or not about_episode:
            return None
        return base64.b64decode(told.removeprefix("sha-256=:").removesuffix(":")).hex()


def exchanges(calls: list[Call]) -> list[Exchange]:
    """In the order of the answers. Of a request only the head is looked at; it came in one piece."""
    asked: dict[str, tuple[str, str, dict[str, str]]] = {}
    found = []
    for call in calls:
        if call.name == "sendto" and (request := re.match(rb"([A-Z]+) (/\S+) HTTP/1\.1\r\n", call.data)):
            asked[call.connection] = (request[1].decode(), request[2].decode(), _fields(call.data))
        elif call.name in ("write", "writev") and (answer := re.match(rb"HTTP/1\.1 ([2-5]\d\d) ", call.data)):
            there, _, here = call.connection.partition("->")
            request_of = asked.get(f"{here}->{there}")
            if request_of is not None:
                found.append(Exchange(call.begun, *request_of, int(answer[1]), _fields(call.data)))
    return found


def _fields(data: bytes) -> dict[str, str]:
    head = data.partition(b"\r\n\r\n")[0].decode("latin-1")
    lines = [line.partition(":") for line in head.split("\r\n")[1:]]
    return {name.lower(): value.strip() for name, _, value in lines}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


if __name__ == "__main__":
    run(Path(sys.argv[1]))
