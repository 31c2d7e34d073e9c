"""The application as any ASGI server may call it, and what its answers must not say."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from asgi import Asking, Message, Reply, ask, scope_of
from receiver_process import make_artifact, sha256_field

from fastship.receiver import verification
from fastship.receiver.app import Receiver, create_app
from fastship.settings import ReceiverSettings

DATA = make_artifact("e", 2000)
Ask = Callable[..., Reply]


@pytest.fixture
def app(tmp_path: Path) -> Iterator[Receiver]:
    made = create_app(ReceiverSettings(root=str(tmp_path / "root"), reserve_bytes=0))
    yield made
    made.close()


def request(app: Receiver, method: str, path: str, body: bytes | Sequence[bytes] = b"", **headers: str) -> Reply:
    pieces = [body] if isinstance(body, bytes) else list(body)
    told = {"content-length": str(sum(map(len, pieces))), **{key.replace("_", "-"): headers[key] for key in headers}}
    return asyncio.run(ask(app, method, path, told.items(), pieces))


def append(app: Receiver, location: str, data: bytes, offset: int, complete: str = "?0", **headers: str) -> Reply:
    of_append = {
        "content_type": "application/partial-upload",
        "upload_offset": str(offset),
        "upload_complete": complete,
    }
    return request(app, "PATCH", location, data, **of_append, **headers)


def create(app: Receiver, data: bytes = DATA, body: bytes = b"", **headers: str) -> Reply:
    declared = {"upload_complete": "?0", "upload_length": str(len(data)), "repr_digest": sha256_field(data)}
    return request(app, "PUT", "/v1/episodes/e", body, **{**declared, **headers})


def run(app: Receiver, scope: Message, *, send_fails: bool = False) -> Coroutine[Any, Any, Reply | None]:
    async def one() -> Reply | None:
        asking = Asking(app, scope, send_fails=send_fails)
        asking.disconnect()
        return await asking.ended()

    return one()


def test_a_scope_may_have_no_extensions(app: Receiver) -> None:
    reply = asyncio.run(run(app, {**scope_of("GET", "/healthz"), "extensions": None}))
    assert reply is not None
    assert reply.status == 200


def test_a_protocol_that_is_not_spoken_is_refused_as_asgi_asks(app: Receiver) -> None:
    with pytest.raises(NotImplementedError, match="websocket"):
        asyncio.run(run(app, {"type": "websocket"}))


def test_a_server_that_says_that_the_client_has_gone_is_no_failure(
    app: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    """From ASGI 2.4 on ``send`` raises then."""
    request(app, "PUT", "/v1/episodes/e", DATA)
    for method, path in (("GET", "/healthz"), ("GET", "/v1/episodes/e"), ("POST", "/v1/verifications/e")):
        assert asyncio.run(run(app, scope_of(method, path), send_fails=True)) is None
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_method_names_that_clients_make_up_are_counted_together(app: Receiver) -> None:
    for number in range(50):
        assert request(app, f"BREW{number}", "/v1/episodes/e").status == 405
    text = request(app, "GET", "/metrics").body
    assert b"BREW" not in text
    assert b'requests_total{method="other",status="405"} 50.0' in text


@pytest.mark.parametrize("path", ["/healthz", "/metrics"])
def test_what_is_only_read_takes_no_other_method(app: Receiver, path: str) -> None:
    refused = request(app, "PUT", path, b"x")
    assert (refused.status, refused.code, refused.headers["allow"]) == (405, "bad-method", "GET, HEAD")
    assert request(app, "OPTIONS", path).status == 204
    unread = request(app, "GET", path, b"x")
    assert (unread.status, unread.headers["connection"]) == (200, "close")


@pytest.mark.parametrize("body", [DATA[:-1], DATA + b"x", [DATA, b"x"]])
def test_a_small_body_that_is_not_as_long_as_was_said_is_not_stored(app: Receiver, body: bytes | list[bytes]) -> None:
    refused = request(app, "PUT", "/v1/episodes/e", body, content_length=str(len(DATA)))
    assert (refused.status, refused.code) == (400, "inconsistent-length")
    assert request(app, "HEAD", "/v1/episodes/e").status == 404


def test_a_refused_length_tells_no_offset_of_an_upload_that_stands_elsewhere(app: Receiver) -> None:
    location = create(app).headers["location"]
    assert append(app, location, DATA[:100], 0).offset == 100
    declared = {"repr_digest": sha256_field(DATA), "upload_length": "7"}
    for more in ({}, {"upload_complete": "?0"}, {"expect": "100-continue"}):
        refused = request(app, "PUT", "/v1/episodes/e", DATA, **declared, **more)
        assert (refused.status, refused.code, refused.offset) == (400, "inconsistent-length", None)
    assert request(app, "HEAD", location).offset == 100


def test_a_creation_whose_first_bytes_are_refused_says_where_the_upload_is(app: Receiver) -> None:
    """With a random name nobody could go on with it, else; it would count as one of its token's for a week."""
    wrong = request(app, "PUT", "/v1/episodes/e", DATA, upload_complete="?0", content_digest=sha256_field(b"x"))
    assert (wrong.status, wrong.code, wrong.complete, wrong.offset) == (400, "digest-mismatch", "?0", 0)
    assert append(app, wrong.headers["location"], DATA, 0, "?1").status == 201


