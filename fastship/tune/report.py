"""What `bench` and `tune` found, as values: what ``--json`` prints and the tables show.

Rates are MB/s (1e6 bytes) of raw data, the tar stream, so that every part can be set beside every other; CPU is
seconds a GB (1e9 bytes) of it. Imports `measure`, `model`, `words` and ``upload``; ``tune`` imports it.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from fastship.tune.measure import Cost, Storage, Writing
from fastship.tune.model import Prediction
from fastship.tune.words import tell_link, tell_prediction
from fastship.upload import LinkSpeed, LinkUnknown


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """One part of an episode's way. None: not measured, and ``how`` says why."""

    name: str
    mb_per_s: float | None = None
    cpu_s_per_gb: float | None = None
    how: str


class MeasuredHost(msgspec.Struct, frozen=True, kw_only=True):
    """What it ran on."""

    cpu: str
    cores: int
    cores_to_be_had: float  # what packing got while it was measured
    memory_available_bytes: int
    kernel: str
    fastship: str
    spool: str  # directory and file system of the episodes
    outbox: str  # where artifacts were written to


class MeasuredEpisodes(msgspec.Struct, frozen=True, kw_only=True):
    told: str
    generated: bool
    episodes: int
    files: int
    bytes: int  # of the tar stream


class Predicted(msgspec.Struct, frozen=True, kw_only=True):
    """What is delivered end to end, in words, too."""

    level: int
    ratio: float
    mb_per_s: float
    bottleneck: str
    limits_mb_per_s: dict[str, float]
    told: str


class BenchReport(msgspec.Struct, frozen=True, kw_only=True):
    host: MeasuredHost
    episodes: MeasuredEpisodes
    parts: list[Part]
    pack_efficiency: float  # CPU of its parts alone over its own
    prediction: Predicted
    notes: list[str]
    seconds: float


class TuneReport(msgspec.Struct, frozen=True, kw_only=True):
    host: MeasuredHost
    episodes: MeasuredEpisodes
    parts: list[Part]
    levels: list[Prediction]
    chosen: Predicted
    why: str
    link: str  # what is known of it, in words
    settings: dict[str, dict[str, int]]  # what --write writes
    notes: list[str]
    seconds: float


def part_of(name: str, cost: Cost, how: str, *, ratio: float = 1.0) -> Part:
    """A part from its cost; ``ratio``: the cost is of the artifact, so many times smaller than the tar stream."""
    return Part(
        name=name,
        mb_per_s=round(cost.bytes_per_s * ratio / 1e6, 1),
        cpu_s_per_gb=round(cost.cpu_s_per_byte / ratio * 1e9, 3),
        how=how,
    )


def reading_parts(reading: Storage) -> list[Part]:
    cold = Part(name="read, cold", how="the kernel does not let go of these files: memory, or not yet on disk")
    if reading.cold is not None:
        cold = part_of("read, cold", reading.cold, "the files, after the kernel was told to forget them")
    return [cold, part_of("read, warm", reading.warm, "again, from memory")]


def writing_parts(writing: Writing, ratio: float) -> list[Part]:
    told = f"{writing.cached.bytes / 1e6:.0f} MB into the outbox's file system"
    return [
        part_of("write", writing.cached, f"{told}, no fsync, as fastship writes", ratio=ratio),
        part_of("write and fsync", writing.synced, f"{told}, as a long backlog writes", ratio=ratio),
    ]


class LinkRate(NamedTuple):
    """What counts as the link's rate (bytes of the artifact a second; None: not known), and why, in words."""

    bytes_per_s: float | None
    told: str


def link_rate(link: LinkSpeed | LinkUnknown, given_bytes_per_s: float | None, bandwidth: int = 0) -> LinkRate:
    """A rate that was given goes before one that was measured, and ``upload.bandwidth`` (0: no limit) bounds both."""
    rate = given_bytes_per_s
    if rate is not None:
        told = f"{tell_link(rate)}, as given"
    elif isinstance(link, LinkSpeed):
        rate = link.bytes_per_s
        lines = "1 connection" if link.connections == 1 else f"{link.connections} connections"
        told = f"{tell_link(rate)}, measured over {lines}"
    else:
        told = f"not measured: {link.reason}"
    if bandwidth and (rate is None or rate > bandwidth):
        return LinkRate(bandwidth, f"{tell_link(bandwidth)} by upload.bandwidth ({told})")
    return LinkRate(rate, told)


def link_part(name: str, link: LinkSpeed | LinkUnknown, rate: LinkRate, ratio: float) -> Part:
    """What a destination takes."""
    if rate.bytes_per_s is None:
        return Part(name=name, how=rate.told)
    measured = link if isinstance(link, LinkSpeed) and link.bytes_per_s == rate.bytes_per_s else None
    return Part(
        name=name,
        mb_per_s=round(rate.bytes_per_s * ratio / 1e6, 1),
        cpu_s_per_gb=round(measured.cpu_s_per_byte / ratio * 1e9, 3) if measured else None,
        how=f"{rate.told}, times {ratio:.2f}{'; sent, made durable there, cancelled' if measured else ''}",
    )


def predicted(one: Prediction, cores: float) -> Predicted:
    return Predicted(
        level=one.level,
        ratio=round(one.ratio, 3),
        mb_per_s=round(one.bytes_per_s / 1e6, 1),
        bottleneck=one.bottleneck,
        limits_mb_per_s={name: round(rate / 1e6, 1) for name, rate in one.limits.items()},
        told=tell_prediction(one, cores),
    )
