"""The line and the other end: cut, killed, restarted; and what is stored there, read back with stock tools."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

from lab import Daemon, Lab, Receiver, Sections, Wire, fastship, noise, read_back, results, tree, wait_until

from fastship import Shipper, status
from fastship.episode import MARKER

MakeLab = Callable[..., Lab]

PATIENT: Sections = {"upload": {"one_shot_bytes": 0, "retries": 30, "retry_min_s": "50ms", "retry_max_s": "300ms"}}
SLOW: Sections = {"upload": {**PATIENT["upload"], "bandwidth": "3MB"}}
ARTIFACT_BYTES = 6_000_000


def test_killed_receiver(make_lab: MakeLab, own_receiver: Receiver) -> None:
    """SIGKILL in mid-upload, started again on the same port: the same pass goes on from its offset."""
    lab = make_lab(own_receiver.url)
    before = tree(lab.episode("ep1", files={"data": noise(ARTIFACT_BYTES)}))

    def kill() -> None:
        wait_until(lambda: own_receiver.arrived_bytes() > ARTIFACT_BYTES // 3, "a third of the artifact")
        own_receiver.kill()
        own_receiver.start()

    thread = threading.Thread(target=kill)
    thread.start()
    result = lab.once(SLOW)
    thread.join()

    assert (result.shipped, result.transient_failures) == (1, 0)
    assert ARTIFACT_BYTES // 3 < results(lab)["ep1"].resumed_at < ARTIFACT_BYTES
    assert read_back(own_receiver, "ep1", lab.root.parent / "back") == before


def test_cut_connection(make_lab: MakeLab, receiver: Receiver) -> None:
    """A third of the way the line is cut; the same pass goes on from there and sends little twice."""
    wire = Wire(receiver.url, ARTIFACT_BYTES // 3)
    with contextlib.closing(wire):
        lab = make_lab(wire.url)
        before = tree(lab.episode("cut", files={"data": noise(ARTIFACT_BYTES)}))
        result = lab.once(PATIENT)
    assert wire.cuts == 1
    assert (result.shipped, result.transient_failures) == (1, 0)
    assert results(lab)["cut"].resumed_at > 0
    assert read_back(receiver, "cut", lab.root.parent / "back") == before


def test_cut_in_one_shot(make_lab: MakeLab, receiver: Receiver) -> None:
    """The first attempt of a small artifact is one request; what arrived of it is not sent again."""
    wire = Wire(receiver.url, 1_000_000)
    with contextlib.closing(wire):
        lab = make_lab(wire.url, upload={**PATIENT["upload"], "one_shot_bytes": "4MiB"})
        lab.episode("cutshort", files={"data": noise(2_000_000)})
        assert lab.once().shipped == 1
    assert wire.cuts == 1
    assert "cutshort" in receiver.stored()


def test_receiver_that_is_down_at_first(make_lab: MakeLab, own_receiver: Receiver) -> None:
    own_receiver.kill()
    lab = make_lab(own_receiver.url, destination={"pause_min_s": "50ms", "pause_max_s": "200ms"})
    with Daemon(lab.settings({"upload": {"retries": 0}})) as daemon:
        for number in range(5):
            lab.episode(f"ep{number}")
        wait_until(lambda: (look := lab.snapshot()) and look.destination.state != "up", "the pause")
        own_receiver.start()
        wait_until(lambda: len(lab.names("shipped")) == 5, "the queue")
        assert daemon.stop().fatal == 0


def real_files(count: int) -> list[Path]:
    """So many files of this machine, none larger than 1 MB; on one machine always the same."""
    found: list[Path] = []
    for top in ("/usr/lib", "/usr/share"):
        found += [Path(directory, name) for directory, _, names in os.walk(top) for name in names]
    random.Random(1).shuffle(found := sorted(found))
    usable = (path for path in found if not path.is_symlink() and path.is_file() and path.stat().st_size < 1 << 20)
    return list(itertools.islice(usable, count))


def test_a_thousand_real_files_there_and_back(make_lab: MakeLab, receiver: Receiver, tmp_path: Path) -> None:
    """Of /usr/lib and /usr/share, as 20 episodes, by ``fastship once``, read back in both ways: equal byte for byte."""
    lab = make_lab(receiver.url, workers={"count": 2}, pack={"threads": 2})
    files = real_files(1000)
    for number, path in enumerate(files):
        directory = lab.episodes / f"real{number % 20:02}"
        copy = directory / path.relative_to("/usr")
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, copy)
    before = {}
    for directory in sorted(lab.episodes.iterdir()):
        (directory / MARKER).touch()
        before[directory.name] = tree(directory)
    assert len(before) == 20
    size = sum(path.stat().st_size for path in files)

    subprocess.run(fastship("once", "-c", lab.settings_file(), "--quiet"), check=True, cwd=tmp_path)

    assert lab.names("shipped") == sorted(before)
    assert {name: tree(lab.shipped / name) for name in before} == before
    print(f"{len(files)} files, {size / 1e6:.1f} MB")
    assert {name: read_back(receiver, name, tmp_path / "fastship", stock=False) for name in before} == before
    assert {name: read_back(receiver, name, tmp_path / "stock") for name in before} == before


def test_the_same_episodes_offered_again_cost_no_bytes(make_lab: MakeLab, receiver: Receiver) -> None:
    """A spool restored from a backup: the receiver has it all and says so before it takes a byte."""
    lab = make_lab(receiver.url, upload={"one_shot_bytes": 0})
    for number in range(3):
        lab.episode(f"again{number}", files={"data": noise(200_000, number)})
    assert lab.once().shipped == 3
    for name in lab.names("shipped"):
        (lab.shipped / name).rename(lab.episodes / name)
    sent: list[int] = []

    def look(snapshot: status.Snapshot) -> None:
        sent.extend(one.done_bytes for one in snapshot.progress if one.stage == "shipping")

    assert Shipper(lab.settings(), observer=look).run_once().shipped == 3
    assert not any(sent)
