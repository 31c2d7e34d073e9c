"""Sending while packing, played through without a network: a model receiver, faults by hand or by Hypothesis."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastship import fields
from fastship.episode import Manifest, Outcome, Receipt, ReceivedArtifact, ReceivedContent, Verdict
from fastship.settings import DestinationSettings, UploadSettings
from fastship.upload.course import (
    Answer,
    AwaitGrowth,
    CheckArtifact,
    Checked,
    Fault,
    FaultKind,
    Growing,
    Growth,
    Remember,
    Request,
    Result,
    Step,
    Wait,
)
from fastship.upload.streaming import APPEND_BYTES, streamed_upload

MEBI = 1 << 20
DATA = bytes(range(256)) * (MEBI // 256) * 20
CONTENT = "22" * 32
PLACE = "/v1/uploads/77aa"
GROWING = Growing("ep1", Path("/nowhere"), "a" * 40)
DESTINATION = DestinationSettings(url="https://receiver.example:8443")
UPLOAD = UploadSettings(retries=3, retry_min_s=0.5, retry_max_s=8.0, one_shot_bytes=0)
CUT = Fault(FaultKind.NETWORK, "connection reset by peer")


def manifest_of(data: bytes) -> Manifest:
    return Manifest(
        episode="ep1",
        artifact_sha256=hashlib.sha256(data).hexdigest(),
        artifact_bytes=len(data),
        content_blake3=CONTENT,
        content_bytes=3 * len(data),
        members=3,
        frames=1,
        frame_bytes=8 << 20,
        levels={3: 1},
        fingerprint="00",
        code_commit="a" * 40,
    )


def field_of(request: Request, name: str) -> str | None:
    return dict(request.fields).get(name)


def answer(status: int, body: bytes = b"", /, **named: str) -> Answer:
    return Answer(status, {name.replace("_", "-").lower(): value for name, value in named.items()}, body)


class ModelReceiver:
    """Does what docs/protocol.md says, for one episode; ``faults`` maps the number of a request to what is played."""

    def __init__(
        self, data: bytes = DATA, faults: dict[int, Callable[[Request], Answer | Fault]] | None = None
    ) -> None:
        self.data = data
        self.faults = faults or {}
        self.kept: bytearray | None = None  # of the upload without a digest
        self.announced: bytearray | None = None  # of the one of way 2
        self.published: bytes | None = None
        self.ended = False
        self.requests: list[Request] = []
        self.resent_bytes = 0
        self.highest = 0
        self.verifies = True

    @property
    def outline(self) -> list[str]:
        return [f"{one.method} {field_of(one, 'Upload-Offset') or ''}".strip() for one in self.requests]

    def __call__(self, request: Request) -> Answer | Fault:
        self.requests.append(request)
        fault = self.faults.get(len(self.requests) - 1)
        return fault(request) if fault else self.serve(request)

    def serve(self, request: Request) -> Answer:
        if "/v1/episodes/" in request.url:
            return self._episode(request)
        named = self.announced if request.url.endswith("bb") else self.kept
        if named is None:
            return answer(404, upload_complete="?0")
        if request.method == "DELETE":
            self.kept = None
            return answer(204)
        if request.method == "HEAD":
            return answer(204, upload_complete="?1" if self.ended else "?0", upload_offset=str(len(named)))
        if self.ended:
            return self._stored(201)
        return self._append(request, named)

    def _episode(self, request: Request) -> Answer:
        if request.method == "HEAD":
            return self._stored(200) if self.published is not None else answer(404)
        if self.published is not None:
            return self._stored(200)
        if field_of(request, "Repr-Digest"):
            self.announced = self.announced if self.announced is not None else bytearray()
            location, offset = "/v1/uploads/bb", len(self.announced)
        else:
            self.kept = bytearray()
            location, offset = PLACE, 0
        return answer(201, location=location, upload_complete="?0", upload_offset=str(offset))

    def _append(self, request: Request, named: bytearray) -> Answer:
        offset = int(field_of(request, "Upload-Offset") or -1)
        assert request.body is not None
        if offset != len(named):
            return answer(409, upload_complete="?0", upload_offset=str(len(named)))
        self.take(request, named, request.body.length_bytes)
        if field_of(request, "Upload-Complete") == "?1":
            self.published, self.ended = bytes(named), True
            return self._stored(201)
        told = {"upload_complete": "?0", "upload_offset": str(len(named))}
        if field_of(request, "Want-Repr-Digest"):
            told["repr_digest"] = fields.format_digest("sha-256", hashlib.sha256(named).hexdigest())
        return answer(204, **told)

    def take(self, request: Request, named: bytearray, count: int) -> None:
        assert request.body is not None
        start = request.body.offset
        named += self.data[start : start + count]
        self.resent_bytes += max(0, min(self.highest, start + count) - start)
        self.highest = max(self.highest, len(named))

    def keep_some(self, count: int) -> Callable[[Request], Answer | Fault]:
        """The line is cut after ``count`` bytes of the body."""

        def cut(request: Request) -> Fault:
            named = self.announced if request.url.endswith("bb") else self.kept
            if request.method == "PATCH" and named is not None and request.body is not None:
                self.take(request, named, min(count, request.body.length_bytes))
            return CUT

        return cut

    def _stored(self, status: int) -> Answer:
        assert self.published is not None
        receipt = Receipt(
            episode="ep1",
            artifact=ReceivedArtifact(hashlib.sha256(self.published).hexdigest(), len(self.published)),
            content=ReceivedContent(CONTENT, 3 * len(self.published)) if self.verifies else None,
            verified="content" if self.verifies else "artifact",
        )
        return answer(status, msgspec.json.encode(receipt), upload_complete="?1")


class Packing:
    """An artifact that grows a step each time the course waits for it."""

    def __init__(self, data: bytes = DATA, step_bytes: int = 3 * MEBI, drop_at: int = 1 << 62) -> None:
        self.data = data
        self.step_bytes = step_bytes
        self.drop_at = drop_at
        self.bytes = step_bytes

    def grow_to(self, enough: int) -> Growth:
        while self.bytes < min(enough, len(self.data)):
            self.bytes = min(self.bytes + self.step_bytes, len(self.data))
        if self.bytes >= self.drop_at:
            return Growth(dropped=True)
        whole = self.bytes >= len(self.data)
        return Growth(len(self.data) if whole else self.bytes, manifest_of(self.data) if whole else None)


class Played:
    def __init__(self, verdict: Verdict, steps: list[Step]) -> None:
        self.verdict = verdict
        self.waits = [step for step in steps if isinstance(step, Wait)]
        self.remembered = [step.url for step in steps if isinstance(step, Remember)]


def play(receiver: Callable[[Request], Answer | Fault], packing: Packing | None = None, url: str = "") -> Played:
    packing = packing or Packing()
    course = streamed_upload(GROWING, DESTINATION, UPLOAD, url=url, jitter=lambda: 0.5)
    steps: list[Step] = []
    result: Result = None
    try:
        while True:
            step = course.send(result)
            steps.append(step)
            assert len(steps) < 10_000, "the course does not end"
            match step:
                case Request():
                    result = receiver(step)
                case Wait() | Remember():
                    result = None
                case CheckArtifact():
                    result = Checked(True)
                case AwaitGrowth():
                    result = packing.grow_to(step.bytes)
    except StopIteration as stop:
        verdict = stop.value
    assert isinstance(verdict, Verdict)
    return Played(verdict, steps)


def test_it_is_created_without_digest_appended_compared_and_published() -> None:
    receiver = ModelReceiver()
    played = play(receiver)
    assert played.verdict.outcome is Outcome.SHIPPED
    assert receiver.published == DATA
    assert receiver.outline[:2] == ["HEAD", "PUT"]
    creation = receiver.requests[1]
    assert field_of(creation, "Repr-Digest") is field_of(creation, "Upload-Length") is None
    assert field_of(creation, "X-Cis490-Code-Commit") == "a" * 40
    assert played.remembered == [f"{DESTINATION.url}{PLACE}"]
    appends = [one for one in receiver.requests if one.method == "PATCH"]
    assert all(one.body is not None and one.body.length_bytes >= APPEND_BYTES for one in appends[:-2])
    assert [field_of(one, "Want-Repr-Digest") for one in appends] == [None] * (len(appends) - 2) + [
        "sha-256=10",
        None,
    ]
    assert not any(field_of(one, "Repr-Digest") for one in appends)  # RFC 9530: of a PATCH it would be the patch's
    publishing = appends[-1]
    assert field_of(publishing, "Upload-Length") == str(len(DATA))
    assert fields.parse_digest(field_of(publishing, "Fastship-Content-Digest"), "blake3") == CONTENT
    assert receiver.resent_bytes == 0


def test_what_was_packed_meanwhile_goes_in_one_append() -> None:
    receiver = ModelReceiver()
    play(receiver, Packing(step_bytes=len(DATA)))
    assert receiver.outline == ["HEAD", "PUT", "PATCH 0", f"PATCH {len(DATA)}"]


def test_a_cut_append_goes_on_behind_what_arrived() -> None:
    receiver = ModelReceiver()
    receiver.faults = {3: receiver.keep_some(MEBI)}
    played = play(receiver)
    assert played.verdict.outcome is Outcome.SHIPPED
    assert receiver.outline[3:6] == ["PATCH 6291456", "HEAD", "PATCH 7340032"]
    assert receiver.resent_bytes == 0


def test_an_attempt_that_was_interrupted_goes_on_in_its_upload() -> None:
    receiver = ModelReceiver()
    receiver.kept = bytearray(DATA[: 7 * MEBI])
    receiver.highest = 7 * MEBI
    played = play(receiver, Packing(step_bytes=9 * MEBI), url=DESTINATION.url + PLACE)
    assert played.verdict.outcome is Outcome.SHIPPED
    assert played.verdict.resumed_at == 7 * MEBI
    assert receiver.outline[0] == "HEAD"
    assert receiver.resent_bytes == 0


def test_an_upload_that_is_gone_is_created_anew() -> None:
    receiver = ModelReceiver()
    played = play(receiver, url=DESTINATION.url + PLACE)
    assert played.verdict.outcome is Outcome.SHIPPED
    assert receiver.published == DATA
    assert played.remembered == ["", DESTINATION.url + PLACE]


def test_bytes_that_arrived_otherwise_are_never_published() -> None:
    receiver = ModelReceiver(bytes([DATA[0] ^ 1]) + DATA[1:])
    receiver.verifies = False
    played = play(receiver)
    assert receiver.kept is None  # deleted
    assert "DELETE" in receiver.outline
    assert played.remembered[-1] == ""
    # Way 2 follows: a receiver compares its digest, this model takes anything, and the proof refuses that.
    assert played.verdict.outcome is not Outcome.SHIPPED


def test_a_receiver_that_tells_no_digest_gets_way_2() -> None:
    receiver = ModelReceiver()

    def silent(request: Request) -> Answer | Fault:
        found = receiver(request)
        if isinstance(found, Answer):
            found.fields.pop("repr-digest", None)
        return found

    played = play(silent)
    assert played.verdict.outcome is Outcome.SHIPPED
    assert "DELETE" in receiver.outline
    assert field_of(receiver.requests[receiver.outline.index("DELETE") + 1], "Repr-Digest")


@pytest.mark.parametrize("status", [200, 401, 405, 500])
def test_an_id_that_is_taken_or_a_receiver_that_is_not_well_is_left_to_way_2(status: int) -> None:
    receiver = ModelReceiver(faults={0: lambda _request: answer(status)})
    assert play(receiver).verdict.outcome is Outcome.SHIPPED
    assert field_of(receiver.requests[1], "Repr-Digest")


@pytest.mark.parametrize(
    ("status", "outcome"), [(412, Outcome.REJECTED), (413, Outcome.REJECTED), (401, Outcome.TRANSIENT)]
)
def test_a_refusal_is_a_verdict_of_way_2_alone(status: int, outcome: Outcome) -> None:
    def refuse(request: Request) -> Answer:
        return answer(404) if request.method == "HEAD" else answer(status)

    assert play(refuse).verdict.outcome is outcome


def test_a_publication_whose_answer_was_lost_is_found_again() -> None:
    receiver = ModelReceiver()
    play(receiver)
    last = len(receiver.requests) - 1
    receiver = ModelReceiver()

    def lose(request: Request) -> Fault:
        receiver.serve(request)
        return CUT

    receiver.faults = {last: lose}
    assert play(receiver).verdict.outcome is Outcome.SHIPPED
    assert receiver.published == DATA
    assert receiver.resent_bytes == 0


def test_a_dropped_artifact_is_deleted_at_the_receiver() -> None:
    receiver = ModelReceiver()
    played = play(receiver, Packing(drop_at=10 * MEBI))
    assert receiver.outline[-1] == "DELETE"
    assert receiver.published is None
    assert played.remembered[-1] == ""


def test_a_receiver_that_claims_more_than_there_is_is_not_believed() -> None:
    receiver = ModelReceiver(faults={2: lambda _request: answer(204, upload_complete="?0", upload_offset=str(1 << 40))})
    assert play(receiver).verdict.outcome is Outcome.SHIPPED
    assert receiver.published == DATA


def test_a_line_that_is_always_cut_ends_the_attempt() -> None:
    played = play(lambda request: answer(404) if request.method == "HEAD" else CUT)
    assert played.verdict.outcome is Outcome.TRANSIENT
    assert len(played.waits) == 2 * UPLOAD.retries  # while it is packed, and after


def lost_after(receiver: ModelReceiver, count: int, told: Answer | Fault) -> Callable[[Request], Answer | Fault]:
    """The destination is well for ``count`` requests; then all that is heard of it is ``told``."""
    return lambda request: receiver(request) if len(receiver.requests) < count else told


UNREACHED = [CUT, Fault(FaultKind.DNS, "no such name"), *map(answer, (401, 404, 429, 500, 502, 503))]


@pytest.mark.parametrize("told", UNREACHED, ids=lambda told: told.kind if isinstance(told, Fault) else str(told.status))
def test_an_outage_costs_nothing_of_what_arrived(told: Answer | Fault) -> None:
    """It is longer than all retries: the next attempt finds the upload where it stands."""
    receiver = ModelReceiver()
    played = play(lost_after(receiver, 4, told))
    assert played.verdict.outcome is Outcome.TRANSIENT
    assert played.remembered == [DESTINATION.url + PLACE]
    assert receiver.highest > 5 * MEBI
    played = play(receiver, Packing(step_bytes=len(DATA)), url=DESTINATION.url + PLACE)
    assert played.verdict.outcome is Outcome.SHIPPED
    assert receiver.resent_bytes == 0


def test_an_outage_that_ends_while_it_is_packed_costs_nothing() -> None:
    receiver = ModelReceiver()
    receiver.faults = dict.fromkeys(range(4, 4 + UPLOAD.retries + 1), lambda _request: CUT)
    played = play(receiver)
    assert played.verdict.outcome is Outcome.SHIPPED
    assert len(played.waits) == UPLOAD.retries  # then it is waited for the whole
    assert receiver.resent_bytes == 0


def test_a_receiver_that_fails_at_this_upload_alone_gets_way_2() -> None:
    receiver = ModelReceiver()
    failed = answer(500, b'{"error": "the receiver\'s disk failed", "code": "storage"}', upload_complete="?0")

    def fail(request: Request) -> Answer | Fault:
        found = receiver(request)
        return failed if request.url.endswith(PLACE) else found

    assert play(fail).verdict.outcome is Outcome.SHIPPED
    assert receiver.published == DATA


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_whatever_fails_it_ends_right_and_sends_little_twice(data: st.DataObject) -> None:
    receiver = ModelReceiver()
    statuses = [answer(status) for status in (400, 404, 408, 409, 410, 429, 500, 503)]
    faults: dict[int, Callable[[Request], Answer | Fault]] = {}
    for number in data.draw(st.sets(st.integers(0, 40), max_size=6)):
        kind = data.draw(st.integers(0, 2))
        if kind == 0:
            faults[number] = receiver.keep_some(data.draw(st.integers(0, 5 * MEBI)))
        elif kind == 1:
            told = data.draw(st.sampled_from(statuses))
            faults[number] = lambda _request, told=told: told  # type: ignore[misc]
        else:

            def lose(request: Request) -> Fault:
                receiver.serve(request)
                return CUT

            faults[number] = lose
    receiver.faults = faults
    packing = Packing(step_bytes=data.draw(st.integers(MEBI, 8 * MEBI)))
    verdict = play(receiver, packing).verdict
    if verdict.outcome is Outcome.SHIPPED:
        assert receiver.published == DATA
    # Each upload that was given up costs what it had; nothing is sent twice into the same one.
    for named in (receiver.kept, receiver.announced):
        assert named is None or bytes(named) == DATA[: len(named)]
