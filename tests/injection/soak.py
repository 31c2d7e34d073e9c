"""A lab host and its receiver over a long time, while everything that can happen to processes and lines does.

`Soak` runs ``fastship run`` and ``fastship receive`` as real processes with a line between them, records episodes of
all sizes and kinds, and plays faults that are drawn from a seed. Each episode that was recorded has an `end` that it
must come to; `Soak.compare` looks at every one. What was done stands in ``soak.log``, with its second.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import psutil
from lab import COMMIT, Command, Lab, Receiver, noise, telemetry, tree, wait_until, workers_of

from fastship.episode import MARKER
from fastship.errors import EXIT_INTERNAL
from fastship.frames import ArtifactReader
from fastship.pack import extract

REFUSED_COMMIT = "f" * 40
SECTIONS: dict[str, dict[str, Any]] = {
    "spool": {"scan_interval_s": "500ms"},
    "pack": {"threads": 2, "level": "auto", "frame_bytes": "64KiB"},
    "upload": {"one_shot_bytes": "64kB", "stream_bytes": "256kB", "connections": 3, "retries": 2, "bandwidth": "4MB"},
    "destination": {"pause_min_s": "200ms", "pause_max_s": "1s"},
    # Those that are killed here die of us, not of their episode.
    "workers": {"count": 2, "poison_after": 1_000_000, "drain_timeout_s": "2s"},
}
SIZES = (0, 100, 5_000, 60_000, 200_000, 800_000, 3_000_000)


class Line:
    """Carries connections to a port of this host; all of them can be cut, and kept waiting."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.flows = threading.Event()
        self.flows.set()
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                near, _ = self._listener.accept()
                threading.Thread(target=self._connect, args=(near,), daemon=True).start()

    def _connect(self, near: socket.socket) -> None:
        with near, contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self._port)) as far:
            with self._lock:
                self._open |= {near, far}
            back = threading.Thread(target=self._carry, args=(far, near), daemon=True)
            back.start()
            self._carry(near, far)
            back.join()
            with self._lock:
                self._open -= {near, far}

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                self.flows.wait()
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def cut(self) -> int:
        with self._lock:
            ends = list(self._open)
        for end in ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        return len(ends) // 2

    def close(self) -> None:
        self.flows.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()
        self.cut()


class Recorded(NamedTuple):
    end: str  # "shipped", "quarantined", "held", or "open": changed after its marker, so shipped or held
    facts: dict[str, Any]  # `tree`, as it was when it was recorded


class Sample(NamedTuple):
    """Of all processes of one role."""

    rss_bytes: int
    descriptors: int
    threads: int


