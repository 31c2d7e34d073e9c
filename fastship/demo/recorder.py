"""Recording episodes: real telemetry of this host, and copies of the reader's own directories.

What always holds: an episode gets its ``done.marker`` last, when every file of it is closed; the reader's own
directories are only read.

Imports ``episode`` and ``errors``; only ``demo`` imports it.
"""

from __future__ import annotations

import array
import csv
import json
import os
import platform
import re
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from fastship.episode import MARKER, is_episode_id
from fastship.errors import UsageError

Maker = Callable[[Path, threading.Event], None]

_FAST_S = 0.02  # CPU, memory: cheap to ask
_SLOW_S = 0.2  # processes: some 10 ms for a hundred of them
_PROCESS_FIELDS = (
    "pid", "ppid", "name", "username", "status", "cpu_times", "memory_info", "num_threads", "create_time",
)  # fmt: skip


def mark_done(episode: Path) -> None:
    """Say that the episode is finished: the last thing a recorder does."""
    (episode / MARKER).touch()


class Recorder(threading.Thread):
    """Makes episodes one after the other in a thread of its own, each marked when it is whole.

    ``error`` is what ended it early, or None; `stop` ends it soon, leaving the last episode unmarked.
    """

    def __init__(self, episodes: Path, makers: Mapping[str, Maker]) -> None:
        """``makers``: for each episode what fills its directory; given that directory and when to stop."""
        super().__init__(name="recorder", daemon=True)
        self._episodes = episodes
        self._makers = makers
        self._stopping = threading.Event()
        self.error: Exception | None = None

    def stop(self) -> None:
        self._stopping.set()

    def run(self) -> None:
        try:
            for name, make in self._makers.items():
                make(self._episodes / name, self._stopping)
                if self._stopping.is_set():
                    return
                mark_done(self._episodes / name)
        except Exception as error:  # told by whoever waits for this thread
            self.error = error


def host_telemetry(seconds: float) -> Maker:
    """What records this host for ``seconds`` into an episode."""
    return lambda directory, stopping: _record_host(directory, seconds, stopping)


def copy_of(source: Path) -> Maker:
    """What copies ``source`` into an episode, as it is: links, modes, times, sparse files, FIFOs."""
    return lambda directory, stopping: _copy(source, directory, stopping)


def _record_host(directory: Path, seconds: float, stopping: threading.Event) -> None:
    """One episode: JSONL of processes and disks, CSV of memory and network, a binary array of CPU times, meta.json."""
    import psutil

    (directory / "network").mkdir(parents=True)
    started = time.time()
    cpu = array.array("d")
    with ExitStack() as files:

        def new(name: str) -> IO[str]:
            return files.enter_context(open(directory / name, "w", encoding="utf-8", newline=""))

        processes, disks = new("processes.jsonl"), new("disks.jsonl")
        memory, network = csv.writer(new("memory.csv")), csv.writer(new("network/counters.csv"))
        memory.writerow(["time", *psutil.virtual_memory()._fields])
        network.writerow(["time", "interface", "bytes_sent", "bytes_recv", "packets_sent", "packets_recv", "errin"])
        end, slow = time.monotonic() + seconds, 0.0
        while True:
            now = time.time()
            cpu.append(now)
            cpu.extend(psutil.cpu_times())
            memory.writerow([f"{now:.6f}", *psutil.virtual_memory()])
            if time.monotonic() >= slow:
                slow = time.monotonic() + _SLOW_S
                _write_lines(processes, now, (one.info for one in psutil.process_iter(_PROCESS_FIELDS)))
                _write_lines(disks, now, _disks())
                network.writerows(_network(now))
            if time.monotonic() >= end or stopping.wait(_FAST_S):
                break
    with open(directory / "cpu_times.f64", "wb") as binary:
        cpu.tofile(binary)
    meta = {
        "recorder": "fastship demo",
        "host": platform.node(),
        "kernel": platform.release(),
        "started_at": datetime.fromtimestamp(started, UTC).isoformat(),
        "seconds": round(time.time() - started, 3),
        "cpu_times": {"type": "float64", "order": "native", "columns": ["time", *psutil.cpu_times()._fields]},
        "code_version": {"commit": _commit()},
    }
    (directory / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")


def _write_lines(file: IO[str], now: float, records: Iterable[dict[str, Any]]) -> None:
    for record in records:
        file.write(json.dumps({"time": round(now, 6), **record}, default=str) + "\n")


def _disks() -> Iterator[dict[str, Any]]:
    import psutil

    for name, counters in (psutil.disk_io_counters(perdisk=True) or {}).items():
        yield {"disk": name, **counters._asdict()}


def _network(now: float) -> Iterator[list[Any]]:
    import psutil

    for name, one in (psutil.net_io_counters(pernic=True) or {}).items():
        row = [one.bytes_sent, one.bytes_recv, one.packets_sent, one.packets_recv, one.errin]
        yield [f"{now:.6f}", name, *row]


def _commit() -> str:
    """This checkout's commit, or 40 zeros where fastship is not run from one."""
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):
        return "0" * 40
    commit = found.stdout.strip()
    return commit if found.returncode == 0 and re.fullmatch(r"[0-9a-f]{40}", commit) else "0" * 40


