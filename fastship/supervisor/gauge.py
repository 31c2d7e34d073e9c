"""What everybody else on this host uses and waits for, from /proc.

What always holds: a look costs well under a millisecond for a few workers; what cannot be read is not counted.

What others use is the busy time of the cores that packing may run on (/proc/stat) without that of our own processes.
What they wait for is what the host waits for without our threads' part (/proc/PID/task/TID/schedstat). The host's
part of time in /proc/pressure/cpu is an average over cores that are not idle (kernel, kernel/sched/psi.c): times those
it is the cores at which somebody waited. Of two who share a core one always waits, so the difference is exact; where
more than one waits at a core it is too small, and grows as packing takes fewer cores.

Imports ``lifecycle``; ``host`` imports it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from fastship.lifecycle import Reading

PROC = Path("/proc")
TICK_S = 1 / os.sysconf("SC_CLK_TCK")
LOAD_S = 60.0  # over which the kernel smooths the load that we look at


class Gauge:
    """Readings of /proc, each of the time since the one before. ``cores``: the numbers of those packing may run on."""

    def __init__(self, cores: Iterable[int], *, proc: Path = PROC) -> None:
        self._cores = {f"cpu{core}" for core in cores}
        self._proc = proc
        self._at: float | None = None
        self._totals: dict[tuple[str, str], float] = {}  # by kind and source: seconds since its beginning
        self._our_load = 0.0

    def read(self, ours: set[int], now: float) -> Reading | None:
        """``ours``: the pids that are not others. None the first time, and where no time went by."""
        gap_s = now - self._at if self._at is not None else 0.0
        before, self._totals, self._at = self._totals, dict(self._count(ours)), now
        if gap_s <= 0:
            return None

        def grown(kind: str) -> float:
            """By how much the totals of this kind grew a second. A new one began since."""
            grown_s = (total - before.get(key, 0.0) for key, total in self._totals.items() if key[0] == kind)
            return sum(max(0.0, seconds) for seconds in grown_s) / gap_s

        def pressure(kind: str) -> float | None:
            key = (f"{kind}-pressure", "")
            return grown(key[0]) if key in before and key in self._totals else None

        busy, used, waited = grown("core"), grown("process"), grown("wait")
        stalled = busy * min(1.0, pressure("cpu") or 0.0)
        memory, io = pressure("memory"), pressure("io")
        self._our_load += min(1.0, gap_s / LOAD_S) * (used + waited - self._our_load)
        return Reading(
            others_cores=max(0.0, busy - used) + max(0.0, stalled - waited),
            memory_pressure=None if memory is None else 100 * memory,
            io_pressure=None if io is None else 100 * io,
            load=max(0.0, os.getloadavg()[0] - self._our_load),
        )

    def _count(self, ours: set[int]) -> Iterator[tuple[tuple[str, str], float]]:
        with contextlib.suppress(OSError, ValueError), (self._proc / "stat").open() as lines:
            for line in lines:
                name, _, rest = line.partition(" ")
                if name in self._cores:
                    user, nice, system, _idle, _iowait, irq, softirq = (int(text) for text in rest.split()[:7])
                    yield ("core", name), (user + nice + system + irq + softirq) * TICK_S
        for pid in ours:
            yield from self._count_process(self._proc / str(pid))
        for kind in ("cpu", "io", "memory"):
            total_s = stalled_s(kind, proc=self._proc)
            if total_s is not None:
                yield (f"{kind}-pressure", ""), total_s

    def _count_process(self, directory: Path) -> Iterator[tuple[tuple[str, str], float]]:
        with contextlib.suppress(OSError, ValueError):  # it may have ended
            fields = (directory / "stat").read_text().rpartition(")")[2].split()
            yield ("process", directory.name), (int(fields[11]) + int(fields[12])) * TICK_S  # ended threads' too
            for thread in os.listdir(directory / "task"):
                with contextlib.suppress(OSError, ValueError):
                    _, waited_ns, _ = (directory / "task" / thread / "schedstat").read_text().split()
                    yield ("wait", thread), int(waited_ns) / 1e9


def stalled_s(kind: str, *, proc: Path = PROC) -> float | None:
    """Seconds in which something waited for ``kind`` ("cpu", "io", "memory"), since boot. None: not told here."""
    try:
        some = (proc / "pressure" / kind).read_text().partition("\n")[0]
        return int(some.rpartition("total=")[2]) / 1e6
    except (OSError, ValueError):
        return None
