"""A spool that a recorder, a visitor or the disk made hostile: each entry comes to its right end, or stays where it is
and is told of with a remedy; nothing is lost, and the others pass it.

What can be mounted or made immutable needs root; each mount stands in a mount namespace of its own, that of the process
that sees it, and goes with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import pty
import random
import shutil
import signal
import socket
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import faults
import pytest
from lab import Command, Destination, Lab, Receiver, fastship, noise, read_back, telemetry, tree, wait_until, workers_of

from fastship.episode import MARKER
from fastship.errors import EXIT_BUSY, EXIT_SETTINGS
from fastship.frames import ArtifactReader
from fastship.pack import extract

TEST = "tests/crash/test_hostile_spool.py"
MakeLab = Callable[..., Lab]
NOBODY = 65534
ESCAPES = "\x1b]0;owned\x07\x1b[2J\x9b31m"
"""What a terminal would obey: its title, a cleared screen, a colour by the one-byte form."""

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


# --- what can stand in a spool ---------------------------------------------------------------------------------------


def deep(depth: int, name: str) -> Callable[[Path], None]:
    def make(episode: Path) -> None:
        fd = os.open(episode, os.O_RDONLY)
        for number in range(depth):
            with open(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=fd), "w") as file:
                file.write(str(number))
            os.mkdir(name, dir_fd=fd)
            below = os.open(name, os.O_RDONLY, dir_fd=fd)
            os.close(fd)
            fd = below
        os.close(fd)

    return make


def content_of_deep(episode: Path) -> list[str]:
    """What each level of `deep` holds, by descriptors: no path leads there."""
    found = []
    fd = os.open(episode, os.O_RDONLY)
    while names := sorted(os.listdir(fd), key=lambda name: name in ("file", MARKER)):
        with contextlib.suppress(FileNotFoundError), open(os.open("file", os.O_RDONLY, dir_fd=fd)) as file:
            found.append(file.read())
        if names[0] in ("file", MARKER):
            break
        below = os.open(names[0], os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)
    return found


def odd_names(episode: Path) -> None:
    root = os.fsencode(episode)
    for name in (
        b"new\nline",
        b"n" * 255,
        b"\xff\xfe",
        ESCAPES.encode(),
        b"-rf",
        b"back\\slash",
        "é".encode(),
        b"e\xcc\x81",
    ):
        Path(os.fsdecode(root + b"/" + name)).write_bytes(name)


def many_sockets_far_down(episode: Path) -> None:
    """Their names are all in the manifest, which is one message of bounded size."""
    fd = os.open(episode, os.O_RDONLY)
    for _ in range(150):
        os.mkdir("s" * 250, dir_fd=fd)
        below = os.open("s" * 250, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.fchdir(fd)
    for number in range(120):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(f"socket{number}")
    os.chdir(episode)
    os.close(fd)


def special_files(episode: Path) -> None:
    os.mkfifo(episode / "fifo")
    os.mkfifo(episode / "meta.json")  # which is read for the commit
    (episode / "zero").symlink_to("/dev/zero")
    if os.geteuid() == 0:
        os.mknod(episode / "null", 0o600 | stat.S_IFCHR, os.makedev(1, 3))


def links_and_holes(episode: Path) -> None:
    (episode / "data").write_bytes(noise(10_000))
    for name in ("hard", "zz-hard"):
        os.link(episode / "data", episode / name)
    (episode / "loop").symlink_to("loop")
    (episode / "up").symlink_to("../../..")
    with (episode / "sparse").open("wb") as file:
        file.truncate(50 << 20)


def nothing(_: Path) -> None:
    """Only the marker."""


def only_directories(episode: Path) -> None:
    (episode / "a" / "b").mkdir(parents=True)
    (episode / "c").mkdir(0o700)


class Kind(NamedTuple):
    name: bytes
    fill: Callable[[Path], None]
    end: str = "shipped"
    mark: Callable[[Path], None] = Path.touch


DEEPEST = 1000 if faults.SHARE >= 0.1 else 300  # its tar stream grows with the square: 260 MB for 1000

KINDS = [
    Kind(b"deep", deep(1000, "d" * 20)),
    Kind(b"deepest", deep(DEEPEST, "d" * 255)),
    Kind(b"names", odd_names),
    Kind(b"sockets", many_sockets_far_down),
    Kind(b"special", special_files),
    Kind(b"links", links_and_holes),
    Kind(b"empty", nothing),
    Kind(b"directories", only_directories),
    Kind(b"Case", nothing),
    Kind(b"case", nothing),
    Kind(b"x" * 200, nothing),
    Kind(b"marker-directory", nothing, mark=Path.mkdir),
    Kind(b"marker-link", nothing, mark=lambda marker: marker.symlink_to(".")),
    Kind(b"marker-dangling", nothing, "recording", mark=lambda marker: marker.symlink_to("nowhere")),
    Kind(b"new\nline", nothing, "quarantined"),
    Kind(b"x" * 255, nothing, "quarantined"),
    Kind(b"\xff\xfe", nothing, "quarantined"),
    Kind(ESCAPES.encode(), nothing, "quarantined"),
    Kind("é".encode(), nothing, "quarantined"),
    Kind(b"e\xcc\x81", nothing, "quarantined"),
    Kind(b".dot", deep(1000, "d" * 20), "quarantined"),
    Kind(b"-rf", nothing, "quarantined"),
]


def record(lab: Lab, kind: Kind) -> Path:
    episode = lab.episodes / os.fsdecode(kind.name)
    episode.mkdir()
    where = os.getcwd()
    try:
        kind.fill(episode)
    finally:
        os.chdir(where)
    kind.mark(episode / MARKER)
    return episode


def name_in_quarantine(name: bytes) -> str:
    return os.fsdecode((b"_" + name if name.startswith(b".") else name)[:200])


@pytest.fixture
def shallow(tmp_path: Path) -> Iterator[Path]:
    """``tmp_path``, which pytest itself could not clean up."""
    yield tmp_path
    subprocess.run(["rm", "-rf", *(path for path in tmp_path.iterdir())], check=True)


@pytest.mark.timeout(900 if faults.SHARE > 0.1 else 120)
def test_each_kind_comes_to_its_end_and_back(shallow: Path) -> None:
    with contextlib.closing(Receiver(shallow / "store")) as receiver:
        lab = Lab(shallow, receiver.url, {"workers": {"count": 2}})
        for kind in KINDS:
            record(lab, kind)
        for name in ("a-good", "m-good", "z-good"):
            lab.episode(name)
        (shallow / "elsewhere").mkdir()
        (shallow / "elsewhere" / MARKER).touch()
        (lab.episodes / "link").symlink_to(shallow / "elsewhere")
        plain = {
            kind.name.decode(): tree(lab.episodes / kind.name.decode())
            for kind in KINDS
            if kind.end == "shipped" and not kind.name.startswith((b"deep", b"sockets"))
        }

        told = on_a_terminal("once", "-c", lab.settings_file({"log": {"level": "warning", "format": "text"}}))

        ends = {end: sorted(kind.name for kind in KINDS if kind.end == end) for end in ("shipped", "quarantined")}
        shipped = sorted([*(name.decode() for name in ends["shipped"]), "a-good", "m-good", "z-good"])
        assert lab.names("shipped") == shipped == sorted(receiver.stored()), told
        assert lab.names("quarantine") == sorted(map(name_in_quarantine, ends["quarantined"]))
        assert lab.names("episodes") == ["link", "marker-dangling"]
        assert lab.names("outbox") == []
        assert "Traceback" not in told
        assert "move the directory itself" in told  # of the link

        for name, facts in plain.items():
            with ArtifactReader.open(receiver.artifact(name)) as reader:
                extract(reader, shallow / "out")
            got = tree(shallow / "out" / name)
            skipped = {path for path, (mode, _, _) in facts.items() if stat.S_ISCHR(int(mode, 8))}
            assert got == {path: fact for path, fact in facts.items() if path not in skipped}, name
            if shutil.which("zstd") and shutil.which("tar") and not skipped:
                assert read_back(receiver, name, shallow / "stock") == facts, name
        for name, depth in (("deep", 1000), ("deepest", DEEPEST)):
            subprocess.run(fastship("extract", receiver.artifact(name), "-C", shallow / "out", "--quiet"), check=True)
            assert content_of_deep(shallow / "out" / name) == list(map(str, range(depth)))
            assert (shallow / "out" / name / MARKER).exists()

        operate_on_a_terminal(lab, shallow)
    count = len(KINDS) + 1
    faults.count(
        "spool: odd entries",
        "names, depths, kinds and links of each sort in one spool: shipped and restored, or set aside with a reason",
        of=count,
        tried=count,
        test=TEST,
    )


def operate_on_a_terminal(lab: Lab, directory: Path) -> None:
    """Show, and then drop for good, each entry of quarantine/, beside a daemon."""
    conf = lab.settings_file()
    with Command("run", "-c", conf, log=directory / "run.log") as daemon:
        wait_until(lambda: workers_of(daemon.process.pid), "the daemon")
        on_a_terminal("status", "-c", conf)
        on_a_terminal("quarantine", "list", "-c", conf)
        on_a_terminal("quarantine", "show", "-c", conf, "--", ESCAPES)
        dropped = on_a_terminal("quarantine", "drop", "--yes", "-c", conf, "--", *lab.names("quarantine"))
        assert dropped.count("was removed") == 8
        assert lab.names("quarantine") == []
        (lab.outbox / f"{ESCAPES}.tar.zst").touch()
        (lab.state / "requests" / "stray.json").mkdir()  # nobody's request; it keeps nothing from its turn
        lab.episode("late")
        wait_until(lambda: "late" in lab.names("shipped"), "an episode after all that")
        wait_until(lambda: lab.names("outbox") == [], "the sweep")
        daemon.signal(signal.SIGTERM)
        assert daemon.wait() == 0
        assert "Traceback" not in daemon.log


def on_a_terminal(*arguments: str | Path) -> str:
    """What a command shows on a terminal; fails where it lets through what stands in a name."""
    ours, theirs = pty.openpty()
    command = fastship(*arguments)
    with subprocess.Popen(
        list(map(os.fsencode, command)), stdin=theirs, stdout=theirs, stderr=theirs, env={**os.environ, "TERM": "xterm"}
    ) as process:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # the end of a terminal
            while piece := os.read(ours, 1 << 16):
                shown += piece
    os.close(ours)
    assert process.returncode in (0, 4), shown
    for part in ("\x1b]0;owned", "\x07", "\x1b[2J\x9b", "\x9b"):
        assert part.encode() not in shown, shown
    assert b"\xff\xfe" not in shown
    return shown.decode(errors="replace")


# --- what the user may not, and what the disk will not ------------------------------------------------------------


UNPRIVILEGED = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]
"""Root who may only what its files' modes say: this process' own interpreter may be root's alone."""


