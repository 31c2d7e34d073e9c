"""The receiver's decisions from headers alone: the protocol's order, as a table."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastship import fields
from fastship.episode import Receipt, ReceivedArtifact, ReceivedContent
from fastship.receiver.policy.access import CommitList
from fastship.receiver.policy.answers import Answer
from fastship.receiver.policy.decisions import (
    Append,
    Body,
    Declared,
    Facts,
    admit,
    compare,
    decide_put,
    parse_range,
    read_append,
    read_body,
    read_declared,
)

SHA, OTHER_SHA = "aa" * 32, "bb" * 32
BLAKE, OTHER_BLAKE = "cc" * 32, "dd" * 32
COMMIT, HEAD = "ab" * 20, "cd" * 20
LIST = CommitList((HEAD, COMMIT), "update")
VERIFIED = Receipt(
    episode="e", artifact=ReceivedArtifact(SHA, 10), content=ReceivedContent(BLAKE, 20, 1), verified="content"
)
UNVERIFIED = Receipt(episode="e", artifact=ReceivedArtifact(SHA, 10), verified="artifact")


def declared(sha256: str | None = OTHER_SHA, blake3: str | None = None, length: int | None = 100) -> Declared:
    return Declared(episode="e", sha256=sha256, length=length, content_blake3=blake3)


# Each row has every fault of the rows below it as well: the first in the protocol's order is the answer.
ORDER: list[tuple[dict[str, object], str | None, int | None]] = [
    ({"max_bytes": 99, "room_bytes": 0, "commits": LIST, "stored": VERIFIED, "overloaded": True}, None, 413),
    ({"room_bytes": 99, "commits": LIST, "stored": VERIFIED, "overloaded": True}, None, 507),
    ({"commits": LIST, "stored": VERIFIED, "overloaded": True}, None, 400),
    ({"commits": LIST, "stored": VERIFIED, "overloaded": True}, "not hex", 400),
    ({"commits": LIST, "stored": VERIFIED, "overloaded": True}, "ee" * 20, 412),
    ({"commits": LIST, "stored": VERIFIED, "overloaded": True}, COMMIT, 409),
    ({"commits": LIST, "owned_bytes": 1, "most_owned_bytes": 100, "overloaded": True}, COMMIT, 507),
    ({"commits": LIST, "owned_bytes": 1, "most_owned_bytes": 101, "overloaded": True}, COMMIT, 503),
    ({"commits": LIST}, COMMIT.upper(), None),
    ({"max_bytes": 100, "room_bytes": 100}, None, None),
]


@pytest.mark.parametrize(("facts", "commit", "status"), ORDER)
def test_the_order(facts: dict[str, object], commit: str | None, status: int | None) -> None:
    verdict = decide_put(declared(), commit, Facts(**facts))  # type: ignore[arg-type]
    assert (verdict.status if verdict else None) == status


def test_a_full_disk_refuses_an_unknown_length_too() -> None:
    verdict = decide_put(declared(length=None), None, Facts(room_bytes=-1))
    assert verdict is not None
    assert verdict.status == 507


def test_who_has_stored_what_he_may_is_refused_what_has_no_length_and_told_what_is_stored() -> None:
    full = Facts(owned_bytes=100, most_owned_bytes=100)
    verdict = decide_put(declared(length=None), None, full)
    assert verdict is not None
    assert verdict.body is not None
    assert (verdict.status, verdict.body["code"]) == (507, "stored-quota")
    assert (verdict.body["stored_bytes"], verdict.body["max_bytes"]) == (100, 100)
    known = decide_put(declared(SHA), None, msgspec.structs.replace(full, stored=VERIFIED))
    assert known is not None
    assert known.status == 200


COMPARED = [
    (SHA, None, VERIFIED, 200),
    (SHA, OTHER_BLAKE, VERIFIED, 200),  # the same bytes are the same, whatever is said of them
    (OTHER_SHA, BLAKE, VERIFIED, 200),
    (None, BLAKE, VERIFIED, 200),
    (OTHER_SHA, OTHER_BLAKE, VERIFIED, 409),
    (None, OTHER_BLAKE, VERIFIED, 409),
    (OTHER_SHA, None, VERIFIED, 409),
    (None, None, VERIFIED, None),
    (SHA, BLAKE, UNVERIFIED, 200),
    (OTHER_SHA, BLAKE, UNVERIFIED, 409),
    (None, BLAKE, UNVERIFIED, None),
]


@pytest.mark.parametrize(("sha256", "blake3", "stored", "status"), COMPARED)
def test_stored_already_or_conflict(sha256: str | None, blake3: str | None, stored: Receipt, status: int) -> None:
    verdict = compare(sha256, blake3, stored)
    assert (verdict.status if verdict else None) == status


def test_412_says_what_to_do() -> None:
    verdict = decide_put(declared(), "EE" * 20, Facts(commits=LIST))
    assert verdict is not None
    assert verdict.body is not None
    assert {name: verdict.body[name] for name in ("your_commit", "head_commit", "remediation", "code")} == {
        "your_commit": "ee" * 20,
        "head_commit": HEAD,
        "remediation": "update",
        "code": "commit-rejected",
    }


def test_access_comes_before_the_id() -> None:
    for allowed, episode, status in ((False, "..", 401), (True, "..", 400), (True, "ok", None), (True, None, None)):
        verdict = admit(allowed, episode)
        assert (verdict.status if verdict else None) == status


def test_a_body_is_read_from_its_framing() -> None:
    assert read_body({}) == Body(length=0)
    assert read_body({"content-length": "7"}) == Body(length=7)
    assert read_body({"transfer-encoding": "chunked", "content-length": "7"}) == Body(length=None)
    digest = fields.format_digest("sha-256", SHA)
    found = read_body({"content-digest": digest, "upload-complete": "?0", "want-repr-digest": "sha-512=3, sha-256=10"})
    assert found == Body(length=0, sha256=SHA, complete=False, want_digest=True)
    unwanted = read_body({"want-repr-digest": "sha-256=0"})
    assert isinstance(unwanted, Body)
    assert not unwanted.want_digest


def test_a_complete_body_tells_the_length() -> None:
    for complete, headers, length in (
        (None, {}, 7),
        (True, {"upload-length": "7"}, 7),
        (False, {}, None),
        (False, {"upload-length": "70"}, 70),
    ):
        found = read_declared(headers, "e", Body(length=7, complete=complete))
        assert isinstance(found, Declared)
        assert found.length == length
    for complete, said in ((None, "8"), (True, "6"), (False, "6")):
        refused = read_declared({"upload-length": said}, "e", Body(length=7, complete=complete))
        assert isinstance(refused, Answer)
        assert refused.status == 400


def test_other_digest_algorithms_are_ignored() -> None:
    found = read_declared({"repr-digest": "sha-512=:AAAA:"}, "e", Body(length=0))
    assert isinstance(found, Declared)
    assert found.sha256 is None


APPEND = {"content-type": "application/partial-upload", "upload-offset": "5"}


def test_appends() -> None:
    assert read_append(APPEND, Body(length=7, complete=False)) == Append(5, None)
    assert read_append(APPEND, Body(length=7, complete=True)) == Append(5, 12)
    assert read_append(APPEND, Body(length=None, complete=True)) == Append(5, None)
    assert read_append({**APPEND, "upload-length": "12"}, Body(length=7, complete=True)) == Append(5, 12)
    for headers, complete in (
        ({**APPEND, "upload-length": "13"}, True),
        ({**APPEND, "content-type": "text/plain"}, True),
        ({**APPEND, "upload-offset": "-5"}, True),
        (APPEND, None),
    ):
        refused = read_append(headers, Body(length=7, complete=complete))
        assert isinstance(refused, Answer)
        assert dict(refused.fields)["Upload-Complete"] == "?0"


@given(st.integers(0, 50), st.integers(0, 50) | st.none(), st.integers(1, 40))
def test_ranges_are_slices(first: int, last: int | None, size: int) -> None:
    data = bytes(range(size))
    found = parse_range(f"bytes={first}-{'' if last is None else last}", size)
    if last is not None and last < first:
        assert found is None
    elif first >= size:
        assert isinstance(found, Answer)
        assert found.status == 416
    else:
        assert isinstance(found, tuple)
        assert data[slice(*found)] == data[first : size if last is None else last + 1]


@given(st.integers(0, 50), st.integers(0, 40))
def test_suffix_ranges(length: int, size: int) -> None:
    found = parse_range(f"bytes=-{length}", size)
    if length == 0 or size == 0:
        assert isinstance(found, Answer)
    else:
        assert isinstance(found, tuple)
        assert bytes(range(size))[slice(*found)] == bytes(range(size))[-length:]


@given(
    st.dictionaries(
        st.sampled_from(
            [
                "content-length",
                "upload-complete",
                "upload-length",
                "upload-offset",
                "repr-digest",
                "content-digest",
                "fastship-content-digest",
                "fastship-content-length",
                "want-repr-digest",
                "content-type",
                "transfer-encoding",
                "content-encoding",
                "content-range",
                "range",
            ]
        ),
        st.text(max_size=40),
    )
)
def test_nothing_a_client_says_raises(headers: dict[str, str]) -> None:
    body = read_body(headers)
    if isinstance(body, Body):
        assert isinstance(read_declared(headers, "e", body), Declared | Answer)
        assert isinstance(read_append(headers, body), Append | Answer)
    parse_range(headers.get("range"), 100)
