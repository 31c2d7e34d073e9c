"""Readers of an answer's fields and bodies; what the statuses mean is played through in test_upload_native.py."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastship.episode import Manifest, Outcome, Scope
from fastship.upload.course import BODY_LIMIT_BYTES, Answer, Fault, FaultKind
from fastship.upload.verdict import read_proof, retry_after_s, verdict_of_fault, verdict_of_status

MANIFEST = Manifest(
    episode="ep1",
    artifact_sha256="11" * 32,
    artifact_bytes=10,
    content_blake3="22" * 32,
    content_bytes=20,
    members=1,
    frames=1,
    frame_bytes=4096,
    levels={3: 1},
    fingerprint="00",
)
DATE = "Mon, 23 Nov 2026 13:00:00 GMT"


@pytest.mark.parametrize(
    ("value", "date", "seconds"),
    [
        ("0", None, 0.0),
        (" 120 ", None, 120.0),
        ("Mon, 23 Nov 2026 13:02:00 GMT", DATE, 120.0),
        ("Mon, 23 Nov 2026 12:00:00 GMT", DATE, 0.0),
        ("Mon, 23 Nov 2026 13:02:00 GMT", None, None),
        ("Mon, 23 Nov 2026 13:02:00 GMT", "Mon, 23 Nov 2026 13:00:00 -0000", None),
        ("999999999", None, 3600.0),  # not for 31 years: somebody mends it sooner
        ("Fri, 31 Dec 9999 23:59:59 GMT", DATE, 3600.0),
        ("-5", DATE, None),
        ("1.5", DATE, None),
        ("9" * 40, DATE, None),
        ("soon", DATE, None),
        ("", DATE, None),
    ],
)
def test_retry_after(value: str, date: str | None, seconds: float | None) -> None:
    fields = {"retry-after": value} | ({"date": date} if date else {})
    assert retry_after_s(Answer(503, fields)) == seconds


@settings(deadline=None)
@given(
    status=st.integers(-1, 1000), value=st.text(max_size=40), date=st.text(max_size=40), body=st.binary(max_size=200)
)
def test_nothing_that_is_answered_raises_or_blames_the_episode_for_a_server_error(
    status: int, value: str, date: str, body: bytes
) -> None:
    answer = Answer(status, {"retry-after": value, "date": date, "repr-digest": value}, body)
    verdict = verdict_of_status(answer)
    assert verdict.outcome is not Outcome.SHIPPED
    if status // 100 != 4:
        assert verdict.scope is not Scope.EPISODE
    assert read_proof(answer, MANIFEST).receipt is None


def test_the_body_is_kept_as_text_up_to_its_limit() -> None:
    assert verdict_of_status(Answer(400, {}, b"caf\xe9")).body == "caf\N{REPLACEMENT CHARACTER}"
    assert len(verdict_of_status(Answer(400, {}, b"x" * (BODY_LIMIT_BYTES + 5))).body) == BODY_LIMIT_BYTES


def test_every_kind_of_fault_has_a_verdict_that_says_why() -> None:
    for kind in FaultKind:
        assert "the reason" in verdict_of_fault(Fault(kind, "the reason")).error


def test_a_limits_own_words_are_told() -> None:
    said = b'{"error": "this token has 5 bytes stored here", "code": "stored-quota"}'
    assert verdict_of_status(Answer(507, {}, said)).error.endswith("no room: this token has 5 bytes stored here")
    for body in (b"", b"[]", b'{"error": 5}', b"\xff"):
        assert verdict_of_status(Answer(507, {}, body)).error.endswith("no room")


@pytest.mark.parametrize(
    "body",
    [b"", b"null", b"[]", b'"x"', b'{"episode": "ep1"}', b'{"episode": 1, "artifact": 2, "verified": 3}', b"\xff\xfe"],
)
def test_what_is_no_receipt_proves_nothing(body: bytes) -> None:
    proof = read_proof(Answer(201, {}, body), MANIFEST)
    assert (proof.receipt, proof.other) == (None, "")


def test_a_receipt_may_say_more_than_we_know() -> None:
    body = msgspec.json.encode(
        {
            "episode": "ep1",
            "artifact": {"sha256": "11" * 32, "bytes": 10, "md5": "?"},
            "verified": "artifact",
            "later": [1, 2],
        }
    )
    receipt = read_proof(Answer(201, {}, body), MANIFEST).receipt
    assert receipt is not None
    assert receipt.verified == "artifact"