@as_root
def test_what_its_user_may_not_read_or_move_waits_and_is_told(shallow: Path) -> None:
    if not shutil.which("setpriv"):
        pytest.skip("no setpriv here")
    with contextlib.closing(Receiver(shallow / "store")) as receiver:
        lab = Lab(shallow, receiver.url, {})
        for name in ("good", "file", "subdirectory", "closed", "foreign", "read-only"):
            lab.episode(name, files={"sub/data": b"x"})
        (lab.episodes / "file" / "sub" / "data").chmod(0o600)
        (lab.episodes / "subdirectory" / "sub").chmod(0o700)
        (lab.episodes / "closed").chmod(0o700)
        (lab.episodes / "read-only").chmod(0o555)
        for path in ("file/sub/data", "subdirectory/sub", "closed", "foreign"):
            os.chown(lab.episodes / path, NOBODY, NOBODY)
        conf = lab.settings_file({"log": {"level": "warning"}})
        once = subprocess.run(
            [*UNPRIVILEGED, *fastship("once", "-c", conf)], capture_output=True, text=True, cwd=shallow
        )
        log = once.stderr
        assert once.returncode == 4, log
        assert "Traceback" not in log
        assert lab.names("shipped") == ["good", "read-only"]
        assert lab.names("episodes") == ["closed", "file", "foreign", "subdirectory"]
        lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
        said = {(line["event"], str(line.get("episode"))): line.get("remedy") or line["error"] for line in lines}
        assert "chmod" in said["pack-failed", "file"]
        assert "chmod" in said["pack-failed", "subdirectory"]
        assert "chmod" in said["not-shipped", "'closed'"]
        assert "owner" in said["pack-failed", "foreign"]
        assert receiver.stored() == {"good", "read-only"}

        subprocess.run(["chown", "-R", "0:0", lab.root], check=True)
        subprocess.run([*UNPRIVILEGED, *fastship("once", "-c", conf, "--quiet")], cwd=shallow, check=True)
        assert lab.names("episodes") == []
        assert len(lab.names("shipped")) == len(receiver.stored()) == 6
    faults.count(
        "spool: permissions",
        "files, directories and episodes that fastship's user may not read or move: told, and shipped once mended",
        of=5,
        tried=5,
        test=TEST,
    )


