"""Clocks that jump, hosts that stand still, and disks that take their time: nothing is cleaned up early, no healthy
worker is taken for dead, and nobody spins.

The clock is set by a ``sitecustomize`` in the processes under test alone, which adds to ``time.time``; hosts stand
still by SIGSTOP; disks are slow where strace delays their calls.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import faults
import psutil
import pytest
from lab import Command, Destination, Lab, Receiver, Reply, Sections, noise, telemetry, tree, wait_until, workers_of

TEST = "tests/crash/test_time.py"
YEAR_S = 366 * 86400
QUICK: Sections = {
    "spool": {"scan_interval_s": 0.1},
    "workers": {"count": 2, "heartbeat_timeout_s": 3.0, "stall_report_s": 1.0},
    "upload": {"one_shot_bytes": "64kB", "stream_bytes": "128kB"},
    "pack": {"frame_bytes": "64KiB", "level": 1},
}
SHIM = """
import os, time
_true, _path = time.time, os.environ["TEST_CLOCK_OFFSET"]
def _shifted():
    with open(_path) as file:
        return _true() + float(file.read() or 0)
time.time = _shifted
"""


class SetClock:
    """The clock of the processes that run with ``env``."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "offset"
        shim = directory / "shim"
        shim.mkdir()
        (shim / "sitecustomize.py").write_text(SHIM)
        self.set(0)
        self.env = {"PYTHONPATH": str(shim), "TEST_CLOCK_OFFSET": str(self._path)}

    def set(self, offset_s: float) -> None:
        new = self._path.with_suffix(".new")
        new.write_text(str(offset_s))
        new.replace(self._path)


def everybody(daemon: Command) -> list[psutil.Process]:
    return [psutil.Process(daemon.process.pid), *workers_of(daemon.process.pid)]


def cpu_s(processes: list[psutil.Process]) -> float:
    return sum(sum(one.cpu_times()[:2]) for one in processes)


@contextlib.contextmanager
def at_rest(processes: list[psutil.Process]) -> Iterator[None]:
    """What is done in here costs them next to nothing: whoever waits in a loop takes a core."""
    before, began = cpu_s(processes), time.monotonic()
    yield
    used_s, passed_s = cpu_s(processes) - before, time.monotonic() - began
    assert used_s < 0.5 * passed_s + 0.5, f"{used_s:.2f} s of CPU in {passed_s:.2f} s"


def strace_works() -> bool:
    if not shutil.which("strace"):
        return False
    return subprocess.run(["strace", "-o", "/dev/null", "true"], capture_output=True).returncode == 0


def is_traced(task: Path) -> bool:
    return "TracerPid:\t0\n" not in (task / "status").read_text()


