"""The native dialect played through without a network: every answer is put in by hand or by Hypothesis."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastship import fields
from fastship.episode import Manifest, Outcome, Receipt, ReceivedArtifact, ReceivedContent, Scope, Verdict
from fastship.settings import DestinationSettings, UploadSettings
from fastship.upload.course import (
    Answer,
    Artifact,
    Body,
    CheckArtifact,
    Checked,
    Fault,
    FaultKind,
    Request,
    Step,
    Wait,
)
from fastship.upload.native import RESTARTS, native_upload

SIZE = 1000
OURS = "11" * 32
CONTENT = "22" * 32
OTHER = "33" * 32
PLACE = "/v1/uploads/cc57"

MANIFEST = Manifest(
    episode="ep1",
    artifact_sha256=OURS,
    artifact_bytes=SIZE,
    content_blake3=CONTENT,
    content_bytes=5000,
    members=3,
    frames=1,
    frame_bytes=8 << 20,
    levels={3: 1},
    fingerprint="00",
    code_commit="a" * 40,
)
DESTINATION = DestinationSettings(url="https://receiver.example:8443/")
UPLOAD = UploadSettings(retries=3, retry_min_s=0.5, retry_max_s=8.0, answer_timeout_s=10.0)
RESUMABLE = msgspec.structs.replace(UPLOAD, one_shot_bytes=0)


class Played:
    """What a course did: its requests, its waits, its checks, and its verdict."""

    def __init__(self, verdict: Verdict, steps: list[Step]) -> None:
        self.verdict = verdict
        self.steps = steps
        self.requests = [step for step in steps if isinstance(step, Request)]
        self.waits = [step for step in steps if isinstance(step, Wait)]
        self.checks = [step for step in steps if isinstance(step, CheckArtifact)]

    @property
    def outline(self) -> list[tuple[str, int, int] | tuple[str]]:
        return [(r.method, r.body.offset, r.body.length_bytes) if r.body else (r.method,) for r in self.requests]


def play(
    respond: Callable[[Request], Answer | Fault],
    *,
    upload: UploadSettings = UPLOAD,
    destination: DestinationSettings = DESTINATION,
    manifest: Manifest = MANIFEST,
    first_attempt: bool = True,
    intact: bool = True,
    jitter: Callable[[], float] = lambda: 0.5,
) -> Played:
    course = native_upload(
        Artifact(manifest, Path("/nowhere")), destination, upload, first_attempt=first_attempt, jitter=jitter
    )
    steps: list[Step] = []
    result: Answer | Fault | Checked | None = None
    try:
        while True:
            step = course.send(result)
            steps.append(step)
            assert len(steps) < 10_000, "the course does not end"
            match step:
                case Request():
                    result = respond(step)
                case Wait():
                    result = None
                case CheckArtifact():
                    result = Checked(intact)
    except StopIteration as stop:
        verdict = stop.value
    assert isinstance(verdict, Verdict)
    return Played(verdict, steps)


def script(*answers: Answer | Fault) -> Callable[[Request], Answer | Fault]:
    """Give these in order; a request more is an error of the test's expectation."""
    rest: Iterator[Answer | Fault] = iter(answers)
    return lambda _request: next(rest)


def answer(status: int, body: bytes = b"", /, **named: str) -> Answer:
    return Answer(status, {name.replace("_", "-").lower(): value for name, value in named.items()}, body)


def place(offset: int, status: int = 201, /, **named: str) -> Answer:
    return answer(status, location=PLACE, upload_complete="?0", upload_offset=str(offset), **named)


def stored(status: int = 201) -> Answer:
    return answer(status, upload_complete="?1", repr_digest=fields.format_digest("sha-256", OURS))


CUT = Fault(FaultKind.NETWORK, "connection reset by peer")


def field_of(request: Request, name: str) -> str | None:
    return dict(request.fields).get(name)


