"""Bodies of one-shot PUTs on their way: files of their request alone, until a newer request wants what they have.

A body whose artifact digest was announced is also a beginning of that artifact's upload. So the upload's token is in
its name, and whoever takes the upload over takes the body over as well: what has come of it counts, and its own
request, which may not have noticed yet that its client is gone, finds the name gone before its next write and stops.

What always holds: such a name is taken away only under the file's ``flock``, and the body's request writes and
publishes only while it holds that and the name is there; so an older body never takes anything over from a newer
request, nor does it write into what has become the newer one's. Bytes of another boot are nobody's: they may be wrong
(`durable.boot_id`).

Blocks on the disk. Imported by ``uploads``.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from fastship import durable
from fastship.frames import Following
from fastship.receiver.uploads.lock import Busy, Superseded
from fastship.receiver.uploads.partial import Partial, Unsynced, sync_data

_POLL_S = 0.002


class Bodies:
    """Those below ``directory``, of all processes; in ``directory/bodies`` those that may be taken over."""

    def __init__(self, directory: Path, boot: str, reserve_bytes: int = 0) -> None:
        self.directory = directory / "bodies"
        self._nameless = directory
        self._boot = boot
        self._reserve_bytes = reserve_bytes

    def begin(self, token: str | None, following: Following | None) -> Partial:
        """A new one; ``token``: of the upload that it may be taken for. Raises `Superseded` in its writes, then."""
        name = f"{secrets.token_hex(16)}.part"
        if token is None or not self._boot:
            path = self._nameless / f"one-{name}"
            fd = _create(path)
            fcntl.flock(fd, fcntl.LOCK_EX)  # for as long as it is open: keeps the sweep away
            return Partial(path, fd, following=following, reserve_bytes=self._reserve_bytes)
        path = self.directory / f"one-{token}-{self._boot}-{name}"
        fd = _create(path)
        guard = functools.partial(_owned, path, fd)
        return Partial(path, fd, following=following, guard=guard, reserve_bytes=self._reserve_bytes)

    def may_be_taken(self, path: Path) -> bool:
        """Whether this body is of an upload, and has not been taken yet."""
        return path.parent == self.directory and path.exists()

    def take_over(
        self,
        token: str,
        part: Path,
        have_bytes: int,
        most_bytes: int | None,
        wait_s: float,
        replacing: Callable[[], None],
        only: Path | None = None,
    ) -> int:
        """Take all of an upload from their requests; one that has more than ``part``, and not too much, becomes it.

        ``replacing`` is called before one becomes it. ``only``: no other than this. Gives the part's durable bytes,
        ``have_bytes`` when it is what it was. The caller holds the upload's lock, so no two of these meet. Raises
        `Busy` after ``wait_s``: one is being published.
        """
        deadline = time.monotonic() + wait_s
        for name in sorted(os.listdir(self.directory)):
            path = self.directory / name
            if not self._boot or not name.startswith(f"one-{token}-{self._boot}-") or path != (only or path):
                continue
            try:
                fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            try:
                _lock(fd, deadline)
                status = os.fstat(fd)
                size = status.st_size
                if not path.exists():
                    continue  # its request has ended meanwhile
                more = have_bytes < size <= (size if most_bytes is None else most_bytes)
                published = status.st_nlink > 1  # and its process died before this name went: nobody writes it again
                if more and not published and _is_durable(fd):
                    replacing()
                    os.rename(path, part)
                    durable.sync_directory(part.parent)
                    have_bytes = size
                else:
                    os.unlink(path)
            finally:
                os.close(fd)  # which also unlocks
        return have_bytes


def is_free(path: str) -> bool:
    """Whether no process holds the body's flock."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True


def _create(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)


def _is_durable(fd: int) -> bool:
    try:
        sync_data(fd)
    except Unsynced:
        return False
    return True


@contextlib.contextmanager
def _owned(path: Path, fd: int) -> Iterator[None]:
    """Hold the body while it still is its request's; not to be nested. Raises `Superseded`."""
    fcntl.flock(fd, fcntl.LOCK_EX)
    try:
        if not path.exists():
            raise Superseded
        yield
    finally:
        fcntl.flock(fd, fcntl.LOCK_UN)


def _lock(fd: int, deadline: float) -> None:
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise Busy from None
            time.sleep(_POLL_S)
