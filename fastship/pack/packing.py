"""`pack`, `fingerprint` and `measure`: the three things one does with an episode's directory.

What always holds: the episode is only read. ``pack`` reads every byte once and makes both digests in that pass; what it
wrote is worth nothing unless it returned. Imports ``errors``, ``episode``, ``durable``, ``frames`` and its siblings.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import msgspec

from fastship import durable
from fastship.episode import Manifest, read_code_commit
from fastship.errors import EpisodeChanged, OutboxFull, PackError
from fastship.frames import ArtifactWriter, FramePool, KeptFrames, LevelChoice
from fastship.pack.headers import BLOCK, END_OF_ARCHIVE
from fastship.pack.stream import Layout, Owner, TarStream
from fastship.pack.walk import printable, read_fault, walk
from fastship.pagecache import Care

SKIPPED_NAMED = 100  # a manifest travels in one message of at most 2 MiB (ipc)


class Sink(Protocol):
    """Where an artifact goes: a file opened for writing, buffered or not, or anything with its ``write``."""

    def write(self, data: memoryview, /) -> int | None: ...


class PackOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How to pack. ``frame_bytes`` is tar stream bytes a frame; ``owner="zero"`` writes uid and gid as 0;
    ``page_cache``: what is left in it of files that were read (`fastship.pagecache`); ``level``: a zstd level, or
    what chooses one for each frame.
    """

    level: int | LevelChoice = 3
    frame_bytes: int = 8 << 20
    owner: Owner = "keep"
    page_cache: Care = "as-found"


class EpisodeSize(msgspec.Struct, frozen=True):
    """A stat walk's sum: about the tar stream's bytes, and the regular files; ``complete``: it was within the limit."""

    bytes: int
    files: int
    complete: bool


def pack(
    episode: Path,
    sink: Sink,
    options: PackOptions,
    pool: FramePool,
    progress: Callable[[int], None] | None = None,
    kept: KeptFrames | None = None,
) -> Manifest:
    """Write the artifact of the directory ``episode`` to ``sink`` and say what it is.

    ``kept``: frames of an interrupted packing of it; those that still hold its bytes are taken instead of made again.

    ``progress`` is called about once a frame, and at the end, with the tar stream bytes read so far; what it raises
    ends the packing. Blocks; may be repeated, and at a fixed level without ``kept`` gives the same bytes while the
    episode is the same. Syncs nothing.
    Raises `EpisodeChanged`, `EpisodeUnreadable`, `OutboxFull`, `PackError`; then the sink holds a useless beginning.
    """
    wall, cpu = time.monotonic(), time.process_time()
    commit = code_commit(episode)
    artifact = _DigestingSink(sink)
    writer = ArtifactWriter(pool, artifact.write, level=options.level, frame_bytes=options.frame_bytes, kept=kept)
    with writer:
        stream = TarStream(writer, options.owner, progress, options.page_cache)
        stream.write_episode(episode)
    return Manifest(
        episode=printable(os.fsencode(os.path.basename(os.path.abspath(episode)))),
        artifact_sha256=artifact.digest.hexdigest(),
        artifact_bytes=writer.artifact_bytes,
        content_blake3=stream.digest.hexdigest(),
        content_bytes=stream.content_bytes,
        members=writer.index.members,
        frames=writer.frames,
        frame_bytes=options.frame_bytes,
        levels=writer.levels,
        fingerprint=stream.layout.fingerprint(),
        code_commit=commit,
        skipped=tuple(stream.layout.skipped[:SKIPPED_NAMED]),
        boot_id=durable.boot_id(),
        seconds=time.monotonic() - wall,
        cpu_seconds=time.process_time() - cpu,
    )


class Content(msgspec.Struct, frozen=True):
    """What `pack`'s manifest of a directory would say of its content."""

    blake3: str
    bytes: int
    fingerprint: str


def digest_content(episode: Path, owner: Owner, *, name: str, page_cache: Care = "as-found") -> Content:
    """Read an episode called ``name`` as `pack` does, and make nothing of it but its digest.

    Blocks for as long as reading takes. Raises `EpisodeChanged` and `EpisodeUnreadable`.
    """
    stream = TarStream(_Unpacked(), owner, None, page_cache)
    stream.write_episode(episode, name)
    return Content(stream.digest.hexdigest(), stream.content_bytes, stream.layout.fingerprint())


class _Unpacked:
    """Takes frames, which nobody wants."""

    def __init__(self) -> None:
        self.buffer = memoryview(bytearray(1 << 20))

    @property
    def index(self) -> _Unpacked:
        return self

    def add(self, *_: object) -> None:
        pass

    def submit(self, _used: int) -> memoryview:
        return self.buffer

    def finish(self, used: int) -> None:
        pass


def code_commit(episode: Path) -> str | None:
    """`read_code_commit`, which raises `EpisodeUnreadable`."""
    try:
        return read_code_commit(episode)
    except OSError as error:
        raise read_fault(error, b"meta.json") from None


def fingerprint(episode: Path, owner: Owner) -> str:
    """What `pack`'s manifest of the directory would have as fingerprint, from a stat walk; reads no content.

    Raises `EpisodeChanged` and `EpisodeUnreadable`. Blocks for about 10 us an entry.
    """
    layout = Layout(owner)
    for entry in walk(episode):
        dir_fd, name, member, status = entry
        if status is None:
            status = _status(dir_fd, name, member)
            if not stat.S_ISREG(status.st_mode):
                raise EpisodeChanged(f"{printable(member)} was replaced while the episode was read")
        layout.header_of(entry, status)
    return layout.fingerprint()


def measure(episode: Path, limit_bytes: int, *, limit_entries: int | None = None) -> EpisodeSize:
    """Sum up the directory's entries until a limit is passed: cheap, for deciding, not for trusting.

    Raises `EpisodeChanged` and `EpisodeUnreadable`.
    """
    total, files = len(END_OF_ARCHIVE), 0
    for number, (dir_fd, name, member, status) in enumerate(walk(episode)):
        total += BLOCK
        if status is None:
            size = _status(dir_fd, name, member).st_size
            total += size + -size % BLOCK
            files += 1
        if total > limit_bytes or number == limit_entries:
            return EpisodeSize(total, files, complete=False)
    return EpisodeSize(total, files, complete=True)


class _DigestingSink:
    """Writes whole pieces to a sink that may take fewer bytes, digesting them on the way."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self.digest = hashlib.sha256()

    def write(self, data: bytes) -> None:
        self.digest.update(data)
        view = memoryview(data)
        try:
            while view.nbytes:
                written = self._sink.write(view)
                if written is None:  # a raw file that does not block has no room now
                    raise BlockingIOError(errno.EAGAIN, "the sink does not block")
                view = view[written:]
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                remedy = "free space on the spool's file system; packing is tried again by itself"
                raise OutboxFull(f"no room for the artifact: {error.strerror}", remedy=remedy) from None
            remedy = "see the kernel's log for faults of the disk"
            raise PackError(f"the artifact cannot be written: {error.strerror}", remedy=remedy) from None


def _status(dir_fd: int, name: bytes, member: bytes) -> os.stat_result:
    try:
        return os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
    except OSError as error:
        raise read_fault(error, member) from None