def test_a_small_artifact_goes_in_one_request_that_says_all_about_it() -> None:
    played = play(script(stored()))
    assert played.outline == [("PUT", 0, SIZE)]
    request = played.requests[0]
    assert request.url == "https://receiver.example:8443/v1/episodes/ep1"
    assert fields.parse_digest(field_of(request, "Repr-Digest"), "sha-256") == OURS
    assert fields.parse_digest(field_of(request, "Fastship-Content-Digest"), "blake3") == CONTENT
    assert field_of(request, "Fastship-Content-Length") == "5000"
    assert field_of(request, "X-Cis490-Code-Commit") == "a" * 40
    assert field_of(request, "Upload-Complete") is None
    verdict = played.verdict
    assert (verdict.outcome, verdict.scope, verdict.status) == (Outcome.SHIPPED, Scope.EPISODE, 201)
    assert verdict.receipt is not None
    assert verdict.receipt.artifact == ReceivedArtifact(OURS, SIZE)
    assert verdict.receipt.verified == "artifact"


def test_without_a_commit_there_is_no_commit_field_and_its_name_is_a_setting() -> None:
    plain = msgspec.structs.replace(MANIFEST, code_commit=None)
    assert field_of(play(script(stored()), manifest=plain).requests[0], "X-Cis490-Code-Commit") is None
    other = msgspec.structs.replace(DESTINATION, commit_field="X-Lab-Commit")
    assert field_of(play(script(stored()), destination=other).requests[0], "X-Lab-Commit") == "a" * 40


@pytest.mark.parametrize(("upload", "first_attempt"), [(RESUMABLE, True), (UPLOAD, False)])
def test_a_large_artifact_and_every_later_attempt_are_created_then_appended(
    upload: UploadSettings, first_attempt: bool
) -> None:
    played = play(script(place(400), stored()), upload=upload, first_attempt=first_attempt)
    assert played.outline == [("PUT", 0, 0), ("PATCH", 400, 600)]
    creation, append = played.requests
    assert field_of(creation, "Upload-Complete") == "?0"
    assert field_of(creation, "Upload-Length") == str(SIZE)
    assert field_of(creation, "X-Cis490-Code-Commit") == "a" * 40
    assert append.url == "https://receiver.example:8443" + PLACE
    assert field_of(append, "Content-Type") == "application/partial-upload"
    assert field_of(append, "Upload-Offset") == "400"
    assert field_of(append, "Upload-Complete") == "?1"
    assert field_of(append, "Repr-Digest") is None  # RFC 9530: there it would be the patch document's
    assert played.verdict.outcome is Outcome.SHIPPED
    assert played.verdict.resumed_at == 400


def test_appends_are_no_longer_than_the_receiver_takes() -> None:
    limit = {"upload_limit": "max-append-size=400, max-age=60"}
    played = play(
        script(place(0, **limit), place(400, 204, **limit), place(800, 204, **limit), stored()), upload=RESUMABLE
    )
    assert played.outline == [("PUT", 0, 0), ("PATCH", 0, 400), ("PATCH", 400, 400), ("PATCH", 800, 200)]
    assert [field_of(request, "Upload-Complete") for request in played.requests[1:]] == ["?0", "?0", "?1"]
    assert played.waits == []


def test_an_upload_that_is_all_there_is_finished_with_an_empty_append() -> None:
    played = play(script(place(SIZE), stored()), upload=RESUMABLE)
    assert played.outline == [("PUT", 0, 0), ("PATCH", SIZE, 0)]
    assert played.verdict.outcome is Outcome.SHIPPED


def test_a_cut_asks_for_the_offset_and_goes_on_there() -> None:
    played = play(script(CUT, place(300), CUT, place(700), stored()))
    assert played.outline == [("PUT", 0, SIZE), ("PUT", 0, 0), ("PATCH", 300, 700), ("PUT", 0, 0), ("PATCH", 700, 300)]
    assert len(played.waits) == 2
    assert played.verdict.resumed_at == 700


