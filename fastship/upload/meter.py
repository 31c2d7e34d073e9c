"""What the way to the destination takes: bytes a second while there is something to send.

What always holds: only time in which bytes waited to go counts, so a link that is idle half of the time is not half
as fast. Pure: the clock is the caller's. The session imports it.
"""

from __future__ import annotations

WINDOW_S = 0.25
"""Busy time that one measurement takes: shorter ones show the kernel's buffers and not the link."""

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
            moved = self._busy_bytes >= LEAST_BYTES
            if self._busy_s >= (WINDOW_S if moved else LONGEST_S):
                rate = max(self._busy_bytes, 1) / self._busy_s
                self.bytes_per_s = rate if self.bytes_per_s is None else rate * GAIN + self.bytes_per_s * (1 - GAIN)
                self._busy_s, self._busy_bytes = 0.0, 0
        self._at, self._moved_bytes, self._busy = now, moved_bytes, busy
