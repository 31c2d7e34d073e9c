"""The level of each frame, chosen so that the episode is at the receiver as soon as can be (``pack.level = "auto"``).

A model, not a feedback loop: the tar stream is delivered at

    min(reading, threads / cost of a level, link x ratio of a level)     bytes a second

and the level for which that is largest is taken, of several within `TIE` the one that packs smallest. Cost and ratio
of each level are measured from the frames themselves, beginning with `_PRIOR`; a level that was never tried is
predicted from those that were, and one frame in `TRY_EVERY` is given to a level that seems as good and was not tried
for long. So nothing gets stuck: what the link can do is measured on the link, not guessed from a queue that is full
or empty, and a link that is well again counts at the next frame.

The link's rate is weighed by what waits to be sent: with more than `WAITING_S` seconds of it in the outbox there is
time for a higher level, with less a lower one keeps the link busy.

What always holds: levels are within the bounds given; the content digest does not depend on any of this. Pure: no
clock, no I/O. Not thread-safe: the thread that packs uses it. Imports nothing of fastship; ``frames`` calls it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

WAITING_S = 2.0
"""So much of the link's time should be packed and waiting: a pause in packing costs the link nothing then."""

TIE = 0.03
"""Levels whose delivery is predicted within this part of the best are equally good: predictions are no better."""

TRY_EVERY = 16
"""One frame in so many is packed at a level that is not the best known: about 1 % of the time, as it is near to it."""

LEVEL_WITHOUT_LINK = 3
"""What "auto" is where there is no link: zstd's own default."""

UNKNOWN_BYTES, UNKNOWN_LEVEL = 8 << 20, 6
"""Measuring the link takes a tenth of a second. When so much waits before that, it may be slow: this level keeps a
small backlog from being packed as for a fast one meanwhile, and costs a frame's 80 ms where that is wrong."""

_SHARED_GAIN, _OWN_GAIN = 0.3, 0.1  # what all levels share (the content, the cores) moves faster than one level's own
_WEIGHT_LEAST, _WEIGHT_MOST = 1 / 16, 4.0
_STORED_RATIO = 1.02  # a frame that zstd cannot make smaller says nothing of the levels


class Flow(NamedTuple):
    """What is known of the way to the receiver."""

    link_bytes_per_s: float | None  # of artifact; None: not measured yet
    waiting_bytes: int  # of artifacts that are packed and not sent


class LevelControl:
    """Chooses between ``lowest`` and ``highest`` (zstd levels, -7 to 22); ``flow`` is asked before each frame."""

    def __init__(self, lowest: int, highest: int, flow: Callable[[], Flow]) -> None:
        self._levels = {level: _Level(level) for level in range(lowest, highest + 1)}
        self._lowest = lowest
        self._unknown = min(max(UNKNOWN_LEVEL, lowest), highest)
        self._flow = flow
        self._cost_shift = 0.0  # log: what all levels cost here, against the prior
        self._ratio_shift = 0.0
        self._read_s_per_byte = 0.0
        self._frames = 0

    def next_level(self, threads: int, content_bytes: int, filled_s: float) -> int:
        """The level for a frame of ``content_bytes`` that took ``filled_s`` to read, with so many threads at work."""
        self._frames += 1
        if content_bytes:
            self._read_s_per_byte += _SHARED_GAIN * (filled_s / content_bytes - self._read_s_per_byte)
        flow = self._flow()
        link = flow.link_bytes_per_s
        if link is None:
            return self._lowest if flow.waiting_bytes < UNKNOWN_BYTES else self._unknown
        waiting_s = flow.waiting_bytes / link if link else math.inf
        link *= min(max(WAITING_S / max(waiting_s, 1e-3), _WEIGHT_LEAST), _WEIGHT_MOST)
        delivered = {level: self._delivered(level, threads, link) for level in self._levels}
        enough = max(delivered.values()) * (1 - TIE)
        good = [level for level, rate in delivered.items() if rate >= enough]
        best = max(good, key=self.ratio)
        if self._frames % TRY_EVERY == 0:
            close = [level for level, rate in delivered.items() if rate >= enough * (1 - 4 * TIE)]
            best = min(close, key=lambda level: self._levels[level].tried)
        self._levels[best].tried = self._frames
        return best

    def told(self, level: int, content_bytes: int, compressed_bytes: int, seconds: float) -> None:
        """What a frame came to; ``seconds`` of one thread."""
        known = self._levels.get(level)
        ratio = content_bytes / max(compressed_bytes, 1)
        if known is None or content_bytes < _LEAST_BYTES or seconds < _LEAST_S or ratio < _STORED_RATIO:
            return
        error = math.log(seconds / content_bytes) - known.cost - self._cost_shift
        self._cost_shift += _SHARED_GAIN * error
        known.cost += _OWN_GAIN * error
        error = math.log(ratio) - known.ratio - self._ratio_shift
        self._ratio_shift += _SHARED_GAIN * error
        known.ratio += _OWN_GAIN * error

    def ratio(self, level: int) -> float:
        """Predicted."""
        return math.exp(self._levels[level].ratio + self._ratio_shift)

    def cost_s_per_byte(self, level: int) -> float:
        """Predicted, of one thread."""
        return math.exp(self._levels[level].cost + self._cost_shift)

    def _delivered(self, level: int, threads: int, link_bytes_per_s: float) -> float:
        cost = self.cost_s_per_byte(level)
        # A single thread reads and compresses in turn.
        packing = max(cost / threads, self._read_s_per_byte) if threads > 1 else cost + self._read_s_per_byte
        return min(1 / packing, link_bytes_per_s * self.ratio(level))


def level_without_link(lowest: int, highest: int) -> int:
    """`LEVEL_WITHOUT_LINK` within the bounds."""
    return min(max(LEVEL_WITHOUT_LINK, lowest), highest)


class _Level:
    """What is known of one level: logarithms of seconds a byte and of the ratio, less what all levels share."""

    __slots__ = ("cost", "ratio", "tried")

    def __init__(self, level: int) -> None:
        nanoseconds, ratio = _PRIOR[min(_PRIOR, key=lambda known: abs(known - level))]
        self.cost = math.log(nanoseconds * 1e-9)
        self.ratio = math.log(ratio)
        self.tried = 0


_LEAST_BYTES = 64 << 10  # a smaller frame's ratio and cost are those of its beginning
_LEAST_S = 1e-6  # of a clock that stood still

_PRIOR = {
    -7: (1.5, 2.0),
    -5: (1.8, 2.1),
    -3: (1.9, 2.2),
    -1: (2.2, 2.7),
    1: (2.4, 3.2),
    2: (2.5, 3.3),
    3: (3.2, 3.4),
    4: (4.5, 3.42),
    5: (6.7, 3.5),
    6: (9.3, 3.6),
    7: (12.0, 3.66),
    8: (15.0, 3.7),
    9: (17.0, 3.72),
    10: (26.0, 3.75),
    11: (38.0, 3.76),
    12: (42.0, 3.77),
    13: (130.0, 3.8),
    14: (170.0, 3.85),
    15: (250.0, 3.9),
    16: (330.0, 4.2),
    17: (390.0, 4.3),
    18: (130.0, 4.5),
    19: (430.0, 4.55),
    20: (500.0, 4.6),
    22: (600.0, 4.65),
}
"""Nanoseconds a byte of one thread at 2.6 GHz, and ratio: of frames of 8 MiB of mixed telemetry (bench/corpus.py's
jsonl, csv, f64 and log), smoothed. Only their proportions matter, and only until frames were measured."""
