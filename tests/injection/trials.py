"""Commands that somebody types, each with what it is typed at and what must come of it, whatever befalls it.

A `Trial` has a directory of its own. After the command was killed or failed `Trial.check` looks at that; after it was
typed again (`Trial.again`), and the shipper has made a pass, `Trial.check_end` does. Both raise `Wrong` of ``sweep``.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import urlsplit

import msgspec
from lab import Lab, contents, contents_of, noise, telemetry, tree
from receiver_process import make_artifact, sha256_field
from sample import hold_record, receipt_of
from sweep import READ_FAILURES, Point, age, require

from fastship.episode import ARTIFACT_SUFFIX, MARKER, Manifest
from fastship.errors import EXIT_OK
from fastship.frames import FramePool
from fastship.pack import PackOptions, pack
from fastship.receiver.store.store import Store
from fastship.settings import ReceiverSettings, Settings
from fastship.spool import Spool, requests

Said: TypeAlias = tuple[tuple[str, ...], dict[str, str | None]]
"""A command without its settings, and where each episode that it is about ends; None: nowhere."""

OPTIONS = PackOptions(level=1, frame_bytes=1 << 20, owner="keep", page_cache="as-found")


class Trial:
    """A command in a directory of its own. ``places``: where its calls are looked at."""

    words: tuple[str | Path, ...]
    worked = frozenset({EXIT_OK})
    places: dict[str, Path]

    def __init__(self, directory: Path, url: str, number: int) -> None:
        directory.mkdir()
        self.directory, self.url, self.number = directory, url, number

    def check(self, code: int | None) -> None:
        """What must hold whatever befell it; ``code``: how it ended, None where it was killed."""

    @property
    def again(self) -> tuple[str | Path, ...]:
        return self.words

    def is_done_already(self, said: str) -> bool:
        """Whether the second one may say so."""
        return "is there already" in said

    def check_end(self, ship: Callable[[Path], None], point: Point | None) -> None:
        """What must hold once it was done. ``ship``: one pass with the settings in this file."""


# --- an operator's word on what is in the spool ------------------------------------------------------------------


class Word(Trial):
    """One episode is in quarantine, one is held, one is in ``shipped/`` and not at the receiver."""

    settings: Mapping[str, Mapping[str, Any]] = {}

    def __init__(self, directory: Path, url: str, number: int) -> None:
        super().__init__(directory, url, number)
        self.lab = Lab(directory, url, self.settings)
        self.settings_file = self.lab.settings_file()
        self.places = {"spool": self.lab.root}
        self.spool = Spool(self.lab.root)
        self.spool.create()
        self.bad, self.held, self.kept, self.other = (f"{name}-{number}" for name in ("bad", "held", "kept", "other"))
        self.before, self.mtimes = {}, {}
        for name in (self.bad, self.held, self.kept):
            path = self.lab.episode(name, files={"data": telemetry(3000, name), "sub/noise": noise(2000, name)})
            self.before[name], self.mtimes[name] = tree(path), path.stat().st_mtime_ns
        manifest = self.pack(self.kept)
        self.artifact = self.lab.artifact(self.kept).read_bytes()
        self.spool.retire([(self.kept, receipt_of(manifest), manifest)])
        self.pack(self.held)
        self.spool.hold(msgspec.structs.replace(hold_record(self.held), fingerprint=""))
        self.spool.quarantine(self.bad, status_code=422, error="not this", body="")
        self.begun_at = {self.bad: "quarantine", self.held: "episodes", self.kept: "shipped"}
        words, self.ends_at = self.says()
        self.words = (*words, "-c", self.settings_file)

    def says(self) -> Said:
        raise NotImplementedError

    def pack(self, name: str) -> Manifest:
        with self.spool.outbox.begin(name) as sink, FramePool(1) as pool:
            manifest = pack(self.lab.episodes / name, sink, OPTIONS, pool)
        self.spool.outbox.commit(manifest)
        return manifest

    def whereabouts(self) -> dict[str, str]:
        """The place of each of the three, below the root, each whole and in one."""
        found: dict[str, str] = {}
        for place in ("episodes", "shipped", "quarantine"):
            for path in (self.lab.root / place).iterdir():
                if path.name.startswith(".") or not path.is_dir():
                    continue
                facts = tree(path)
                facts.pop("quarantine_reason.json", None)
                name = next((one for one, before in self.before.items() if before == facts), None)
                require(name, "mixed", f"{place}/{path.name} is none of those that were there")
                assert name is not None
                require(name not in found, "doubled", f"{name} is {found.get(name)} and {place}/{path.name}")
                found[name] = f"{place}/{path.name}"
        return found

    def check(self, code: int | None) -> None:
        found = self.whereabouts()
        for name in self.before:
            ends = self.ends_at.get(name, f"{self.begun_at[name]}/{name}")
            require(name in found or ends is None, "lost", f"{name} is nowhere")
            if name in found and name not in self.ends_at:
                require(found[name] == ends, "doubled", f"{name} is {found[name]}: nobody asked for that")
            if code == EXIT_OK and name in self.ends_at:
                place = found.get(name, "")
                moved = (
                    place != f"{self.begun_at[name]}/{name}" or not (self.spool.paths.holds / f"{name}.json").exists()
                )
                require(moved and (ends is not None or not place), "untidy", f"ended with 0, and {name} is {place}")

    def is_done_already(self, said: str) -> bool:
        return "is not in quarantine" in said or "is not held" in said

    def check_end(self, ship: Callable[[Path], None], point: Point | None) -> None:
        self.age_requests()
        ship(self.settings_file)
        self.check(None)
        found = self.whereabouts()
        ends: dict[str, str | None] = {name: f"{place}/{name}" for name, place in self.begun_at.items()}
        ends |= self.ends_at
        expected = {name: place for name, place in ends.items() if place is not None}
        require(found == expected, "untidy", f"{found}, not {expected}")
        for name, place in self.ends_at.items():
            if place is not None and place.startswith("shipped/"):
                self.check_shipped(name, place.removeprefix("shipped/"))
        held = ends[self.held] == f"episodes/{self.held}"
        left = {
            "holds": [f"{self.held}.json"] if held else [],
            "outbox": [f"{self.held}.manifest.json", f"{self.held}.tar.zst"] if held else [],
            "quarantine": sorted(
                place.partition("/")[2] for place in found.values() if place.startswith("quarantine/")
            ),
            "state/requests": [],
        }
        look = {name: self.lab.names(name) for name in left}
        require(look == left, "untidy", f"{look}, not {left}")
        strays = [str(path.relative_to(self.lab.root)) for path in self.lab.root.rglob(".*")]
        require(not strays, "untidy", strays)

    def age_requests(self) -> None:
        """Let the hour go by after which a daemon forgets what a killed command left of its question."""
        for path in self.spool.paths.requests.iterdir():
            os.utime(path, (time.time() - 7200, time.time() - 7200))
        self.spool.ages.look()
        requests.forget_old(self.spool.paths.requests, self.spool.ages, older_than_s=3600.0)

    def check_shipped(self, name: str, episode: str) -> None:
        """At the receiver as it was here, with its time; ``episode``: the id it was given."""
        here = self.lab.shipped / episode
        require(here.stat().st_mtime_ns == self.mtimes[name], "mixed", f"{episode} has lost its time: another digest")
        answer = get(self.url, episode)
        require(answer is not None, "lost", f"{episode} was retired and is not at the receiver")
        assert answer is not None
        require(contents_of(answer) == contents(self.before[name]), "mixed", f"{episode} is not what it is here")

    def is_at_end(self) -> bool:
        """Whether each is where it ends, as far as a look beside a daemon can tell."""
        gone = (self.lab.root / self.begun_at[name] / name for name in self.ends_at)
        there = (self.lab.root / place for place in self.ends_at.values() if place is not None)
        return all(path.is_dir() for path in there) and not any(
            path.exists() for path in gone if str(path.relative_to(self.lab.root)) not in self.ends_at.values()
        )


def get(url: str, episode: str) -> bytes | None:
    """What the receiver has of it."""
    return request(url, "GET", episode)


def request(url: str, method: str, episode: str, body: bytes | None = None) -> bytes | None:
    """The body of a good answer."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
    with contextlib.closing(connection):
        fields = {} if body is None else {"Repr-Digest": sha256_field(body)}
        connection.request(method, f"/v1/episodes/{episode}", body, fields)
        answer = connection.getresponse()
        data = answer.read()
        return data if answer.status in (200, 201) else None