def test_a_lost_final_answer_is_asked_for_again() -> None:
    played = play(script(place(0), CUT, stored(200)), upload=RESUMABLE)
    assert played.outline == [("PUT", 0, 0), ("PATCH", 0, SIZE), ("PUT", 0, 0)]
    assert (played.verdict.outcome, played.verdict.status) == (Outcome.SHIPPED, 200)


def test_a_conflict_of_offsets_is_not_one_of_content() -> None:
    played = play(script(place(0), place(640, 409), stored()), upload=RESUMABLE)
    assert played.outline == [("PUT", 0, 0), ("PATCH", 0, SIZE), ("PATCH", 640, 360)]
    played = play(script(place(0), answer(409, upload_complete="?1")), upload=RESUMABLE)
    assert (played.verdict.outcome, played.verdict.scope) == (Outcome.CONFLICT, Scope.EPISODE)


@pytest.mark.parametrize("status", [404, 410])
def test_an_upload_that_is_gone_is_created_again(status: int) -> None:
    played = play(script(place(500), answer(status), place(0), stored()), upload=RESUMABLE)
    assert played.outline == [("PUT", 0, 0), ("PATCH", 500, 500), ("PUT", 0, 0), ("PATCH", 0, SIZE)]
    assert played.verdict.outcome is Outcome.SHIPPED


def test_an_append_that_arrived_damaged_is_sent_again_from_the_receivers_offset() -> None:
    played = play(script(place(500), answer(400, upload_complete="?0"), place(500), stored()), upload=RESUMABLE)
    assert played.outline == [("PUT", 0, 0), ("PATCH", 500, 500), ("PUT", 0, 0), ("PATCH", 500, 500)]


def test_retries_without_progress_are_bounded_and_progress_renews_them() -> None:
    refused = play(lambda _request: CUT)
    assert len(refused.requests) == 1 + UPLOAD.retries
    assert (refused.verdict.outcome, refused.verdict.scope) == (Outcome.TRANSIENT, Scope.NETWORK)
    assert "connection reset by peer" in refused.verdict.error

    progress = [step for offset in range(0, SIZE, 100) for step in (place(offset), CUT)]
    played = play(script(*progress, stored(200)), upload=RESUMABLE)
    assert played.verdict.outcome is Outcome.SHIPPED

    stuck = play(lambda request: place(100) if request.body == Body() else CUT, upload=RESUMABLE)
    assert stuck.verdict.outcome is Outcome.TRANSIENT
    assert len([request for request in stuck.requests if request.method == "PATCH"]) == 1 + UPLOAD.retries


def test_a_receiver_that_answers_well_but_never_advances_is_given_up() -> None:
    played = play(lambda request: place(100, 201 if request.method == "PUT" else 204), upload=RESUMABLE)
    assert (played.verdict.outcome, played.verdict.scope) == (Outcome.TRANSIENT, Scope.DESTINATION)
    assert "stays at offset 100" in played.verdict.error


@pytest.mark.parametrize("draw", [0.0, 0.37, 0.999])
def test_waits_grow_from_retry_min_to_retry_max_with_full_jitter(draw: float) -> None:
    many = msgspec.structs.replace(UPLOAD, retries=12)
    waits = [wait.seconds for wait in play(lambda _request: CUT, upload=many, jitter=lambda: draw).waits]
    assert len(waits) == 12
    for number, seconds in enumerate(waits, start=1):
        ceiling = min(8.0, 0.5 * 2**number)
        assert seconds == pytest.approx(0.5 + draw * (ceiling - 0.5))


def test_retry_after_is_obeyed_with_jitter_and_a_long_one_ends_the_attempt() -> None:
    played = play(script(answer(503, retry_after="4"), stored(200)))
    assert 4.0 <= played.waits[0].seconds <= 5.0
    long = play(script(answer(503, retry_after="900")))
    assert long.waits == []
    assert (long.verdict.outcome, long.verdict.scope) == (Outcome.TRANSIENT, Scope.DESTINATION)
    assert long.verdict.retry_after_s == 900.0