def in_a_namespace(script: str, *arguments: str | Path) -> list[str]:
    return ["unshare", "-m", "sh", "-ec", script, "sh", *map(str, arguments)]


def skip_without_mounts() -> None:
    if subprocess.run(in_a_namespace("mount -t tmpfs none /mnt"), capture_output=True).returncode:
        pytest.skip("no mounts here")


@as_root
def test_a_mount_point_as_an_episode_and_in_one(shallow: Path) -> None:
    """It cannot be moved while it is mounted: it is at the receiver, and stays; one within an episode moves with it."""
    skip_without_mounts()
    with contextlib.closing(Receiver(shallow / "store")) as receiver:
        lab = Lab(shallow, receiver.url, {})
        for name in ("foreign", "bound", "inside", "good"):
            lab.episode(name)
        (lab.episodes / "inside" / "sub").mkdir()
        script = """
cd "$1"; mount -t tmpfs none foreign; echo far > foreign/data; touch foreign/done.marker
mount --bind bound bound; mount -t tmpfs none inside/sub; echo far > inside/sub/data
shift; "$@" || echo "status $?" >&2
cat foreign/data bound/done.marker ../shipped/inside/sub/data
"""
        once = fastship("once", "-c", lab.settings_file({"log": {"level": "warning"}}))
        done = subprocess.run(
            in_a_namespace(script, lab.episodes, *once), capture_output=True, text=True, check=True, cwd=shallow
        )
        assert done.stdout.endswith("far\nfar\n")
        assert "status 4" in done.stderr
        assert "Traceback" not in done.stderr
        lines = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
        said = {(line["event"], line["episode"]): line.get("remedy") or line["error"] for line in lines}
        assert "mount point" in said["retire-failed", "bound"]
        assert "unmount it" in said["pack-failed", "foreign"]
        assert lab.names("shipped") == ["good", "inside"]
        assert receiver.stored() == {"bound", "good", "inside"}
        assert (
            "inside/sub/data"
            in subprocess.run(
                fastship("ls", receiver.artifact("inside")), capture_output=True, text=True, check=True
            ).stdout
        )
        assert lab.once().shipped == 2  # unmounted
        assert lab.names("shipped") == ["bound", "foreign", "good", "inside"]
    faults.count(
        "spool: mount points",
        "an episode that is a mount point (of another file system or of the same), one with a mount in it, a read-only "
        "spool, a spool under two paths",
        of=5,
        tried=5,
        test=TEST,
    )


