"""A token bucket for bytes: how much may be moved now, and when some may be again.

What always holds: over any stretch of time no more than ``rate x seconds + burst`` bytes are granted. Reads no
clock; the caller passes a monotonic one's time. Not thread-safe: it belongs to the session's thread.

Imports nothing of fastship; the transfers use it.
"""

from __future__ import annotations

BURST_S = 0.1
"""The bucket holds what this time brings. Shorter costs wake-ups, longer makes a shared line stutter."""

BURST_MIN_BYTES = 32 << 10
"""...but never less than two TLS records (RFC 8446, 5.1), or slow limits would send crumbs."""


class Bandwidth:
    def __init__(self, rate_bytes_per_s: float = 0, *, now: float) -> None:
        self._rate = 0.0
        self._level = 0.0
        self._filled_at = now
        self.set_rate(rate_bytes_per_s, now)

    def set_rate(self, rate_bytes_per_s: float, now: float) -> None:
        """0: no limit. What was saved up under the old rate stays, as far as the new bucket holds it: a worker's share
        changes with every small episode, and one that began anew each time would send nothing.
        """
        self.ready_in_s(now)
        self._rate = rate_bytes_per_s
        self._level = min(self._level, self._burst)
        self._filled_at = now

    @property
    def _burst(self) -> float:
        return max(self._rate * BURST_S, BURST_MIN_BYTES)

    def take(self, wanted_bytes: int, now: float) -> int:
        """How many of ``wanted_bytes`` may be sent now: 0, or at least a useful piece of them."""
        if not self._rate:
            return wanted_bytes
        if self.ready_in_s(now) > 0:
            return 0
        granted = min(wanted_bytes, int(self._level))
        self._level -= granted
        return granted

    def take_whole(self, count_bytes: int, now: float) -> bool:
        """Whether so many may move now, all of them: at most `BURST_MIN_BYTES` / 2, which a bucket half full has."""
        if not self._rate:
            return True
        if self.ready_in_s(now) > 0:
            return False
        self._level -= count_bytes
        return True

    def ready_in_s(self, now: float) -> float:
        """Seconds until the bucket is half full; 0: now. Half makes few, even pieces and forgives a late wake-up."""
        if not self._rate:
            return 0.0
        self._level = min(self._burst, self._level + self._rate * (now - self._filled_at))
        self._filled_at = now
        missing = self._burst / 2 - self._level
        return missing / self._rate if missing > 1 else 0.0  # less than a byte is floating point