def test_a_busy_upload_pauses_no_destination() -> None:
    busy = answer(503, upload_complete="?0", retry_after="10")
    played = play(script(place(0), busy), upload=RESUMABLE)
    assert (played.verdict.scope, played.verdict.retry_after_s) == (Scope.NETWORK, 10.0)
    busy = answer(503, upload_complete="?0", retry_after="2")
    assert play(script(place(0), busy, stored(200)), upload=RESUMABLE).verdict.outcome is Outcome.SHIPPED


def test_no_retries_means_none() -> None:
    none = msgspec.structs.replace(UPLOAD, retries=0)
    assert len(play(lambda _request: CUT, upload=none).requests) == 1


@pytest.mark.parametrize(
    ("status", "outcome", "scope", "requests"),
    [
        *[(status, Outcome.TRANSIENT, Scope.DESTINATION, 1) for status in (401, 403, 404, 405, 407, 411, 421)],
        *[(status, Outcome.TRANSIENT, Scope.DESTINATION, 4) for status in (408, 425, 429)],
        *[(status, Outcome.TRANSIENT, Scope.DESTINATION, 1) for status in (301, 302, 307, 308)],
        *[(status, Outcome.REJECTED, Scope.EPISODE, 2) for status in (400, 402, 406, 410, 412, 413)],
        (422, Outcome.REJECTED, Scope.EPISODE, 1),
        (409, Outcome.TRANSIENT, Scope.NETWORK, 2),  # in words that are not a receiver's: is anything there?
        *[(status, Outcome.TRANSIENT, Scope.NETWORK, 4) for status in (500, 502, 503, 504)],
        *[(status, Outcome.TRANSIENT, Scope.NETWORK, 1) for status in (501, 505, 507)],
        (202, Outcome.TRANSIENT, Scope.DESTINATION, 1),
        (99, Outcome.TRANSIENT, Scope.DESTINATION, 1),
    ],
)
def test_what_each_status_means(status: int, outcome: Outcome, scope: Scope, requests: int) -> None:
    played = play(lambda _request: answer(status, b"because", location="https://elsewhere.example/"))
    verdict = played.verdict
    assert (verdict.outcome, verdict.scope, verdict.status, verdict.body) == (outcome, scope, status, "because")
    assert len(played.requests) == requests
    assert str(status) in verdict.error


@pytest.mark.parametrize(
    ("kind", "outcome", "scope", "requests"),
    [
        (FaultKind.DNS, Outcome.TRANSIENT, Scope.DESTINATION, 1),
        (FaultKind.TLS, Outcome.TRANSIENT, Scope.DESTINATION, 1),
        (FaultKind.SETTINGS, Outcome.TRANSIENT, Scope.DESTINATION, 1),
        (FaultKind.ARTIFACT, Outcome.DAMAGED, Scope.EPISODE, 1),
        (FaultKind.STALL, Outcome.TRANSIENT, Scope.NETWORK, 4),
        (FaultKind.NETWORK, Outcome.TRANSIENT, Scope.NETWORK, 4),
    ],
)
def test_what_each_fault_means(kind: FaultKind, outcome: Outcome, scope: Scope, requests: int) -> None:
    played = play(lambda _request: Fault(kind, "so it was"))
    assert (played.verdict.outcome, played.verdict.scope, played.verdict.status) == (outcome, scope, None)
    assert "so it was" in played.verdict.error
    assert len(played.requests) == requests


