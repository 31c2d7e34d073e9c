"""kill -9 at random times, of several workers at many episodes and of their receiver; at each call: see ``sweep``.

What is looked at afterwards: every episode exactly once where it belongs, equal bytes at the receiver and on disk,
nothing left in the outbox, no temporary file anywhere.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import faults
from lab import (
    Command,
    Lab,
    Receiver,
    Sections,
    contents,
    contents_of,
    noise,
    telemetry,
    tree,
    wait_until,
    workers_of,
)

MakeLab = Callable[..., Lab]


KILLS = 8
LINE: Sections = {
    "upload": {"one_shot_bytes": "64kB", "stream_bytes": "128kB", "bandwidth": "4MB"},
    "pack": {"frame_bytes": "64KiB", "level": "auto"},
    "workers": {"count": 2},
}


def test_killed_at_random_times(make_lab: MakeLab, tmp_path: Path) -> None:
    """The supervisor, or a worker, or the receiver, again and again over the same spool."""
    chance = faults.chance("kill at random times")
    with contextlib.closing(Receiver(tmp_path / "store")) as receiver:
        lab = make_lab(receiver.url)
        before = {}
        for number in range(40):
            size = chance.choice([100, 5_000, 300_000, 1_000_000])
            directory = lab.episode(
                f"ep{number:02}", files={"a/data": noise(size, number), "b": telemetry(size, number)}
            )
            before[directory.name] = tree(directory)
        arguments = ("once", "-c", lab.settings_file(LINE), "--quiet")
        for kill in range(KILLS):
            with Command(*arguments, log=tmp_path / f"once{kill}.log") as command:
                wait_until(lambda pid=command.process.pid: workers_of(pid), "workers")  # type: ignore[misc]
                with contextlib.suppress(subprocess.TimeoutExpired):
                    command.process.wait(chance.uniform(0.0, 1.2))
                victim = chance.choice(["supervisor", "supervisor", "worker", "receiver"])
                if victim == "worker":
                    for worker in workers_of(command.process.pid)[:1]:
                        worker.kill()
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        command.process.wait(chance.uniform(0.0, 0.5))
                elif victim == "receiver":
                    receiver.kill()
                    receiver.start()
                command.signal(signal.SIGKILL)
                command.wait()
                log = command.log
            assert "Traceback" not in log
            left = len(lab.names("episodes"))
            if not left:
                break  # a fast pass before it was killed: there is nothing left to start a worker for
        print(f"{len(before) - left} of {len(before)} episodes were shipped by passes that were killed")

        result = lab.once({"workers": {"count": 2}})

        assert (result.transient_failures, result.conflicts, result.fatal) == (0, 0, 0)
        assert result.shipped == result.scanned == left
        assert lab.names("shipped") == sorted(before) == sorted(receiver.stored())
        assert lab.names("episodes") == lab.names("outbox") == lab.names("quarantine") == lab.names("holds") == []
        assert {name: tree(lab.shipped / name) for name in before} == before
        for name, facts in before.items():
            assert contents_of(receiver.artifact(name).read_bytes()) == contents(facts)
        assert list(lab.root.rglob(".*")) == []