@contextlib.contextmanager
def slowed(pid: int, calls: str, how: str) -> Iterator[None]:
    """Delay calls of all threads of a process."""
    command = [
        "strace",
        "-f",
        "-qq",
        "-o",
        "/dev/null",
        "-e",
        f"trace={calls}",
        "-e",
        f"inject={calls}:{how}",
        "-p",
        f"{pid}",
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as strace:
        try:
            wait_until(lambda: all(is_traced(task) for task in Path(f"/proc/{pid}/task").iterdir()), "strace to attach")
            yield
        finally:
            strace.terminate()


SCENARIOS = ["jumps", "suspended", "slow", "hanging", "slow everywhere"]
DRAWN = faults.some_of(SCENARIOS, "time", least=len(SCENARIOS) if faults.SHARE >= 0.1 else 2)
"""They take some seconds each, mostly of waiting: a small share of the faults has two of them, in time all."""


def drawn(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(name not in DRAWN, reason="not drawn for this share of the faults (FASTSHIP_FAULTS)")


# --- clocks ----------------------------------------------------------------------------------------------------------


@drawn("jumps")
def test_a_clock_that_jumps_by_years_cleans_up_nothing(tmp_path: Path, destination: Destination) -> None:
    clock = SetClock(tmp_path)
    with contextlib.closing(Receiver(tmp_path / "store")) as receiver:
        keep = {"quarantine_keep_days": 1, "shipped_keep_days": 1, "quarantine_cleanup_interval_s": 0.1}
        lab = Lab(tmp_path, receiver.url, {**QUICK, "retention": keep})
        before = {"first": tree(lab.episode("first", {"data": noise(50_000)}))}
        (lab.episodes / "no id").mkdir()
        (lab.episodes / "no id" / "done.marker").touch()
        jumps = [10, -20, 30, 0.1, -0.1, 0]
        log = tmp_path / "run.log"
        with Command("run", "-c", lab.settings_file(), log=log, env=clock.env) as daemon:
            wait_until(lambda: lab.names("shipped") == ["first"], "the first to be shipped")
            wait_until(lambda: lab.names("quarantine") == ["no id"], "a quarantine")
            processes = everybody(daemon)
            for number, years in enumerate(jumps):
                clock.set(years * YEAR_S)
                wait_until(lambda: daemon.log.count("clock-stepped") == number + 1, "it to be noticed")  # noqa: B023
                with at_rest(processes):
                    time.sleep(0.5)
                name = f"ep{number}"
                directory = lab.episode(name, {"data": noise(50_000, name)}, marker=False)
                (directory / "done.marker").touch()
                when = time.time() + years * YEAR_S
                os.utime(directory / "done.marker", (when, when))
                before[name] = tree(directory)
                wait_until(lambda: name in lab.names("shipped"), "one with a marker of that time")  # noqa: B023
                assert lab.names("quarantine") == ["no id"]
                assert lab.names("shipped") == sorted(before)
            assert [one.pid for one in everybody(daemon)] == [one.pid for one in processes]
            daemon.signal(signal.SIGTERM)
            assert daemon.wait() == 0
            assert "Traceback" not in daemon.log
        assert {name: tree(lab.shipped / name) for name in before} == before
        assert receiver.stored() == set(before)
    what = "clock set forwards and back by years, markers of the future: nothing cleaned up, all shipped, no spinning"
    faults.count("time: the clock jumps", what, of=len(jumps), tried=len(jumps), test=TEST)


# --- hosts that stand still ------------------------------------------------------------------------------------------


@drawn("suspended")
@pytest.mark.parametrize("first", ["supervisor", "workers"] if faults.SHARE >= 0.1 else ["supervisor"])
def test_a_host_that_was_suspended_kills_nobody(tmp_path: Path, destination: Destination, first: str) -> None:
    """Four times for longer than the heartbeat's limit: three deaths would put the episode into quarantine."""
    lab = Lab(tmp_path, destination.url, QUICK)
    names = [f"ep{number}" for number in range(4)]
    before = {name: tree(lab.episode(name, {"data": noise(300_000, name)})) for name in names}
    destination.gate.clear()
    stops = 4 if faults.SHARE >= 0.1 else 2
    with Command("run", "-c", lab.settings_file(), log=tmp_path / "run.log") as daemon:
        wait_until(lambda: len(destination.heard) >= 2, "uploads under way")
        processes = everybody(daemon)
        assert len(processes) == 3
        for _ in range(stops):
            for one in processes:
                one.suspend()
            time.sleep(4.0)
            for one in processes if first == "supervisor" else processes[::-1]:
                one.resume()
            time.sleep(0.5)
        destination.gate.set()
        wait_until(lambda: lab.names("shipped") == names, "all to be shipped")
        assert [one.pid for one in everybody(daemon)] == [one.pid for one in processes]
        assert "worker-silent" not in daemon.log
        daemon.signal(signal.SIGTERM)
        assert daemon.wait() == 0
        assert "Traceback" not in daemon.log
    assert {name: tree(lab.shipped / name) for name in before} == before
    what = "every process stopped for longer than heartbeats may be away: no worker killed, the same ones go on"
    faults.count(f"time: suspended, {first} wake first", what, of=4, tried=stops, test=TEST)


# --- disks that take their time --------------------------------------------------------------------------------------


@drawn("slow")
@pytest.mark.skipif(not strace_works(), reason="strace is missing, or may not trace here")
def test_a_slow_disk_under_the_supervisor_kills_nobody(tmp_path: Path, destination: Destination) -> None:
    lab = Lab(tmp_path, destination.url, {**QUICK, "workers": {**QUICK["workers"], "heartbeat_timeout_s": 1.0}})
    log = tmp_path / "run.log"
    with Command("run", "-c", lab.settings_file(), log=log) as daemon:
        wait_until(lambda: len(everybody(daemon)) == 3, "the workers")
        processes = everybody(daemon)
        lab.episode("ep1", {"data": telemetry(200_000)})
        # Looking at the spool and making its moves durable: each longer than heartbeats may be away.
        with (
            slowed(daemon.process.pid, "fsync,statfs,faccessat,faccessat2", "delay_enter=1400000:when=1"),
            at_rest(processes),
        ):
            wait_until(lambda: lab.names("shipped") == ["ep1"], "it to be shipped")
        lab.episode("ep2", {"data": telemetry(200_000)})
        wait_until(lambda: lab.names("shipped") == ["ep1", "ep2"], "the other to be shipped")
        assert [one.pid for one in everybody(daemon)] == [one.pid for one in processes]
        assert "worker-silent" not in daemon.log
        assert "Traceback" not in daemon.log
    what = "looks and fsyncs of the supervisor hang for longer than heartbeats may be away: no worker killed"
    faults.count("time: slow disk under the supervisor", what, of=1, tried=1, test=TEST)


@drawn("hanging")
@pytest.mark.skipif(not strace_works(), reason="strace is missing, or may not trace here")
def test_a_pack_that_hangs_in_the_kernel_is_told_of_and_left_alone(tmp_path: Path, destination: Destination) -> None:
    lab = Lab(tmp_path, destination.url, {**QUICK, "workers": {**QUICK["workers"], "count": 1}})
    with Command("run", "-c", lab.settings_file(), log=tmp_path / "run.log") as daemon:
        wait_until(lambda: len(everybody(daemon)) == 2, "the worker")
        processes = everybody(daemon)
        with slowed(processes[1].pid, "readv,preadv,preadv2", "delay_enter=4000000:when=2"):
            before = tree(lab.episode("ep1", {"data": telemetry(500_000)}))
            wait_until(lambda: "pack-stalled" in daemon.log, "it to be told")
            wait_until(lambda: still_s(lab) >= 1.0, "it to be shown")
            wait_until(lambda: lab.names("shipped") == ["ep1"], "it to be shipped")
        wait_until(lambda: "pack-no-longer-stalled" in daemon.log, "that to be told, too")
        assert [one.pid for one in everybody(daemon)] == [one.pid for one in processes]
        assert "Traceback" not in daemon.log
    assert tree(lab.shipped / "ep1") == before
    what = "a read that hangs in the kernel while the worker beats: told in the log and in status, nobody killed"
    faults.count("time: hanging read", what, of=1, tried=1, test=TEST)


def still_s(lab: Lab) -> float:
    snapshot = lab.snapshot()
    return max((one.still_s for one in snapshot.progress), default=0.0) if snapshot else 0.0


@drawn("slow everywhere")
@pytest.mark.skipif(not strace_works(), reason="strace is missing, or may not trace here")
def test_every_call_of_a_pass_may_be_slow(tmp_path: Path, destination: Destination) -> None:
    """A pass of which each call that looks at or changes the disk takes longer."""
    delay_us = 20_000 if faults.SHARE >= 0.1 else 5_000
    lab = Lab(tmp_path, destination.url, QUICK)
    destination.say("held", Reply(409, b'{"error": "another content"}'))
    destination.say("refused", Reply(422, b'{"error": "no such schema"}'))
    for name in ("held", "refused", "ship"):
        lab.episode(name, {"data": noise(50_000, name)})
    destination.gate.clear()
    calls = "fsync,rename,unlink,mkdir,statfs,fstat,newfstatat,getdents64,readv,ftruncate"
    with Command("run", "-c", lab.settings_file(), log=tmp_path / "run.log") as daemon:
        wait_until(lambda: len(destination.heard) == 3, "workers that have started: Python reads many files for that")
        with contextlib.ExitStack() as slow:
            for one in everybody(daemon):
                slow.enter_context(slowed(one.pid, calls, f"delay_enter={delay_us}"))
            destination.gate.set()
            lab.episode("later", {"data": noise(50_000)})
            wait_until(lambda: lab.names("shipped") == ["later", "ship"], "what can be shipped")
            wait_until(lambda: lab.names("quarantine") == ["refused"], "the quarantine")
            wait_until(lambda: lab.names("holds") == ["held.json"], "the hold")
        assert "worker-silent" not in daemon.log
        assert "Traceback" not in daemon.log
    what = "every look and change of the disk slower by up to 20 ms, in all processes: the same ends"
    faults.count("time: slow disk everywhere", what, of=4, tried=4, test=TEST)