def test_a_digest_mismatch_of_a_sound_artifact_starts_from_0_a_bounded_number_of_times() -> None:
    mismatch = answer(400, b"digest", upload_complete="?1")
    played = play(script(place(0), mismatch, stored()), upload=RESUMABLE)
    assert played.outline == [("PUT", 0, 0), ("PATCH", 0, SIZE), ("PUT", 0, SIZE)]
    assert played.verdict.outcome is Outcome.SHIPPED
    always = play(lambda _request: mismatch)
    assert always.outline == [("PUT", 0, SIZE)] * (1 + RESTARTS)
    assert (always.verdict.outcome, always.verdict.scope) == (Outcome.TRANSIENT, Scope.NETWORK)


def test_a_400_for_another_reason_is_no_digest_mismatch() -> None:
    refused = answer(400, b'{"error": "...", "code": "commit-missing"}', upload_complete="?1")
    played = play(script(refused, refused))
    assert (played.verdict.outcome, played.checks) == (Outcome.REJECTED, [])
    named = play(script(answer(400, b'{"code": "digest-mismatch"}', upload_complete="?1"), stored()))
    assert (named.verdict.outcome, len(named.checks)) == (Outcome.SHIPPED, 1)


def test_a_refusal_of_what_one_flipped_bit_may_have_said_is_asked_for_once_more() -> None:
    for status in (400, 412, 413):
        played = play(script(answer(status), place(0), stored(201)), upload=RESUMABLE)
        assert (played.verdict.outcome, len(played.waits)) == (Outcome.SHIPPED, 1)


def test_a_wrong_content_is_looked_for_here_first() -> None:
    for code in (b"content-mismatch", b"artifact-invalid"):
        refused = answer(422, b'{"error": "so it is", "code": "%b"}' % code, upload_complete="?1")
        damaged = play(script(refused), intact=False)
        assert damaged.verdict.outcome is Outcome.DAMAGED
        assert damaged.checks[0].content
        assert damaged.checks[0].why == "so it is"
        assert play(script(refused, stored())).verdict.outcome is Outcome.SHIPPED
        played = play(script(refused, refused, refused))
        assert (played.verdict.outcome, played.verdict.status) == (Outcome.REJECTED, 422)
        assert len(played.requests) == 3


def test_a_digest_mismatch_of_a_damaged_artifact_asks_for_a_new_pack() -> None:
    played = play(script(answer(400, upload_complete="?1")), intact=False)
    assert len(played.checks) == 1
    assert (played.verdict.outcome, played.verdict.scope) == (Outcome.DAMAGED, Scope.EPISODE)


def receipt(**changes: Any) -> bytes:
    whole = Receipt(
        episode="ep1",
        artifact=ReceivedArtifact(OURS, SIZE),
        content=ReceivedContent(CONTENT, 5000, 3),
        verified="content",
        stored_at="2026-11-23T12:00:00Z",
        receiver="lab-store",
    )
    return msgspec.json.encode(msgspec.structs.replace(whole, **changes))


def test_a_receipt_is_taken_over_as_the_receiver_wrote_it() -> None:
    verdict = play(script(answer(201, receipt()))).verdict
    assert verdict.receipt is not None
    assert (verdict.receipt.verified, verdict.receipt.receiver) == ("content", "lab-store")
    assert verdict.receipt.content == ReceivedContent(CONTENT, 5000, 3)


def test_another_artifact_of_the_same_verified_content_is_ours() -> None:
    repacked = receipt(artifact=ReceivedArtifact(OTHER, 900))
    assert play(script(answer(200, repacked))).verdict.outcome is Outcome.SHIPPED


@pytest.mark.parametrize(
    "success",
    [
        answer(201, repr_digest=fields.format_digest("sha-256", OTHER)),
        answer(200, receipt(artifact=ReceivedArtifact(OTHER, 900), verified="artifact")),
        answer(200, receipt(artifact=ReceivedArtifact(OTHER, 900), content=ReceivedContent(OTHER, 5000))),
        answer(200, receipt(content=ReceivedContent(OTHER, 5000))),
        answer(200, receipt(episode="ep2")),
        answer(200, receipt(), repr_digest=fields.format_digest("sha-256", OTHER)),
    ],
)
@pytest.mark.parametrize("proof", ["receipt", "status"])
def test_a_success_that_names_other_bytes_is_none(success: Answer, proof: str) -> None:
    destination = msgspec.convert({"url": DESTINATION.url, "proof": proof}, DestinationSettings)
    verdict = play(script(success), destination=destination).verdict
    assert (verdict.outcome, verdict.scope) == (Outcome.TRANSIENT, Scope.DESTINATION)
    assert "not this artifact" in verdict.error


