"""A disk that fills while a recorder writes: fastship stops in time, says so, and loses nothing; also when it is full.

On file systems of their own, a few MiB large: a tmpfs and, where it can be made, an ext4 in a file.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import faults
import msgspec
import pytest
from lab import Command, Destination, Lab, Receiver, Reply, Sections, noise, tree, wait_until

from fastship.status import DiskPressure

TEST = "tests/crash/test_disk.py"
DISK_MIB = 16
STEADY: Sections = {
    "pack": {"frame_bytes": "64KiB", "level": 1},
    "upload": {"one_shot_bytes": "64kB", "stream_bytes": "128kB", "retries": 0},
    "destination": {"pause_min_s": 0.2, "pause_max_s": 0.5},
    "disk": {"reserve_bytes": 0, "reserve_percent": 40},
    "spool": {"scan_interval_s": 0.3},
}


NO_RESERVE = {"reserve_bytes": 0, "reserve_percent": 0}


@contextlib.contextmanager
def mounted(directory: Path, kind: str, size_mib: int = DISK_MIB) -> Iterator[Path]:
    """An empty file system of its own, or a skip where that is not allowed."""
    place = directory / "disk"
    place.mkdir()
    if kind == "tmpfs":
        command = ["mount", "-t", "tmpfs", "-o", f"size={size_mib}m", "tmpfs", str(place)]
    else:
        image = directory / "image"
        with image.open("wb") as file:
            file.truncate(size_mib << 20)
        if not shutil.which("mkfs.ext4"):
            pytest.skip("no mkfs.ext4 here")
        subprocess.run(["mkfs.ext4", "-q", "-F", "-m", "0", image], check=True)
        command = ["mount", "-o", "loop", str(image), str(place)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip(f"no {kind} can be mounted here")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


KINDS = ["tmpfs"] if faults.SHARE < 0.1 else ["tmpfs", "ext4"]


SCENARIOS = ["heeded", "full", "copies", "verdicts"]
DRAWN = faults.some_of(SCENARIOS, "disk", least=len(SCENARIOS) if faults.SHARE >= 0.1 else 2)
"""They take some seconds each, mostly of waiting: a small share of the faults has two of them, in time all."""


def drawn(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(name not in DRAWN, reason="not drawn for this share of the faults (FASTSHIP_FAULTS)")


def pressure(lab: Lab) -> DiskPressure | None:
    with contextlib.suppress(FileNotFoundError, msgspec.DecodeError):
        return msgspec.json.decode((lab.state / "pressure.json").read_bytes(), type=DiskPressure)
    return None


def level(lab: Lab) -> str:
    found = pressure(lab)
    return "" if found is None else found.level


class Recorder:
    """Writes episodes of noise, in small pieces, until it is told to stop; what it never should see is an error."""

    def __init__(self, lab: Lab, *, stops: bool, bytes_in_all: int = 1 << 40) -> None:
        self._lab = lab
        self._stops = stops  # at "critical", as a recorder should; for good, unless there is an end to what it has
        self._rest_bytes = bytes_in_all
        self._goes_on = bytes_in_all < 1 << 40
        self.told = threading.Event()
        self.recorded: dict[str, dict[str, Any]] = {}
        self.refused = 0  # times that the disk said it was full
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        number = 0
        while not self.told.is_set() and self._rest_bytes > 0:
            number += 1
            directory = self._lab.episodes / f"ep{number:03}"
            directory.mkdir()
            data = noise(100_000 + 37_000 * (number % 7), number)
            with (directory / "data").open("wb", buffering=0) as file:
                for at in range(0, len(data), 50_000):
                    self._write(file.fileno(), data[at : at + 50_000])
                    time.sleep(0.02)  # about 2 MB/s: a look each second is soon enough
            if self.told.is_set() and self.refused:
                break  # it may be incomplete: no marker
            self._mark(directory)
            self.recorded[directory.name] = tree(directory)
            self._rest_bytes -= len(data)
            while self._goes_on and not self.told.is_set() and level(self._lab) == "critical":
                time.sleep(0.05)
            if self._stops and not self._goes_on and level(self._lab) == "critical":
                return

    def _write(self, fd: int, data: bytes) -> None:
        while data:
            try:
                data = data[os.write(fd, data) :]
            except OSError:
                self.refused += 1
                if self._stops or self.told.is_set():
                    return
                time.sleep(0.002)

    def _mark(self, directory: Path) -> None:
        while True:
            try:
                (directory / "done.marker").touch()
                return
            except OSError:
                self.refused += 1
                time.sleep(0.002)

    def __enter__(self) -> Recorder:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.told.set()
        self._thread.join()

    def wait(self) -> None:
        self._thread.join(60.0)
        assert not self._thread.is_alive()


def receipts(lab: Lab) -> list[dict[str, Any]]:
    journals = lab.root.glob("receipts/*")
    return [msgspec.json.decode(line) for journal in journals for line in journal.read_bytes().splitlines()]


def all_is_shipped(
    lab: Lab, receiver: Receiver, recorded: dict[str, dict[str, Any]], gone: Collection[str] = ()
) -> None:
    wait_until(lambda: lab.names("shipped") == sorted(recorded), "all to be shipped")
    wait_until(lambda: lab.names("outbox") == [], "the last artifact to go")
    assert lab.names("quarantine") == lab.names("holds") == []
    assert receiver.stored() == {*recorded, *gone}
    assert {name: tree(lab.shipped / name) for name in recorded} == recorded
    assert {one["receipt"]["episode"] for one in receipts(lab)} == {*recorded, *gone}


@drawn("heeded")
@pytest.mark.parametrize("kind", KINDS)
def test_a_recorder_that_heeds_the_pressure_never_meets_a_full_disk(tmp_path: Path, kind: str) -> None:
    with contextlib.closing(Receiver(tmp_path / "store")) as receiver, mounted(tmp_path, kind) as disk:
        receiver.kill()
        lab = Lab(disk, receiver.url, STEADY)
        with (
            Command("run", "-c", lab.settings_file({"workers": {"count": 2}}), log=tmp_path / "run.log") as daemon,
            Recorder(lab, stops=True) as recorder,
        ):
            recorder.wait()
            found = pressure(lab)
            assert found is not None
            assert found.level == "critical"
            assert recorder.refused == 0
            assert found.seconds_to_full is not None  # it was filling
            # Packing stopped where the reserve began: what it has is what the recorder left above that, and no more.
            recorded = sum(path.stat().st_size for path in lab.episodes.rglob("data"))
            assert 0 < found.waiting_bytes <= found.total_bytes - found.reserve_bytes
            assert found.waiting_bytes < recorded
            assert "disk-low" in daemon.log
            assert "disk-critical" in daemon.log
            waiting = len(lab.names("episodes"))

            receiver.start()
            all_is_shipped(lab, receiver, recorder.recorded)
            assert daemon.process.poll() is None
            daemon.signal(signal.SIGTERM)
            assert daemon.wait() == 0
            assert "Traceback" not in daemon.log
        print(f"{kind}: {waiting} episodes waited on a disk of {DISK_MIB} MiB with {found.free_bytes} bytes free")
    what = "recorder that stops at critical: no ENOSPC, packing off its reserve, all shipped when the receiver is back"
    name = f"disk: {kind} fills, receiver away"
    faults.count(name, what, of=waiting, tried=len(recorder.recorded), test=TEST)


@drawn("full")
@pytest.mark.parametrize("kind", KINDS)
def test_a_disk_that_is_really_full_costs_nothing(tmp_path: Path, kind: str) -> None:
    """The recorder heeds nothing and fights for each block, also for those that an upload has just freed."""
    with contextlib.closing(Receiver(tmp_path / "store")) as receiver, mounted(tmp_path, kind) as disk:
        receiver.kill()
        # No reserve: packing itself meets the full disk as well. The settings and the log are elsewhere.
        lab = Lab(disk, receiver.url, {**STEADY, "disk": NO_RESERVE})
        with Command("run", "-c", lab.settings_file(), log=tmp_path / "run.log") as daemon:
            with Recorder(lab, stops=False) as recorder:
                wait_until(lambda: recorder.refused > 100, "a full disk")
                wait_until(lambda: level(lab) == "critical", "pressure to be published")
                receiver.start()
                wait_until(lambda: receiver.stored() or "outbox-full" in daemon.log, "something to happen")
                time.sleep(0.5)
            met = recorder.refused
            assert daemon.process.poll() is None
            # An operator makes room, of what is at the receiver and of what the recorder had not finished.
            recorded = recorder.recorded
            wait_until(lambda: lab.names("shipped"), "one that fitted")
            removed = lab.names("shipped")
            for name in removed:
                assert tree(lab.shipped / name) == recorded.pop(name)
                assert receiver.artifact(name).exists()
                shutil.rmtree(lab.shipped / name)
            for path in lab.episodes.glob("*"):
                if not (path / "done.marker").exists():
                    shutil.rmtree(path)
            all_is_shipped(lab, receiver, recorded, gone=removed)
            daemon.signal(signal.SIGTERM)
            assert daemon.wait() == 0
            assert "Traceback" not in daemon.log
    what = "recorder that heeds nothing: ENOSPC for packs, receipts and pressure.json; goes on when there is space"
    faults.count(f"disk: {kind} full", what, of=met, tried=met, test=TEST)


@drawn("copies")
def test_a_disk_is_enough_for_more_than_it_holds_where_copies_make_room(tmp_path: Path) -> None:
    """A recorder writes one and a half times the disk (three times, where there is time): copies of what is at the
    receiver go at once."""
    times = 3.0 if faults.SHARE >= 0.1 else 1.5
    with contextlib.closing(Receiver(tmp_path / "store")) as receiver, mounted(tmp_path, "tmpfs") as disk:
        lab = Lab(disk, receiver.url, {**STEADY, "retention": {"shipped_make_room": True}})
        with (
            Command("run", "-c", lab.settings_file({"workers": {"count": 2}}), log=tmp_path / "run.log") as daemon,
            Recorder(lab, stops=True, bytes_in_all=int(times * DISK_MIB * (1 << 20))) as recorder,
        ):
            recorder.wait()
            assert recorder.refused == 0
            recorded = recorder.recorded
            wait_until(lambda: lab.names("episodes") == [], "all to be shipped")
            wait_until(lambda: lab.names("outbox") == [], "the last artifact to go")
            assert daemon.process.poll() is None
            daemon.signal(signal.SIGTERM)
            assert daemon.wait() == 0
            assert "Traceback" not in daemon.log
        assert receiver.stored() == set(recorded)
        left = [name for name in lab.names("shipped") if not name.startswith(".")]
        assert 0 < len(left) < len(recorded)
        when = {one["receipt"]["episode"]: one["retired_at"] for one in receipts(lab)}
        assert set(when) == set(recorded)
        oldest_left = min(when[name] for name in left)
        assert all(when[name] <= oldest_left for name in recorded if name not in left), "the oldest go first"
        assert {name: tree(lab.shipped / name) for name in left} == {name: recorded[name] for name in left}
        assert lab.names("quarantine") == lab.names("holds") == []
    what = "recorder writes more than the disk holds, copies make room: each removed after the receiver read it again"
    gone = len(recorded) - len(left)
    faults.count("disk: copies make room", what, of=gone, tried=gone, test=TEST)


@drawn("verdicts")
def test_receipts_that_a_full_disk_does_not_take_retire_nothing(tmp_path: Path, destination: Destination) -> None:
    """Verdicts come while not one byte can be written: each is asked for again, and none is forgotten."""
    with mounted(tmp_path, "tmpfs", 8) as disk:
        patient = {**STEADY["destination"], "pause_after": 1000}
        lab = Lab(disk, destination.url, {**STEADY, "disk": NO_RESERVE, "destination": patient})
        destination.say("held", Reply(409, b'{"error": "another content"}'))
        destination.say("refused", Reply(422, b'{"error": "no such schema"}'))
        destination.say("ship", Reply(503))
        before = {name: tree(lab.episode(name, {"data": noise(20_000, name)})) for name in ("held", "refused", "ship")}
        destination.gate.clear()
        with Command("run", "-c", lab.settings_file(), log=tmp_path / "run.log") as daemon:
            wait_until(lambda: len(destination.heard) == 3, "three offers")
            for directory in ("holds", "quarantine", "receipts"):  # no room for a name of a file, either
                assert lab.names(directory) == []
            with (disk / "filler").open("wb", buffering=0) as filler:
                stop = threading.Event()
                greedy = threading.Thread(target=eat, args=(filler.fileno(), stop))
                greedy.start()
                try:
                    wait_until(lambda: level(lab) == "critical", "pressure to be published")
                    destination.gate.set()
                    wait_until(lambda: len(destination.offers("refused")) > 2, "it to be asked again")
                    assert {"held", "refused"} <= set(lab.names("episodes"))
                    # Its artifact makes room for its receipt, and may for the others' words: so it comes after them.
                    offers = len(destination.offers("ship"))
                    del destination.says["ship"]
                    wait_until(lambda: len(destination.offers("ship")) > offers + 1 or lab.names("shipped"), "its turn")
                    if lab.names("shipped"):
                        assert b'"episode":"ship"' in b"".join(one.read_bytes() for one in lab.root.glob("receipts/*"))
                finally:
                    stop.set()
                    greedy.join()
            (disk / "filler").unlink()
            wait_until(lambda: lab.names("shipped") == ["ship"], "the receipt")
            wait_until(lambda: lab.names("quarantine") == ["refused"], "the quarantine")
            wait_until(lambda: lab.names("holds") == ["held.json"], "the hold")
            assert daemon.process.poll() is None
            assert "Traceback" not in daemon.log
        assert tree(lab.shipped / "ship") == before["ship"]
        assert tree(lab.episodes / "held") == before["held"]
        assert (lab.quarantine / "refused" / "data").read_bytes() == noise(20_000, "refused")
    what = "receipt, hold and quarantine that cannot be written: asked for again, nothing moved before"
    faults.count("disk: verdicts on a full disk", what, of=3, tried=3, test=TEST)


def eat(fd: int, stop: threading.Event) -> None:
    """Take every block that becomes free."""
    size = 1 << 16
    while not stop.is_set():
        try:
            os.write(fd, bytes(size))
        except OSError:
            size = max(1, size // 2)
            time.sleep(0.0002 if size == 1 else 0)
