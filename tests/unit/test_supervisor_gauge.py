"""Readings: from a /proc written for the test, and from the real one."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from lab import wait_until

from fastship.supervisor.gauge import TICK_S, Gauge, stalled_s


class Proc:
    """A /proc of two cores, on which things happen."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.cores = [0.0, 0.0]
        self.ours_s = self.waited_s = 0.0
        self.pressure: dict[str, float] = {"cpu": 0.0, "io": 0.0, "memory": 0.0}
        (directory / "pressure").mkdir()
        (directory / "7" / "task" / "8").mkdir(parents=True)

    def write(self) -> Path:
        lines = ["cpu  0 0 0 0 0 0 0 0 0 0"]
        for number, seconds in enumerate(self.cores):
            ticks = round(seconds / TICK_S)
            lines.append(f"cpu{number} {ticks} 0 0 777 777 0 0 777 0 0")
        (self.directory / "stat").write_text("\n".join([*lines, "intr 0"]))
        ticks = round(self.ours_s / TICK_S)
        (self.directory / "7" / "stat").write_text(f"7 (a ) b) R {'0 ' * 10}{ticks} 0 0 0")
        (self.directory / "7" / "task" / "8" / "schedstat").write_text(f"1 {round(self.waited_s * 1e9)} 5\n")
        for kind, seconds in self.pressure.items():
            text = f"some avg10=0.00 avg60=0.00 avg300=0.00 total={round(seconds * 1e6)}\nfull total=0\n"
            (self.directory / "pressure" / kind).write_text(text)
        return self.directory


@pytest.fixture
def proc(tmp_path: Path) -> Proc:
    return Proc(tmp_path)


def test_the_first_reading_says_nothing(proc: Proc) -> None:
    gauge = Gauge([0, 1], proc=proc.write())
    assert gauge.read({7}, 1.0) is None
    assert gauge.read({7}, 1.0) is None
    assert gauge.read({7}, 2.0) is not None


def test_others_use_what_we_do_not(proc: Proc) -> None:
    gauge = Gauge([0, 1], proc=proc.write())
    gauge.read({7}, 10.0)
    proc.cores, proc.ours_s = [2.0, 1.6], 3.0
    proc.write()
    reading = gauge.read({7}, 12.0)
    assert reading is not None
    assert reading.others_cores == pytest.approx(0.3)


def test_only_the_cores_that_packing_may_run_on_count(proc: Proc) -> None:
    gauge = Gauge([1], proc=proc.write())
    gauge.read({7}, 10.0)
    proc.cores = [1.0, 0.25]
    proc.write()
    reading = gauge.read({7}, 11.0)
    assert reading is not None
    assert reading.others_cores == pytest.approx(0.25)


def test_others_waiting_is_the_hosts_without_ours(proc: Proc) -> None:
    """Two threads of ours and two of theirs on two cores: of each pair one waits. Then ours alone."""
    gauge = Gauge([0, 1], proc=proc.write())
    gauge.read({7}, 10.0)
    proc.cores, proc.ours_s, proc.waited_s, proc.pressure["cpu"] = [1.0, 1.0], 1.0, 1.0, 1.0
    proc.write()
    reading = gauge.read({7}, 11.0)
    assert reading is not None
    assert reading.others_cores == pytest.approx(2.0)
    proc.cores, proc.ours_s, proc.waited_s, proc.pressure["cpu"] = [2.0, 2.0], 3.0, 2.0, 1.5
    proc.write()
    reading = gauge.read({7}, 12.0)
    assert reading is not None
    assert reading.others_cores == pytest.approx(0.0)


def test_pressures_are_percent_of_the_time_between(proc: Proc) -> None:
    gauge = Gauge([0], proc=proc.write())
    gauge.read({7}, 10.0)
    proc.pressure |= {"io": 0.5, "memory": 0.1}
    proc.write()
    reading = gauge.read({7}, 12.0)
    assert reading is not None
    assert reading.io_pressure == pytest.approx(25.0)
    assert reading.memory_pressure == pytest.approx(5.0)


def test_a_kernel_that_tells_little_and_processes_that_end(proc: Proc) -> None:
    gauge = Gauge([0, 1], proc=proc.write())
    gauge.read({7, 99}, 10.0)
    for kind in proc.pressure:
        (proc.directory / "pressure" / kind).unlink()
    (proc.directory / "7" / "stat").unlink()
    (proc.directory / "stat").write_text("nothing of the kind")
    reading = gauge.read({7, 99}, 11.0)
    assert reading is not None
    assert (reading.others_cores, reading.io_pressure, reading.memory_pressure) == (0.0, None, None)
    assert stalled_s("cpu", proc=proc.directory) is None


def test_on_this_host_a_process_of_ours_is_none_of_the_others() -> None:
    """Burnt CPU is counted as ours or as others', by whose process it is; a third of a core forgives other work."""
    gauges = {whose: Gauge(os.sched_getaffinity(0)) for whose in ("ours", "others")}
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        try:
            ours = {"ours": {os.getpid(), busy.pid}, "others": {os.getpid()}}
            used = {}
            for burnt_s in (0.5, 0.0):  # so much that the moment between two readings is nothing beside it
                for whose, gauge in gauges.items():
                    used[whose] = gauge.read(ours[whose], time.monotonic())
                before_s = psutil.Process(busy.pid).cpu_times().user
                wait_until(lambda: psutil.Process(busy.pid).cpu_times().user >= before_s + burnt_s, "its work")  # noqa: B023
        finally:
            busy.kill()
    assert used["ours"] is not None
    assert used["others"] is not None
    assert used["others"].others_cores > used["ours"].others_cores