def test_a_success_that_says_nothing_is_asked_once_what_is_there() -> None:
    there = answer(200, repr_digest=fields.format_digest("sha-256", OURS))
    played = play(script(answer(201), there))
    assert played.outline == [("PUT", 0, SIZE), ("HEAD",)]
    assert played.verdict.outcome is Outcome.SHIPPED
    other = play(script(answer(201), answer(200, repr_digest=fields.format_digest("sha-256", OTHER))))
    assert (other.verdict.outcome, other.verdict.scope) == (Outcome.TRANSIENT, Scope.DESTINATION)
    for silent in (answer(200), answer(404), answer(405)):
        played = play(script(answer(201), silent))
        assert (played.verdict.outcome, played.verdict.scope) == (Outcome.TRANSIENT, Scope.DESTINATION)
        assert 'destination.proof = "status"' in played.verdict.error
    assert play(script(answer(201), CUT)).verdict.outcome is Outcome.TRANSIENT


def test_where_the_status_is_proof_the_artifact_is_only_ever_sent_whole() -> None:
    believing = msgspec.structs.replace(DESTINATION, proof="status")
    played = play(script(CUT, answer(502), answer(201)), destination=believing, upload=RESUMABLE, first_attempt=False)
    assert played.outline == [("PUT", 0, SIZE)] * 3
    assert played.verdict.receipt is not None
    assert played.verdict.receipt.verified == "status"


def test_a_server_that_takes_a_creation_for_an_episode_proves_nothing() -> None:
    played = play(script(answer(201), answer(200)), upload=RESUMABLE)
    assert (played.verdict.outcome, played.verdict.scope) == (Outcome.TRANSIENT, Scope.DESTINATION)


@pytest.mark.parametrize(
    "location",
    [
        "https://elsewhere.example/u/1",
        "//elsewhere.example/u/1",
        "http://receiver.example:8443/u/1",
        "https://receiver.example:99999999/u/1",
        "https://receiver.example:8443/u/\u00e9\r\n",
        "https://[::1/u",
        "https://receiver.example:8443@elsewhere.example/u",
        "https://elsewhere.example\\@receiver.example:8443/u v",
    ],
)
def test_an_upload_elsewhere_is_not_followed(location: str) -> None:
    odd = answer(201, upload_complete="?0", upload_offset="0", location=location)
    played = play(script(odd), upload=RESUMABLE)
    assert len(played.requests) == 1
    assert (played.verdict.outcome, played.verdict.scope) == (Outcome.TRANSIENT, Scope.DESTINATION)


@pytest.mark.parametrize(
    "odd",
    [answer(201, upload_complete="?0", upload_offset="0"), place(SIZE + 1)],
    ids=["no Location", "more than there is"],
)
def test_an_answer_against_the_protocol_is_the_destinations_fault(odd: Answer) -> None:
    played = play(script(odd), upload=RESUMABLE)
    assert (played.verdict.outcome, played.verdict.scope) == (Outcome.TRANSIENT, Scope.DESTINATION)


