"""A busy neighbour: it gets its cores, and packing comes back."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from lab import Daemon, Lab, Sections, fastship, telemetry, wait_until, workers_of

PATIENCE_S = 12.0  # on a host whose other tests keep it busy, packing comes back after so long
COURTEOUS: Sections = {
    "pack": {"threads": len(os.sched_getaffinity(0)), "level": 17, "frame_bytes": "1MiB"},
    "workers": {"drain_timeout_s": "100ms"},
    "host": {"nice": 10, "give_way": True, "pause_max_s": PATIENCE_S},
}


@contextmanager
def busy_neighbour() -> Iterator[list[psutil.Process]]:
    """Processes that burn every core, at our nice value and in a session of their own, as somebody else's are."""
    burning = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"], start_new_session=number == 0)
        for number in range(len(os.sched_getaffinity(0)))
    ]
    try:
        yield [psutil.Process(one.pid) for one in burning]
    finally:
        for one in burning:
            one.kill()
            one.wait()


def cpu_s(processes: list[psutil.Process]) -> float:
    return sum(sum(one.cpu_times()[:2]) for one in processes)


def packed_bytes(lab: Lab) -> int:
    """How far it is, as the snapshot says."""
    snapshot = lab.snapshot()
    return 0 if snapshot is None else sum(one.done_bytes for one in snapshot.progress if one.stage == "packing")


def budget(lab: Lab) -> int:
    snapshot = lab.snapshot()
    assert snapshot is not None
    assert snapshot.host is not None
    return snapshot.host.budget


def test_packing_gives_way_to_a_busy_neighbour_and_comes_back(lab: Lab) -> None:
    lab.episode("long", files={"data": telemetry(400 << 20)})
    with Daemon(lab.settings(COURTEOUS)) as daemon:
        wait_until(lambda: packed_bytes(lab), "packing")
        with busy_neighbour() as neighbour:
            wait_until(lambda: budget(lab) == 0, "a pause")
            snapshot = lab.snapshot()
            assert snapshot is not None
            assert snapshot.host is not None
            assert "others want" in snapshot.host.why
            shown = subprocess.run(
                fastship("status", "-c", lab.settings_file()), stdout=subprocess.PIPE, text=True
            ).stdout
            assert "\npacking      " in shown
            assert "others want" in shown
            ours = workers_of()
            theirs_before, ours_before = cpu_s(neighbour), cpu_s(ours)
            wait_until(lambda: cpu_s(neighbour) - theirs_before > 2.0, "the neighbour's work")
            # Even where the longest pause ended in between: one thread, at its nice value.
            assert cpu_s(ours) - ours_before < (cpu_s(neighbour) - theirs_before) / 2
            done = packed_bytes(lab)
        wait_until(lambda: budget(lab) > 0, "the end of the pause")
        wait_until(lambda: packed_bytes(lab) > done, "packing again")
        daemon.told.set()


def test_workers_are_modest_in_every_thread(lab: Lab) -> None:
    usable = sorted(os.sched_getaffinity(0))
    own_nice = os.getpriority(os.PRIO_PROCESS, 0)  # a process may give itself no lower one
    modest: Sections = {"host": {"nice": 7, "io_class": "best-effort", "io_priority": 5, "reserved_cores": 1}}
    lab.episode("ep")
    with Daemon(lab.settings(modest)) as daemon:
        wait_until(lambda: lab.names("shipped") == ["ep"], "an episode shipped")
        (worker,) = workers_of()
        assert tuple(worker.ionice()) == (psutil.IOPRIO_CLASS_BE, 5)
        threads = [one.id for one in worker.threads()]
        assert len(threads) > 1
        assert {os.getpriority(os.PRIO_PROCESS, thread) for thread in threads} == {max(7, own_nice)}
        assert {tuple(sorted(os.sched_getaffinity(thread))) for thread in threads} == {tuple(usable[1:] or usable)}
        group = Path(f"/proc/{worker.pid}/autogroup")
        if group.exists():
            wait_until(lambda: group.read_text().split()[-1] == "7", "the nice value of its group")
        assert os.getpriority(os.PRIO_PROCESS, 0) == own_nice
        daemon.told.set()