class Retry(Word):
    def says(self) -> Said:
        return ("quarantine", "retry", self.bad), {self.bad: f"shipped/{self.bad}"}


class RetryAs(Word):
    def says(self) -> Said:
        return ("quarantine", "retry", self.bad, "--as", self.other), {self.bad: f"shipped/{self.other}"}


class Drop(Word):
    def says(self) -> Said:
        return ("quarantine", "drop", "-y", self.bad), {self.bad: None}


class KeepLocal(Word):
    def says(self) -> Said:
        return ("holds", "keep-local", self.held), {self.held: f"shipped/{self.held}"}


class KeepLocalAs(Word):
    def says(self) -> Said:
        return ("holds", "keep-local", self.held, "--as", self.other), {self.held: f"shipped/{self.other}"}


class DropLocal(Word):
    def says(self) -> Said:
        return ("holds", "drop-local", "-y", self.held), {self.held: f"quarantine/{self.held}"}


class Reship(Word):
    worked = frozenset({1})  # the receiver has lost it

    def says(self) -> Said:
        return ("verify", "--reship", self.kept), {self.kept: f"shipped/{self.kept}"}


class Status(Word):
    """And whoever else only looks."""

    def says(self) -> Said:
        looking = (("status",), ("quarantine", "list"), ("holds", "list"), ("config", "check"))
        return looking[self.number % len(looking)], {}