@as_root
def test_a_read_only_spool_is_refused(shallow: Path, destination: Destination) -> None:
    skip_without_mounts()
    lab = Lab(shallow, destination.url, {})
    lab.episode()
    lab.once()
    script = 'mount --bind "$1" "$1"; mount -o remount,ro,bind "$1"; shift; exec "$@"'
    once = fastship("once", "-c", lab.settings_file())
    done = subprocess.run(in_a_namespace(script, lab.root, *once), capture_output=True, text=True, cwd=shallow)
    assert done.returncode == EXIT_SETTINGS
    assert "read-only file system" in done.stderr
    assert "try:" in done.stderr


@as_root
def test_what_is_immutable_stays_and_goes_when_it_may(shallow: Path) -> None:
    """An immutable episode, an immutable shipped/: tried again, not in a loop; an immutable file moves with it."""
    with contextlib.closing(Receiver(shallow / "store")) as receiver:
        lab = Lab(shallow, receiver.url, {"destination": {"pause_min_s": "300ms", "pause_max_s": "300ms"}})
        lab.once()
        for name in ("file", "fixed", "last"):
            lab.episode(name)
        try:
            for path in (lab.episodes / "file" / "meta.json", lab.episodes / "fixed"):
                if subprocess.run(["chattr", "+i", path], capture_output=True).returncode:
                    pytest.skip("no immutable flag here")
            with Command("run", "-c", lab.settings_file(), log=shallow / "run.log") as daemon:
                wait_until(lambda: lab.names("shipped") == ["file", "last"], "those that can be moved")
                wait_until(lambda: daemon.log.count("retire-failed") >= 2, "some attempts")
                assert "lsattr" in daemon.log
                assert journal(lab).count('"fixed"') <= daemon.log.count("retire-failed") + 1
                subprocess.run(["chattr", "-i", lab.episodes / "fixed"], check=True)
                wait_until(lambda: "fixed" in lab.names("shipped"), "the one that was immutable")
                subprocess.run(["chattr", "+i", lab.shipped], check=True)
                lab.episode("late")
                wait_until(lambda: daemon.log.count('"episode": "late"') >= 2, "two attempts")
                subprocess.run(["chattr", "-i", lab.shipped], check=True)
                wait_until(lambda: "late" in lab.names("shipped"), "the late one")
                assert "Traceback" not in daemon.log
        finally:
            subprocess.run(["chattr", "-R", "-f", "-i", lab.root], check=False)
        assert lab.names("episodes") == []
        assert receiver.stored() == {"file", "fixed", "last", "late"}
    faults.count("spool: immutable", "chattr +i on a file, an episode, shipped/", of=3, tried=3, test=TEST)


