"""`run_bench`: the standard set on a user's own host and episodes.

Imports the rest of ``tune``; the command line imports it through the package.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from fastship.settings import Settings
from fastship.tune.model import predict
from fastship.tune.report import BenchReport, link_part, link_rate, part_of, predicted, reading_parts, writing_parts
from fastship.tune.survey import SEND_CPU_S, Survey, host_of
from fastship.upload import LinkSpeed


def run_bench(
    settings: Settings,
    sources: Sequence[Path] = (),
    *,
    size_bytes: int,
    seconds: float,
    link_bytes_per_s: float | None = None,
    say: Callable[[str], None] = lambda _step: None,
) -> BenchReport:
    """Measure every part of an episode's way on this host, and say which holds it back.

    On episodes of ``sources``, else of the spool, else generated ones: at most ``size_bytes`` of them, in about
    ``seconds``. ``link_bytes_per_s``: take the link's rate from the caller. ``say`` is told each step. Blocks; leaves
    nothing behind. Raises `UsageError` for sources that cannot be used, and `PackError`.
    """
    with Survey(settings, sources, size_bytes=size_bytes, seconds=seconds, say=say) as survey:
        level = settings.pack.level
        if not isinstance(level, int):  # "auto"
            level = settings.pack.level_min
            survey.notes.append(f'pack.level is "auto": measured at {level}, as it packs while the cores hold it back')
        reading = survey.read()
        blake3, sha256 = survey.digest(sha256=False), survey.digest(sha256=True)
        alone, _ = survey.compress(level, 1, seconds / 12)
        together, count = survey.compress(level, survey.threads, seconds / 12)
        writing = survey.write()
        packed, pack_threads = survey.pack(level, seconds / 6)
        loopback = survey.loopback(seconds / 12)
        link = survey.link(seconds / 12, settings.upload.connections, packed.code_commit)

        reference = together.at(level)
        ratio = reference.ratio
        # Beside its parts with as many threads: two that share a core's units take more CPU than one alone.
        zstd = alone.at(level) if pack_threads == 1 else reference
        send_cpu_s = loopback.cpu_s_per_byte if isinstance(loopback, LinkSpeed) else SEND_CPU_S
        rate = link_rate(link, link_bytes_per_s, settings.upload.bandwidth)
        cores = survey.cores_to_be_had
        host = host_of(reading, writing, packed, zstd, sha256, send_cpu_s, cores, rate.bytes_per_s)
        prediction = predict(host, reference)
        floor = reading.warm.cpu_s_per_byte + blake3.cpu_s_per_byte + zstd.zstd_cpu_s
        floor += (sha256.cpu_s_per_byte + writing.cached.cpu_s_per_byte) / ratio
        efficiency = floor / packed.cost.cpu_s_per_byte

        threads = survey.threads
        pack_cost, workers = packed.cost, f"{threads} threads"
        if pack_threads == 1 < threads:
            pack_cost = pack_cost._replace(wall_s=pack_cost.wall_s / threads)
            workers = f"as {threads} workers like the one that was measured"
        parts = [
            *reading_parts(reading),
            part_of("BLAKE3", blake3, "one thread, in memory"),
            part_of("SHA-256", sha256, "one thread, of the artifact, in memory", ratio=ratio),
            part_of(f"zstd {level}, 1 thread", alone.cost, "frames in memory"),
            part_of(f"zstd {level}, all threads", together.cost, f"{threads} threads, {count} frames in memory"),
            *writing_parts(writing, ratio),
            part_of("pack", pack_cost, f"{workers}; its parts alone take {100 * efficiency:.0f} % of its CPU"),
            link_part("upload, loopback", loopback, link_rate(loopback, None), ratio),
            link_part("link", link, rate, ratio),
        ]
        return BenchReport(
            host=survey.measured_host(),
            episodes=survey.measured_episodes(),
            parts=parts,
            pack_efficiency=round(efficiency, 3),
            prediction=predicted(prediction, cores),
            notes=survey.all_notes(),
            seconds=time.monotonic() - survey.started,
        )
