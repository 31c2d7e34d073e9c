"""A large episode is sent while it is packed, and an interrupted one goes on where both ends stand."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

from lab import (
    Command,
    Daemon,
    Lab,
    Receiver,
    Wire,
    noise,
    read_back,
    results,
    telemetry,
    tree,
    wait_until,
    workers_of,
)

MakeLab = Callable[..., Lab]

SMALL_FRAMES: dict[str, Any] = {"frame_bytes": "256KiB", "level": 3}
SLOW: dict[str, Any] = {"frame_bytes": "256KiB", "level": 15}
UPLOAD: dict[str, Any] = {"stream_bytes": "64KiB", "retries": 30, "retry_min_s": "50ms", "retry_max_s": "300ms"}
EPISODE_BYTES = 16_000_000


def test_it_arrives_while_it_is_packed(make_lab: MakeLab, own_receiver: Receiver) -> None:
    lab = make_lab(own_receiver.url, pack=SLOW, upload=UPLOAD)
    before = tree(lab.episode("ep1", files={"data": telemetry(EPISODE_BYTES)}))
    seen: list[list[str]] = []

    def look() -> None:
        wait_until(lambda: own_receiver.arrived_bytes() > 300_000, "a part of it at the receiver")
        seen.append(lab.names("outbox"))

    thread = threading.Thread(target=look)
    thread.start()
    result = lab.once()
    thread.join()
    assert seen == [["ep1.tar.zst.partial", "ep1.upload.json"]]
    assert result.shipped == 1
    assert lab.names("outbox") == []
    assert read_back(own_receiver, "ep1", lab.root.parent / "back", stock=False) == before


def test_a_killed_worker_packs_only_what_was_not_packed(make_lab: MakeLab, own_receiver: Receiver) -> None:
    """The worker that follows has another level: what it takes over can only be the frames of the one that died."""
    lab = make_lab(own_receiver.url, upload=UPLOAD)
    before = tree(lab.episode("ep1", files={"data": telemetry(EPISODE_BYTES)}))
    file = lab.settings_file({"pack": SLOW})
    with Command("once", "-c", file, "--quiet", log=lab.root.parent / "once.log") as command:
        wait_until(lambda: own_receiver.arrived_bytes() > 500_000, "a part of it at the receiver")
        for worker in workers_of(command.process.pid):
            worker.kill()
        command.signal(signal.SIGKILL)
        command.wait()
    partial = (lab.outbox / "ep1.tar.zst.partial").read_bytes()
    assert len(partial) > 500_000

    assert lab.once({"pack": SMALL_FRAMES}).shipped == 1

    assert results(lab)["ep1"].resumed_at > 500_000
    whole = own_receiver.artifact("ep1").read_bytes()
    assert whole.startswith(partial[: len(partial) * 9 // 10])  # all but a frame that was not whole
    assert read_back(own_receiver, "ep1", lab.root.parent / "back", stock=False) == before
    assert lab.names("outbox") == []


def test_an_episode_that_changed_meanwhile_begins_anew(make_lab: MakeLab, own_receiver: Receiver) -> None:
    lab = make_lab(own_receiver.url, upload=UPLOAD)
    directory = lab.episode("ep1", files={"data": telemetry(EPISODE_BYTES)})
    with Command("once", "-c", lab.settings_file({"pack": SLOW}), "--quiet", log=lab.root.parent / "log") as command:
        wait_until(lambda: own_receiver.arrived_bytes() > 300_000, "a part of it at the receiver")
        command.signal(signal.SIGKILL)
        command.wait()
    (directory / "data").write_bytes(telemetry(EPISODE_BYTES, "other"))
    before = tree(directory)
    assert lab.once({"pack": SMALL_FRAMES}).shipped == 1
    assert results(lab)["ep1"].resumed_at == 0
    assert read_back(own_receiver, "ep1", lab.root.parent / "back", stock=False) == before


def test_a_receiver_that_is_killed_costs_no_byte_twice(make_lab: MakeLab, own_receiver: Receiver) -> None:
    lab = make_lab(own_receiver.url, pack=SMALL_FRAMES, upload={**UPLOAD, "bandwidth": "6MB"})
    before = tree(lab.episode("ep1", files={"data": noise(12_000_000)}))

    def kill() -> None:
        wait_until(lambda: own_receiver.arrived_bytes() > 4_000_000, "a third of the artifact")
        own_receiver.kill()
        own_receiver.start()

    thread = threading.Thread(target=kill)
    thread.start()
    assert lab.once().shipped == 1
    thread.join()
    assert results(lab)["ep1"].resumed_at > 4_000_000
    assert read_back(own_receiver, "ep1", lab.root.parent / "back", stock=False) == before


def test_a_cut_line_is_taken_up_again(make_lab: MakeLab, receiver: Receiver) -> None:
    with contextlib.closing(Wire(receiver.url, 3_000_000)) as wire:
        lab = make_lab(wire.url, pack=SMALL_FRAMES, upload=UPLOAD)
        before = tree(lab.episode("streamcut", files={"data": noise(9_000_000)}))
        assert lab.once().shipped == 1
        assert wire.cuts == 1
    assert results(lab)["streamcut"].resumed_at > 0
    assert read_back(receiver, "streamcut", lab.root.parent / "back", stock=False) == before


def test_an_episode_that_changes_under_its_packing_leaves_nothing(make_lab: MakeLab, own_receiver: Receiver) -> None:
    """What was sent is deleted at the receiver, and the next attempt ships what is there then."""
    lab = make_lab(own_receiver.url, pack=SLOW, upload=UPLOAD)
    directory = lab.episode("ep1", files={"a": telemetry(EPISODE_BYTES), "b": b"later"})

    def change() -> None:
        wait_until(lambda: own_receiver.arrived_bytes() > 300_000, "a part of it at the receiver")
        os.utime(directory / "a", (1, 1))
        with (directory / "a").open("ab") as file:
            file.write(b"more")

    thread = threading.Thread(target=change)
    thread.start()
    with Daemon(lab.settings()) as daemon:
        thread.join()
        wait_until(lambda: lab.names("shipped") == ["ep1"], "the next attempt")
        result = daemon.stop()
    assert (result.shipped, result.transient_failures) == (1, 1)
    assert read_back(own_receiver, "ep1", lab.root.parent / "back", stock=False) == tree(lab.shipped / "ep1")
    assert list(own_receiver.root.glob("uploads/*.part")) == []
    assert lab.names("outbox") == []
