"""Workers and their supervisor: killed, stopped, poisoned, unable to start; who gets how many threads."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from killer import Killer
from lab import (
    Command,
    Daemon,
    Destination,
    Lab,
    Receiver,
    Sections,
    noise,
    telemetry,
    tree,
    wait_until,
    workers_of,
)
from structlog.testing import capture_logs

from fastship import Shipper, status
from fastship.errors import EXIT_INTERNAL, EXIT_NOT_SHIPPED, WorkerCannotStart
from fastship.supervisor import crew as crew_module

MakeLab = Callable[..., Lab]

SLOW_LINE: Sections = {"upload": {"bandwidth": "3MB", "one_shot_bytes": 0, "retries": 5}}
SLOW_LINE_BYTES = 6_000_000


def slow_to_pack(lab: Lab, name: str, *, marker: bool = True) -> Path:
    """Packs for a second or so at `HARD`."""
    return lab.episode(name, files={"data": telemetry(4 << 20, name)}, marker=marker)


HARD: Sections = {"pack": {"level": 17, "frame_bytes": "1MiB"}}


def test_worker_killed_while_packing(lab: Lab, destination: Destination) -> None:
    before = tree(slow_to_pack(lab, "ep1"))
    with Killer(lab, "ep1", times=1) as killer:
        result = lab.once(HARD)
    assert len(killer.hit) == 1
    assert (result.scanned, result.shipped, result.fatal) == (1, 1, 0)
    assert tree(lab.shipped / "ep1") == before
    assert lab.names("outbox") == []


def test_worker_killed_while_uploading_goes_on_from_the_offset(make_lab: MakeLab, receiver: Receiver) -> None:
    lab = make_lab(receiver.url)
    lab.episode("killed-uploading", files={"data": noise(SLOW_LINE_BYTES)})
    killed: list[int] = []

    def kill() -> None:
        wait_until(lambda: receiver.arrived_bytes() > SLOW_LINE_BYTES // 3, "a third of the artifact")
        for worker in workers_of():
            worker.kill()
            killed.append(worker.pid)

    thread = threading.Thread(target=kill)
    thread.start()
    result = lab.once(SLOW_LINE)
    thread.join()

    assert len(killed) == 1
    assert result.shipped == 1
    (shipped,) = [one for one in recent(lab) if one.outcome == "shipped"]
    assert SLOW_LINE_BYTES // 3 < shipped.resumed_at < SLOW_LINE_BYTES


def recent(lab: Lab) -> list[status.EpisodeResult]:
    snapshot = lab.snapshot()
    assert snapshot is not None
    return snapshot.recent


def test_what_a_killed_worker_was_writing_is_removed_when_it_is_replaced(lab: Lab, destination: Destination) -> None:
    with Daemon(lab.settings()):
        wait_until(workers_of, "a worker")
        (worker,) = workers_of()
        left, others = (lab.outbox / f".tmp-ep1.upload.json.{pid}" for pid in (worker.pid, os.getpid()))
        left.touch()
        others.touch()
        worker.kill()
        wait_until(lambda: not left.exists(), "its end to be noticed")
        wait_until(workers_of, "another one")
        assert others.exists()


@pytest.mark.parametrize("stage", ["packing", "uploading"])
def test_supervisor_killed(make_lab: MakeLab, receiver: Receiver, tmp_path: Path, stage: str) -> None:
    """Its workers end by themselves; the next one gets the lock and goes on."""
    lab = make_lab(receiver.url)
    name = f"orphaned-{stage}"
    if stage == "packing":
        slow_to_pack(lab, name)
        sections = HARD
    else:
        lab.episode(name, files={"data": noise(SLOW_LINE_BYTES)})
        sections = SLOW_LINE
    before = tree(lab.episodes / name)
    arrived = receiver.arrived_bytes()

    with Command("once", "-c", lab.settings_file(sections), log=tmp_path / "log") as command:
        if stage == "packing":
            wait_until((lab.outbox / f"{name}.tar.zst.partial").exists, "the partial")
        else:
            wait_until(lambda: receiver.arrived_bytes() > arrived + SLOW_LINE_BYTES // 3, "a third of the artifact")
        workers = workers_of(command.process.pid)
        assert workers
        command.signal(signal.SIGKILL)
        command.wait()
        wait_until(lambda: not any(is_alive(worker) for worker in workers), "the workers to end by themselves")
    assert not (lab.shipped / name).exists()

    assert lab.once().shipped == 1
    assert tree(lab.shipped / name) == before
    if stage == "uploading":
        assert recent(lab)[-1].resumed_at > SLOW_LINE_BYTES // 3


def is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def test_silent_worker_is_killed_and_its_episode_shipped_by_another(lab: Lab, destination: Destination) -> None:
    slow_to_pack(lab, "ep1")
    quick = {**HARD, "workers": {"heartbeat_timeout_s": "2s"}}
    with Killer(lab, "ep1", times=1, number=signal.SIGSTOP) as stopper:
        result = lab.once(quick)
    (stopped,) = stopper.hit
    assert (result.shipped, result.fatal) == (1, 0)
    assert not psutil.pid_exists(stopped)


def test_busy_supervisor_does_not_take_its_workers_for_silent(lab: Lab, destination: Destination) -> None:
    """What a worker said while the supervisor had no time to listen counts."""
    seen: set[int] = set()
    busy = threading.Event()

    def heartbeat() -> None:
        seen.update(worker.pid for worker in workers_of())
        if not busy.is_set() and lab.names("shipped"):
            busy.set()
            threading.Event().wait(2.5)  # a disk that hangs, say

    settings = lab.settings({"workers": {"heartbeat_timeout_s": "2s"}, "spool": {"scan_interval_s": "100ms"}})
    with Daemon(settings, heartbeat) as daemon:
        lab.episode("ep1")
        wait_until(busy.is_set, "the heartbeat that takes long")
        beats = daemon.beats
        wait_until(lambda: daemon.beats > beats + 5, "what comes after it")
        daemon.stop()
    assert len(seen) == 1


def test_poison_episode_is_quarantined_and_the_others_pass(lab: Lab, destination: Destination) -> None:
    for name in ("a", "z"):
        lab.episode(name)
    before = tree(slow_to_pack(lab, "poison"))
    with Killer(lab, "poison", times=99) as killer:
        result = lab.once(HARD)
    assert len(killer.hit) == 3
    assert (result.scanned, result.shipped, result.fatal) == (3, 2, 1)
    reason = msgspec.json.decode((lab.quarantine / "poison" / "quarantine_reason.json").read_bytes())
    assert reason["status_code"] is None
    assert "3 workers died" in reason["error"]
    after = tree(lab.quarantine / "poison")
    del after["quarantine_reason.json"]
    assert after == before
    assert lab.names("outbox") == lab.names("episodes") == []


def test_worker_that_cannot_start_stops_the_daemon(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "pycurl.py").write_text("raise ImportError('libcurl.so.4: cannot open shared object file')\n")
    lab.episode()
    with Command("run", "-c", lab.settings_file(), log=tmp_path / "log", env={"PYTHONPATH": str(broken)}) as command:
        assert command.wait() == EXIT_INTERNAL
        log = command.log
    assert "libcurl.so.4" in log
    assert "could not start" in log
    assert lab.names("episodes") == ["ep1"]
    monkeypatch.setenv("PYTHONPATH", str(broken))
    with pytest.raises(WorkerCannotStart):
        lab.once()
    assert workers_of() == []


def test_a_system_that_gives_no_process_is_waited_for(
    lab: Lab, destination: Destination, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crew_module, "HIRE_AGAIN_S", 0.01)
    lab.episode()
    start, refusals = crew_module.Crew._start, iter([errno.EAGAIN, errno.ENOMEM])

    def refuse(self: crew_module.Crew) -> Any:
        for number in refusals:
            raise OSError(number, os.strerror(number))
        return start(self)

    monkeypatch.setattr(crew_module.Crew, "_start", refuse)
    with capture_logs() as logs:
        assert lab.once().shipped == 1
    assert [line["event"] for line in logs] == ["worker-not-started"] * 2
    lab.episode("late")
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(WorkerCannotStart, match="No such file"):
        lab.once()
    assert lab.names("episodes") == ["late"]


def test_an_episode_that_cannot_be_packed_is_told(lab: Lab, destination: Destination, tmp_path: Path) -> None:
    """By the exit code and the log of ``once``; the others pass."""
    lab.episode("good")
    lab.episode("stuck")
    lab.outbox.mkdir()
    (lab.outbox / "stuck.tar.zst.partial").mkdir()
    with Command("once", "--json", "-c", lab.settings_file(), log=tmp_path / "log") as command:
        assert command.wait() == EXIT_NOT_SHIPPED
        assert command.process.stdout is not None
        result = msgspec.json.decode(command.process.stdout.read())
    assert (result["scanned"], result["shipped"], result["transient_failures"]) == (2, 1, 1)
    assert "Traceback" not in command.log


def test_one_huge_episode_gets_every_thread_and_small_ones_one_each(lab: Lab, destination: Destination) -> None:
    huge: list[int] = []
    small: list[int] = []

    def look(snapshot: status.Snapshot) -> None:
        workers = snapshot.workers
        if any(one.episode == "huge" and one.stage == "packing" for one in snapshot.progress):
            huge.extend(worker.threads for worker in workers if worker.packing)
        elif snapshot.ready and len(workers) == 4 and all(worker.packing for worker in workers):
            small.extend(worker.threads for worker in workers)

    crew: Sections = {"pack": {"threads": 4, "level": 16, "frame_bytes": "512KiB"}, "workers": {"count": 4}}
    lab.episode("huge", files={"data": telemetry(6 << 20)})
    assert Shipper(lab.settings(crew), observer=look).run_once().shipped == 1
    for number in range(20):
        lab.episode(f"small{number}", files={"data": telemetry(400 << 10, number)})
    assert Shipper(lab.settings(crew), observer=look).run_once().shipped == 20
    assert set(huge) == {4}
    assert set(small) == {1}