def journal(lab: Lab) -> str:
    return "".join(path.read_text() for path in (lab.root / "receipts").iterdir())


# --- two at once -----------------------------------------------------------------------------------------------------


@as_root
def test_a_second_one_is_refused_also_by_another_path(shallow: Path, destination: Destination) -> None:
    skip_without_mounts()
    lab = Lab(shallow, destination.url, {})
    (shallow / "other").mkdir()
    settings = lab.settings_file()
    elsewhere = shallow / "elsewhere.toml"
    elsewhere.write_text(settings.read_text().replace(str(lab.root), str(shallow / "other")))
    script = 'mount --bind "$1" "$2"; shift 2; exec "$@"'
    with Command("run", "-c", settings, log=shallow / "first.log") as first:
        wait_until(lambda: workers_of(first.process.pid), "the first one")
        for action in ("run", "once"):
            for command in (
                fastship(action, "-c", settings),
                in_a_namespace(script, lab.root, shallow / "other", *fastship(action, "-c", elsewhere)),
            ):
                done = subprocess.run(command, capture_output=True, text=True, cwd=shallow)
                assert done.returncode == EXIT_BUSY, done.stderr
                assert f"process {first.process.pid}" in done.stderr
                assert "fastship status" in done.stderr
        lab.episode()
        wait_until(lambda: lab.names("shipped") == ["ep1"], "the first one's work")
        (lab.state / "lock").unlink()  # now another could begin: so this one ends
        assert first.wait() == EXIT_BUSY
        assert "was removed or replaced" in first.log
    assert lab.once().scanned == 0


# --- changed while it is packed --------------------------------------------------------------------------------------


