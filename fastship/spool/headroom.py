"""How much of the disk one artifact may take: looked at before it is packed and at each of its frames.

What always holds: no write is begun that would bring the free space below the floor, as statvfs(3) tells it just
before. Several workers that write at once, and a recorder, are seen in the same figure; between a look and its write
each of them may take one frame more, so a reserve is passed by some frames at worst. The supervisor says the floor.

Imports ``outbox``, ``durable`` and ``errors``; the worker imports it.
"""

from __future__ import annotations

import time
from collections import deque

from fastship import durable
from fastship.errors import DiskShort
from fastship.spool.outbox import Outbox

OUTBOX_LOOK_S = 0.25  # its size is a look at each of its files
RATIO_OF = 8  # of so many artifacts packed last the one that was compressed least counts
RATIO_MARGIN = 1.2
OVERHEAD_BYTES = 4096  # index and seek table of a few frames

_REMEDY = "free space on the spool's file system, or see [disk] in the settings; it is tried again by itself"


class Ratio:
    """What an artifact will be, from what the last ones were. Until there was one: as large as its content."""

    def __init__(self) -> None:
        self._last: deque[float] = deque(maxlen=RATIO_OF)

    def add(self, content_bytes: int, artifact_bytes: int) -> None:
        self._last.append(artifact_bytes / max(1, content_bytes))

    def estimate_bytes(self, content_bytes: int) -> int:
        ratio = min(1.0, RATIO_MARGIN * max(self._last)) if self._last else 1.0
        return int(content_bytes * ratio) + OVERHEAD_BYTES


class Headroom:
    """Of one artifact that is packed. Blocks on the disk, for microseconds; raises ``OSError`` where the disk does."""

    def __init__(self, outbox: Outbox, episode: str, *, floor_bytes: int, outbox_limit_bytes: int = 0) -> None:
        self._outbox = outbox
        self._episode = episode
        self._floor_bytes = floor_bytes
        self._limit_bytes = outbox_limit_bytes
        self._others_bytes = 0
        self._looked_at: float | None = None
        self._kept_bytes = outbox.partial_bytes(episode)  # is written over first: that takes nothing new

    def most_bytes(self) -> int:
        """How large the artifact may become."""
        most = self._free_bytes() + self._kept_bytes
        return most if not self._others() else min(most, self._limit_bytes - self._others_bytes)

    def require(self, artifact_bytes: int) -> None:
        """Before it is begun. Raises `DiskShort` where an artifact of so much would not fit."""
        most_bytes = self.most_bytes()
        if artifact_bytes > most_bytes:
            told = f"the artifact would take about {artifact_bytes} bytes, there are {max(0, most_bytes)} for it"
            raise DiskShort(f"the disk is short: {told}", remedy=_REMEDY)

    def grow(self, written_bytes: int, more_bytes: int) -> None:
        """Before ``more_bytes`` are written behind ``written_bytes``. Raises `DiskShort`."""
        grown_bytes = written_bytes + more_bytes
        new_bytes = grown_bytes - max(written_bytes, self._kept_bytes)
        if new_bytes > max(0, self._free_bytes()):
            raise DiskShort(f"the disk became short when {written_bytes} bytes were packed", remedy=_REMEDY)
        if self._others() and grown_bytes > self._limit_bytes - self._others_bytes:
            raise DiskShort(f"the outbox became full when {written_bytes} bytes were packed", remedy=_REMEDY)

    def _free_bytes(self) -> int:
        """Above the floor; may be below 0."""
        return durable.free_bytes(self._outbox.directory) - self._floor_bytes

    def _others(self) -> bool:
        """Whether the limit of the outbox counts: not for an artifact alone, which would never be shipped otherwise."""
        if not self._limit_bytes:
            return False
        now = time.monotonic()
        if self._looked_at is None or now - self._looked_at >= OUTBOX_LOOK_S:
            self._looked_at = now
            self._others_bytes = self._outbox.size_bytes(but=self._episode)
        return self._others_bytes > 0
