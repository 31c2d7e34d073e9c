"""``POST /v1/verifications/{id}``: an artifact read again while its client waits, however long that takes.

The answer begins at once and its JSON document comes at the end, after a line feed every few seconds (JSON allows white
space before it): so neither end, nor what is between them, takes a long reading for a dead connection, and there is no
state to ask for afterwards. A client that goes away ends its reading.

What always holds: so many are read at once as there are threads, so many more may wait, and to others 503 is said.
Imported by ``app``.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec

from fastship.receiver.policy import answers
from fastship.receiver.policy.answers import Answer
from fastship.receiver.store.custody import Custody, Finding
from fastship.receiver.store.store import Store
from fastship.receiver.wire.request import Request

_log = logging.getLogger("fastship.receiver")

_AT_ONCE = 2  # a disk's arm serves no more well, and each may use several cores
_WAITING = 16
_ALIVE_S = 5.0  # well below the least idle limit of the usual proxies (60 s)

_TOO_MANY = answers.error(
    503, "overloaded", "as many artifacts as are allowed are being read again", ("Retry-After", "5")
)
_HEADERS = (("Content-Type", "application/json"), ("Cache-Control", "no-store"), ("X-Accel-Buffering", "no"))


class NotFound(msgspec.Struct, frozen=True):
    """There is no finding: it went away meanwhile (``missing``), or nothing is known (``failed``)."""

    episode: str
    verdict: str
    error: str


class Verifications:
    """Those of one process."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._custody = Custody(store)
        self._threads = ThreadPoolExecutor(_AT_ONCE, "receiver-reread")
        self._asked = 0

    def close(self) -> None:
        self._threads.shutdown(wait=False)

    async def answer(self, request: Request, episode: str) -> Answer | None:
        """The answer where it is known at once, else it is sent."""
        if request.unread:
            return answers.error(400, "bad-field", "a verification takes no body", ("Connection", "close"))
        loop = asyncio.get_running_loop()
        if not await loop.run_in_executor(None, self._store.artifact_path(episode).exists):
            return answers.error(404, "not-stored", f"episode {episode} is not stored here")
        if self._asked >= _AT_ONCE + _WAITING:
            return _TOO_MANY
        gone = threading.Event()
        reading = loop.run_in_executor(self._threads, self._check, episode, gone)  # may be refused a thread
        self._asked += 1
        leaving: asyncio.Future[None] = asyncio.ensure_future(request.left())
        ends: list[asyncio.Future[Any]] = [reading, leaving]
        try:
            await request.start(200, _HEADERS)
            while True:
                await asyncio.wait(ends, timeout=_ALIVE_S, return_when=asyncio.FIRST_COMPLETED)
                if reading.done():
                    break
                if leaving.done():
                    return None
                await request.send_body(b"\n", more=True)
            await request.send_body(msgspec.json.encode(reading.result()) + b"\n")
            return None
        finally:
            gone.set()
            leaving.cancel()
            await asyncio.wait([reading])
            self._asked -= 1

    def _check(self, episode: str, gone: threading.Event) -> Finding | NotFound:
        """In a thread."""
        try:
            found = self._custody.check(episode, stopped=lambda: gone.is_set() or self._store.is_stopping)
        except InterruptedError:
            return NotFound(episode, "failed", "the receiver is being stopped")
        except Exception as error:  # the answer has begun: this is the only place left to say it
            _log.exception("%s could not be read again", episode)
            why = error.strerror if isinstance(error, OSError) else ""
            return NotFound(episode, "failed", f"it could not be read again: {why or type(error).__name__}")
        return found or NotFound(episode, "missing", "it is not stored here any more")