def plan_copies(sources: Iterable[Path]) -> list[tuple[Path, str]]:
    """What to copy under which id: each sub-directory of a source, or the source itself where it has none.

    Raises `UsageError` for a source that cannot be used.
    """
    plan: list[tuple[Path, str]] = []
    taken: set[str] = set()
    for source in sources:
        try:
            found = [Path(entry.path) for entry in os.scandir(source) if entry.is_dir(follow_symlinks=False)]
        except OSError as error:
            raise UsageError(
                f"{source}: {error.strerror}", remedy="--from takes a directory that you may read"
            ) from None
        for directory in sorted(found) or [source]:
            name = _make_id(directory.absolute().name, taken)
            taken.add(name)
            plan.append((directory, name))
    return plan


def _copy(source: Path, target: Path, stopping: threading.Event) -> None:
    """Raises `UsageError` when something of it cannot be copied."""
    command = ["cp", "-a", "--", str(source), str(target)]
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=said)
        while process.poll() is None:
            if stopping.wait(0.01):
                process.terminate()
                process.wait()
                return
        said.seek(0)
        lines = said.read().decode(errors="replace").splitlines()
    if process.returncode:
        raise UsageError(
            f"{source} cannot be copied: {lines[0] if lines else 'cp failed'}",
            remedy="choose directories that you may read whole, and a --dir with room for three times their size",
        )
    target.chmod(target.stat().st_mode | 0o700)  # the copy may be of a read-only directory


def size_bytes(directory: Path) -> int:
    """About how much room the copy takes: the blocks of all files in it. What cannot be read counts nothing."""
    total = 0
    for top, _, files in os.walk(directory):
        for name in files:
            try:
                total += os.lstat(os.path.join(top, name)).st_blocks * 512
            except OSError:
                continue
    return total


def check_room(directory: Path, wanted_bytes: int) -> None:
    """Raises `UsageError` when the file system of ``directory`` has not so much free."""
    free = shutil.disk_usage(directory).free
    if free < wanted_bytes:
        raise UsageError(
            f"{directory} has {free / 1e6:.0f} MB free and the demo needs about {wanted_bytes / 1e6:.0f} MB",
            remedy="--dir DIR on a larger file system",
        )


def _make_id(name: str, taken: set[str]) -> str:
    """A valid id as near to ``name`` as can be, and not one of ``taken``."""
    base = re.sub(r"[^A-Za-z0-9._-]", "-", name).lstrip("._-")[:190] or "episode"
    candidate, number = base, 1
    while candidate in taken:
        number += 1
        candidate = f"{base}-{number}"
    assert is_episode_id(candidate)
    return candidate
