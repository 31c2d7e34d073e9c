"""An answer from the pieces in which libcurl hands it over."""

from __future__ import annotations

import pytest

from fastship.upload.course import BODY_LIMIT_BYTES, Answer, Fault, Taker
from fastship.upload.incoming import ANSWER_LIMIT_BYTES, Incoming

TOKEN = "token-of-today"


def heard(*lines: bytes, taker: Taker | None = None) -> Incoming:
    incoming = Incoming(taker)
    for line in lines:
        incoming.field(line)
    return incoming


class Keeper:
    def __init__(self, wants: bool) -> None:
        self.wants = wants
        self.began: list[Answer] = []
        self.pieces = b""

    def begin(self, answer: Answer) -> bool:
        self.began.append(answer)
        return self.wants

    def take(self, piece: bytes) -> None:
        self.pieces += piece


def test_fields_of_the_last_head_count_and_no_trailer() -> None:
    incoming = heard(
        b"HTTP/1.1 200 Connection established\r\n", b"Via: a proxy\r\n", b"\r\n",
        b"HTTP/1.1 104 Upload Resumption\r\n", b"Upload-Offset: 7\r\n", b"\r\n",
        b"HTTP/1.1 201 Created\r\n", b"Vary: a\r\n", b"vary:b\r\n", b"ETag:  \xe9 \r\n", b"odd\r\n", b"\r\n",
        b"Vary: of the trailer\r\n",
    )  # fmt: skip
    assert incoming.add(b"bo")
    assert incoming.add(b"dy")
    assert incoming.answer(201, TOKEN) == Answer(201, {"vary": "a, b", "etag": "\xe9", "odd": ""}, b"body")


@pytest.mark.parametrize("lines", [[], [b"HTTP/1.1 200 OK\r\n"], [b"HTTP/1.1 200 OK\r\n", b"Upload-Complete: ?1\r\n"]])
def test_a_head_that_was_cut_is_no_answer(lines: list[bytes]) -> None:
    assert isinstance(heard(*lines).answer(200, TOKEN), Fault)
    assert isinstance(heard(*lines, b"\r\n").answer(200, TOKEN), Answer)
    assert isinstance(heard(*lines, b"\n").answer(104, TOKEN), Fault)


def test_of_a_body_so_much_is_kept_and_so_much_is_borne() -> None:
    incoming = heard(b"HTTP/1.1 200 OK\r\n", b"\r\n")
    piece = b"x" * 16384
    for _ in range(ANSWER_LIMIT_BYTES // len(piece)):
        assert incoming.add(piece)
    answer = incoming.answer(200, TOKEN)
    assert isinstance(answer, Answer)
    assert len(answer.body) == BODY_LIMIT_BYTES
    assert not incoming.too_long
    assert not incoming.add(b"x")
    assert incoming.too_long


@pytest.mark.parametrize("wants", [False, True])
def test_who_may_want_the_body_is_asked_once_and_of_the_final_head(wants: bool) -> None:
    keeper = Keeper(wants)
    incoming = heard(
        b"HTTP/1.1 100 Continue\r\n", b"\r\n", b"HTTP/1.1 206 Part\r\n", b"A: b\r\n", b"\r\n", taker=keeper
    )
    assert (incoming.began, incoming.taken) == (True, False)
    pieces = ANSWER_LIMIT_BYTES // 16384 + 1
    assert [incoming.add(b"x" * 16384) for _ in range(pieces)] == [True] * (pieces - 1) + [wants]
    assert keeper.began == [Answer(206, {"a": "b"})]
    assert len(keeper.pieces) == (pieces * 16384 if wants else 0)
    assert (incoming.taken, incoming.too_long) == (wants, not wants)
    answer = incoming.answer(206, TOKEN)
    assert isinstance(answer, Answer)
    assert answer.body == (b"" if wants else b"x" * BODY_LIMIT_BYTES)


def test_of_a_body_that_never_came_its_taker_hears_all_the_same() -> None:
    keeper = Keeper(True)
    assert heard(b"HTTP/1.1 404 No\r\n", b"\r\n", taker=keeper).answer(404, TOKEN) == Answer(404)
    assert keeper.began == [Answer(404)]


@pytest.mark.parametrize(("status", "token", "shown"), [(200, TOKEN, True), (401, TOKEN, False), (401, "no", True)])
def test_a_token_is_taken_out_of_a_refusal(status: int, token: str, shown: bool) -> None:
    incoming = heard(b"HTTP/1.1 401 No\r\n", b"\r\n")
    assert incoming.add(f"you sent {token}".encode())
    answer = incoming.answer(status, token)
    assert isinstance(answer, Answer)
    assert (token in answer.text) == shown
