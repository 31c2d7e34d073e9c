"""A thread taking a body from a socket into a partial: every end it can come to."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from fastship.receiver.uploads.partial import Partial
from fastship.receiver.wire.direct import PIECE_BYTES, Takers, Taking

DATA = os.urandom(3 * PIECE_BYTES + 12345)


@pytest.fixture
def partial(tmp_path: Path) -> Partial:
    path = tmp_path / "p"
    return Partial(path, os.open(path, os.O_RDWR | os.O_CREAT))


def take(partial: Partial, most: int, sent: bytes, *, then_close: bool = False) -> int:
    ours, theirs = socket.socketpair()
    takers = Takers()
    with ours, theirs:

        def send() -> None:
            with contextlib.suppress(OSError):  # not all of it is taken
                theirs.sendall(sent)
            if then_close:
                theirs.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=send, daemon=True)
        sender.start()
        try:
            return takers.submit(Taking(ours, partial, most, PIECE_BYTES, None)).result(30)
        finally:
            takers.close()
            ours.close()


@pytest.mark.parametrize("then_close", [False, True])
def test_all_that_comes_is_appended_and_digested(partial: Partial, then_close: bool) -> None:
    partial.write([b"before"])
    assert take(partial, 1 << 30, DATA, then_close=then_close) == len(DATA)
    assert partial.path.read_bytes() == b"before" + DATA
    assert partial.digest() == hashlib.sha256(b"before" + DATA).hexdigest()


def test_no_more_is_taken_than_was_asked(partial: Partial) -> None:
    assert take(partial, 2 * PIECE_BYTES + 1, DATA) == 2 * PIECE_BYTES + 1
    assert partial.digest() == hashlib.sha256(DATA[: 2 * PIECE_BYTES + 1]).hexdigest()


def test_nothing_is_waited_for_long(partial: Partial) -> None:
    assert take(partial, len(DATA), b"") == 0
    assert partial.offset == 0


def test_a_digest_of_another_process_stays_unknown(partial: Partial) -> None:
    partial.write([b"before"])
    partial.running = None
    assert take(partial, len(DATA), DATA) == len(DATA)
    assert partial.running is None
    assert partial.digest() == hashlib.sha256(b"before" + DATA).hexdigest()


def test_an_error_of_the_disk_leaves_a_consistent_partial(partial: Partial, monkeypatch: pytest.MonkeyPatch) -> None:
    real: Callable[..., int] = os.pwritev

    def fail(fd: int, buffers: Sequence[bytes], offset: int) -> int:
        if offset >= 2 * PIECE_BYTES:
            raise OSError(28, "No space left on device")
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "pwritev", fail)
    with pytest.raises(OSError, match="No space"):
        take(partial, len(DATA), DATA)
    assert partial.offset == 2 * PIECE_BYTES
    assert partial.digest() == hashlib.sha256(DATA[: partial.offset]).hexdigest()


def test_there_are_so_many_threads_and_no_more() -> None:
    takers = Takers()
    taken = []
    with takers.one() as first:
        taken.append(first)
        held = [takers.one() for _ in range(20)]
        taken += [one.__enter__() for one in held]
        for one in held:
            one.__exit__(None, None, None)
    assert first
    assert 1 < sum(taken) < 20
    with takers.one() as free:
        assert free
    takers.close()
