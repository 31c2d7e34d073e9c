"""One standard scenario, a fault at one system call of it, a restart, and the comparison: for every call there is.

The scenario: four episodes, ``small`` and ``big`` (several frames, several appends), ``held`` (the receiver has another
content under that id: 409) and ``refused`` (its commit is not taken: 412), beside what an earlier crash left. `record`
runs it and numbers the calls that change something; a `Point` is one of them and one fault. The fault strikes the
shipper or the receiver; what must hold is the same for both:

- when the process has ended, before anything is started again: no episode is in no place, none in two, and what is in
  ``shipped/`` is at the receiver;
- after one more ``fastship once``, with no help: every episode is exactly where it belongs, its bytes equal, and no
  stray file is left, or it is one that the receiver forgets by age;
- no traceback in any log, and whoever ends with an error of its own says what to do.

`Wrong` says which of these did not.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import faults
import zstandard
from interpose import CHANGING, READING, Action, Call, Nursery, Stuck
from lab import COMMIT, Lab, Receiver, contents, contents_of, noise, telemetry, tree
from receiver_process import make_artifact

from fastship import durable
from fastship.episode import ARTIFACT_SUFFIX, MARKER
from fastship.errors import EXIT_NOT_SHIPPED, EXIT_OK
from fastship.receiver.store.store import Store
from fastship.settings import ReceiverSettings

KILL, KILL_ALL, FULL = "killed", "all killed", "full from then on"
HALF, UNREAD, ROTTEN = "half of it written", "not read", "not read from then on"
ERRORS = {name: getattr(errno, name) for name in ("ENOSPC", "EIO", "EMFILE", "EDQUOT")}
FAILURES = (*ERRORS, FULL, HALF)
READ_FAILURES = (UNREAD, ROTTEN)
KINDS: dict[str, tuple[str, ...]] = {
    "SIGKILL": (KILL, KILL_ALL),
    "ENOSPC, EIO, EMFILE or EDQUOT": tuple(ERRORS),
    "a disk that is full from then on": (FULL,),
    "a write that takes half": (HALF,),
    "EIO for a read": (UNREAD,),
    "EIO for all reads of a file from then on": (ROTTEN,),
}
_READS = ("EIO for a read", "EIO for all reads of a file from then on")
_ONLY = {"open": ("EIO", "EMFILE"), "socket": ("EMFILE",), "accept4": ("EMFILE",)}
"""What these may fail with, which change nothing; the others with each of `ERRORS`."""
_FILLING = ("create", "write", "pwrite64", "pwritev", "writev", "mkdir", "link")
"""What a full disk refuses, under the log as well."""
_WRITING = ("write", "pwrite64", "writev", "pwritev", "sendto", "sendmsg")
_SOCKETS = ("tcp", "unix", "socket")
_OTHER_COMMIT = "f" * 40
UPLOAD_MAX_AGE_S = 7 * 86400.0

WAYS: dict[str, dict[str, Any]] = {
    "sent while packed": {"one_shot_bytes": "64kB", "stream_bytes": "128kB"},
    "resumable": {"one_shot_bytes": "64kB", "stream_bytes": 0},
    "in one request": {"one_shot_bytes": "16MB", "stream_bytes": 0},
}


def some_ways(ways: Sequence[str], side: str) -> list[str]:
    """All, but for the smallest shares: each has its scenario to run and its programs to load."""
    return faults.nearly_all(ways, f"{side} ways")


class Wrong(AssertionError):
    """What came of a fault is not what must hold; ``kind`` is lost, doubled, mixed or untidy."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(f"{kind}: {text}")
        self.kind = kind


def require(true: object, kind: str, text: object) -> None:
    """Raises `Wrong`."""
    if not true:
        raise Wrong(kind, str(text))


class Point(NamedTuple):
    """The ``number``-th call of this name, on this file, by this process, and what is done to it."""

    process: str
    call: str
    place: str
    number: int
    fault: str

    def __str__(self) -> str:
        return f"{self.process}: {self.call} {self.place} ({self.number}): {self.fault}"


