"""What each part of the way costs on this host: reading, digests, zstd, writing, packing.

What always holds: every measurement is bounded, by bytes and by seconds; scratch files have no name (O_TMPFILE), so
they are gone when the process is, whatever ends it; CPU is of this process with all its threads.

Imports ``frames``, ``pack``, ``episode`` and ``errors``; ``tune`` imports it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import blake3

from fastship.errors import PackError
from fastship.frames import FramePool
from fastship.pack import PackOptions, pack
from fastship.tune.model import LevelCost

_KEPT = 0.1  # of the files: some pages are on a list that the kernel cannot take them from at once
READ_BYTES = 8 << 20  # as packing does: a frame at once


class Cost(NamedTuple):
    """Of working on ``bytes``."""

    bytes: int
    wall_s: float
    cpu_s: float

    @property
    def bytes_per_s(self) -> float:
        return self.bytes / max(self.wall_s, 1e-9)

    @property
    def cpu_s_per_byte(self) -> float:
        return self.cpu_s / max(self.bytes, 1)


class Storage(NamedTuple):
    """Of files read or written; None: cannot be told apart here."""

    cold: Cost | None
    warm: Cost


class Writing(NamedTuple):
    """Of bytes of the artifact."""

    cached: Cost
    synced: Cost


class Meter:
    """``with Meter() as meter: ...; meter.cost(bytes)``."""

    def __enter__(self) -> Meter:
        self._cpu = time.process_time()
        self._wall = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self._wall = time.perf_counter() - self._wall
        self._cpu = time.process_time() - self._cpu

    def cost(self, size: int) -> Cost:
        return Cost(size, self._wall, self._cpu)


def fastest(work: Callable[[], Cost], seconds: float, rounds: int = 3) -> Cost:
    """The cheapest of up to ``rounds``, and of what goes into ``seconds``: what disturbs only adds."""
    deadline = time.monotonic() + seconds
    costs = [work()]
    while len(costs) < rounds and time.monotonic() < deadline:
        costs.append(work())
    return Cost(costs[0].bytes, min(cost.wall_s for cost in costs), min(cost.cpu_s for cost in costs))


def read_files(paths: Sequence[str], limit_bytes: int, seconds: float) -> Cost:
    """Read files one after the other as packing does, until a limit; what cannot be read is passed over."""
    buffer = memoryview(bytearray(READ_BYTES))
    total = 0
    deadline = time.monotonic() + seconds
    with Meter() as meter:
        for path in paths:
            with contextlib.suppress(OSError), open(path, "rb", buffering=0) as file:
                while (got := file.readinto(buffer)) > 0:
                    total += got
                    if got < READ_BYTES or total >= limit_bytes or time.monotonic() > deadline:
                        break
            if total >= limit_bytes or time.monotonic() > deadline:
                break
    return meter.cost(total)


def drop_from_cache(paths: Sequence[str], limit_bytes: int) -> bool:
    """Have the kernel forget what it keeps of the files' contents; whether it did, as their last pages show.

    It does not where the file system is memory itself, and for what is mapped, or not yet written to the disk.
    """
    total = kept = looked = 0
    for path in paths:
        with contextlib.suppress(OSError), open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            if size:
                kept += _is_cached(file.fileno(), size - 1)
                looked += 1
            total += size
        if total >= limit_bytes:
            break
    return kept <= _KEPT * looked


def _is_cached(fd: int, offset: int) -> bool:
    try:
        return os.preadv(fd, [bytearray(1)], offset, os.RWF_NOWAIT) > 0
    except BlockingIOError:
        return False
    except OSError:  # the file system cannot tell
        return True


def digest(pieces: Sequence[bytes], *, sha256: bool) -> Cost:
    """BLAKE3 or SHA-256 of what is in memory, on one thread."""
    one = hashlib.sha256() if sha256 else blake3.blake3()
    with Meter() as meter:
        for piece in pieces:
            one.update(piece)
    return meter.cost(sum(map(len, pieces)))


class Compressed(NamedTuple):
    cost: Cost  # of the compressing threads; bytes of the tar stream
    artifact_bytes: int
    cores: float  # that were at work

    def at(self, level: int) -> LevelCost:
        return LevelCost(
            level=level, ratio=self.cost.bytes / max(1, self.artifact_bytes), zstd_cpu_s=self.cost.cpu_s_per_byte
        )


def compress(pieces: Sequence[bytes], level: int, threads: int) -> Compressed:
    """One zstd frame a piece, on ``threads`` at once, by the pool that packs. Wall counts the handing over, CPU not."""
    artifact_bytes = 0

    def commit(frame: bytes, _used: int) -> None:
        nonlocal artifact_bytes
        artifact_bytes += len(frame)

    longest = max(map(len, pieces))
    with FramePool(threads) as pool, pool.open(level=level, frame_bytes=longest, commit=commit) as stream:
        wall, cpu, filling = time.perf_counter(), time.process_time(), 0.0
        for piece in pieces:
            before = time.thread_time()
            stream.buffer[: len(piece)] = piece
            filling += time.thread_time() - before
            stream.submit(len(piece))
        stream.finish(0)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return Compressed(Cost(sum(map(len, pieces)), wall, cpu - filling), artifact_bytes, cpu / wall)


def write_file(directory: Path, data: bytes, size: int, *, sync: bool) -> Cost:
    """Write ``size`` bytes into a nameless file there, with fsync or without. Raises ``OSError``."""
    with scratch_file(directory) as file, Meter() as meter:
        left = size
        while left > 0:
            left -= file.write(memoryview(data)[:left])
        if sync:
            os.fsync(file.fileno())
    return meter.cost(size)


def scratch_file(directory: Path) -> IO[bytes]:
    """A file without a name. Raises ``OSError``."""
    return tempfile.TemporaryFile(dir=directory, buffering=0)


class Packed(NamedTuple):
    """``cost.bytes`` is tar stream, all of it in ``episodes`` whole or cut ones."""

    cost: Cost
    artifact_bytes: int
    episodes: int
    code_commit: str | None


def pack_episodes(
    episodes: Sequence[Path], directory: Path, options: PackOptions, threads: int, seconds: float
) -> Packed:
    """`pack` episodes into nameless files for about ``seconds``; one under way then is cut.

    Raises `PackError` when none can be packed.
    """
    content = artifact = count = reached = 0
    commit: str | None = None
    error: PackError | None = None
    wall = cpu = 0.0
    deadline = time.monotonic() + seconds

    class Enough(Exception):
        pass

    def advanced(done_bytes: int) -> None:
        nonlocal reached
        reached = done_bytes
        if time.monotonic() > deadline:
            raise Enough

    with FramePool(threads) as pool:
        for episode in episodes:
            reached = 0
            with scratch_file(directory) as sink, Meter() as meter:
                try:
                    manifest = pack(episode, sink, options, pool, advanced)
                    reached = manifest.content_bytes
                    commit = commit or manifest.code_commit
                except Enough:
                    pass
                except PackError as fault:  # the daemon may have moved it
                    error = fault
                    continue
                artifact += os.fstat(sink.fileno()).st_size
            one = meter.cost(reached)
            content, wall, cpu, count = content + one.bytes, wall + one.wall_s, cpu + one.cpu_s, count + 1
            if time.monotonic() > deadline:
                break
    if not content:
        raise error or PackError("nothing of the episodes could be packed")
    return Packed(Cost(content, wall, cpu), artifact, count, commit)
