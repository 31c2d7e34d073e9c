"""What something cost: wall, CPU seconds, peak memory; of this process, of a command, of a server that runs.

What always holds: CPU is user and system time of all processes a thing started, and peak memory is the sum of each
one's VmHWM as last seen (not ``ru_maxrss``: a process started by vfork begins with its parent's). Costs are compared
only with costs taken in turn with them in the same run; seconds of different runs or hosts say nothing.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import resource
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from bench import recordings

T = TypeVar("T")

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_SAMPLE_S = 0.05
MIB = 1 << 20


def installed_environment() -> dict[str, str]:
    """The environment for commands in Python, with bytecode cached as an installation has it.

    A checkout under PYTHONDONTWRITEBYTECODE compiles itself at every start, in every process: 0.2 s each that no
    user's host pays. The first start fills the cache: run a command once before it is measured.
    """
    cached = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(recordings.cache_directory() / "pycache")}
    return {**os.environ, **cached}


class Cost(NamedTuple):
    wall_s: float
    cpu_s: float
    peak_bytes: int

    def a_gigabyte(self, raw_bytes: int) -> float:
        """CPU seconds a GB (1e9 bytes) of ``raw_bytes``."""
        return self.cpu_s * 1e9 / raw_bytes

    def megabytes_per_s(self, raw_bytes: int) -> float:
        return raw_bytes / 1e6 / self.wall_s


def median(costs: Sequence[Cost]) -> Cost:
    """The median of each figure by itself; of peak memory the largest."""
    return Cost(
        statistics.median(cost.wall_s for cost in costs),
        statistics.median(cost.cpu_s for cost in costs),
        max(cost.peak_bytes for cost in costs),
    )


def least(costs: Sequence[Cost]) -> Cost:
    """The least of each: noise only adds, so this is the nearest to what the work itself costs."""
    return Cost(min(c.wall_s for c in costs), min(c.cpu_s for c in costs), max(c.peak_bytes for c in costs))


class CommandFailed(Exception):
    """A measured command ended with another code than 0."""


class Metered:
    """``with Metered() as meter: ...; meter.cost``: of this process, its threads and the children it waited for.

    The peak is VmHWM since the beginning (the kernel's mark is reset), less what was resident then.
    """

    def __enter__(self) -> Metered:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_bytes(b"5")  # proc(5): resets VmHWM
        self._resident = _memory_bytes(os.getpid(), b"VmRSS:")
        self._cpu = _own_cpu_s()
        self._wall = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        wall, cpu = time.perf_counter() - self._wall, _own_cpu_s() - self._cpu
        self.cost = Cost(wall, cpu, max(0, _memory_bytes(os.getpid(), b"VmHWM:") - self._resident))


def metered(work: Callable[[], T]) -> tuple[Cost, T]:
    with Metered() as meter:
        result = work()
    return meter.cost, result


def run(
    command: Sequence[str | Path],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    timeout_s: float = 3600,
) -> tuple[Cost, bytes]:
    """Run a command to its end: its cost, with all that it started and waited for, and its standard output.

    Raises `CommandFailed` with what it said on standard error.
    """
    wall = time.perf_counter()
    before = _children_cpu_s()
    with subprocess.Popen(
        [os.fspath(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        env={**installed_environment(), **(env or {})},
        cwd=cwd,
    ) as process:
        watch = _PeakWatch(process.pid)
        try:
            out, error = process.communicate(timeout=timeout_s)
        except BaseException:
            process.kill()
            raise
        finally:
            peak = watch.stop()
    cpu = _children_cpu_s() - before
    if process.returncode:
        said = error.decode(errors="replace")[-2000:]
        raise CommandFailed(f"{' '.join(map(str, command))[:300]}: exit {process.returncode}: {said}")
    return Cost(time.perf_counter() - wall, cpu, peak), out


def tree_cpu_s(pid: int) -> float:
    """CPU seconds so far of a running process, its children, and those they waited for: a server's, say."""
    total = 0.0
    for member in _tree(pid):
        with contextlib.suppress(OSError, ValueError):
            fields = Path(f"/proc/{member}/stat").read_bytes().rpartition(b")")[2].split()
            total += sum(map(int, fields[11:15])) / _TICKS_PER_S  # utime, stime, cutime, cstime
    return total


def tree_peak_bytes(pid: int) -> int:
    return sum(_memory_bytes(member, b"VmHWM:") for member in _tree(pid))


def largest_peak_bytes(pid: int) -> int:
    """Of the one process of them that has the most."""
    return max((_memory_bytes(member, b"VmHWM:") for member in _tree(pid)), default=0)


class _PeakWatch:
    """Looks at the VmHWM of a process and all below it, often enough to see all that live a while."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._most = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while True:
            peaks = {pid: _memory_bytes(pid, b"VmHWM:") for pid in _tree(self._pid)}
            # Those that live at the same time: a loop over episodes starts thousands that never meet.
            self._most = max(self._most, sum(peaks.values()))
            if self._ended.wait(_SAMPLE_S):
                return

    def stop(self) -> int:
        self._ended.set()
        self._thread.join()
        return self._most


def _tree(pid: int) -> Iterator[int]:
    yield pid
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError):
                for child in Path(f"/proc/{pid}/task/{task}/children").read_bytes().split():
                    yield from _tree(int(child))


def _memory_bytes(pid: int, field: bytes) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_bytes().splitlines():
            if line.startswith(field):
                return int(line.split()[1]) * 1024
    return 0


def _own_cpu_s() -> float:
    return time.process_time() + _children_cpu_s()


def _children_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)  # of those waited for; finer than times(2)
    return used.ru_utime + used.ru_stime


def host() -> dict[str, Any]:
    """What it ran on, for whoever reads the figures later."""
    model = "unknown"
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30), 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_before": round(os.getloadavg()[0], 2),
    }


def versions() -> dict[str, str]:
    import pycurl
    import zstandard

    return {
        "fastship": importlib.metadata.version("fastship"),
        "zstandard": importlib.metadata.version("zstandard"),
        "libzstd": ".".join(map(str, zstandard.ZSTD_VERSION)),
        "blake3": importlib.metadata.version("blake3"),
        "libcurl": pycurl.version_info()[1],
    }
