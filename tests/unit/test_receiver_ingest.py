"""Bodies on their way into a partial: every end they can come to."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fastship.receiver.uploads.partial import Partial
from fastship.receiver.wire.ingest import BATCH_BYTES, End, Message, gather, ingest

CHUNKS = [bytes([number % 251]) * 65536 for number in range(60)]  # more than three batches
WHOLE = b"".join(CHUNKS)


@pytest.fixture
def partial(tmp_path: Path) -> Partial:
    path = tmp_path / "p"
    return Partial(path, os.open(path, os.O_RDWR | os.O_CREAT))


def body(chunks: Sequence[bytes], then: Message | None = None) -> Callable[[], Awaitable[Message]]:
    """An ASGI ``receive`` that gives ``chunks`` and then ``then``; None: nothing ever again."""
    messages: list[Message] = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]

    async def receive() -> Message:
        await asyncio.sleep(0)
        if messages:
            return messages.pop(0)
        if then is None:
            await asyncio.Event().wait()
        assert then is not None
        return then

    return receive


LAST: Message = {"type": "http.request", "body": b"", "more_body": False}
GONE: Message = {"type": "http.disconnect"}


def run(partial: Partial, receive: Callable[[], Awaitable[Message]], **options: Any) -> End:
    chosen = {"limit_bytes": None, "sync_bytes": BATCH_BYTES, "idle_timeout_s": 30.0, **options}

    async def main() -> End:
        with ThreadPoolExecutor(4) as executor:
            return await ingest(receive, partial, executor, **chosen)

    return asyncio.run(main())


@pytest.mark.parametrize(("then", "end"), [(LAST, End.WHOLE), (GONE, End.CUT), (None, End.IDLE)])
def test_what_came_is_kept(partial: Partial, then: Message | None, end: End) -> None:
    digest = hashlib.sha256()
    assert run(partial, body(CHUNKS, then), body_digest=digest, idle_timeout_s=0.3 if then is None else 30.0) is end
    assert partial.path.read_bytes() == WHOLE
    assert partial.digest() == digest.hexdigest() == hashlib.sha256(WHOLE).hexdigest()


def test_a_limit_is_not_passed(partial: Partial) -> None:
    assert run(partial, body(CHUNKS, LAST), limit_bytes=len(WHOLE)) is End.WHOLE
    assert run(partial, body(CHUNKS, LAST), limit_bytes=100_000) is End.TOO_LONG
    assert partial.offset == len(WHOLE) + 65536
    assert run(partial, body([b"x"], LAST), limit_bytes=0) is End.TOO_LONG


def test_syncs_happen_on_the_way(tmp_path: Path) -> None:
    synced: list[int] = []
    path = tmp_path / "p"
    partial = Partial(path, os.open(path, os.O_RDWR | os.O_CREAT), synced=synced.append)
    assert run(partial, body(CHUNKS, LAST)) is End.WHOLE
    assert synced
    assert synced == sorted(synced)
    assert synced[-1] <= partial.offset


def test_an_error_of_the_disk_leaves_a_consistent_partial(partial: Partial, monkeypatch: pytest.MonkeyPatch) -> None:
    real: Callable[..., int] = os.pwritev
    left = [2]

    def fail(fd: int, buffers: Sequence[bytes], offset: int) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "pwritev", fail)
    with pytest.raises(OSError, match="No space"):
        run(partial, body(CHUNKS, LAST))
    assert partial.offset == 2 * BATCH_BYTES
    assert partial.digest() == hashlib.sha256(WHOLE[: 2 * BATCH_BYTES]).hexdigest()


def test_a_cancelled_request_leaves_no_thread_behind(partial: Partial) -> None:
    async def main() -> None:
        with ThreadPoolExecutor(4) as executor:
            options: dict[str, Any] = {"limit_bytes": None, "sync_bytes": 1, "idle_timeout_s": 30.0}
            task = asyncio.create_task(ingest(body(CHUNKS), partial, executor, **options))
            while partial.offset == 0:  # noqa: ASYNC110 - it is a thread that writes, and it sets no event
                await asyncio.sleep(0.001)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            at = partial.offset
            partial.close()
            await asyncio.sleep(0.05)
            assert partial.offset == at

    asyncio.run(main())
    assert WHOLE.startswith(partial.path.read_bytes())


def test_crumbs_are_not_gathered_for_long(partial: Partial) -> None:
    """A piece costs 40 bytes to keep, however small: a batch is full by its pieces, too."""
    crumbs = body([b"x"] * 3000, LAST)
    written = []

    async def receive() -> Message:
        message = await crumbs()
        if message is LAST:
            for _ in range(10_000):
                if partial.offset >= 2000:
                    break
                await asyncio.sleep(0.001)
            written.append(partial.offset)
        return message

    assert run(partial, receive) is End.WHOLE
    assert written[0] >= 2000
    assert partial.offset == 3000


@pytest.mark.parametrize("small", [False, True])
def test_a_byte_now_and_then_is_idle(partial: Partial, small: bool) -> None:
    async def receive() -> Message:
        await asyncio.sleep(0.01)
        return {"type": "http.request", "body": b"x", "more_body": True}

    if small:
        end, data = asyncio.run(gather(receive, limit_bytes=1 << 20, idle_timeout_s=0.3))
        assert end is End.IDLE
        assert data == b"x" * len(data) != b""
    else:
        assert run(partial, receive, idle_timeout_s=0.3) is End.IDLE
        assert partial.path.read_bytes() == b"x" * partial.offset != b""