def test_the_answer_of_an_upload_is_no_answer_once_another_content_has_its_id(app: Receiver, tmp_path: Path) -> None:
    """Its 201 would let a client retire what the receiver does not have any more."""
    location = create(app).headers["location"]
    assert append(app, location, DATA, 0, "?1").status == 201
    assert append(app, location, DATA, 0, "?1").status == 201
    for name in ("e.tar.zst", "e.receipt.json"):
        (tmp_path / "root" / "episodes" / name).unlink()
    assert request(app, "PUT", "/v1/episodes/e", make_artifact("other", 900)).status == 201
    for late in (append(app, location, DATA, 0, "?1"), request(app, "HEAD", location)):
        assert (late.status, late.complete) == (404, "?0")
    assert create(app).code == "conflict"


def test_a_range_is_of_a_get_only(app: Receiver) -> None:
    request(app, "PUT", "/v1/episodes/e", DATA)
    for wanted in ("bytes=0-0", f"bytes={len(DATA)}-"):
        told = request(app, "HEAD", "/v1/episodes/e", range=wanted)
        assert (told.status, told.headers["content-length"]) == (200, str(len(DATA)))
    assert json.loads(request(app, "GET", "/v1/receipts/e").body)["artifact"]["bytes"] == len(DATA)


def leave(app: Receiver, data: bytes, said: int, **headers: str) -> None:
    """A whole artifact of ``said`` bytes of which only ``data`` comes."""

    async def left() -> Reply | None:
        told = {"content-length": str(said), **{key.replace("_", "-"): headers[key] for key in headers}}
        asking = Asking(app, scope_of("PUT", "/v1/episodes/e", told.items()))
        asking.body(data, more=True)
        asking.disconnect()
        return await asking.ended()

    assert asyncio.run(left()) is None


SMALL = {"fastship_content_length": "10240"}  # so that it is read before anything is decided


@pytest.mark.parametrize("more", [{}, SMALL])
def test_what_came_of_a_cut_body_is_no_upload_more_than_its_token_may_have(
    tmp_path: Path, more: dict[str, str]
) -> None:
    (tmp_path / "tokens").write_text("t uploads=1\n")
    app = create_app(
        ReceiverSettings(root=str(tmp_path / "root"), reserve_bytes=0, token_file=str(tmp_path / "tokens"))
    )
    try:
        for number in range(3):
            leave(app, DATA[:100], 2000, repr_digest=sha256_field(b"%d" % number), authorization="Bearer t", **more)
        assert len(list((tmp_path / "root" / "uploads").glob("*.part"))) == 1
    finally:
        app.close()


def test_what_came_of_a_cut_small_body_that_would_be_refused_is_not_kept(tmp_path: Path) -> None:
    app = create_app(ReceiverSettings(root=str(tmp_path / "root"), reserve_bytes=0, max_bytes=1000))
    try:
        leave(app, DATA[:100], 2000, repr_digest=sha256_field(DATA), **SMALL)
        assert not list((tmp_path / "root" / "uploads").glob("*.part"))
        leave(app, DATA[:100], 900, repr_digest=sha256_field(DATA), **SMALL)
        assert len(list((tmp_path / "root" / "uploads").glob("*.part"))) == 1
    finally:
        app.close()


def test_an_upload_of_a_random_name_that_nobody_was_told_is_not_kept(tmp_path: Path) -> None:
    app = create_app(ReceiverSettings(root=str(tmp_path / "root"), reserve_bytes=0, max_bytes=1000))
    try:
        refused = request(app, "PUT", "/v1/episodes/e", DATA, upload_complete="?0")
        assert (refused.status, refused.code) == (413, "too-large")
        leave(app, DATA[:100], 900, upload_complete="?0")
        assert not list((tmp_path / "root" / "uploads").glob("*.part"))
    finally:
        app.close()


def test_a_verification_that_was_refused_a_thread_takes_no_place(
    app: Receiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After some of them, all were told to wait, until the receiver was started again."""
    assert request(app, "PUT", "/v1/episodes/e", DATA).status == 201

    def refused(*_: object, **__: object) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(app._verifications._threads, "submit", refused)
        patch.setattr(verification, "_WAITING", 0)
        assert [request(app, "POST", "/v1/verifications/e").status for _ in range(4)] == [500] * 4
    reply = request(app, "POST", "/v1/verifications/e")
    assert (reply.status, reply.json()["verdict"]) == (200, "sound")
