"""`run_tune`: the level and the settings with which this host delivers most.

Imports the rest of ``tune``; the command line imports it through the package.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from fastship.settings import Settings, format_size
from fastship.tune import measure
from fastship.tune.episodes import cut
from fastship.tune.model import best, least_near_best, predict, worker_count
from fastship.tune.report import TuneReport, link_part, link_rate, part_of, predicted, reading_parts, writing_parts
from fastship.tune.survey import SEND_CPU_S, Survey, host_of
from fastship.tune.words import tell_choice
from fastship.upload import LinkSpeed, LinkUnknown

LEVELS = (1, 2, 3, 4, 6, 9, 12, 15, 19)
_CONNECTIONS = (1, 4, 8)
_LINK_S = 1.5  # some appends of each connection: with fewer a slow link looks up to a third faster than it is
_FRAME_DIVISORS = (1, 2, 4)
_BETTER = 0.03  # by so much another frame size must be: less than that is the sample's doing


def run_tune(
    settings: Settings,
    sources: Sequence[Path] = (),
    *,
    size_bytes: int,
    seconds: float,
    link_bytes_per_s: float | None = None,
    say: Callable[[str], None] = lambda _step: None,
) -> TuneReport:
    """Measure this host on the user's episodes and choose: see `run_bench` for the arguments and what is raised."""
    with Survey(settings, sources, size_bytes=size_bytes, seconds=seconds, say=say) as survey:
        lowest = min(LEVELS)
        reading, writing = survey.read(), survey.write()
        sha256 = survey.digest(sha256=True)
        packed, pack_threads = survey.pack(lowest, seconds / 10)
        costs = survey.levels(LEVELS, seconds * 0.6)
        reference = costs[0]
        if pack_threads == 1:
            reference = survey.compress(lowest, 1, seconds / 40)[0].at(lowest)
        link, connections = _measure_link(survey, packed.code_commit)
        rate = link_rate(link, link_bytes_per_s, settings.upload.bandwidth)
        send_cpu_s = link.cpu_s_per_byte if isinstance(link, LinkSpeed) else SEND_CPU_S
        cores = survey.cores_to_be_had
        host = host_of(reading, writing, packed, reference, sha256, send_cpu_s, cores, rate.bytes_per_s)
        levels = [predict(host, cost) for cost in costs]
        chosen = best(levels)

        threads = _measure_threads(survey, chosen.level, seconds / 10)
        frame_bytes = _measure_frames(survey, chosen.level, threads, seconds / 10)
        workers = worker_count(threads, psutil.virtual_memory().available, frame_bytes)
        if workers < threads:
            survey.notes.append(f"{threads} workers would take more than half of the free memory: {workers} it is")
        return TuneReport(
            host=survey.measured_host(),
            episodes=survey.measured_episodes(),
            parts=[
                *reading_parts(reading),
                *writing_parts(writing, chosen.ratio),
                part_of(f"pack, level {lowest}", packed.cost, f"{pack_threads} thread{'s' * (pack_threads > 1)}"),
                link_part("link", link, rate, chosen.ratio),
            ],
            levels=levels,
            chosen=predicted(chosen, cores),
            why=tell_choice(chosen, levels),
            link=f"{rate.told}; give it with --link 100Mbit/s"
            if rate.bytes_per_s is None
            else f"{rate.told}, to {settings.destination.url}",
            settings={
                "pack": {"level": chosen.level, "threads": threads, "frame_bytes": frame_bytes},
                "workers": {"count": workers},
                "upload": {"connections": max(settings.upload.connections, -(-connections // workers))},
            },
            notes=survey.all_notes(),
            seconds=round(time.monotonic() - survey.started, 1),
        )


def _measure_link(survey: Survey, commit: str | None) -> tuple[LinkSpeed | LinkUnknown, int]:
    """The destination's rate, and the fewest connections at once that come near its best."""
    found: dict[int, LinkSpeed] = {}
    for connections in _CONNECTIONS:
        one = survey.link(max(_LINK_S, survey.seconds / 20), connections, commit)
        if isinstance(one, LinkUnknown):
            return one, 1
        found[connections] = one
    least = least_near_best([(count, one.bytes_per_s) for count, one in found.items()])
    return found[least], least


def _measure_threads(survey: Survey, level: int, seconds: float) -> int:
    """The fewest threads that pack about as fast as all of them: cores that share their units may add nothing."""
    counts = sorted({1, max(1, survey.threads // 2), survey.threads})
    if len(counts) == 1:
        return survey.threads
    pieces = survey.pieces[: survey.pieces_within(level, seconds / (2 * len(counts)))]
    survey.say(f"1 to {survey.threads} threads at level {level}")
    return least_near_best([(count, measure.compress(pieces, level, count).cost.bytes_per_s) for count in counts])


def _measure_frames(survey: Survey, level: int, threads: int, seconds: float) -> int:
    """The frame size: as it is set, unless smaller ones pack better, or memory asks for them."""
    usual = survey.options.frame_bytes
    pieces = [piece for piece in survey.pieces if len(piece) == usual]
    sizes = [usual // divisor for divisor in _FRAME_DIVISORS if usual // divisor >= 1 << 20] or [usual]
    fitting = [size for size in sizes if (threads + 2) * 2 * size <= psutil.virtual_memory().available / 8]
    if len(pieces) < threads or len(fitting) < 2:
        return max(fitting, default=min(sizes))
    count = survey.pieces_within(level, seconds / len(fitting))
    survey.say(f"frames of {' '.join(map(format_size, fitting))} at level {level}")
    made = {size: measure.compress(cut(pieces[:count], size), level, threads) for size in fitting}
    largest = made[max(fitting)]
    better = [
        size
        for size, one in made.items()
        if one.cost.cpu_s < (1 - _BETTER) * largest.cost.cpu_s
        and one.artifact_bytes < (1 + _BETTER / 3) * largest.artifact_bytes
    ]
    return max(better, default=max(fitting))
