"""What the way to the destination takes: bytes a second while there is something to send.

What always holds: only time in which bytes waited to go counts, so a link that is idle half of the time is not half
as fast. Pure: the clock is the caller's. The session imports it.
"""

from __future__ import annotations

FIRST_S, WINDOW_S = 0.1, 0.25
"""Busy time that a measurement takes, the first one and those that follow: a shorter one shows the kernel's buffers and
not the link, and while there is none the levels of frames are chosen without it."""

LEAST_BYTES, LONGEST_S = 64 << 10, 2.0
"""A window with fewer bytes goes on, for so long at most: connecting and asking first take time and move none."""

GAIN = 0.5
"""Of a new measurement in the rate: three of them forget what was before."""


class LinkMeter:
    """Told often how many bytes the other end has acknowledged in all, and whether more were waiting since."""

    def __init__(self) -> None:
        self.bytes_per_s: float | None = None  # None: not measured yet
        self._at = 0.0
        self._moved_bytes = 0
        self._busy = False
        self._busy_s = 0.0
        self._busy_bytes = 0

    def sample(self, now: float, moved_bytes: int, busy: bool) -> None:
        """``moved_bytes`` since ever; ``busy``: more waits from now on."""
        if self._busy:
            self._busy_s += now - self._at
            self._busy_bytes += moved_bytes - self._moved_bytes
            window_s = FIRST_S if self.bytes_per_s is None else WINDOW_S
            if self._busy_s >= (window_s if self._busy_bytes >= LEAST_BYTES else LONGEST_S):
                rate = max(self._busy_bytes, 1) / self._busy_s
                self.bytes_per_s = rate if self.bytes_per_s is None else rate * GAIN + self.bytes_per_s * (1 - GAIN)
                self._busy_s, self._busy_bytes = 0.0, 0
        self._at, self._moved_bytes, self._busy = now, moved_bytes, busy