class Mutator:
    """Changes an episode all the time, each file always of one letter as far as one write goes."""

    def __init__(self, episode: Path, chance: random.Random) -> None:
        self.episode = episode
        self.changes = 0
        self._chance = chance
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.is_set():
            with contextlib.suppress(OSError):
                self._change(self._chance.choice(sorted(self.episode.glob("d*/f*"))))
            self.changes += 1
            time.sleep(self._chance.choice([0, 0, 0.001, 0.01]))

    def _change(self, path: Path) -> None:
        letter = self._chance.choice("abcdefgh").encode()
        size = path.stat().st_size
        match self._chance.choice(["write", "grow", "shrink", "vanish", "replace", "directory", "fifo", "rename"]):
            case "write":
                with path.open("r+b") as file:
                    file.write(letter * size)
            case "grow":
                path.write_bytes(letter * (size + 100_000) if size < 1_000_000 else letter)
            case "shrink":
                os.truncate(path, size // 2)
            case "vanish":
                path.unlink()
                path.write_bytes(letter * 300_000)
            case "replace":
                (path.parent / "new").write_bytes(letter * 200_000)
                (path.parent / "new").rename(path)
            case "directory":
                path.unlink()
                path.mkdir()
                path.rmdir()
                path.write_bytes(letter * 100_000)
            case "fifo":
                path.unlink()
                os.mkfifo(path)
                path.unlink()
                path.write_bytes(letter * 100_000)
            case _:
                away = path.parent.with_name("away")
                path.parent.rename(away)
                away.rename(path.parent)


def fine_timestamps() -> bool:
    """Whether each change of a file shows in its ctime: before Linux 6.13 two within one tick may look like one."""
    major, minor = os.uname().release.split(".")[:2]
    return (int(major), int("".join(filter(str.isdigit, minor)))) >= (6, 13)


@pytest.mark.timeout(900 if faults.SHARE > 0.1 else 120)
def test_an_episode_that_changes_is_shipped_as_it_was_at_one_moment_or_not_at_all(
    make_lab: MakeLab, tmp_path: Path
) -> None:
    chance = faults.chance("changing episodes")
    packs = changes = 0
    with contextlib.closing(Receiver(tmp_path / "store")) as receiver:
        for number in range(faults.times(20)):
            directory = tmp_path / str(number)
            directory.mkdir()
            lab = Lab(directory, receiver.url, {"pack": {"frame_bytes": "64KiB"}, "workers": {"count": 2}})
            name = f"changing{number}"
            episode = lab.episode(
                name,
                files={f"d{d}/f{f}": b"a" * chance.choice([100, 50_000, 700_000]) for d in range(3) for f in range(8)},
            )
            lab.episode(f"good{number}")
            mutator = Mutator(episode, chance)
            with Command("run", "-c", lab.settings_file(), log=directory / "run.log") as daemon:
                wait_until(lambda lab=lab: lab.names("shipped") or lab.names("holds"), "an end of one")  # type: ignore[misc]
                wait_until(
                    lambda lab=lab, name=name: name in lab.names("shipped") or lab.names("holds"),  # type: ignore[misc]
                    "an end of the changing one",
                )
                mutator.stop()
                wait_until(lambda lab=lab, number=number: f"good{number}" in lab.names("shipped"), "the good one")  # type: ignore[misc]
                log = daemon.log
            changes += mutator.changes
            packs += log.count("episode-changed")
            assert "Traceback" not in log
            kept = lab.episodes / name if name in lab.names("episodes") else lab.shipped / name
            assert len(list(kept.glob("d*/f*"))) == 24  # nothing of it went
            if name in receiver.stored() and fine_timestamps():
                read_back(receiver, name, directory / "out", stock=False)
                for path in (directory / "out" / name).glob("d*/f*"):
                    assert len(set(path.read_bytes())) <= 1, f"{path.name} is of two moments"
            subprocess.run(["rm", "-rf", directory], check=True)
    faults.count(
        "spool: changed while packed",
        f"episodes written to, grown, cut, replaced, renamed while they were packed ({changes} changes, {packs} packs "
        "dropped): whole files at the receiver or none",
        of=20,
        tried=faults.times(20),
        test=TEST,
    )


def test_an_episode_whose_marker_goes_before_it_is_packed_is_not_shipped(make_lab: MakeLab, receiver: Receiver) -> None:
    lab = make_lab(receiver.url, spool={"scan_interval_s": "1h"}, pack={"level": 12}, upload={"stream_bytes": 0})
    lab.episode("first", files={"data": telemetry(24 << 20)})
    second = lab.episode("second")
    with Command("run", "-c", lab.settings_file(), log=lab.root.parent / "run.log") as daemon:
        wait_until(lambda: lab.names("outbox") == ["first.tar.zst.partial"], "the first being packed")
        (second / MARKER).unlink()
        wait_until(lambda: lab.names("shipped") == ["first"], "the first shipped")
        wait_until(lambda: "episode-unfinished" in daemon.log, "the second being looked at")
        assert lab.names("episodes") == ["second"]
        assert "second" not in receiver.stored()
        (second / "more").write_bytes(b"the rest")
        (second / MARKER).touch()
        wait_until(lambda: lab.names("shipped") == ["first", "second"], "the second, finished")
    assert "more" in read_back(receiver, "second", lab.root.parent / "out", stock=False)


# --- very many ---------------------------------------------------------------------------------------------------


@pytest.mark.timeout(900 if faults.SHARE > 0.1 else 120)
def test_very_many_entries_that_are_no_episodes(make_lab: MakeLab, receiver: Receiver) -> None:
    lab = make_lab(receiver.url)
    entries = faults.times(100_000, least=2_000)
    fd = os.open(lab.episodes, os.O_RDONLY)
    for number in range(entries):
        match number % 4:
            case 0:
                os.mkdir(f"unfinished{number}", dir_fd=fd)
            case 1:
                os.symlink("nowhere", f"link{number}", dir_fd=fd)
            case 2:
                os.symlink("good-2", f"to-an-episode{number}", dir_fd=fd)
            case _:
                os.close(os.open(f"file{number}", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
    os.close(fd)
    lab.episode("good-2")
    with Command("run", "-c", lab.settings_file(), log=lab.root.parent / "run.log") as daemon:
        wait_until(lambda: lab.names("shipped") == ["good-2"], "the episode among them")
        lab.episode("good-3")
        wait_until(lambda: lab.names("shipped") == ["good-2", "good-3"], "another one")
        daemon.signal(signal.SIGTERM)
        assert daemon.wait() == 0
        assert daemon.log.count("not-shipped") <= 2 * 11  # not a line for each
        assert "Traceback" not in daemon.log
    faults.count(
        "spool: many entries", "entries of episodes/ that are no episodes", of=100_000, tried=entries, test=TEST
    )


NAME_BYTES = 200
"""Memory that each file of one directory may cost a process: its name, several times over (measured: 65)."""


@pytest.mark.timeout(900 if faults.SHARE > 0.1 else 120)
def test_very_many_files_in_one_episode(make_lab: MakeLab, tmp_path: Path) -> None:
    files = faults.times(1_000_000, least=20_000)
    with contextlib.closing(Receiver(tmp_path / "store")) as receiver:
        lab = make_lab(receiver.url)
        episode = lab.episode("many", marker=False)
        fd = os.open(episode, os.O_RDONLY)
        for number in range(files):
            os.close(os.open(f"telemetry-{number:07}.json", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
        os.close(fd)
        (episode / MARKER).touch()
        peaks: dict[str, int] = {}
        with Command("once", "-c", lab.settings_file(), log=tmp_path / "once.log") as once:
            while once.process.poll() is None:
                pids = [("supervisor", once.process.pid), ("receiver", receiver.process.pid)]
                for who, pid in [*pids, *(("worker", worker.pid) for worker in workers_of(once.process.pid))]:
                    peaks[who] = max(peaks.get(who, 0), peak_bytes(pid))
                time.sleep(0.02)
            assert once.wait() == 0, once.log
        assert lab.names("shipped") == ["many"]
        listed = subprocess.run(fastship("ls", receiver.artifact("many")), stdout=subprocess.PIPE, check=True).stdout
        assert listed.count(b"telemetry-") == files
    told = ", ".join(f"{who} {peak >> 20} MiB" for who, peak in peaks.items())
    assert max(peaks.values()) < (160 << 20) + NAME_BYTES * files, told
    faults.count(
        "spool: many files",
        f"files in one directory of an episode (at most: {told})",
        of=1_000_000,
        tried=files,
        test=TEST,
    )


def peak_bytes(pid: int) -> int:
    with contextlib.suppress(OSError, IndexError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) << 10
    return 0
