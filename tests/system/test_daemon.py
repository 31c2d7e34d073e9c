"""The daemon: signals, reload, one instance, markers noticed at once, an idle spool, the line's share."""

from __future__ import annotations

import resource
import signal
import socket
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from lab import (
    GENEROUS_S,
    Command,
    Daemon,
    Destination,
    Lab,
    Receiver,
    Reply,
    Sections,
    noise,
    tree,
    wait_until,
    workers_of,
)

from fastship.episode import MARKER
from fastship.errors import EXIT_BUSY, EXIT_OK

MakeLab = Callable[..., Lab]
SLOW_LINE_BYTES = 4_500_000


def running(lab: Lab, log: Path, sections: Sections | None = None) -> Command:
    """``fastship run``, ready."""
    command = Command("run", "-c", lab.settings_file(sections), log=log)
    wait_until(
        lambda: (look := lab.snapshot()) and look.pid == command.process.pid and look.workers, "the daemon to be ready"
    )
    return command


def test_a_drain_does_not_wait_for_retries(lab: Lab, destination: Destination) -> None:
    """What would be repeated in ten minutes is left for the next start."""
    destination.say("*", Reply(500))
    never: Sections = {
        "upload": {"retries": 9, "retry_min_s": "10min", "retry_max_s": "10min", "connections": 2},
        "workers": {"drain_timeout_s": "1h"},
    }
    with Daemon(lab.settings(never)) as daemon:
        for number in range(6):
            lab.episode(f"ep{number}")
        wait_until(lambda: len(destination.heard) == 2, "both connections to be waiting")
        wait_until(lambda: len(lab.names("outbox")) > 6, "more artifacts in line")
        assert daemon.stop().shipped == 0
    destination.says.clear()
    assert lab.once().shipped == 6