class Copies(Word):
    """The daemon, which removes the copy in ``shipped/``: the receiver has it."""

    settings: Mapping[str, Mapping[str, Any]] = {"retention": {"shipped_max_bytes": 1}}

    def __init__(self, directory: Path, url: str, number: int) -> None:
        super().__init__(directory, url, number)
        assert request(url, "PUT", self.kept, self.artifact)
        self.places = {"shipped": self.lab.shipped, "receipts": self.spool.paths.receipts}

    def says(self) -> Said:
        return ("run",), {self.kept: None}

    def check(self, code: int | None) -> None:
        super().check(None)
        if self.kept not in self.whereabouts():
            there = get(self.url, self.kept)
            require(there is not None, "lost", f"{self.kept} is neither here nor at the receiver")
            require(contents_of(there or b"") == contents(self.before[self.kept]), "mixed", f"{self.kept} is another")


# --- a receiver's store ------------------------------------------------------------------------------------------


class ScrubStore(Trial):
    """Of three artifacts one is sound, one has rotted, and one has lost its receipt."""

    worked = frozenset({1})

    def __init__(self, directory: Path, url: str, number: int) -> None:
        super().__init__(directory, url, number)
        self.store = directory / "store"
        Store(ReceiverSettings(root=str(self.store)))
        self.episodes, self.rotted = self.store / "episodes", self.store / "rotted"
        self.data = {name: make_artifact(name) for name in ("sound", "rotten", "bare")}
        for name, data in self.data.items():
            (self.episodes / f"{name}{ARTIFACT_SUFFIX}").write_bytes(data)
        Store(ReceiverSettings(root=str(self.store))).mend()  # their receipts
        (self.episodes / "bare.receipt.json").unlink()
        wrong = bytearray(self.data["rotten"])
        wrong[len(wrong) // 2] ^= 1
        self.data["rotten"] = bytes(wrong)
        (self.episodes / f"rotten{ARTIFACT_SUFFIX}").write_bytes(wrong)
        self.places = {"store": self.store}
        self.words = ("scrub", "--root", self.store)

    def check(self, code: int | None) -> None:
        require(code != EXIT_OK, "untidy", "nothing was found")
        for name, data in self.data.items():
            there = [place / f"{name}{ARTIFACT_SUFFIX}" for place in (self.episodes, self.rotted)]
            there = [path for path in there if path.exists()]
            require(there, "lost", f"{name} is nowhere")
            require(len(there) == 1, "doubled", there)
            require(there[0].read_bytes() == data, "mixed", f"{there[0]} was changed")
            if there[0].parent == self.rotted:
                reason = json.loads((self.rotted / f"{name}.reason.json").read_bytes())
                require((reason["episode"], reason["verdict"]) == (name, "rotted"), "mixed", reason)

    @property
    def again(self) -> tuple[str | Path, ...]:
        self.worked = frozenset({EXIT_OK, 1})
        return self.words

    def check_end(self, ship: Callable[[Path], None], point: Point | None) -> None:
        age(self.store)
        self.check(None)
        aside = sorted(path.name for path in self.rotted.iterdir())
        unread = point is not None and point.fault in READ_FAILURES  # then it counts as rotted, and is kept as well
        rotted = sorted(name for name in self.data if f"{name}{ARTIFACT_SUFFIX}" in aside)
        require("rotten" in rotted and (unread or rotted == ["rotten"]), "untidy", f"{rotted} are set aside")
        files = sorted(f"{name}{suffix}" for name in rotted for suffix in (".reason.json", ARTIFACT_SUFFIX))
        require(aside == files, "untidy", f"rotted/ has {aside}")
        stored = [name for name in self.data if name not in rotted]
        files = sorted(f"{name}{suffix}" for name in stored for suffix in (".receipt.json", ARTIFACT_SUFFIX))
        found = sorted(path.name for path in self.episodes.iterdir())
        require(found == files, "untidy", f"episodes/ has {found}")
        left = sorted(str(path.relative_to(self.store)) for path in self.store.rglob(".*"))
        require(not left, "untidy", left)


# --- files -------------------------------------------------------------------------------------------------------


class Pack(Trial):
    """``--force`` where ``older`` is there."""

    older = b""

    def __init__(self, directory: Path, url: str, number: int) -> None:
        super().__init__(directory, url, number)
        self.episode = Lab(directory, url, {}).episode("ep", files={"text": telemetry(5000), "noise": noise(90_000)})
        self.contents = contents(tree(self.episode))
        self.file = directory / "out" / "ep.tar.zst"
        self.file.parent.mkdir()
        if self.older:
            self.file.write_bytes(self.older)
        self.places = {"episode": self.episode, "out": self.file.parent}
        self.words = ("pack", self.episode, "-o", self.file, *(["--force"] if self.older else []))

    def check(self, code: int | None) -> None:
        there = self.file.read_bytes() if self.file.exists() else b""
        require(there or (not self.older and code != EXIT_OK), "lost", f"ended with {code}, and there is no artifact")
        if there != self.older:
            require(contents_of(there) == self.contents, "mixed", "the artifact is not what was packed")
        require(code != EXIT_OK or there != self.older, "mixed", "ended with 0, and the older artifact is there")

    def check_end(self, ship: Callable[[Path], None], point: Point | None) -> None:
        self.check(EXIT_OK)
        found = [path.name for path in self.file.parent.iterdir()]
        require(found == [self.file.name], "untidy", found)


class PackAgain(Pack):
    older = b"what was there before"


class Extract(Trial):
    """The second one into another directory: nothing is overwritten."""

    def __init__(self, directory: Path, url: str, number: int) -> None:
        super().__init__(directory, url, number)
        files = {"text": telemetry(5000), "deep/noise": noise(90_000)}
        episode = Lab(directory, url, {}).episode("ep", files=files)
        self.before = tree(episode)
        self.artifact = directory / "ep.tar.zst"
        with self.artifact.open("wb", buffering=0) as sink, FramePool(1) as pool:
            pack(episode, sink, OPTIONS, pool)
        self.target = directory / "first"
        self.places = {"artifact": self.artifact, "target": self.target}

    @property
    def words(self) -> tuple[str | Path, ...]:  # type: ignore[override]
        return ("extract", self.artifact, "-C", self.target)

    @property
    def again(self) -> tuple[str | Path, ...]:
        self.target = self.directory / "second"
        return self.words

    def check(self, code: int | None) -> None:
        extracted = self.target / "ep"
        if code == EXIT_OK or (extracted / MARKER).exists():  # or somebody would take it for a finished one
            found, before = tree(extracted), self.before
            if code != EXIT_OK:  # permissions and times of directories come last of all
                found, before = ({path: facts[2] for path, facts in one.items()} for one in (found, before))
            require(found == before, "mixed", f"{found} was extracted, not {before}")

    def check_end(self, ship: Callable[[Path], None], point: Point | None) -> None:
        self.check(EXIT_OK)


class Ls(Extract):
    @property
    def words(self) -> tuple[str | Path, ...]:  # type: ignore[override]
        return ("ls", self.artifact)

    def check(self, code: int | None) -> None:
        pass


class Init(Trial):
    def __init__(self, directory: Path, url: str, number: int) -> None:
        super().__init__(directory, url, number)
        self.root = directory / "spool"
        self.words = ("init", self.root, "--url", url)
        self.places = {"spool": self.root}

    def check(self, code: int | None) -> None:
        file = self.root / "fastship.toml"
        require(file.exists() or code != EXIT_OK, "lost", "ended with 0, and there are no settings")
        if file.exists():
            settings = Settings.load(file)
            require(settings.destination.url == self.url, "mixed", "these are not all of the settings")
            require(Path(settings.spool.root) == self.root, "mixed", settings.spool.root)

    def check_end(self, ship: Callable[[Path], None], point: Point | None) -> None:
        self.check(EXIT_OK)
        found = sorted(path.name for path in self.root.iterdir())
        names = ["episodes", "fastship.toml", "holds", "outbox", "quarantine", "receipts", "shipped", "state"]
        require(found == names, "untidy", found)
        ship(self.root / "fastship.toml")


TRIALS: dict[str, type[Trial]] = {
    "retry": Retry,
    "retry --as": RetryAs,
    "drop": Drop,
    "keep-local": KeepLocal,
    "keep-local --as": KeepLocalAs,
    "drop-local": DropLocal,
    "verify --reship": Reship,
    "looking": Status,
    "scrub": ScrubStore,
    "pack": Pack,
    "pack --force": PackAgain,
    "extract": Extract,
    "ls": Ls,
    "init": Init,
}
GROUPS = {
    "words on the spool": [name for name, trial in TRIALS.items() if issubclass(trial, Word)],
    "files and the store": [name for name, trial in TRIALS.items() if not issubclass(trial, Word)],
}