class Look:
    """Sees the calls of a program; strikes at ``point``. ``places``: where each directory or file stands."""

    def __init__(self, processes: tuple[str, ...], places: Mapping[str, Path], point: Point | None = None) -> None:
        self._processes = processes
        self._places = sorted(((str(path), name) for name, path in places.items()), reverse=True)
        self._point = point
        self._counts: Counter[tuple[str, str, str]] = Counter()
        self._full = False
        self._rotten = ""
        self.calls: list[Point] = []
        self.struck = False

    def __call__(self, call: Call) -> Action:
        place = self._place(call.path)
        if not place:
            return None
        key = (self._processes[not call.first], call.name, place)
        self._counts[key] += 1
        self.calls.append(Point(*key, self._counts[key], ""))
        if self._full:
            return errno.ENOSPC if call.name in _FILLING and place not in _SOCKETS else None
        if place == self._rotten:
            return errno.EIO
        point = self._point
        if point is None or self.struck or self.calls[-1] != point._replace(fault=""):
            return None
        self.struck = True
        if point.fault == FULL:
            self._full = True
            return errno.ENOSPC
        if point.fault in (UNREAD, ROTTEN):
            self._rotten = place if point.fault == ROTTEN else ""
            return errno.EIO
        if point.fault == HALF:
            return "half"
        if point.fault in (KILL, KILL_ALL):
            return "kill" if point.fault == KILL else "kill all"
        error: int = ERRORS[point.fault]
        return error

    @property
    def lasts(self) -> bool:
        """Whether its fault lasts until `free`."""
        return self._point is not None and self._point.fault in (FULL, ROTTEN)

    def free(self) -> None:
        """Somebody made room on the full disk, or put in one that can be read."""
        self._full = False
        self._rotten = ""

    def _place(self, path: str) -> str:
        """Where a file is, the same in each run; "" for what is none of ours (imports, pipes)."""
        if path in _SOCKETS:
            # A receiver's "unix" is how its threads wake its loop.
            return path if path != "unix" or "worker" in self._processes else ""
        for top, name in self._places:
            if path == top or path.startswith(f"{top}/"):
                found = re.sub(r"[0-9a-f]{16,}|\d{4}-\d\d-\d\d|(?<=[.-])\d+(?=$|[./])", "#", path[len(top) :])
                return name + found.removesuffix(" (deleted)")
        return ""


def points_of(recordings: Iterable[list[Point]], faults: Iterable[str]) -> list[Point]:
    """Every call of any of the recordings with every fault that can befall it, in the order of the calls."""
    calls = dict.fromkeys(itertools.chain(*recordings))
    return [call._replace(fault=fault) for call, fault in itertools.product(calls, faults) if _is_possible(call, fault)]


def _is_possible(call: Point, fault: str) -> bool:
    if call.call in READING or fault in (UNREAD, ROTTEN):
        reads = call.call in READING and call.place not in _SOCKETS
        return reads and (fault == UNREAD or (fault == ROTTEN and call.number == 1))
    if fault == HALF:
        return call.call in _WRITING and call.place not in ("unix", "socket")
    if fault in ERRORS:
        if (call.call, call.place) == ("write", "unix"):  # by which a signal wakes Python, which prints what befalls it
            return False
        return fault in _ONLY.get(call.call, ERRORS)
    if fault == FULL:
        return call.call in _FILLING and call.place not in _SOCKETS
    return call.call not in _ONLY  # a kill there is the kill at the next call that changes something


