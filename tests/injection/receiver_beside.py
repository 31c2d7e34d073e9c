"""Receivers beside their model: how requests are made of both, and what both have at the end is compared.

`crash/test_receiver_model.py` has the rules by which histories are made of this.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from asgi import Asking, LifeSpan, Reply, ask, scope_of
from hypothesis.stateful import RuleBasedStateMachine
from receiver_model import ARTIFACTS, MAX_BYTES, RIGHT, Artifact, Model, Said, Told, Upload, owner, token, wrong

from fastship import fields
from fastship.receiver.app import Receiver, create_app
from fastship.receiver.policy.decisions import Declared
from fastship.receiver.store.store import Store
from fastship.settings import ReceiverSettings

T = TypeVar("T")

SETTLED_S = 10.0  # the longest wait for threads to have done what nobody waits for


class Says(NamedTuple):
    """Which fields a request has: None, absent; False, a wrong one."""

    sha256: bool | None
    length: bool | None
    content: bool | None
    body: bool | None


class Pending(NamedTuple):
    """A request of which not all has come."""

    asking: Asking
    key: str
    body: bytes
    came: list[int]  # one number, which grows
    is_append: bool
    episode: str
    said: Said
    last: bool
    stopped: list[bool]  # a newer request has taken over; one truth


class Beside(RuleBasedStateMachine):
    """Two receivers on one root, as two processes of one, and the model."""

    tried = 0

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="receiver-model-"))
        (self.directory / "tokens").write_text("token-of-ann name=ann\ntoken-of-bob name=bob\n")
        self.root = self.directory / "root"
        self.settings = ReceiverSettings(
            root=str(self.root), token_file=str(self.directory / "tokens"), max_bytes=MAX_BYTES, reserve_bytes=0
        )
        self.runner = asyncio.Runner()
        self.apps: list[Receiver] = []
        self.lives: list[LifeSpan] = []
        self.model = Model(RIGHT)
        self.locations: list[tuple[str, str]] = []  # that were ever told, and to whom
        self.pending: list[Pending] = []
        self.start()

    def start(self) -> None:
        for _ in range(2):
            app = create_app(self.settings)
            self.apps.append(app)
            self.lives.append(self.run(begun(app)))

    def end_all(self) -> None:
        for one in [*self.pending]:
            self.drop(one)
        for life in self.lives:
            self.run(life.end())
        for app in self.apps:
            for threads in (app._threads.io, app._threads.publishing):
                threads.shutdown(wait=True)
        self.apps.clear()
        self.lives.clear()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(work)

    def key(self, client: str, episode: str, said: Said) -> str | None:
        """The upload's location, where it can be known: the same for ever."""
        if said.sha256 is None:
            return None
        declared = Declared(episode=episode, sha256=said.sha256, owner=owner(client))
        return f"/v1/uploads/{self.apps[0]._uploads.token(declared)}"

    @staticmethod
    def said(artifact: Artifact, says: Says) -> Said:
        sha, length, content, _ = says
        size = len(artifact.data) + (length is False)
        blake3 = artifact.blake3 or wrong("none")
        return Said(
            sha256=None if sha is None else artifact.sha256 if sha else wrong(artifact.sha256),
            length=None if length is None else size,
            blake3=None if content is None else blake3 if content else wrong(blake3),
            content_bytes=None if content is None else artifact.content_bytes,
        )

    @staticmethod
    def whole(upload: Upload | None) -> bytes:
        """What its client means to send."""
        means = [one.data for one in ARTIFACTS if upload is not None and upload.said.sha256 == one.sha256]
        means += [one.data for one in ARTIFACTS if upload is not None and one.data.startswith(upload.data)]
        return means[0] if means else ARTIFACTS[0].data

    def is_busy(self, key: str) -> bool:
        return any(one.key == key for one in self.pending)

    def stop(self, key: str | None, *, appends_only: bool = False) -> None:
        """A request on this upload, or its end, stops those that are under way."""
        for one in self.pending:
            if one.key == key and (one.is_append or not appends_only):
                one.stopped[0] = True

    def begin(self, client: str, method: str, path: str, headers: Sequence[tuple[str, str]], second: bool) -> Asking:
        async def begun() -> Asking:
            asking = Asking(self.apps[second], scope_of(method, path, [*headers, token(client)]))
            await asking.settled()
            return asking

        Beside.tried += 1
        return self.run(begun())

    def leave(
        self, client: str, method: str, path: str, headers: Sequence[tuple[str, str]], body: list[bytes], second: bool
    ) -> Reply | None:
        """A request whose client goes away when this much of the body has come."""

        async def left() -> Reply | None:
            asking = Asking(self.apps[second], scope_of(method, path, [*headers, token(client)]))
            for piece in body:
                asking.body(piece, more=True)
            asking.disconnect()
            return await asking.ended()

        Beside.tried += 1
        return self.run(left())

    def drop(self, one: Pending) -> None:
        self.pending.remove(one)
        one.asking.disconnect()
        reply = self.run(one.asking.ended())
        if one.stopped[0]:
            assert reply is None or reply.status in (200, 409, 503)
            return
        assert reply is None or reply.status in (400, 413)
        data = one.body[: one.came[0]]
        client = next(client for location, client in self.locations if location == one.key)
        if one.is_append:
            upload = self.model.uploads[one.key]
            self.resolve(one.key, upload.data + data, self.head(one.key))
        else:
            self.model.keep(one.key, owner(client), one.episode, one.said, data, begin_only=False)

    def head(self, key: str) -> Reply:
        client = next(client for location, client in self.locations if location == key)
        return self.run(ask(self.apps[0], "HEAD", key, [token(client)]))

    def resolve(self, key: str, most: bytes, reply: Reply) -> None:
        """What the receiver had taken of a request that did not come to its end, as it says now."""
        upload = self.model.uploads[key]
        assert reply.offset is not None
        assert max(upload.told, len(upload.data)) <= reply.offset <= len(most), (upload, reply.offset)
        if reply.offset > len(upload.data):
            upload.data = most[: reply.offset]
        upload.told = reply.offset

    def ask(
        self, told: Told, client: str, method: str, path: str, headers: Sequence[tuple[str, str]], body: list[bytes],
        second: bool,
    ) -> Reply:  # fmt: skip
        Beside.tried += 1
        reply = self.run(ask(self.apps[second], method, path, [*headers, token(client)], body))
        self.check(reply, told)
        return reply

    def check(self, reply: Reply, told: Told) -> None:
        assert (reply.status, reply.complete) == (told.status, told.complete), (reply.body, told)
        assert not told.codes or reply.code in told.codes, (reply.body, told)
        assert reply.offset is None or told.offset is None or reply.offset == told.offset, (reply.offset, told)
        if told.complete == "?1" and told.status < 300 and told.status != 204:
            receipt = reply.json()
            stored = self.model.stored[receipt["episode"]]
            assert receipt["artifact"]["sha256"] == stored.sha256
            assert "owner" not in receipt
            assert reply.headers["repr-digest"] == fields.format_digest("sha-256", stored.sha256)

    def check_reading(self, episode: str, verdict: str) -> None:
        was_right = self.model.stored[episode].is_right
        expected = self.model.read_again(episode)
        assert verdict == expected or (was_right and verdict == "mended"), (verdict, expected)

    def teardown(self) -> None:
        try:
            self.end_all()
            self.look_through()
        finally:
            self.runner.close()
            shutil.rmtree(self.directory, ignore_errors=True)

    def look_through(self) -> None:
        model = self.model
        Store(self.settings).mend()
        for episode, stored in model.stored.items():
            assert (self.root / "episodes" / f"{episode}.tar.zst").read_bytes() == stored.data
            receipt = self.root / "episodes" / f"{episode}.receipt.json"
            if stored.is_right:
                told = json.loads(receipt.read_bytes())
                assert (told["artifact"]["sha256"], told["artifact"]["bytes"]) == (stored.sha256, len(stored.data))
                assert told["content"]["blake3"] == RIGHT[stored.sha256].blake3
        uploads = {f"uploads/{key.rpartition('/')[2]}" for key in model.uploads}
        expected = {"secret", "uploads/clock"} | {
            f"{one}.{kind}" for one in uploads for kind in ("json", "part", "lock")
        }
        expected |= {f"uploads/ended/{key.rpartition('/')[2]}.json" for key in model.ended}
        expected |= {f"episodes/{episode}.tar.zst" for episode in model.stored}
        end = time.monotonic() + SETTLED_S
        while (differ := self.files() ^ expected) and time.monotonic() < end:
            time.sleep(0.01)  # what becomes of a body whose client left is decided in threads
        assert not differ, differ
        for key, upload in model.uploads.items():
            assert (self.root / "uploads" / f"{key.rpartition('/')[2]}.part").read_bytes() == upload.data
        self.check_accounts(exactly=True)
        rotted = sorted(path.read_bytes() for path in self.root.glob("rotted/*.tar.zst"))
        assert rotted == sorted(model.rotted)

    def files(self) -> set[str]:
        """Of the store, but what was set aside; an artifact's receipt is looked at by itself."""
        names = (path.relative_to(self.root).as_posix() for path in self.root.rglob("*") if path.is_file())
        kept = (one for one in names if not one.startswith(("rotted/", "accounts/")))
        return {one for one in kept if not one.endswith(".receipt.json")}

    def owned(self) -> Counter[str]:
        """Bytes of what is stored, by the owners that the receipts name."""
        found: Counter[str] = Counter()
        for path in (self.root / "episodes").glob("*.receipt.json"):
            with contextlib.suppress(FileNotFoundError, ValueError):  # one that is taken away or renewed just now
                told = json.loads(path.read_bytes())
                if path.with_name(f"{told['episode']}.tar.zst").exists():
                    found[told.get("owner", "")] += told["artifact"]["bytes"]
        return found

    def check_accounts(self, *, exactly: bool = False) -> None:
        """Nobody's account is ever less than what he has; once all is counted, and nobody is storing, it is that."""
        store = Store(self.settings)
        accounts = store.accounts
        for whose, size in self.owned().items():
            assert not whose or accounts.stored_bytes(whose) >= size, (whose, size)
        if exactly:
            assert store.recount.run()
            found = {whose: size for whose, size in accounts.all().items() if size}
            assert found == {whose: size for whose, size in self.owned().items() if whose}


async def begun(app: Receiver) -> LifeSpan:
    life = LifeSpan(app)
    await life.start()
    return life
