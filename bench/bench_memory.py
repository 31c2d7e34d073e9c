"""Memory of a worker: the same for an episode of 10 MB and for one of 20 GB (at scale 1), packed and sent by ``auto``.

The peak is VmHWM of the largest process of ``fastship once``, the worker, which has every core. It is to be less than
64 MiB and, for each of T threads and two beside, two frames.
"""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from bench import measure
from bench.compare import SCALE, note
from bench.corpus import Corpus, Shape
from bench.measure import MIB
from bench.peers.backlog import Backlog
from bench.peers.programs import fastship_command
from bench.servers import Receiver
from fastship.pack import PackOptions

pytestmark = pytest.mark.timeout(0)

HUGE_BYTES = round(20_000_000_000 * SCALE)
FILE_BYTES = 2_000_000_000
SAMPLE_S = 0.02


def worker_peak_bytes(backlog: Backlog, sink: Receiver) -> int:
    command = fastship_command(backlog, sink.url)
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=measure.installed_environment()) as process:
        peak = 0
        while process.poll() is None:
            peak = max(peak, measure.largest_peak_bytes(process.pid))
            time.sleep(SAMPLE_S)
    assert process.returncode == 0
    assert len(sink.artifacts()) == 1
    return peak


def test_worker(benchmark: Any, corpus: Corpus, work: Path, receiver: Receiver) -> None:
    peaks = {}
    for name, size_bytes in (("ten", 10_000_000), ("huge", HUGE_BYTES)):
        spool = work / name
        corpus.write_episodes(spool / "episodes", Shape(1, size_bytes, min(size_bytes, FILE_BYTES)), name)
        receiver.empty()
        backlog = Backlog(spool, 1, size_bytes)
        if name == "huge":
            peaks[name] = benchmark.pedantic(worker_peak_bytes, (backlog, receiver), rounds=1)
        else:
            peaks[name] = worker_peak_bytes(backlog, receiver)
    threads = len(os.sched_getaffinity(0))
    aim = (64 << 20) + (threads + 2) * 2 * PackOptions().frame_bytes
    note(
        benchmark,
        peak_mib={name: round(peak / MIB, 1) for name, peak in peaks.items()},
        aim_mib=round(aim / MIB, 1),
        huge_gb=HUGE_BYTES / 1e9,
        host=measure.host(),
        versions=measure.versions(),
    )
    print(benchmark.extra_info["peak_mib"], "aim", benchmark.extra_info["aim_mib"])
    assert max(peaks.values()) < aim
