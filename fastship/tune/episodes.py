"""What is measured on: the user's own episodes, the newest first, or generated ones; and pieces of them in memory.

What always holds: episodes are only read; how many bytes of them are looked at is bounded, whatever they hold; what
cannot be read is left out, and said only when nothing is left.

Imports ``pack``, ``episode``, ``errors`` and `telemetry`; ``tune`` imports it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from fastship.episode import MARKER
from fastship.errors import PackError, UsageError
from fastship.pack import EpisodeSize, PackOptions, measure, read_windows
from fastship.tune.telemetry import Telemetry

_SEED = 1
_POOL_BYTES = 8 << 20  # of each kind: a frame's worth, made in a second or two
_GENERATED_EPISODES = 4
_GENERATED_FILES = 16  # an episode: of all kinds some
_LOOKED_AT = 1000  # episodes at most: with the smallest ones the bytes would not end it
_LEAST_BYTES = 4096  # an episode with its marker alone is 2048
_REMEDY = "--from takes an episode's directory, or a spool's episodes/ or shipped/"


class Chosen(NamedTuple):
    """Episodes to measure on. ``bytes`` of the tar stream in all of them, or the limit where a larger one was cut."""

    paths: tuple[Path, ...]
    sizes: tuple[EpisodeSize, ...]
    told: str  # for people: what they are
    generated: bool

    @property
    def bytes(self) -> int:
        return sum(size.bytes for size in self.sizes)

    @property
    def files(self) -> int:
        return sum(size.files for size in self.sizes)


def choose(sources: Sequence[Path], spool: Path | None, limit_bytes: int) -> Chosen | None:
    """The newest episodes of ``sources``, else of the spool, up to ``limit_bytes``; None when the spool has none.

    Raises `UsageError` when a source has no episode that can be read.
    """
    if sources:
        chosen: list[tuple[Path, EpisodeSize]] = []
        for source in sources:
            found = _take(_newest(_episodes_in(source)), limit_bytes // len(sources), source)
            chosen += found
        return _chosen(chosen, "in " + ", ".join(str(source) for source in sources))
    if spool is None:
        return None
    found_here = [path for name in ("shipped", "episodes") for path in _marked(spool / name)]
    with contextlib.suppress(UsageError):
        return _chosen(_take(_newest(found_here), limit_bytes, spool), f"in {spool}")
    return None


def generate(directory: Path, total_bytes: int) -> Chosen:
    """Episodes of the seeded mix below ``directory``."""
    telemetry = Telemetry(_SEED, _POOL_BYTES)
    episode_bytes = max(1, total_bytes // _GENERATED_EPISODES)
    paths = [directory / f"generated-{number}" for number in range(_GENERATED_EPISODES)]
    for number, path in enumerate(paths):
        telemetry.write_episode(path, episode_bytes, -(-episode_bytes // _GENERATED_FILES), number)
    _sync(directory)
    sizes = tuple(measure(path, 1 << 60) for path in paths)
    return Chosen(tuple(paths), sizes, "generated telemetry", generated=True)


def _sync(directory: Path) -> None:
    """On the disk, so that the kernel can forget them and reading them from there be measured."""
    for path in directory.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())


def read_pieces(chosen: Chosen, options: PackOptions, limit_bytes: int) -> list[bytes]:
    """Frames as packing would make them, spread over all of ``chosen``, up to ``limit_bytes`` together.

    In an order in which any beginning is spread, too. Raises `PackError` when nothing can be read.
    """
    share = min(1.0, limit_bytes / max(1, chosen.bytes))
    pieces: list[list[bytes]] = []
    error: PackError | None = None
    taken = 0.0  # frames that the share is owed so far: small episodes give one now and then
    for path, size in zip(chosen.paths, chosen.sizes, strict=True):
        frames = -(-size.bytes // options.frame_bytes)
        before, taken = taken, taken + share * frames
        count = round(taken) - round(before) if pieces else max(1, round(taken))
        windows = [_window(round(index * frames / count), options.frame_bytes) for index in range(count)]
        try:
            pieces.append(read_windows(path, options.owner, windows))
        except PackError as fault:
            error = fault
    spread = [piece for row in _columns(pieces) for piece in row]
    if not spread:
        raise error or PackError("the episodes are empty", remedy=_REMEDY)
    return spread


def regular_files(chosen: Chosen) -> Iterator[str]:
    """The paths of the episodes' regular files; links are not followed, and what no path leads to is left out.

    Not by `os.walk`, which recurses: directories may be nested deeper than Python's stack.
    """
    for path in chosen.paths:
        directories = [os.fspath(path)]
        while directories:
            entries: list[os.DirEntry[str]] = []
            with contextlib.suppress(OSError), os.scandir(directories.pop()) as found:
                entries = sorted(found, key=lambda entry: entry.name)
            yield from (entry.path for entry in entries if entry.is_file(follow_symlinks=False))
            directories += [entry.path for entry in reversed(entries) if entry.is_dir(follow_symlinks=False)]


def _window(number: int, frame_bytes: int) -> tuple[int, int]:
    return number * frame_bytes, (number + 1) * frame_bytes


def _columns(rows: Sequence[Sequence[bytes]]) -> Iterator[list[bytes]]:
    """One piece of each episode, then the next of each."""
    for number in range(max((len(row) for row in rows), default=0)):
        yield [row[number] for row in rows if number < len(row)]


def _episodes_in(source: Path) -> list[Path]:
    """What ``source`` is: an episode, a spool, or a directory of episodes. Raises `UsageError`."""
    try:
        entries = list(os.scandir(source))
    except OSError as error:
        raise UsageError(f"{source}: {error.strerror}", remedy=_REMEDY) from None
    directories = [Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False)]
    if any(entry.name == MARKER for entry in entries):
        return [source]
    if {"episodes", "shipped"} <= {path.name for path in directories}:
        return [path for name in ("shipped", "episodes") for path in _marked(source / name)]
    if marked := _marked(source):
        return marked
    if len(directories) < len(entries):
        return [source]
    if not directories:
        raise UsageError(f"{source} is empty", remedy=_REMEDY)
    return directories  # they never were in a spool: nobody marked them


def _marked(directory: Path) -> list[Path]:
    """The finished episodes in ``directory``; none where it cannot be read."""
    try:
        with os.scandir(directory) as entries:
            return [Path(entry.path) for entry in entries if os.path.exists(os.path.join(entry.path, MARKER))]
    except OSError:
        return []


def _newest(paths: Sequence[Path]) -> list[Path]:
    def age(path: Path) -> float:
        for looked_at in (path / MARKER, path):
            with contextlib.suppress(OSError):
                return -looked_at.stat().st_mtime
        return 0.0

    return sorted(paths, key=age)


def _take(paths: Sequence[Path], limit_bytes: int, source: Path) -> list[tuple[Path, EpisodeSize]]:
    """The first of them that can be read, until there are ``limit_bytes``."""
    taken: list[tuple[Path, EpisodeSize]] = []
    error: PackError | None = None
    total = 0
    for path in paths[:_LOOKED_AT]:
        try:
            size = measure(path, 1 << 60)
        except PackError as fault:  # also one that the daemon has moved meanwhile
            error = fault
            continue
        if size.bytes >= _LEAST_BYTES:
            taken.append((path, size))
            total += size.bytes
            if total >= limit_bytes:
                break
    if not taken:
        why = error.message if error else "no file with anything in it"
        raise UsageError(f"{source} has no episode to measure on: {why}", remedy=error.remedy if error else _REMEDY)
    return taken


def _chosen(found: Sequence[tuple[Path, EpisodeSize]], where: str) -> Chosen:
    count = "1 episode" if len(found) == 1 else f"the {len(found)} newest episodes"
    return Chosen(tuple(path for path, _ in found), tuple(size for _, size in found), f"{count} {where}", False)


def cut(pieces: Sequence[bytes], frame_bytes: int) -> list[bytes]:
    """The pieces in smaller frames."""
    return [piece[at : at + frame_bytes] for piece in pieces for at in range(0, len(piece), frame_bytes)]
