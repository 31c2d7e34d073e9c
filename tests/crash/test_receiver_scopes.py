"""The receiver's application with whatever an ASGI server may call it with, and some of what none should.

Hypothesis makes scopes (methods, paths, fields that are ours with values that are not, fields that are nobody's) and
the events that follow (empty pieces, a body shorter or longer than was said, a client that leaves at any of them). Held
against every one: no exception, one whole answer or none where nobody is left, never a 500, ``Connection: close`` where
body was left, and no more events asked for than there are. Afterwards the root has what was verified, nothing stray.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import threading
from pathlib import Path
from typing import Any

import faults
import pytest
from asgi import Asking, ask, scope_of
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from receiver_process import make_artifact, sha256_field

from fastship.frames import verify_content
from fastship.receiver.app import Receiver, create_app
from fastship.settings import ReceiverSettings

HERE = "tests/crash/test_receiver_scopes.py"
SCOPES = 60_000
TOKEN = "s3cret-of-the-fuzz"

GOOD = make_artifact("good", 2000)
INTEGERS = [
    "0",
    "1",
    "00",
    "-1",
    "+1",
    "5;x",
    " 7 ",
    "9" * 15,
    "9" * 16,
    "1e3",
    "0x10",
    "5, 5",
    "\u00b2",
    "",
    str(len(GOOD)),
]
DIGESTS = [
    sha256_field(GOOD),
    sha256_field(b""),
    sha256_field(b"x"),
    "sha-256=:AAAA:",
    "sha-256=::",
    "sha-256=:====:",
    "sha-256",
    "sha-256 = :x:",
    "md5=:AAAA:",
    "md5=:AAAA:, " + sha256_field(GOOD),
    sha256_field(GOOD) + ";p=1, " + sha256_field(b"x"),
    "blake3=:" + "A" * 43 + "=:",
    "sha-256=:" + "A" * 5000 + ":",
]
VALUES: dict[str, list[str]] = {
    "authorization": [f"Bearer {TOKEN}", f"bearer  {TOKEN} ", "Bearer", "Bearer ", "Basic eA==", "Bearer wrong"],
    "content-length": INTEGERS,
    "transfer-encoding": ["chunked", "identity", "gzip, chunked", ""],
    "expect": ["100-continue", "x"],
    "upgrade": ["h2c"],
    "content-type": ["application/partial-upload", "application/partial-upload; a=b", "text/plain", ""],
    "content-range": ["bytes 0-1/2"],
    "content-encoding": ["identity", "gzip", "IDENTITY"],
    "repr-digest": DIGESTS,
    "content-digest": DIGESTS,
    "want-repr-digest": ["sha-256=10", "sha-256=0", "sha-256=11", "sha-256", "md5=1, sha-256=1"],
    "fastship-content-digest": DIGESTS,
    "fastship-content-length": INTEGERS,
    "fastship-episode": ["good", "other", ""],
    "upload-complete": ["?0", "?1", "?2", "1", "?1;x", ""],
    "upload-offset": INTEGERS,
    "upload-length": INTEGERS,
    "upload-draft-interop-version": ["8", "3", "x"],
    "range": ["bytes=0-", "bytes=-1", "bytes=5-2", "bytes=0-0,2-3", "bytes=-", "bytes=-0", "bytes=99999-", "lines=1-2"],
    "if-range": ['"x"', f'"{hashlib.sha256(GOOD).hexdigest()}"', "Tue, 15 Nov 1994 12:45:26 GMT"],
    "if-none-match": ["*", '"x"', f'W/"{hashlib.sha256(GOOD).hexdigest()}"', ","],
    "x-cis490-code-commit": ["a" * 40, "x", ""],
}
NAMES = [
    "good",
    "other",
    "a",
    "A" * 200,
    "A" * 201,
    ".",
    "..",
    "%2e",
    "a b",
    "a\n",
    "\u00e9",
    "\ud7ff",
    "",
    "0" * 64,
    "f" * 64,
]

UPLOADS = [f"/v1/uploads/{number:064x}" for number in range(64)]
"""Each stands for one that was answered."""

texts = st.text(st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f"), max_size=30)
raw_values = st.binary(max_size=30).map(lambda data: data.decode("latin-1"))
methods = (
    st.sampled_from(["GET", "HEAD", "PUT", "PATCH", "POST", "DELETE", "OPTIONS", "TRACE", "CONNECT", "BREW"]) | texts
)


@st.composite
def targets(draw: st.DrawFn) -> tuple[str, str, list[tuple[str, str]]]:
    """Method, path, and the fields that such a request has: half of all are ones that could be meant."""
    name = draw(st.sampled_from(NAMES))
    upload = UPLOADS[draw(st.integers(0, len(UPLOADS) - 1))]
    kind = draw(st.sampled_from(["put", "put", "create", "append", "append", "upload", "read", "wild", "wild", "wild"]))
    if kind == "put":
        return "PUT", f"/v1/episodes/{name}", []
    if kind == "create":
        return "PUT", f"/v1/episodes/{name}", [("upload-complete", "?0"), ("repr-digest", sha256_field(GOOD))]
    if kind == "append":
        offset = draw(st.sampled_from(["0", "0", "0", "1", "700"]))
        complete = draw(st.sampled_from(["?0", "?1"]))
        of_append = [("content-type", "application/partial-upload"), ("upload-offset", offset)]
        return "PATCH", upload, [*of_append, ("upload-complete", complete)]
    if kind == "upload":
        return draw(st.sampled_from(["HEAD", "DELETE", "OPTIONS"])), upload, []
    if kind == "read":
        method, resource = draw(st.sampled_from([("GET", "episodes"), ("HEAD", "episodes"), ("GET", "receipts")]))
        return draw(st.sampled_from([(method, f"/v1/{resource}/good", []), ("POST", "/v1/verifications/good", [])]))
    resource = draw(st.sampled_from(["episodes", "uploads", "receipts", "verifications", "others"]))
    odd = draw(st.sampled_from(NAMES) | st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
    path = f"/v1/{resource}/{odd}" + draw(st.sampled_from(["", "", "", "/", "/x"]))
    return draw(methods), draw(st.sampled_from([path, path, path, "/healthz", "/metrics", upload]) | texts), []


@st.composite
def fields_of(draw: st.DrawFn, found: list[tuple[str, str]], body_bytes: int) -> list[tuple[str, str]]:
    """``found`` with the framing of the body, and others."""
    if draw(st.integers(0, 9)):
        found = [*found, ("authorization", f"Bearer {TOKEN}")]
    framing = draw(st.integers(0, 9))
    if framing <= 7:
        found = [*found, ("content-length", str(body_bytes))]
    elif framing == 8:
        found = [*found, ("transfer-encoding", "chunked")]
    for name in draw(st.lists(st.sampled_from(sorted(VALUES)), max_size=3)):
        found = [*found, (name, draw(st.sampled_from(VALUES[name]) | raw_values))]
    for name in draw(st.lists(texts, max_size=1)):
        found = [*found, (name.lower(), draw(raw_values))]
    return found


@st.composite
def bodies(draw: st.DrawFn) -> tuple[list[bytes], bool]:
    """Pieces, and whether the client leaves before it said that there are no more."""
    data = draw(
        st.sampled_from([b"", GOOD, GOOD, GOOD[:700], GOOD + b"x", b"(\xb5/\xfd", b"\0" * 300]) | st.binary(max_size=99)
    )
    cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=4)))
    pieces = [data[first:end] for first, end in zip([0, *cuts], [*cuts, len(data)], strict=True)]
    return pieces[: draw(st.integers(0, len(pieces)))] if draw(st.integers(0, 4)) == 0 else pieces, draw(
        st.integers(0, 4)
    ) == 0


def files_below(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


class Fuzz:
    """One application for all examples, as a receiver has it."""

    def __init__(self, tmp_path: Path) -> None:
        (tmp_path / "tokens").write_text(f"{TOKEN}\nanother\n")
        self.root = tmp_path / "root"
        chosen = ReceiverSettings(
            root=str(self.root), token_file=str(tmp_path / "tokens"), max_bytes=100_000, reserve_bytes=0, max_requests=8
        )
        self.app: Receiver = create_app(chosen)
        self.uploads: list[str] = []
        self.statuses: dict[int, int] = {}
        self.tried = 0

    async def one(self, data: st.DataObject) -> None:
        pieces, leaves = data.draw(bodies())
        method, path, meant = data.draw(targets())
        if path in UPLOADS and self.uploads:  # what is drawn must not depend on what was answered
            path = self.uploads[UPLOADS.index(path) % len(self.uploads)]
        scope = scope_of(method, path, data.draw(fields_of(meant, sum(map(len, pieces)))))
        if data.draw(st.booleans()):
            scope["extensions"] = data.draw(st.sampled_from([None, {}, {"http.response.push": {}}]))
        send_fails, sparse = leaves and data.draw(st.booleans()), data.draw(st.booleans())
        asking = Asking(self.app, scope, send_fails=send_fails)
        for number, piece in enumerate(pieces, 1):
            event: dict[str, Any] = {"type": "http.request"}
            if piece or not sparse:
                event["body"] = piece
            if number < len(pieces) or leaves or not sparse:
                event["more_body"] = number < len(pieces) or leaves
            asking.feed(event)
        asking.disconnect()
        self.tried += 1
        reply = await asking.ended()
        assert asking.asked <= len(pieces) + 8
        if reply is None:
            assert leaves or not pieces, "no answer to somebody who waits for it"
            return
        self.statuses[reply.status] = self.statuses.get(reply.status, 0) + 1
        assert reply.status != 500, reply.body
        assert TOKEN.encode() not in reply.body
        framed = {name for name, value in scope["headers"] if value != b"0"} & {b"content-length", b"transfer-encoding"}
        assert not (framed and asking.unread_bytes) or reply.headers.get("connection") == "close"
        if reply.status >= 400 and reply.body:
            assert set(reply.json()) >= {"error", "code"}
        if reply.status in (204, 304):
            assert "content-length" not in reply.headers or reply.status == 304
            assert reply.body == b""
        elif "content-length" in reply.headers and method != "HEAD":
            assert int(reply.headers["content-length"]) == len(reply.body)
        if "location" in reply.headers and reply.headers["location"] not in self.uploads:
            self.uploads.append(reply.headers["location"])

    def look_through(self) -> None:
        found = files_below(self.root)
        stored = {name for name in found if name.startswith("episodes/")}
        for name in sorted(stored):
            if name.endswith(".tar.zst"):
                receipt = json.loads((self.root / name.replace(".tar.zst", ".receipt.json")).read_bytes())
                artifact = self.root / name
                assert receipt["artifact"]["sha256"] == hashlib.sha256(artifact.read_bytes()).hexdigest()
                assert receipt["content"]["blake3"] == verify_content(artifact).blake3
        accounts = {name for name in found if name.startswith("accounts/")}
        kinds = {name.rpartition(".")[2] for name in found - stored - accounts}
        assert kinds <= {"secret", "uploads/clock", "json", "part", "lock"}, kinds
        assert not [name for name in found if "one-" in name or "tmp" in name]


@pytest.mark.timeout(900)
def test_any_scope(tmp_path: Path) -> None:
    fuzz = Fuzz(tmp_path)
    with asyncio.Runner() as runner:

        @seed(faults.SEED)
        @settings(
            max_examples=faults.times(SCOPES, least=500),
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=(Phase.generate, Phase.shrink),
        )
        @given(st.data())
        def each(data: st.DataObject) -> None:
            runner.run(fuzz.one(data))

        threads = files = 0

        async def grown() -> tuple[int, int]:
            return threading.active_count(), len(os.listdir("/proc/self/fd"))

        try:
            runner.run(
                ask(
                    fuzz.app,
                    "PUT",
                    "/v1/episodes/good",
                    [("authorization", f"Bearer {TOKEN}"), ("content-length", str(len(GOOD)))],
                    [GOOD],
                )
            )
            threads, files = runner.run(grown())
            each()
            after = runner.run(grown())
        finally:
            fuzz.app.close()
    assert after[1] <= files + 10
    assert after[0] <= threads + 60
    fuzz.look_through()
    print(sorted(fuzz.statuses.items()))
    faults.count(
        "hostile: ASGI scopes",
        "methods, paths, fields, pieces and departures that Hypothesis makes, on the application without a server: no"
        " exception, no 500, nothing unverified stored, nothing stray",
        of=SCOPES,
        tried=fuzz.tried,
        test=HERE,
    )