class Soak:
    """Used once: `run`, then `settle`, then `compare`."""

    def __init__(self, directory: Path, chance: random.Random) -> None:
        self.directory = directory
        self.recorded: dict[str, Recorded] = {}
        self.done: dict[str, int] = {}  # faults played, by kind
        self.samples: list[dict[str, Sample]] = []
        self._chance = chance
        self._started = time.monotonic()
        self._log = (directory / "soak.log").open("w", buffering=1)
        self._late: list[tuple[float, Callable[[], None]]] = []  # what is to happen when
        self._runs = 0
        self._number = 0
        self._tokens = [directory / "accepted", directory / "token"]
        for path in self._tokens:
            path.write_text("token-0\n")
        (directory / "commits").write_text(f"{COMMIT}\n")
        self.receiver = Receiver(
            directory / "store",
            *("--token-file", self._tokens[0], "--commits", directory / "commits"),
            *("--set", "receiver.sync_bytes=128kB", "--set", "receiver.reserve_bytes=0"),
            *("--set", "receiver.upload_max_age_s=1d"),
        )
        self.line = Line(int(self.receiver.url.rpartition(":")[2]))
        self.lab = Lab(directory, self.line.url, SECTIONS)
        self.settings_file = self.lab.settings_file({"destination": {"token_file": str(self._tokens[1])}})
        self._start_shipper()

    def close(self) -> None:
        self.line.flows.set()
        self._shipper.end()
        self.receiver.close()
        self.line.close()
        self._log.close()

    def note(self, text: str) -> None:
        self._log.write(f"{time.monotonic() - self._started:8.3f} {text}\n")

    # --- the time of it ------------------------------------------------------------------------------------------

    def run(self, seconds: float, faults: dict[str, int], pace_s: float = 0.1) -> None:
        """Record and play ``faults`` (each with its weight) for so long."""
        end = time.monotonic() + seconds
        next_fault = time.monotonic()
        while (now := time.monotonic()) < end:
            for due in [one for one in self._late if one[0] <= now]:
                self._late.remove(due)
                due[1]()
            if len(self.lab.names("episodes")) < 40:  # a recorder faster than the line tests nothing more
                self._record()
            if now >= next_fault:
                kind = self._chance.choices(list(faults), list(faults.values()))[0]
                self.done[kind] = self.done.get(kind, 0) + 1
                self.note(f"fault: {kind}")
                getattr(self, f"_{kind}")()
                next_fault = time.monotonic() + self._chance.expovariate(1 / (3 * pace_s))
            if self._shipper.process.poll() is not None:
                assert self._ended_of_us(), f"the shipper ended by itself: {self._shipper.log[-2000:]}"
                self._start_again()
            time.sleep(self._chance.uniform(0, 2 * pace_s))

    def settle(self) -> None:
        """No more faults: wait until everything has come to its end."""
        self.line.flows.set()
        while self._late:
            _, last = self._late.pop(0)
            last()
        self.note("settling")

        def left() -> list[str]:
            held = {name.removesuffix(".json") for name in self.lab.names("holds")}
            return [name for name in self.lab.names("episodes") if name not in held]

        wait_until(lambda: not left(), f"the end of all; see {self.directory}", limit_s=180.0)
        wait_until(lambda: set(self._outbox_ids()) <= set(self.lab.names("episodes")), "the sweep")

    def _outbox_ids(self) -> list[str]:
        return [name.partition(".tar.zst")[0].removesuffix(".manifest.json") for name in self.lab.names("outbox")]

    # --- the recorder --------------------------------------------------------------------------------------------

    def _record(self) -> None:
        self._number += 1
        name = f"ep{self._number:06}"
        kind = self._chance.choices(
            ["plain", "many", "refused", "impossible", "again", "growing", "withdrawn"], [60, 8, 4, 2, 4, 4, 4]
        )[0]
        again = [one for one in self.lab.names("shipped") if self.recorded.get(one, ("", {}))[0] == "shipped"]
        if kind == "again" and again:
            name = self._chance.choice(again)
        elif kind == "again":
            kind = "plain"
        if kind == "impossible":
            name = f"not an id {self._number}\n\x1b[2J"
        size = self._chance.choice(SIZES)
        files = {"data/noise": noise(size, self._number), "telemetry.jsonl": telemetry(size // 2, self._number)}
        if kind == "many":
            files = {f"d{number % 7}/f{number}": noise(100, number) for number in range(300)}
        meta = {"code_version": {"commit": REFUSED_COMMIT if kind == "refused" else COMMIT}}
        # Elsewhere first, then renamed or marked: as recorders do, the one or the other.
        episode = self.lab.episode(name, files, meta=meta, marker=False)
        (episode / MARKER).touch()
        self.note(f"recorded {name!r}: {kind}, {size}")
        facts: dict[str, Any] = {}
        if kind in ("plain", "many"):
            facts = self._facts_of_files(files)
        ends = {"refused": "quarantined", "impossible": "quarantined", "again": "held"}
        end = ends.get(kind, "open" if kind in ("growing", "withdrawn") else "shipped")
        key = f"{name} again" if kind == "again" else name
        self.recorded[key] = Recorded(end, facts)
        if kind == "again":
            self.recorded[name] = self.recorded[name]._replace(end="shipped once")
        if kind == "growing":
            for step in range(self._chance.randrange(1, 12)):
                self._later(0.02 * step, lambda: self._append(episode))
        if kind == "withdrawn":
            self._later(self._chance.uniform(0, 0.3), lambda: self._withdraw(episode))

    def _facts_of_files(self, files: dict[str, bytes]) -> dict[str, Any]:
        return {path: hashlib.sha256(data).hexdigest() for path, data in files.items()}

    def _append(self, episode: Path) -> None:
        with contextlib.suppress(FileNotFoundError), (episode / "telemetry.jsonl").open("r+b") as file:
            file.seek(0, os.SEEK_END)
            file.write(b"more\n" * 1000)

    def _withdraw(self, episode: Path) -> None:
        with contextlib.suppress(FileNotFoundError):
            (episode / MARKER).unlink()
            self._later(self._chance.uniform(0, 1.0), lambda: self._finish(episode))

    def _finish(self, episode: Path) -> None:
        with contextlib.suppress(FileNotFoundError):
            (episode / "more").write_bytes(b"more")
            (episode / MARKER).touch()

    def _later(self, seconds: float, action: Callable[[], None]) -> None:
        self._late.append((time.monotonic() + seconds, action))

    # --- the faults ------------------------------------------------------------------------------------------------

    def _start_shipper(self) -> None:
        self._runs += 1
        self._shipper = Command("run", "-c", self.settings_file, log=self.directory / f"run{self._runs}.log")

    def _start_again(self) -> None:
        log = self._shipper.log
        assert "Traceback" not in log, log[-4000:]
        self._shipper.end()
        if self._runs > 3 and (old := self.directory / f"run{self._runs - 3}.log").exists():
            old.unlink()
        self._start_shipper()

    def _kill_supervisor(self) -> None:
        self._shipper.process.kill()
        self._shipper.process.wait()
        self._start_again()  # its workers are there still, for a moment

    def _kill_all(self) -> None:
        self._shipper.end()
        self._start_again()

    def _drain(self) -> None:
        self._shipper.signal(signal.SIGTERM)
        if self._chance.random() < 0.3:
            time.sleep(self._chance.uniform(0, 0.1))
            self._shipper.signal(signal.SIGTERM)
        status = self._shipper.wait()
        # One that had no handlers yet is ended by the signal itself.
        assert status in (0, -signal.SIGTERM) or self._ended_of_us(), self._shipper.log[-4000:]
        self._start_again()

    def _ended_of_us(self) -> bool:
        """Three workers in a row that were killed before they were ready look as if none could start."""
        return self._shipper.wait() == EXIT_INTERNAL and "could not start (killed by signal 9)" in self._shipper.log

    def _kill_worker(self) -> None:
        for worker in self._workers():
            with contextlib.suppress(psutil.NoSuchProcess):
                worker.kill()

    def _stop_for_a_while(self) -> None:
        process = self._chance.choice(
            [*self._workers(), psutil.Process(self._shipper.process.pid), psutil.Process(self.receiver.process.pid)]
        )
        with contextlib.suppress(psutil.NoSuchProcess):
            process.suspend()
            time.sleep(self._chance.choice([0.01, 0.2, 1.0]))
            process.resume()

    def _workers(self) -> list[psutil.Process]:
        found = workers_of(self._shipper.process.pid)
        return self._chance.sample(found, min(1, len(found)))

    def _reload(self) -> None:
        self._shipper.signal(signal.SIGHUP) if workers_of(self._shipper.process.pid) else None

    def _kill_receiver(self) -> None:
        self.receiver.kill()
        time.sleep(self._chance.choice([0, 0, 0.3]))
        self.receiver.start()

    def _end_receiver(self) -> None:
        self.receiver.process.send_signal(signal.SIGTERM)
        self.receiver._reap()
        self.receiver.start()

    def _cut(self) -> None:
        self.note(f"cut {self.line.cut()}")

    def _stall(self) -> None:
        self.line.flows.clear()
        self._later(self._chance.uniform(0.05, 1.0), self.line.flows.set)

    def _rotate(self) -> None:
        token = f"token-{self._chance.randrange(1 << 32)}\n"
        self._tokens[0].write_text(token)

        def follow() -> None:
            self._tokens[1].write_text(token)

        self._later(self._chance.uniform(0, 0.5), follow)

    def _nothing(self) -> None:
        pass

    # --- what is looked at ---------------------------------------------------------------------------------------

    def sample(self) -> None:
        """Note what the processes of each role have now."""
        roles = {
            "supervisor": [self._shipper.process.pid],
            "workers": [worker.pid for worker in workers_of(self._shipper.process.pid)],
            "receiver": [self.receiver.process.pid],
        }
        found = {}
        for role, pids in roles.items():
            facts = [sample for pid in pids for sample in sample_of(pid)]
            found[role] = Sample(*map(sum, zip(*facts, strict=True))) if facts else Sample(0, 0, 0)
        self.samples.append(found)
        self.note(f"sample {found}")

    def log(self) -> str:
        return self._shipper.log

    def files(self) -> dict[str, int]:
        """How many files there are of each sort that must not become more and more."""
        root = self.lab.root
        return {
            "outbox, not of an episode held": len(set(self._outbox_ids()) - set(self.lab.names("episodes"))),
            "temporaries": len(list(root.glob("*/.tmp-*")) + list(root.glob("state/requests/*"))),
            "state": len(self.lab.names("state")),
            "condemned": len([name for name in self.lab.names("quarantine") if name.startswith(".")]),
        }

    def compare(self) -> dict[str, list[str]]:
        """Look at every episode that was recorded: those lost, doubled, and mixed (not as they were), by name."""
        wrong: dict[str, list[str]] = {"lost": [], "doubled": [], "mixed": []}
        stored = self.receiver.stored()
        places = {place: set(self.lab.names(place)) for place in ("episodes", "shipped", "quarantine")}
        held = {name.removesuffix(".json") for name in self.lab.names("holds")}
        expected: set[str] = set()
        for key, one in self.recorded.items():
            name = key.removesuffix(" again")
            here = [place for place, names in places.items() if name in names]
            match one.end:
                case "shipped" | "shipped once":
                    expected.add(name)
                    if "shipped" not in here or name not in stored:
                        wrong["lost"].append(f"{key}: {here}")
                        continue
                    if one.end == "shipped" and here != ["shipped"]:
                        wrong["doubled"].append(f"{key}: {here}")
                    self._compare_stored(key, self.lab.shipped / name, one.facts, wrong)
                case "held":
                    if "episodes" not in here or name not in held:
                        wrong["lost"].append(f"{key}: {here}")
                case "quarantined":
                    if here != ["quarantine"] or name in stored:
                        wrong["lost"].append(f"{key}: {here}")
                    self._check_reason(name, wrong)
                case "open":
                    if here == ["shipped"]:
                        expected.add(name)
                    elif here != ["episodes"] or name not in held:
                        wrong["lost"].append(f"{key}: {here}")
                    if name in stored:
                        expected.add(name)
        wrong["doubled"] += [f"{name}: not recorded" for name in sorted(stored - expected)]
        names = {key.removesuffix(" again") for key in self.recorded}
        for place, found in places.items():
            wrong["doubled"] += [
                f"{place}/{name!r}" for name in found if not name.startswith(".") and name not in names
            ]
        return wrong

    def _check_reason(self, name: str, wrong: dict[str, list[str]]) -> None:
        reason = msgspec.json.decode((self.lab.quarantine / name / "quarantine_reason.json").read_bytes())
        if reason["status_code"] != (None if name.startswith("not an id") else 412):
            wrong["mixed"].append(f"{name!r}: {reason}")

    def _compare_stored(self, key: str, local: Path, facts: dict[str, Any], wrong: dict[str, list[str]]) -> None:
        name = key.removesuffix(" again")
        target = self.directory / "out"
        try:
            with ArtifactReader.open(self.receiver.artifact(name)) as reader:
                extract(reader, target)
            here, there = tree(local), tree(target / name)
        finally:
            shutil.rmtree(target, ignore_errors=True)
        if here != there or any(here[path][2] != digest for path, digest in facts.items()):
            wrong["mixed"].append(key)


def sample_of(pid: int) -> Iterator[Sample]:
    """One, or none where the process is gone."""
    with contextlib.suppress(psutil.NoSuchProcess, OSError):
        process = psutil.Process(pid)
        yield Sample(process.memory_info().rss, process.num_fds(), process.num_threads())
