"""What settings come to on this host, and a process that is made modest."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from fastship.errors import EXIT_SETTINGS, SettingsError
from fastship.frames import pool_bytes
from fastship.settings import HostSettings, Settings
from fastship.supervisor import host as module
from fastship.supervisor.host import Courtesy, most_threads, packing_cores, restrain, restrain_group, unavailable


def settings(**sections: Any) -> Settings:
    return Settings.load(values=sections)


@pytest.fixture
def process() -> Iterator[psutil.Process]:
    """One that waits, in a session of its own, as a worker is started."""
    waiting = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    with subprocess.Popen(waiting, stdin=subprocess.PIPE, start_new_session=True) as child:
        yield psutil.Process(child.pid)
        child.kill()


def test_reserved_cores_are_the_first_ones_and_one_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {4, 2, 9})
    assert [packing_cores(HostSettings(reserved_cores=n)) for n in (0, 1, 2, 3, 99)] == [
        [2, 4, 9], [4, 9], [9], [9], [9],
    ]  # fmt: skip


def test_memory_of_a_worker_bounds_its_threads() -> None:
    assert most_threads(settings(pack={"threads": 8})) == 8
    fits = module.WORKER_BYTES + pool_bytes(3, level=3, frame_bytes=8 << 20)
    limited: dict[str, Any] = {"pack": {"threads": 8, "level": 3}, "host": {"memory_limit_bytes": fits}}
    assert most_threads(settings(**limited)) == 3
    limited["host"]["memory_limit_bytes"] = fits - 1
    assert most_threads(settings(**limited)) == 2
    assert most_threads(settings(**limited | {"pack": {"threads": 1, "level": 3}})) == 1


def test_a_chosen_level_counts_as_its_highest_with_the_tables_of_several() -> None:
    fits = module.WORKER_BYTES + pool_bytes(2, level=7, frame_bytes=8 << 20, chosen=True)
    assert pool_bytes(2, level=7, frame_bytes=8 << 20) < fits - module.WORKER_BYTES
    limited: dict[str, Any] = {"host": {"memory_limit_bytes": fits}}
    assert most_threads(settings(pack={"threads": 8, "level": "auto", "level_max": 7}, **limited)) == 2
    with pytest.raises(SettingsError, match=r"pack\.level_max = 19"):
        most_threads(settings(pack={"level": "auto", "level_max": 19}, host={"memory_limit_bytes": "64MiB"}))


def test_a_memory_limit_that_one_thread_does_not_fit_is_told_with_what_would() -> None:
    with pytest.raises(SettingsError, match=r"host\.memory_limit_bytes = 64MiB is less than a worker takes") as caught:
        most_threads(settings(host={"memory_limit_bytes": "64MiB"}, pack={"level": 19}))
    assert caught.value.exit_code == EXIT_SETTINGS
    raised = caught.value.remedy.split()[3].rstrip(",")
    assert most_threads(settings(host={"memory_limit_bytes": raised}, pack={"level": 19})) == 1


def test_a_process_gets_its_nice_value_io_class_and_cores(process: psutil.Process) -> None:
    usable = sorted(os.sched_getaffinity(0))
    restrain(process.pid, HostSettings(nice=11, io_class="best-effort", io_priority=6, reserved_cores=1))
    assert process.nice() == 11
    assert tuple(process.ionice()) == (psutil.IOPRIO_CLASS_BE, 6)
    assert process.cpu_affinity() == (usable[1:] or usable)
    restrain(process.pid, HostSettings(nice=5, io_class="idle"))
    assert process.nice() == 11  # never less modest than it is
    assert process.ionice()[0] == psutil.IOPRIO_CLASS_IDLE


def test_what_is_refused_does_not_keep_the_rest_from_being_done(
    process: psutil.Process, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "sched_setaffinity", refuse)
    restrain(process.pid, HostSettings(nice=11, io_class="idle", reserved_cores=1))
    assert process.nice() == 11
    assert process.ionice()[0] == psutil.IOPRIO_CLASS_IDLE
    told = capsys.readouterr()
    assert "host-care-refused" in told.out + told.err


def test_its_scheduling_group_has_the_same_nice_value(process: psutil.Process) -> None:
    group = Path(f"/proc/{process.pid}/autogroup")
    before = group.read_text() if group.exists() else ""
    assert restrain_group(process.pid, HostSettings(nice=0))
    assert (group.read_text() if group.exists() else "") == before
    while not restrain_group(process.pid, HostSettings(nice=12)):
        pass
    if before:
        assert group.read_text().split()[-1] == "12"


def test_a_process_that_is_gone_is_nobodys_fault() -> None:
    with subprocess.Popen(["true"]) as child:
        pass
    restrain(child.pid, HostSettings(reserved_cores=1))
    assert restrain_group(child.pid, HostSettings())


def test_what_this_host_cannot_do_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(psutil.Process, "ionice", refuse)
    monkeypatch.setattr(module, "stalled_s", lambda _: None)
    asked = {"reserved_cores": 4096, "io_pressure_limit": 50, "load_limit": 0}
    told = "\n".join(unavailable(settings(host=asked)))
    for part in ("reserved_cores = 4096", "io_class", "memory_pressure_limit", "io_pressure_limit", "give_way"):
        assert f"host.{part}" in told
    nothing = {"io_class": "none", "give_way": False}
    assert list(unavailable(settings(host=nothing))) == []


def test_it_says_only_what_changes_and_nothing_when_told_not_to() -> None:
    off = Courtesy(settings(host={"give_way": False}))
    assert (off.turn([]), off.status()) == (None, None)
    on = Courtesy(settings(pack={"threads": 3}))
    assert on.turn([]) is None
    status = on.status()
    assert status is not None
    assert (status.cores, status.budget, status.why) == (3, 3, "")
