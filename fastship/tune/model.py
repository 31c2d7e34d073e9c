"""The model: what this host delivers at a level, what holds it back, and which level is the best.

What always holds: pure functions of values, no clock and no I/O. Rates are bytes of the tar stream a second unless a
name says otherwise. Packing, sending and reading go on at the same time, so what is delivered is the least of what each
*limit* lets through:

- the cores: all CPU that a byte costs, over the cores that are to be had;
- reading the episodes; writing the artifacts; the link, both of which the ratio widens.

Imports nothing of fastship; ``tune`` and the command line import it.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

NEAR = 0.97
"""Levels that deliver this part of the best count as equal: what a measurement of seconds can tell apart."""

CORES, READING, OUTBOX, LINK = "cores", "reading", "outbox", "link"


class LevelCost(msgspec.Struct, frozen=True, kw_only=True):
    """What zstd did at a level with the episodes, on every thread at once."""

    level: int
    ratio: float
    zstd_cpu_s: float  # a byte of the tar stream


class Host(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured of the host, apart from the levels. None: not known, so no limit."""

    cores: float  # that packing gets: fewer than there are where others compute, too
    around_cpu_s: float  # a byte of the tar stream: what packing costs beside zstd, digest and writing of the artifact
    artifact_cpu_s: float  # a byte of the artifact: SHA-256, writing, sending
    episode_cpu_s: float = 0.0  # an episode
    episode_bytes: float = 1.0  # of the tar stream, the mean
    read_bytes_per_s: float | None = None
    write_bytes_per_s: float | None = None  # of the artifact
    link_bytes_per_s: float | None = None  # of the artifact


class Prediction(msgspec.Struct, frozen=True, kw_only=True):
    """What is delivered at a level, and which of the ``limits`` (bytes of the tar stream a second) is the least."""

    level: int
    ratio: float
    bytes_per_s: float
    bottleneck: str
    limits: dict[str, float]
    zstd_share: float  # of the CPU

    @property
    def next_limit(self) -> tuple[str, float] | None:
        """What would hold it back next, and at which rate."""
        others = sorted((rate, name) for name, rate in self.limits.items() if name != self.bottleneck)
        return (others[0][1], others[0][0]) if others else None


def predict(host: Host, cost: LevelCost) -> Prediction:
    """What the host delivers at the level of ``cost``."""
    cpu_s = host.around_cpu_s + host.episode_cpu_s / host.episode_bytes
    cpu_s += cost.zstd_cpu_s + host.artifact_cpu_s / cost.ratio
    limits = {CORES: host.cores / cpu_s}
    for name, rate, widened in (
        (READING, host.read_bytes_per_s, 1.0),
        (OUTBOX, host.write_bytes_per_s, cost.ratio),
        (LINK, host.link_bytes_per_s, cost.ratio),
    ):
        if rate is not None:
            limits[name] = rate * widened
    bottleneck = min(limits, key=lambda name: limits[name])
    return Prediction(
        level=cost.level,
        ratio=cost.ratio,
        bytes_per_s=limits[bottleneck],
        bottleneck=bottleneck,
        limits=limits,
        zstd_share=cost.zstd_cpu_s / cpu_s,
    )


def best(predictions: Sequence[Prediction]) -> Prediction:
    """The one that delivers most; among those within `NEAR` of it, the one with the smallest artifacts."""
    most = max(one.bytes_per_s for one in predictions)
    near = [one for one in predictions if one.bytes_per_s >= NEAR * most]
    return max(near, key=lambda one: (one.ratio, -one.level))


def least_near_best(rates: Sequence[tuple[int, float]]) -> int:
    """Of ``(count, rate)``, the smallest count whose rate is within `NEAR` of the best: of threads, of connections."""
    most = max(rate for _, rate in rates)
    return min(count for count, rate in rates if rate >= NEAR * most)


def calibrated(whole: LevelCost, part: LevelCost, other: LevelCost) -> LevelCost:
    """What ``other``, measured on a part of the sample, would be on the whole: by another level's part and whole.

    ``part`` and ``whole`` are that other level on the same part and on the whole. A high level packs a few MB a second
    and is measured on a few frames, which may be easier or harder than the rest.
    """
    return LevelCost(
        level=other.level,
        ratio=whole.ratio * other.ratio / part.ratio,
        zstd_cpu_s=whole.zstd_cpu_s * other.zstd_cpu_s / part.zstd_cpu_s,
    )


def worker_count(threads: int, available_bytes: int, frame_bytes: int) -> int:
    """As many workers as threads, fewer where half of the memory is not enough for them; at least one.

    A worker takes about 40 MB and, of the threads all have together, two frames each and four beside.
    """
    frames = 2 * frame_bytes
    for count in range(threads, 1, -1):
        if count * (_WORKER_BYTES + 2 * frames) + threads * frames <= available_bytes / 2:
            return count
    return 1


_WORKER_BYTES = 40_000_000