def sweep(
    side: str,
    way: str,
    attempt: Callable[[Point | None, frozenset[str]], Look],
    *,
    kinds: Sequence[str],
    slow: bool = False,
) -> None:
    """Try the share of all points that is asked for, of these kinds of fault; fails with all that is wrong.

    ``attempt`` is the scenario with the fault, the restart and the comparison, where calls of the set are looked at; it
    raises `Wrong` and `Stuck`. ``slow``: the smallest shares are one point of each kind.
    """
    possible = {name: [fault for fault in faults if fault in kinds] for name, faults in KINDS.items()}
    seen = [CHANGING, READING] if possible[_READS[0]] or possible[_READS[1]] else [CHANGING]
    recordings = [attempt(None, calls).calls for calls in seen for _ in range(faults.times(2))]
    wrong: list[str] = []
    for kind in [name for name in possible if possible[name]]:
        points = points_of(recordings, possible[kind])
        struck = 0
        bad: Counter[str] = Counter()
        chosen = faults.some_of(points, f"{side} {way} {kind}")
        if slow and faults.SHARE < 0.1:
            chosen = faults.some_of(chosen, f"{side} {way} {kind}, one of them")
        for point in chosen:
            try:
                struck += attempt(point, READING if kind in _READS else CHANGING).struck
            except (Wrong, Stuck) as error:
                bad[error.kind if isinstance(error, Wrong) else "stuck"] += 1
                wrong.append(f"{point}: {error}")
                print(wrong[-1], flush=True)
        what = "reads or looks at something" if kind in _READS else "changes something"
        faults.count(
            f"{side}, {way}: {kind}",
            f"at each system call of the {side} that {what}; then a restart",
            of=len(points),
            tried=struck,
            test=f"tests/crash/test_sweep_{side}.py",
            **{name: bad[name] for name in ("lost", "doubled", "mixed")},
        )
    assert not wrong


# --- the scenario ------------------------------------------------------------------------------------------------


