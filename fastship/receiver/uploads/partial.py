"""A file of an artifact's first bytes: appended to, digested on the way, made durable, cut back.

What always holds: bytes below ``offset`` never change; the running SHA-256, where there is one, covers exactly
``offset`` bytes. A partial is used by one request at a time (one thread writes; `sync` may run beside it).

Blocks on the disk; called from threads, never on the event loop. Imported by most of
the package.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from fastship import durable
from fastship.frames import Following

_READ_BYTES = 1 << 20
_IOV = 1024  # IOV_MAX of Linux: buffers in one pwritev(2)

Digest = Any  # a hashlib object; its type has no public name


class Unsynced(OSError):
    """The disk did not take bytes that had been written.

    The kernel forgets them and reports it once: a second sync would say that all is well (fsync(2), Errors). So
    whoever meets this abandons the file.
    """


def sync_data(fd: int) -> None:
    """``fdatasync``; raises `Unsynced`."""
    try:
        os.fdatasync(fd)
    except OSError as error:
        raise Unsynced(error.errno, error.strerror) from error


def begin_writeback(fd: int) -> None:
    """Let the kernel begin to write a file's pages, so that a later sync finds little to do. Promises nothing."""
    with contextlib.suppress(OSError):
        # This advice drops only clean pages and sends dirty ones on their way (posix_fadvise(2), Linux).
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


class Mark:
    """Where a partial stood: `Partial.cut_back` returns to it."""

    def __init__(self, offset: int, running: Digest | None) -> None:
        self.offset = offset
        self.running = running


class Partial:
    """An open partial. ``running`` None: the bytes before were written by another process, digest them at the end.

    ``came_at_once``: all of it was written by the request that has it open, so nothing of it lay on the disk before.

    ``following`` verifies the artifact beside: it is told of each new offset, and abandoned when bytes go or nobody
    keeps it. ``guard`` is entered around each write: it raises when this request may not write any more. ``synced`` is
    called with each offset that has become durable, ``unsynced`` when the disk did not take what was written. Writes
    leave ``reserve_bytes`` of the file system free: the disk is full for them where that begins, however long a body
    said it was, or did not say.
    """

    def __init__(
        self,
        path: Path,
        fd: int,
        *,
        offset: int = 0,
        running: Digest | None = None,
        following: Following | None = None,
        guard: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
        synced: Callable[[int], None] | None = None,
        unsynced: Callable[[], None] = lambda: None,
        reserve_bytes: int = 0,
    ) -> None:
        self.path = path
        self.fd = fd
        self.offset = offset
        self.running = hashlib.sha256() if offset == 0 else running
        self.came_at_once = offset == 0
        self.following = following
        self._guard = guard
        self._synced = synced
        self.unsynced = unsynced
        self._reserve_bytes = reserve_bytes

    def exclusive(self) -> AbstractContextManager[None]:
        """Hold it against newer requests, as each write does; not around one. Raises what the guard raises."""
        return self._guard()

    def write(self, chunks: Sequence[bytes]) -> None:
        """Append ``chunks``, in order. Raises what the guard raises (nothing is appended then), and ``OSError``."""
        running = self.running
        if running is not None:
            running = running.copy()  # a failed write leaves the digest where the offset is
            for chunk in chunks:
                running.update(chunk)
        end = self.offset
        self._leave_reserve(sum(map(len, chunks)))
        with self._guard():
            for first in range(0, len(chunks), _IOV):
                end = _pwrite_all(self.fd, chunks[first : first + _IOV], end)
        self.offset, self.running = end, running
        self._follow()

    def put(self, piece: memoryview) -> None:
        """Append ``piece``; whoever calls this also updates ``running`` with it, before anybody looks at that."""
        self._leave_reserve(len(piece))
        with self._guard():
            self.offset = _pwrite_all(self.fd, [piece], self.offset)
        self._follow()

    def _leave_reserve(self, count: int) -> None:
        if self._reserve_bytes and durable.free_bytes(self.fd) < self._reserve_bytes + count:
            raise OSError(errno.ENOSPC, "no room above receiver.reserve_bytes")

    def sync(self) -> int:
        """Make what is written now durable and return that offset. May run beside `write`; may be repeated.

        Raises `Unsynced`, after which the partial is good for nothing.
        """
        offset = self.offset
        try:
            sync_data(self.fd)
        except Unsynced:
            self.unsynced()
            raise
        if self._synced is not None:
            self._synced(offset)
        return offset

    def digest(self) -> str:
        """The SHA-256 of all bytes as they came, hex; reads the file when no running digest covers it."""
        if self.running is None:
            self.running = self._digest_file()
        return str(self.running.hexdigest())

    def read_digest(self) -> str:
        """The SHA-256 of what the file holds now, hex."""
        return str(self._digest_file().hexdigest())

    def _digest_file(self) -> Digest:
        running = hashlib.sha256()
        done = 0
        while done < self.offset:
            data = os.pread(self.fd, min(_READ_BYTES, self.offset - done), done)
            if not data:
                raise OSError(f"{self.path} is shorter than it was written")
            running.update(data)
            done += len(data)
        return running

    def mark(self) -> Mark:
        return Mark(self.offset, self.running.copy() if self.running is not None else None)

    def cut_back(self, mark: Mark) -> None:
        """Forget what was written after ``mark``; only for bytes whose offset never left the receiver."""
        self.part_from_following(abandon=True)
        with self._guard():
            os.ftruncate(self.fd, mark.offset)
        self.offset, self.running = mark.offset, mark.running

    def part_from_following(self, *, abandon: bool = False) -> Following | None:
        """It is the caller's to keep now, unless it is abandoned."""
        following, self.following = self.following, None
        if following is not None and abandon:
            following.abandon()
        return following

    def _follow(self) -> None:
        if self.following is not None:
            self.following.advance(self.fd, self.offset)

    def drop(self) -> None:
        """Remove the file and close it."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)
        self.close()

    def close(self) -> None:
        """May be repeated."""
        self.part_from_following(abandon=True)
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _pwrite_all(fd: int, chunks: Sequence[bytes | memoryview], offset: int) -> int:
    """Write all chunks at ``offset`` (``pwritev(2)`` may take fewer bytes) and return the end."""
    while chunks:
        written = os.pwritev(fd, chunks, offset)
        offset += written
        for index, chunk in enumerate(chunks):
            if written < len(chunk):
                rest = memoryview(chunk)[written:]
                chunks = [rest, *chunks[index + 1 :]]
                break
            written -= len(chunk)
        else:
            return offset
    return offset
