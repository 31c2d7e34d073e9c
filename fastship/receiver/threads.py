"""The threads of a process, and which of them does what: the event loop waits for no disk and no lock.

What always holds: what runs in a thread runs to its end, whatever becomes of its request; what takes long, or may, has
threads of its own, so that all else does not wait behind it. Imported by ``app``.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any, TypeVar

from fastship.receiver.policy import answers
from fastship.receiver.policy.answers import Answer
from fastship.receiver.policy.decisions import Declared
from fastship.receiver.uploads.lock import Busy
from fastship.receiver.uploads.partial import Partial
from fastship.receiver.uploads.uploads import LengthMismatch, UnknownUpload, WrongOffset

_BUSY_WAIT_S = 20.0  # for an artifact that is being verified, before the client is asked to come again
_TRY_S = 0.05  # so long a thread waits for an upload's lock
_LARGE_BYTES = 256 << 20  # of artifact or content: about a third of a second to verify

T = TypeVar("T")


class Threads:
    """``stop`` is called when the server ends and something still runs."""

    def __init__(self, stop: Callable[[], None]) -> None:
        self._stop = stop
        self.io = ThreadPoolExecutor(16, "receiver-io")
        self.publishing = ThreadPoolExecutor(8, "receiver-publish")  # fsyncs of several share one commit
        self._unknown = ThreadPoolExecutor(4, "receiver-unknown")  # of what does not say how long that takes
        self._verifying = ThreadPoolExecutor(2, "receiver-verify")  # of what takes so long that others would wait

    def close(self) -> None:
        """Let them end; does not wait for them."""
        for threads in (self.io, self.publishing, self._unknown, self._verifying):
            threads.shutdown(wait=False)

    def lane(self, partial: Partial, declared: Declared) -> Executor:
        """The threads for publishing this. What is verified already, or nearly, does not wait behind what is not, and
        what says how much it holds not behind what does not, and may hold a thousand times its size."""
        following = partial.following is not None and partial.following.is_under_way
        large = max(partial.offset, declared.content_bytes or 0) > _LARGE_BYTES and not following
        if declared.content_bytes is None and not following and not large:
            return self._unknown
        return self._verifying if large else self.publishing

    async def run(self, executor: Executor, function: Callable[..., T], *args: Any) -> T:
        """Run ``function`` in a thread; it runs to its end even if this request is cancelled."""
        future = asyncio.get_running_loop().run_in_executor(executor, function, *args)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:  # only when the server ends
            self._stop()
            await asyncio.wait([future])
            raise

    async def take(self, function: Callable[[float], T]) -> T | Answer:
        """Call into the uploads, waiting for an artifact that is being verified, and answer what cannot be.

        A thread waits for an upload's lock once only, as long as one append's write may have it: a thousand requests
        that wait for one verification leave the threads to others.
        """
        deadline = time.monotonic() + _BUSY_WAIT_S
        wait_s = pause_s = _TRY_S
        while True:
            try:
                return await self.run(self.io, function, wait_s)
            except UnknownUpload:
                return answers.UNKNOWN_UPLOAD
            except WrongOffset as error:
                return answers.offset_mismatch(error.offset, error.wanted)
            except LengthMismatch as error:
                return answers.error(
                    400, "inconsistent-length", str(error), *answers.about_upload(), type=answers.LENGTH_MISMATCH
                )
            except Busy:
                if time.monotonic() > deadline:
                    return answers.BEING_VERIFIED
                await asyncio.sleep(pause_s)
                wait_s = 0.0
                pause_s = min(2 * pause_s, 1.0)