class Scene:
    """The spool of one run below ``directory``; the episodes that are stored are called after ``number``."""

    def __init__(
        self,
        directory: Path,
        url: str,
        upload: Mapping[str, Any],
        number: int = 0,
        *,
        late: bool = False,
        ca_file: str = "",
    ) -> None:
        """``late``: the marker of ``small`` comes with `finish` only. ``ca_file``: of a receiver with TLS."""
        directory.mkdir()
        self.directory = directory
        self.out, self.log = directory / "out", directory / "log"
        self.small, self.big, self.refused = (f"{name}-{number}" for name in ("small", "big", "refused"))
        self.lab = lab = Lab(
            directory, url, {"upload": upload, "pack": {"frame_bytes": "64KiB"}, "destination": {"ca_file": ca_file}}
        )
        self.settings_file = lab.settings_file()
        other = {"code_version": {"commit": _OTHER_COMMIT}}
        lab.episode(self.small, files={"data": telemetry(5_000, number)}, marker=not late)
        lab.episode(self.big, files={"deep/noise": noise(560_000, number), "text": telemetry(30_000, number)})
        lab.episode(self.refused, files={"data": telemetry(5_000, number)}, meta=other)
        lab.episode("held", files={"data": telemetry(5_000, "here")})
        self.before = {name: tree(lab.episodes / name) for name in (self.small, self.big, self.refused, "held")}
        lab.outbox.mkdir()
        for leftover in ("gone.tar.zst", "gone.manifest.json", f"{durable.TEMP_PREFIX}left.1"):
            (lab.outbox / leftover).write_bytes(b"of an earlier crash")

    @property
    def once(self) -> tuple[str | Path, ...]:
        """The command line."""
        return ("once", "-c", self.settings_file)

    @property
    def run(self) -> tuple[str | Path, ...]:
        return ("run", "-c", self.settings_file)

    def finish(self) -> None:
        """The recorder is done with ``small``."""
        (self.lab.episodes / self.small / MARKER).touch()
        self.before[self.small] = tree(self.lab.episodes / self.small)

    def is_settled(self, *, but: str = "") -> bool:
        """Whether each episode, but that one, is where it belongs, as far as a daemon has anything left to do."""
        lab = self.lab
        return (
            set(lab.names("episodes")) - {but} == {"held"}
            and lab.names("holds") == ["held.json"]
            and lab.names("quarantine") == [self.refused]
            and (lab.quarantine / self.refused / "quarantine_reason.json").exists()
            and lab.names("outbox") == ["held.manifest.json", "held.tar.zst"]
        )

    @property
    def places(self) -> dict[str, Path]:
        return {"spool": self.lab.root, "log": self.log, "output": self.out}

    def check_log(self, code: int | None, point: Point | None) -> None:
        """``code``: the exit code of a pass that nobody killed."""
        log = self.log.read_text(errors="replace")
        require("traceback" not in log.lower(), "untidy", f"a traceback:\n{log}")
        if code not in (None, EXIT_OK, EXIT_NOT_SHIPPED):
            check_told(log, code, point)

    def check_nothing_lost(self, store: Path) -> None:
        """What must hold at any moment: each episode in one place, and what was retired is at the receiver."""
        lab = self.lab
        for name, before in self.before.items():
            found = {place: lab.root / place / name for place in ("episodes", "shipped", "quarantine")}
            there = [place for place, path in found.items() if path.exists()]
            require(there, "lost", f"{name} is nowhere")
            require(len(there) == 1, "doubled", f"{name} is in {there}")
            now = tree(found[there[0]])
            now.pop("quarantine_reason.json", None)
            require(now == before, "mixed", f"{name} is not what it was in {there[0]}")
            if there == ["shipped"]:
                self._check_stored(store, name)
        for place in ("shipped", "quarantine"):
            strangers = [name for name in lab.names(place) if name not in self.before and not name.startswith(".")]
            require(not strangers, "doubled", f"{strangers} in {place}")

    def check_all_right(self, store: Path) -> None:
        """What must hold after a pass that nothing befell."""
        self.check_nothing_lost(store)
        lab = self.lab
        look = {place: lab.names(place) for place in ("episodes", "shipped", "quarantine", "holds", "outbox")}
        expected = {
            "episodes": ["held"],
            "shipped": [self.big, self.small],
            "quarantine": [self.refused],
            "holds": ["held.json"],
            "outbox": ["held.manifest.json", "held.tar.zst"],
        }
        require(look == expected, "untidy", look)
        reason = json.loads((lab.quarantine / self.refused / "quarantine_reason.json").read_bytes())
        require(reason["status_code"] == 412, "untidy", reason)
        strays = [str(path.relative_to(lab.root)) for path in lab.root.rglob(".*")]
        require(not strays, "untidy", strays)
        receipts = [json.loads(line) for path in lab.root.glob("receipts/*.jsonl") for line in _whole_lines(path)]
        told = {one["receipt"]["episode"] for one in receipts}
        require(told == {self.big, self.small}, "untidy", f"receipts of {told}")

    def _check_stored(self, store: Path, name: str) -> None:
        path = store / "episodes" / (name + ARTIFACT_SUFFIX)
        require(path.exists(), "lost", f"{name} was retired and is not at the receiver")
        try:
            found = contents_of(path.read_bytes())
        except (zstandard.ZstdError, OSError) as error:
            raise Wrong("lost", f"{name} cannot be read at the receiver: {error}") from None
        require(found == contents(self.before[name]), "mixed", f"{name} is not at the receiver what it is here")

    def remove(self) -> None:
        shutil.rmtree(self.directory)


def _whole_lines(journal: Path) -> list[bytes]:
    """Without what a crash tore."""
    return [line for line in journal.read_bytes().split(b"\n") if line.startswith(b"{") and line.endswith(b"}")]


# --- the receiver's side -----------------------------------------------------------------------------------------


def seed(store: Path, artifact: bytes) -> list[str]:
    """A root that has ``held`` already, without its receipt, as after a crash; the options to serve it with."""
    (store / "episodes").mkdir(parents=True)
    (store / "episodes" / f"held{ARTIFACT_SUFFIX}").write_bytes(artifact)
    commits = store.parent / "commits"
    commits.write_text(f"{COMMIT}\n")
    return ["receive", "--root", str(store), "--commits", str(commits)]


