"""The receiver's application beside a small model of docs/protocol.md (`receiver_model`).

Hypothesis makes histories: clients create uploads, append (rightly, elsewhere, too much, not what the digest says),
send whole artifacts, leave at any byte, ask, cancel, repeat, race each other on one upload; artifacts rot, are cut,
lose their receipts; the receiver is started again, and two of them serve one root as two processes do; a week goes by.
After every step the answer is the model's, and at the end the store is: each stored artifact byte-equal, each receipt
true, each unfinished upload with the bytes that it was told, and no other file.
"""

from __future__ import annotations

import contextlib
import os
import time

import faults
import pytest
from asgi import ask
from histories import go_through
from hypothesis import strategies as st
from hypothesis.stateful import invariant, precondition, rule
from receiver_beside import Beside, Pending, Says
from receiver_model import (
    ARTIFACTS,
    MAX_BYTES,
    NOT_FOUND,
    UNAUTHORIZED,
    Artifact,
    Stored,
    Told,
    Upload,
    cut,
    framing,
    of_artifact,
    of_body,
    owner,
    sha256,
    token,
)

from fastship import fields
from fastship.receiver.store.scrub import Scrub

HERE = "tests/crash/test_receiver_model.py"
HISTORIES = 3000
STEPS = 30
WEEK_S, TWO_HOURS_S = 8 * 86400, 7200


clients = st.sampled_from(["ann", "ann", "bob"])
episodes = st.sampled_from(["e1", "e2"])
sent = st.sampled_from([*ARTIFACTS[:3] * 2, *ARTIFACTS])
receivers = st.booleans()


@st.composite
def sayings(draw: st.DrawFn) -> Says:
    """One lie at most, and seldom: two would hide each other."""
    found = [draw(st.sampled_from([None, True])) for _ in Says._fields]
    lie = draw(st.integers(0, 23))
    return Says(*(False if number == lie else one for number, one in enumerate(found)))


ways = st.sampled_from(["length", "expect", "chunked"])
tenths = st.integers(0, 10)
picks = st.integers(0, 1000)
seldom_false = st.sampled_from([None, None, None, True, True, False])