@pytest.mark.parametrize("terms", [1, 2])
def test_sigterm_drains_and_a_second_one_stops(
    make_lab: MakeLab, receiver: Receiver, tmp_path: Path, terms: int
) -> None:
    """The upload in flight finishes after one, is cut by the second; the other episode waits; nothing is lost."""
    lab = make_lab(receiver.url)
    first, second = f"drain{terms}-a", f"drain{terms}-b"
    line: dict[str, Any] = {"bandwidth": "3MB" if terms == 1 else "1MB", "one_shot_bytes": 0}
    slow: Sections = {"upload": line, "workers": {"count": 1, "drain_timeout_s": "60s"}}
    arrived = receiver.arrived_bytes()
    with running(lab, tmp_path / "log", slow) as command:
        before = {first: tree(lab.episode(first, files={"data": noise(SLOW_LINE_BYTES)}))}
        wait_until(lambda: receiver.arrived_bytes() > arrived + SLOW_LINE_BYTES // 4, "a quarter of the artifact")
        command.signal(signal.SIGTERM)
        wait_until(lambda: (look := lab.snapshot()) and look.draining, "the drain")
        before[second] = tree(lab.episode(second))
        if terms == 2:
            command.signal(signal.SIGTERM)
        assert command.wait() == EXIT_OK
    assert second not in receiver.stored()
    assert (first in receiver.stored()) == (terms == 1)
    assert lab.names("shipped") == ([first] if terms == 1 else [])

    result = lab.once()
    assert result.shipped == (1 if terms == 1 else 2)
    assert {name: tree(lab.shipped / name) for name in lab.names("shipped")} == before
    if terms == 2:
        snapshot = lab.snapshot()
        assert snapshot is not None
        assert [one.resumed_at > 0 for one in snapshot.recent if one.episode == first] == [True]


def test_sighup_reloads(lab: Lab, destination: Destination, tmp_path: Path) -> None:
    """New settings are used without losing a beat; wrong ones change nothing and are told."""
    token = tmp_path / "token"
    token.write_text("token-of-today\n")
    with running(lab, tmp_path / "log") as command:
        lab.episode("ep1", files={"data": b"a" * 100_000})
        wait_until(lambda: lab.names("shipped") == ["ep1"], "the first episode")

        lab.settings_file({"destination": {"token_file": str(token)}, "pack": {"level": 9}})
        command.signal(signal.SIGHUP)
        wait_until(lambda: "reloaded" in command.log, "the reload")
        lab.episode("ep2", files={"data": b"a" * 100_000})
        wait_until(lambda: lab.names("shipped") == ["ep1", "ep2"], "the second episode")

        lab.settings_file({"pack": {"lvl": 3}})
        command.signal(signal.SIGHUP)
        wait_until(lambda: "reload-refused" in command.log, "the refusal")
        lab.episode("ep3")
        wait_until(lambda: lab.names("shipped") == ["ep1", "ep2", "ep3"], "the third episode")
        command.signal(signal.SIGTERM)
        assert command.wait() == EXIT_OK
        log = command.log

    sent = {one.episode: one.fields.get("authorization") for one in destination.offers()}
    assert sent == {"ep1": None, "ep2": "Bearer token-of-today", "ep3": "Bearer token-of-today"}
    assert "pack.lvl" in log
    assert "token-of-today" not in log
    assert "Traceback" not in log


def test_sighup_ends_the_pause_of_a_wrong_destination(lab: Lab, destination: Destination, tmp_path: Path) -> None:
    """The operator corrects the URL and reloads: nobody waits for the end of a pause that the old one has earned."""
    wrong: Sections = {"destination": {"url": "http://127.0.0.1:9", "pause_min_s": "1h", "pause_max_s": "1h"}}
    with running(lab, tmp_path / "log", {**wrong, "upload": {"retries": 0}}) as command:
        for number in range(4):
            lab.episode(f"ep{number}")
        wait_until(lambda: (look := lab.snapshot()) and look.destination.state == "paused", "the pause")
        lab.settings_file()
        command.signal(signal.SIGHUP)
        wait_until(lambda: len(lab.names("shipped")) == 4, "the queue")
        wait_until(lambda: (look := lab.snapshot()) and look.destination.url == destination.url, "the new address")
        command.signal(signal.SIGTERM)
        assert command.wait() == EXIT_OK


def test_systemd_is_told(lab: Lab, destination: Destination, tmp_path: Path) -> None:
    """sd_notify(3): ready, the watchdog each pass, reloading, stopping."""
    address = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(address)
        sock.settimeout(GENEROUS_S)
        heard: list[str] = []

        def hear(wanted: str) -> None:
            while wanted not in heard:
                heard.append(sock.recv(4096).decode().partition("\n")[0])
            heard.clear()

        settings = lab.settings_file({"spool": {"scan_interval_s": "50ms"}})
        with Command("run", "-c", settings, log=tmp_path / "log", env={"NOTIFY_SOCKET": address}) as command:
            hear("READY=1")
            hear("WATCHDOG=1")
            command.signal(signal.SIGHUP)
            hear("RELOADING=1")
            hear("READY=1")
            command.signal(signal.SIGTERM)
            hear("STOPPING=1")
            assert command.wait() == EXIT_OK


def test_second_instance_is_refused(lab: Lab, tmp_path: Path) -> None:
    with running(lab, tmp_path / "log") as command:
        with Command("once", "-c", lab.settings_file(), log=tmp_path / "second") as second:
            assert second.wait() == EXIT_BUSY
            assert str(command.process.pid) in second.log
        assert command.process.poll() is None


def test_a_new_marker_is_noticed_at_once(lab: Lab, destination: Destination) -> None:
    """Far sooner than a look: the interval is an hour here. inotify does it; an episode moved in whole counts, too."""
    took: list[float] = []
    with Daemon(lab.settings({"spool": {"scan_interval_s": "1h"}})) as daemon:
        wait_until(lambda: daemon.beats, "the first pass")
        for number in range(5):
            directory = lab.episode(f"ep{number}", marker=False)
            began = time.monotonic()
            (directory / MARKER).touch()
            wait_until(partial(offered, destination, f"ep{number}"), "the offer")
            took.append(time.monotonic() - began)
        elsewhere = lab.root / "elsewhere"
        lab.episode("ep5", marker=False).rename(elsewhere)
        (elsewhere / MARKER).touch()
        elsewhere.rename(lab.episodes / "ep5")
        wait_until(lambda: len(lab.names("shipped")) == 6, "the one that was moved in")
        daemon.stop()
    print("from the marker to the offer at the destination:", *(f"{1000 * one:.0f} ms" for one in took))


def offered(destination: Destination, episode: str) -> bool:
    return bool(destination.offers(episode))


def test_a_look_finds_what_inotify_missed(lab: Lab, destination: Destination) -> None:
    """A marker that is a link tells inotify of the link, not of its target, which makes it one."""
    target = lab.root / "target"
    with Daemon(lab.settings({"spool": {"scan_interval_s": "100ms"}})) as daemon:
        wait_until(lambda: daemon.beats, "the first pass")
        (lab.episode("late", marker=False) / MARKER).symlink_to(target)
        beats = daemon.beats
        wait_until(lambda: daemon.beats > beats + 3, "looks")
        assert destination.heard == []
        target.touch()
        wait_until(lambda: lab.names("shipped") == ["late"], "the retirement")
        daemon.stop()


def test_an_idle_spool_of_many_unfinished_episodes_costs_little(lab: Lab, tmp_path: Path) -> None:
    for number in range(5000):
        (lab.episodes / f"unfinished{number:05}").mkdir()
    with running(lab, tmp_path / "log", {"spool": {"scan_interval_s": "100ms"}}) as command:
        wait_until(lambda: (look := lab.snapshot()) and look.recording == 5000, "the first look")
        lab.episode("first")
        wait_until(lambda: lab.names("shipped") == ["first"], "a worker that has started")
        processes = [psutil.Process(command.process.pid), *workers_of(command.process.pid)]

        def cpu_s() -> float:
            return sum(sum(one.cpu_times()[:2]) for one in processes)

        before, began = cpu_s(), time.monotonic()
        time.sleep(2.0)
        share = (cpu_s() - before) / (time.monotonic() - began)
        print(f"idle, 5,000 unfinished episodes: {100 * share:.1f} % of a core")
        last = lab.episodes / "unfinished04999" / MARKER
        last.touch()
        wait_until(lambda: lab.names("shipped") == ["first", "unfinished04999"], "the one that is finished now")
        command.signal(signal.SIGTERM)
        assert command.wait() == EXIT_OK
    assert share < 0.2  # a look at every entry each 0.1 s would cost several times this


def test_the_bandwidth_is_kept_to(make_lab: MakeLab, receiver: Receiver) -> None:
    """Over all workers together."""
    lab = make_lab(receiver.url)
    for number in range(4):
        lab.episode(f"shaped{number}", files={"data": noise(1_000_000, number)})
    limited: Sections = {"upload": {"bandwidth": "2MB"}, "workers": {"count": 2}}
    result = lab.once(limited)
    print(f"4 MB at 2 MB/s: {result.seconds:.2f} s")
    assert result.shipped == 4
    assert result.bytes_out / result.seconds < 3_000_000


def test_stops_soon_when_idle(lab: Lab, destination: Destination) -> None:
    """How long it took is printed: the machine may be busy."""
    with Daemon(lab.settings({"spool": {"scan_interval_s": "1h"}})) as daemon:
        lab.episode()
        wait_until(lambda: lab.names("shipped") == ["ep1"], "a worker that has started")
        began = time.monotonic()
        daemon.stop()
        print(f"stopped {time.monotonic() - began:.2f} s after being told")
    assert workers_of() == []


def test_the_status_tells_what_it_does(lab: Lab, destination: Destination, tmp_path: Path) -> None:
    """``fastship status`` of a daemon that ships, of one whose destination is down, and of none."""
    destination.gate.clear()
    with running(lab, tmp_path / "log", {"upload": {"retries": 0}}) as command:
        lab.episode("ep1")
        wait_until(lambda: destination.heard, "the offer")
        wait_until(lambda: told(lab, tmp_path)["snapshot"]["progress"], "its progress")
        now = told(lab, tmp_path)
        assert now["running"]
        assert [one["episode"] for one in now["snapshot"]["progress"]] == ["ep1"]
        destination.say("*", Reply(401))
        destination.gate.set()
        wait_until(lambda: told(lab, tmp_path)["snapshot"]["destination"]["state"] != "up", "the pause")
        command.signal(signal.SIGTERM)
        assert command.wait() == EXIT_OK
    assert not told(lab, tmp_path)["running"]


def told(lab: Lab, tmp_path: Path) -> Any:
    with Command("status", "--json", "-c", lab.settings_file(), log=tmp_path / "status.log") as command:
        assert command.process.stdout is not None
        return msgspec.json.decode(command.process.stdout.read())


def test_a_disk_that_takes_no_more_is_waited_out(lab: Lab, destination: Destination) -> None:
    """The artifact cannot be written: the episode waits, unharmed, and is shipped when it can be."""
    with Daemon(lab.settings({"destination": {"pause_min_s": "100ms", "pause_max_s": "100ms"}})) as daemon:
        before = tree(lab.episode("small"))
        wait_until(lambda: lab.names("shipped") == ["small"], "a worker that works")
        (worker,) = workers_of()
        worker.rlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))  # its files end there: EFBIG
        before |= tree(lab.episode("large", files={"data": noise(3 << 20)}))
        wait_until(lambda: (look := lab.snapshot()) and look.totals.transient_failures > 1, "attempts that fail")
        assert lab.names("quarantine") == []
        assert not lab.artifact("large").exists()
        worker.rlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        wait_until(lambda: lab.names("shipped") == ["large", "small"], "the retirement")
        assert [one.pid for one in workers_of()] == [worker.pid]
        daemon.stop()
    assert tree(lab.shipped / "small") | tree(lab.shipped / "large") == before
    assert lab.names("outbox") == []
