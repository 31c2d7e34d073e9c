"""What one process has to do at the moment, and for whom: counts, on the event loop alone.

Where there are several callers, one has at most three quarters of the requests with a body that are served at once: a
client whose bodies come a byte at a time keeps nobody else out. Rates are a bucket of one second for each caller.

What always holds: every count goes down by what it went up. Imported by ``app``.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator

from fastship.receiver.policy.access import Caller


class Load:
    """``most`` requests with a body are served at once, and as many artifacts are sent."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._bodies: Counter[str] = Counter()
        self._sending = 0
        self._buckets: dict[str, tuple[float, float]] = {}  # owner -> requests it may make now, as of when
        self.held_bytes = 0  # of small bodies in memory

    def is_full(self, caller: Caller, *, several: bool) -> bool:
        """Whether a body of this caller is one too many."""
        share = max(1, self._most - self._most // 4)
        return self._bodies.total() >= self._most or (several and self._bodies[caller.owner] >= share)

    def is_sending_enough(self) -> bool:
        return self._sending >= self._most

    @contextlib.contextmanager
    def body(self, caller: Caller) -> Iterator[None]:
        self._bodies[caller.owner] += 1
        try:
            yield
        finally:
            self._bodies[caller.owner] -= 1
            if not self._bodies[caller.owner]:
                del self._bodies[caller.owner]

    @contextlib.contextmanager
    def sending(self) -> Iterator[None]:
        self._sending += 1
        try:
            yield
        finally:
            self._sending -= 1

    def wait_s(self, caller: Caller) -> float:
        """0, and the request is counted; or how long until this caller may make one."""
        rate = caller.limits.rate
        if not rate:
            return 0.0
        now = time.monotonic()
        most = max(1.0, rate)
        left, as_of = self._buckets.get(caller.owner, (most, now))
        left = min(most, left + (now - as_of) * rate)
        if left < 1.0:
            self._buckets[caller.owner] = (left, now)
            return (1.0 - left) / rate
        self._buckets[caller.owner] = (left - 1.0, now)
        return 0.0
