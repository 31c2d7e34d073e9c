"""A request's body on its way from the event loop into a partial: gathered, digested and written in threads.

What always holds: the loop never waits for the disk; when `ingest` returns or raises no thread touches the partial
any more; memory is two batches a request and unsynced data at most twice ``sync_bytes`` an upload. Where bytes come
fast and the connection can be lent, a thread takes them itself (``direct``).

Imported by ``app``.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Awaitable, Callable, MutableMapping
from concurrent.futures import Executor
from typing import Any

from fastship.receiver.uploads.partial import Digest, Partial
from fastship.receiver.wire.direct import Direct, Takers, Taking

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]

BATCH_BYTES = 1 << 20  # a thread hop costs about 0.1 ms, digest and write of so much 1 to 2 ms
_BATCH_PIECES = 1024  # a piece of one byte costs 40 bytes to keep; as many as one pwritev(2) takes
_FAST_S = 0.05  # for a batch: 20 MB/s
LEAST_BYTES = 4096  # in the idle limit: a byte at a time now and then is idle, too
_CLOCK_S = 1.0  # how finely the idle limit is kept; moving a timer for each 64 KiB costs more than it is worth


class End(enum.Enum):
    """How a body ended."""

    WHOLE = "whole"
    CUT = "cut"  # the client went away; what came is kept
    IDLE = "idle"  # the client sent nothing for too long
    TOO_LONG = "too long"  # more than was allowed; what is within is kept


async def ingest(
    receive: Receive,
    partial: Partial,
    executor: Executor,
    *,
    limit_bytes: int | None,
    sync_bytes: int,
    idle_timeout_s: float,
    body_digest: Digest | None = None,
    direct: Direct | None = None,
    takers: Takers | None = None,
) -> End:
    """Append the body that ``receive`` (ASGI) gives to ``partial``; at most ``limit_bytes`` of it.

    ``body_digest`` is updated with the same bytes. Not synced at the end. With ``direct`` and ``takers``, a thread
    takes what it can. Raises ``OSError`` and what the partial's guard raises.
    """
    writer = _Writer(partial, executor, sync_bytes, body_digest)
    loop = asyncio.get_running_loop()
    taken = taken_before = 0
    try:
        async with asyncio.timeout(idle_timeout_s) as limit:
            moved = loop.time()
            while True:
                now = loop.time()
                if now - moved > _CLOCK_S and taken - taken_before >= LEAST_BYTES:
                    limit.reschedule(now + idle_timeout_s)
                    moved, taken_before = now, taken
                message = await receive()
                if message["type"] != "http.request":
                    end = End.CUT
                    break
                body = message.get("body", b"")
                taken += len(body)
                if limit_bytes is not None and taken > limit_bytes:
                    end = End.TOO_LONG
                    break
                if body:
                    await writer.put(body)
                if not message.get("more_body", False):
                    end = End.WHOLE
                    break
                if direct is not None and takers is not None and writer.is_fast(direct.left):
                    limit.reschedule(None)
                    most = direct.left if limit_bytes is None else min(direct.left, limit_bytes - taken)
                    taken += await writer.take(direct, takers, most)
                    moved, taken_before = loop.time(), taken
                    limit.reschedule(moved + idle_timeout_s)
    except TimeoutError:
        end = End.IDLE
    except BaseException:
        await writer.settle()
        raise
    await writer.flush()
    return end


async def gather(receive: Receive, *, limit_bytes: int, idle_timeout_s: float) -> tuple[End, bytes]:
    """A small body, in memory; at most ``limit_bytes`` of it."""
    pieces: list[bytes] = []
    loop = asyncio.get_running_loop()
    came, left_bytes = 0, limit_bytes
    try:
        async with asyncio.timeout(idle_timeout_s) as limit:
            while True:
                message = await receive()
                if message["type"] != "http.request":
                    return End.CUT, b"".join(pieces)
                piece = message.get("body", b"")
                left_bytes -= len(piece)
                if left_bytes < 0:
                    return End.TOO_LONG, b"".join(pieces)
                pieces.append(piece)
                if not message.get("more_body", False):
                    return End.WHOLE, b"".join(pieces)
                came += len(piece)
                if came >= LEAST_BYTES:
                    limit.reschedule(loop.time() + idle_timeout_s)
                    came = 0
    except TimeoutError:
        return End.IDLE, b"".join(pieces)


class _Writer:
    """One batch being gathered, one being written, and perhaps a sync beside it."""

    def __init__(self, partial: Partial, executor: Executor, sync_bytes: int, body_digest: Digest | None) -> None:
        self._partial = partial
        self._executor = executor
        self._sync_bytes = sync_bytes
        self._body_digest = body_digest
        self._batch: list[bytes] = []
        self._batch_bytes = 0
        self._unsynced_bytes = 0
        self._writing: asyncio.Future[Any] | None = None
        self._syncing: asyncio.Future[int] | None = None
        self._batch_began = 0.0
        self._fast = False

    async def put(self, body: bytes) -> None:
        now = asyncio.get_running_loop().time()
        if not self._batch:
            self._batch_began = now
        self._batch.append(body)
        self._batch_bytes += len(body)
        if self._batch_bytes >= BATCH_BYTES or len(self._batch) >= _BATCH_PIECES:
            self._fast = self._batch_bytes >= BATCH_BYTES and now - self._batch_began < _FAST_S
            await self._hand_over()

    def is_fast(self, left_bytes: int) -> bool:
        """Whether a batch has just gone at a rate, with so much to come, that is worth `take`."""
        return self._fast and not self._batch and left_bytes >= BATCH_BYTES

    async def take(self, direct: Direct, takers: Takers, most_bytes: int) -> int:
        """Let a thread append from the connection as long as bytes come fast; how many it was, perhaps none."""
        self._fast = False
        with takers.one() as free:
            source = direct.borrow() if free and most_bytes > 0 else None
            if source is None:
                return 0
            before = after = self._partial.offset
            try:
                await self._finish(self._writing)
                await self._finish(self._syncing)
                before = after = self._partial.offset
                taking = Taking(source, self._partial, most_bytes, self._sync_bytes, self._body_digest)
                self._writing = asyncio.wrap_future(takers.submit(taking))
                try:
                    await self._finish(self._writing)
                finally:
                    taking.stop()
                    await self.settle()
                    after = self._partial.offset
            finally:
                direct.give_back(after - before)
            return after - before

    async def flush(self) -> None:
        """Write the rest and wait for everything."""
        try:
            if self._batch:
                await self._hand_over()
            await self._finish(self._writing)
            await self._finish(self._syncing)
        finally:
            await self.settle()

    async def settle(self) -> None:
        """Wait until no thread works, whatever comes of it."""
        running = [future for future in (self._writing, self._syncing) if future is not None]
        if running:
            await asyncio.wait(running)
            for future in running:
                future.exception()  # looked at: it was raised already, or something worse was

    async def _hand_over(self) -> None:
        await self._finish(self._writing)
        loop = asyncio.get_running_loop()
        if self._unsynced_bytes >= self._sync_bytes:
            await self._finish(self._syncing)
            self._syncing = loop.run_in_executor(self._executor, self._partial.sync)
            self._unsynced_bytes = 0
        self._writing = loop.run_in_executor(self._executor, self._write, self._batch)
        self._unsynced_bytes += self._batch_bytes
        self._batch, self._batch_bytes = [], 0

    def _write(self, batch: list[bytes]) -> None:
        self._partial.write(batch)
        if self._body_digest is not None:
            for chunk in batch:
                self._body_digest.update(chunk)

    @staticmethod
    async def _finish(future: asyncio.Future[Any] | None) -> None:
        # Shielded: a cancelled wait must not make a running thread look finished.
        if future is not None:
            await asyncio.shield(future)