class History(Beside):
    # --- what a client does -------------------------------------------------------------------------------------

    @rule(
        client=clients, episode=episodes, artifact=sent, second=receivers, says=sayings(), way=ways, pieces=tenths
    )  # fmt: skip
    def put(
        self, client: str, episode: str, artifact: Artifact, second: bool, says: Says, way: str, pieces: int
    ) -> None:  # fmt: skip
        said = self.said(artifact, says)
        headers = [*of_artifact(said), *of_body(artifact.data, says.body), *framing(way, len(artifact.data))]
        told = self.model.put(
            self.key(client, episode, said),
            episode,
            said,
            artifact.data,
            declared=way != "chunked",
            body_right=says.body is not False,
        )
        if told.status == 201:
            self.stop(self.key(client, episode, said))
        self.ask(told, client, "PUT", f"/v1/episodes/{episode}", headers, cut(artifact.data, pieces), second)

    @rule(
        client=clients, episode=episodes, artifact=sent, second=receivers, says=sayings(), way=ways, came=tenths,
        pieces=tenths,
    )  # fmt: skip
    def put_and_leave(
        self, client: str, episode: str, artifact: Artifact, second: bool, says: Says, way: str, came: int, pieces: int
    ) -> None:  # fmt: skip
        said = self.said(artifact, says._replace(sha256=True))
        key = self.key(client, episode, said)
        declared = way != "chunked"
        told = self.model.before_body(episode, said, len(artifact.data) if declared else None, whole=True)
        data = artifact.data[: len(artifact.data) * came // 11]
        headers = [*of_artifact(said), *framing(way, len(artifact.data))]
        reply = self.leave(client, "PUT", f"/v1/episodes/{episode}", headers, cut(data, pieces), second)
        if told is not None and reply is not None:
            self.check(reply, told)
            return
        if told is not None:  # a small body is read before anything is decided
            assert way == "length"
            assert reply is None
            return
        if len(data) > MAX_BYTES or (said.length is not None and len(data) > said.length):
            assert reply is not None
            assert reply.status in (400, 413)
            return
        assert reply is None
        small = way == "length" and said.content_bytes is not None
        length = len(artifact.data) if declared else said.length
        self.model.keep(key or "", owner(client), episode, said._replace(length=length), data, begin_only=small)

    @rule(
        client=clients, episode=episodes, artifact=sent, second=receivers, says=sayings(),
        first=st.sampled_from([0, 0, 0, 3, 10]),
    )  # fmt: skip
    def create(
        self, client: str, episode: str, artifact: Artifact, second: bool, says: Says, first: int
    ) -> None:  # fmt: skip
        said = self.said(artifact, says)
        key = self.key(client, episode, said)
        if key is not None and self.is_busy(key):
            return
        body = artifact.data[: len(artifact.data) * first // 10]
        headers = [("upload-complete", "?0"), *of_artifact(said), *of_body(body, says.body), *framing("", len(body))]
        new = key or "random"
        told = self.model.create(new, owner(client), episode, said, body, body_right=says.body is not False)
        reply = self.ask(told, client, "PUT", f"/v1/episodes/{episode}", headers, [body], second)
        location = reply.headers.get("location")
        if told.complete == "?0" and told.offset is not None:
            assert location is not None
            assert key in (None, location)
        if key is None and "random" in self.model.uploads:
            upload = self.model.uploads.pop("random")
            if told.status != 413:  # else it is not there any more
                assert location is not None, "an upload that nobody can find"
                self.model.uploads[location] = upload
        if location is not None and (location, client) not in self.locations:
            self.locations.append((location, client))

    @precondition(lambda self: self.locations)
    @rule(
        client=clients, pick=picks, where=st.sampled_from([0] * 8 + [-1, 1]),
        count=st.sampled_from([10] * 5 + [0, 2, 5, 12]),
        last=st.booleans(), says_body=seldom_false, says_length=seldom_false,
        way=st.sampled_from(["length", "chunked"]), spoilt=st.sampled_from([False] * 9 + [True]), second=receivers,
        leaves=st.sampled_from([None] * 6 + [3, 8]),
    )  # fmt: skip
    def append(
        self, client: str, pick: int, where: int, count: int, last: bool, says_body: bool | None,
        says_length: bool | None, way: str, spoilt: bool, second: bool, leaves: int | None,
    ) -> None:  # fmt: skip
        key, whose = self.locations[pick % len(self.locations)]
        if pick % 7:
            client = whose
        if self.is_busy(key):
            return
        upload = self.model.uploads.get(key)
        stands = len(upload.data) if upload is not None else 0
        whole = self.whole(upload)
        offset = max(0, stands + where)
        body = whole[offset : offset + (len(whole) - offset) * min(count, 10) // 10] + b"more" * (count > 10)
        if spoilt:
            body = bytes(255 - byte for byte in body)
        length = None if says_length is None else len(whole) + (not says_length)
        headers = [("content-type", "application/partial-upload"), ("upload-offset", str(offset))]
        headers += [("upload-complete", "?1" if last else "?0"), ("want-repr-digest", "sha-256=10")]
        headers += [*of_body(body, says_body), *framing(way, len(body))]
        if length is not None:
            headers.append(("upload-length", str(length)))
        cut_at = None if leaves is None or not body else len(body) * leaves // 11
        told = self.model.append(
            key, owner(client), offset, body, last=last, length=length, declared=way != "chunked",
            body_right=(says_body is not False and cut_at is None) or (says_body is None), cut_at=cut_at,
        )  # fmt: skip
        if cut_at is not None:
            reply = self.leave(client, "PATCH", key, headers, [body[:cut_at]], second)
            assert (reply is None) == (told is None), (reply and reply.status, told)
            if reply is not None and told is not None:
                self.check(reply, told)
            return
        assert told is not None
        reply = self.ask(told, client, "PATCH", key, headers, [body], second)
        if told.status == 204:
            assert reply.headers["repr-digest"] == fields.format_digest("sha-256", sha256(self.model.uploads[key].data))

    @precondition(lambda self: self.locations)
    @rule(client=clients, pick=picks, second=receivers)
    def look(self, client: str, pick: int, second: bool) -> None:
        key, _ = self.locations[pick % len(self.locations)]
        if not self.is_busy(key):
            reply = self.ask(self.model.look(key, owner(client)), client, "HEAD", key, [], [b""], second)
            if reply.status == 204 and reply.complete == "?0":
                length = self.model.uploads[key].said.length
                assert reply.headers.get("upload-length") == (None if length is None else str(length))

    @precondition(lambda self: self.locations)
    @rule(client=clients, pick=picks, second=receivers)
    def delete(self, client: str, pick: int, second: bool) -> None:
        key, _ = self.locations[pick % len(self.locations)]
        told = self.model.delete(key, owner(client))
        if told.status == 204:
            self.stop(key, appends_only=True)
        self.ask(told, client, "DELETE", key, [], [b""], second)

    @rule(episode=episodes, second=receivers, first=st.integers(-10, 2000), end=st.none() | st.integers(0, 3000))
    def get(self, episode: str, second: bool, first: int, end: int | None) -> None:
        stored = self.model.stored.get(episode)
        wanted = f"bytes={first}-{'' if end is None else end}" if first >= 0 else f"bytes={first}"
        path = f"/v1/episodes/{episode}"
        if stored is None:
            for resource in ("episodes", "receipts"):
                self.ask(NOT_FOUND, "ann", "GET", f"/v1/{resource}/{episode}", [], [b""], second)
            return
        whole = self.ask(Told(200), "ann", "GET", path, [], [b""], second)
        assert whole.body == stored.data
        assert whole.headers["etag"] == f'"{stored.sha256}"'
        assert whole.headers["repr-digest"] == fields.format_digest("sha-256", stored.sha256)
        size = len(stored.data)
        last = size - 1 if end is None else min(end, size - 1)
        if first < 0:
            first, last = max(0, size + first), size - 1
        elif end is not None and end < first:
            first, last = -1, -1
        expected = Told(200) if first < 0 else Told(206) if first < size else Told(416, ("bad-range",))
        part = self.ask(expected, "ann", "GET", path, [("range", wanted)], [b""], second)
        if expected.status == 206:
            assert part.body == stored.data[first : last + 1]
            assert part.headers["content-range"] == f"bytes {first}-{last}/{size}"
        receipt = self.ask(Told(200), "ann", "GET", f"/v1/receipts/{episode}", [], [b""], second).json()
        assert receipt["artifact"] == {"sha256": stored.sha256, "bytes": size}
        head = self.ask(Told(200), "ann", "HEAD", path, [], [b""], second)
        assert (head.body, head.headers["content-length"]) == (b"", str(size))

    @rule(method=st.sampled_from(["PUT", "GET", "PATCH", "HEAD", "DELETE", "POST"]), pick=picks, second=receivers)
    def knock(self, method: str, pick: int, second: bool) -> None:
        """Without a token that is accepted."""
        path = self.locations[pick % len(self.locations)][0] if self.locations else "/v1/episodes/e1"
        self.ask(UNAUTHORIZED, "eve", method, path, [], [b"x"], second)

    # --- several at once ----------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.pending) < 2)
    @rule(
        client=clients,
        episode=episodes,
        artifact=st.sampled_from(ARTIFACTS[:3]),
        way=st.sampled_from(["expect", "chunked"]),
        second=receivers,
    )
    def begin_put(self, client: str, episode: str, artifact: Artifact, way: str, second: bool) -> None:
        said = self.said(artifact, Says(True, True, None, None))
        key = self.key(client, episode, said)
        assert key is not None
        if self.is_busy(key) or self.model.before_body(episode, said, len(artifact.data), whole=True) is not None:
            return
        headers = [*of_artifact(said), *framing(way, len(artifact.data))]
        asking = self.begin(client, "PUT", f"/v1/episodes/{episode}", headers, second)
        self.pending.append(Pending(asking, key, artifact.data, [0], False, episode, said, True, [False]))
        if (key, client) not in self.locations:
            self.locations.append((key, client))

    @precondition(lambda self: self.locations and len(self.pending) < 2)
    @rule(pick=picks, last=st.booleans(), second=receivers)
    def begin_append(self, pick: int, last: bool, second: bool) -> None:
        key, client = self.locations[pick % len(self.locations)]
        upload = self.model.uploads.get(key)
        if upload is None or key in self.model.ended or self.is_busy(key):
            return
        if self.model.compare(upload.episode, upload.said) is not None:
            return
        body = self.whole(upload)[len(upload.data) :]
        headers = [("content-type", "application/partial-upload"), ("upload-offset", str(len(upload.data)))]
        headers += [("upload-complete", "?1" if last else "?0"), *framing("chunked", 0)]
        asking = self.begin(client, "PATCH", key, headers, second)
        self.pending.append(Pending(asking, key, body, [0], True, upload.episode, upload.said, last, [False]))

    @precondition(lambda self: self.pending)
    @rule(pick=picks, count=tenths)
    def feed(self, pick: int, count: int) -> None:
        one = self.pending[pick % len(self.pending)]
        first = one.came[0]
        one.came[0] += (len(one.body) - first) * count // 10
        one.asking.body(one.body[first : one.came[0]], more=True)
        self.run(one.asking.settled())

    @precondition(lambda self: self.pending)
    @rule(pick=picks)
    def end_pending(self, pick: int) -> None:
        one = self.pending.pop(pick % len(self.pending))
        one.asking.body(one.body[one.came[0] :], more=False)
        reply = self.run(one.asking.ended())
        assert reply is not None
        if one.stopped[0]:
            assert (reply.status, reply.code) in {(503, "superseded"), (200, ""), (409, "conflict")}
            return
        if not one.is_append:
            self.check(reply, self.model.whole(one.key, one.episode, one.said, one.body))
            return
        upload = self.model.uploads[one.key]
        limit = MAX_BYTES if upload.said.length is None else upload.said.length
        if len(upload.data) + len(one.body) > limit:
            assert reply.status in (400, 413)
            self.resolve(one.key, upload.data + one.body, self.head(one.key))
            return
        upload.data += one.body
        self.check(reply, self.model.finish(one.key) if one.last else self.model.at(upload, Told(204, (), "?0")))

    @precondition(lambda self: self.pending)
    @rule(pick=picks)
    def leave_pending(self, pick: int) -> None:
        self.drop(self.pending[pick % len(self.pending)])

    @precondition(lambda self: self.pending)
    @rule(pick=picks, second=receivers)
    def race(self, pick: int, second: bool) -> None:
        """Another request of the same client finds out where to go on."""
        one = self.pending[pick % len(self.pending)]
        client = next(client for location, client in self.locations if location == one.key)
        if one.said.sha256 is None or one.stopped[0]:
            return
        headers = [("upload-complete", "?0"), *of_artifact(one.said._replace(length=None)), *framing("", 0)]
        path = f"/v1/episodes/{one.episode}"
        told = self.model.before_body(one.episode, one.said._replace(length=None), 0, whole=False)
        if told is not None:
            self.ask(told, client, "PUT", path, headers, [b""], second)
            return
        self.model.ended.pop(one.key, None)
        upload = self.model.uploads.setdefault(
            one.key, Upload(one.episode, owner(client), one.said._replace(length=None))
        )
        reply = self.run(ask(self.apps[second], "PUT", path, [*headers, token(client)], [b""]))
        assert (reply.status, reply.complete, reply.headers["location"]) == (201, "?0", one.key)
        came = one.body[: one.came[0]]
        self.resolve(one.key, upload.data + came if one.is_append else max(upload.data, came, key=len), reply)
        one.stopped[0] = True

    # --- what befalls it ----------------------------------------------------------------------------------------

    @precondition(lambda self: self.model.stored)
    @rule(episode=episodes, how=st.sampled_from(["flip", "cut", "lose the receipt", "take out"]))
    def damage(self, episode: str, how: str) -> None:
        stored = self.model.stored.get(episode)
        if stored is None:
            return
        artifact, receipt = (self.root / "episodes" / f"{episode}.{kind}" for kind in ("tar.zst", "receipt.json"))
        if how == "take out":
            artifact.unlink()
            receipt.unlink(missing_ok=True)
            del self.model.stored[episode]
        elif how == "lose the receipt":
            receipt.unlink(missing_ok=True)
            if not stored.is_right:
                self.model.stored[episode] = Stored(stored.data, sha256(stored.data), None, False)
            else:  # and is made again for whoever asks
                self.ask(Told(200), "ann", "GET", f"/v1/receipts/{episode}", [], [b""], False)
        elif stored.is_right:
            data = bytearray(stored.data)
            data[len(data) // 2] ^= 1
            as_told = Stored(bytes(data), stored.sha256, stored.blake3, False)
            if how == "cut":
                data = bytearray(stored.data[:700])
                as_told = Stored(bytes(data), sha256(bytes(data)), None, False)
            with open(artifact, "r+b") as file:
                file.write(data)
                file.truncate()
            self.model.stored[episode] = as_told

    @rule(episode=episodes, second=receivers)
    def verify(self, episode: str, second: bool) -> None:
        if episode not in self.model.stored:
            self.ask(Told(404, ("not-stored",)), "ann", "POST", f"/v1/verifications/{episode}", [], [b""], second)
            return
        found = self.ask(Told(200), "ann", "POST", f"/v1/verifications/{episode}", [], [b""], second).json()
        self.check_reading(found["episode"], found["verdict"])

    @rule()
    def scrub(self) -> None:
        found = {finding.episode: finding for finding in Scrub(self.settings).run()}
        assert set(found) == set(self.model.stored)
        for episode, finding in found.items():
            self.check_reading(episode, getattr(finding, "verdict", ""))

    @invariant()
    def accounts_are_never_too_little(self) -> None:
        self.check_accounts()

    @rule()
    def count_again(self) -> None:
        """Beside requests that are under way."""
        assert self.apps[0]._store.recount.run()

    @rule()
    def start_again(self) -> None:
        self.end_all()
        self.start()

    @rule(long=st.booleans())
    def age(self, long: bool) -> None:
        """Nothing is asked for a while."""
        for one in [*self.pending]:
            self.drop(one)
        now = time.time()
        for then in (now - (WEEK_S if long else TWO_HOURS_S), now):
            for path in (self.root / "uploads").rglob("*"):
                if path.is_file() and path.name != "clock":
                    with contextlib.suppress(FileNotFoundError):  # a temporary one of `mend`
                        os.utime(path, (then, then))
            self.apps[0]._store.mend()
        self.model.age(long=long)


@pytest.mark.timeout(1800)
def test_the_receiver_is_what_its_protocol_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastship.receiver.wire.ingest.BATCH_BYTES", 300)
    Beside.tried = 0
    histories = go_through(History, HISTORIES, least=20, steps=STEPS)
    faults.count(
        "the receiver beside its model",
        f"histories of {STEPS} steps: uploads, whole artifacts, departures, races, rot, restarts, weeks; each answer"
        f" and the store at the end as docs/protocol.md says ({Beside.tried} requests)",
        of=HISTORIES,
        tried=histories,
        test=HERE,
    )


@pytest.mark.parametrize("way", ["a late answer", "a cut artifact"])
def test_histories_that_were_told_wrongly_once(way: str) -> None:
    """Seldom drawn, so they are gone through each time."""
    first, _, other = ARTIFACTS[:3]
    right = Says(True, True, True, None)
    history = History()
    if way == "a cut artifact":
        history.put("ann", "e1", first, False, right, "expect", 1)
        history.damage("e1", "cut")
        history.get("e1", False, 0, None)
        history.verify("e1", False)
    else:
        history.create("ann", "e1", first, False, right, 0)
        history.append("ann", 0, 0, 10, True, None, None, "length", False, False, None)
        history.damage("e1", "take out")
        history.put("bob", "e1", other, False, right, "expect", 1)
        history.look("ann", 0, False)
    history.teardown()