_answers = st.builds(
    lambda status, named, body: Answer(status, {key: value for key, value in named.items() if value is not None}, body),
    st.sampled_from([200, 200, 201, 201, 202, 204, 204, 301, 400, 400, 401, 404, 409, 409, 410, 412, 429, 500, 503]),
    st.fixed_dictionaries(
        {
            "upload-complete": st.sampled_from([None, "?0", "?0", "?0", "?1", "?2", "no"]),
            "upload-offset": st.one_of(
                st.none(), st.integers(0, SIZE + 5).map(str), st.sampled_from(["", "-1", "x", "9" * 20])
            ),
            "location": st.sampled_from([None, PLACE, PLACE, "/v1/uploads/two", "https://evil.example/"]),
            "upload-limit": st.sampled_from([None, "max-append-size=0", "max-append-size=7", "max-append-size=x"]),
            "repr-digest": st.sampled_from([None, None, fields.format_digest("sha-256", OTHER), "sha-256=:!:"]),
            "retry-after": st.sampled_from([None, "0", "3", "900", "soon"]),
        }
    ),
    st.sampled_from([b"", b"{", b"\xff", receipt(episode="ep2")]),
)
_results = st.one_of(
    _answers, _answers, st.builds(Fault, st.sampled_from([FaultKind.NETWORK, FaultKind.STALL]), st.just(""))
)


@settings(max_examples=500, deadline=None)
@given(data=st.data(), first_attempt=st.booleans(), one_shot=st.booleans())
def test_whatever_is_answered_it_ends_and_sends_only_from_the_receivers_offset(
    data: st.DataObject, first_attempt: bool, one_shot: bool
) -> None:
    """And is never SHIPPED: none of these answers proves our bytes."""
    named: list[int] = []  # every offset the receiver named, in order

    def respond(request: Request) -> Answer | Fault:
        if request.method == "PATCH":
            assert request.body is not None
            assert request.body.offset == named[-1]
            assert request.body.offset + request.body.length_bytes <= SIZE
            assert request.url.startswith("https://receiver.example:8443/v1/uploads/")
        result = data.draw(_results)
        if isinstance(result, Answer):
            offset = fields.parse_integer(result.field("upload-offset"))
            about_upload = result.status in (200, 201, 204, 409) and result.field("upload-complete") != "?1"
            if about_upload:
                named.append(offset or 0)
        return result

    upload = UPLOAD if one_shot else RESUMABLE
    played = play(respond, upload=upload, first_attempt=first_attempt)
    assert played.verdict.outcome is not Outcome.SHIPPED
    whole = [number for number, request in enumerate(played.steps) if request == played.requests[0]]
    if one_shot and first_attempt:
        for number in whole[1:]:
            assert isinstance(played.steps[number - 1], CheckArtifact), "from byte 0 again only after a check"
    heights = [named[i] for i in range(len(named)) if named[i] > max(named[:i], default=0)]
    stretches = 1 + len(heights) + len(played.checks) * (1 + len(heights))
    assert len(played.requests) <= stretches * (2 * (UPLOAD.retries + 1) + 2) + 1
    assert len(played.checks) <= RESTARTS + 1


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_over_any_line_a_right_receiver_ends_up_with_every_byte_once(data: st.DataObject) -> None:
    """A receiver that keeps what arrives, and a line that cuts anywhere: what it has is the artifact, in order."""
    kept = 0
    sent = 0

    def respond(request: Request) -> Answer | Fault:
        nonlocal kept, sent
        if request.method == "PUT" and request.body == Body():
            if data.draw(st.integers(0, 9)) == 0:
                return CUT
            return stored(200) if kept == SIZE else place(kept)
        assert request.body is not None
        start, length = request.body.offset, request.body.length_bytes
        if request.method == "PUT":
            kept = 0
        assert start == kept
        arrived = data.draw(st.integers(0, length))
        kept += arrived
        sent += arrived
        if kept < SIZE or data.draw(st.integers(0, 9)) == 0:
            return CUT
        return stored()

    many = msgspec.structs.replace(UPLOAD, retries=60)
    played = play(respond, upload=many)
    if played.verdict.outcome is Outcome.SHIPPED:
        assert kept == SIZE
        assert sent == SIZE
    else:
        assert played.verdict.scope is Scope.NETWORK