class Stage(NamedTuple):
    """What all attempts of a shipper's sweep share: one receiver. Their episodes have names of their own."""

    directory: Path
    nursery: Nursery
    receiver: Receiver
    scenes: list[Scene]

    @property
    def store(self) -> Path:
        return self.receiver.root

    def scene(self, way: str, *, late: bool = False) -> Scene:
        """The next one."""
        number = len(self.scenes)
        self.scenes.append(Scene(self.directory / str(number), self.receiver.url, WAYS[way], number, late=late))
        return self.scenes[-1]


@contextlib.contextmanager
def staged(directory: Path) -> Iterator[Stage]:
    """In the end the receiver has what all scenes shipped, and nothing else for ever. Raises `Wrong`."""
    store, artifact = directory / "receiver" / "store", make_artifact("held")
    _, _, _, *options = seed(store, artifact)
    with contextlib.closing(Nursery()) as nursery, contextlib.closing(Receiver(store, *options)) as receiver:
        stage = Stage(directory, nursery, receiver, [])
        yield stage
    check_store(store, artifact, [name for scene in stage.scenes for name in (scene.small, scene.big)])


def check_served(log: Path, code: int, point: Point | None) -> None:
    """How a receiver ended that was told to, or of itself: ``code``."""
    said = log.read_text(errors="replace")
    require("traceback" not in said.lower(), "untidy", f"a traceback:\n{said}")
    if code > EXIT_OK:
        check_told(said, code, point)


def check_told(log: str, code: int | None, point: Point | None) -> None:
    """Who ended with an error said which and what to do, unless the fault took the words."""
    if point is not None and (point.place == "log" or point.fault == FULL):
        return
    for part in ("fastship: error:", "  try: "):
        require(part in log, "untidy", f"exit {code} without {part!r}:\n{log}")


def check_store(store: Path, artifact: bytes, stored: Iterable[str]) -> None:
    """Just these episodes and ``held``, each with its receipt, and nothing else for ever."""
    age(store)
    names = sorted(["held", *stored])
    expected = sorted(name + suffix for name in names for suffix in (ARTIFACT_SUFFIX, ".receipt.json"))
    found = sorted(os.listdir(store / "episodes"))
    require(found == expected, "untidy", f"the store has {found}")
    require((store / "episodes" / f"held{ARTIFACT_SUFFIX}").read_bytes() == artifact, "mixed", "held was replaced")
    for name in names:
        data = (store / "episodes" / (name + ARTIFACT_SUFFIX)).read_bytes()
        receipt = json.loads((store / "episodes" / f"{name}.receipt.json").read_bytes())
        right = (
            receipt["artifact"] == {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
            and receipt["episode"] == name
        )
        require(right, "mixed", f"the receipt of {name} is {receipt}")
    root = sorted(path.name for path in store.iterdir())
    require(root == ["accounts", "episodes", "secret", "uploads"], "untidy", f"the root has {root}")
    left = sorted(str(path.relative_to(store)) for path in (store / "uploads").rglob("*") if not path.is_dir())
    require(left == ["uploads/clock"], "untidy", f"for ever: {left}")


def age(store: Path) -> None:
    """Let ``upload_max_age_s`` go by, and the receiver look after its root then, as it does each hour."""
    for path in store.rglob("*"):
        status = path.stat()
        os.utime(path, (status.st_atime, status.st_mtime - UPLOAD_MAX_AGE_S - 3600))
    # And the clock went steadily meanwhile: a note that could not be read at a start makes ages begin there.
    (store / "uploads" / "clock").unlink(missing_ok=True)
    Store(ReceiverSettings(root=str(store), upload_max_age_s=UPLOAD_MAX_AGE_S)).mend()
