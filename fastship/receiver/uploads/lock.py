"""One upload's lock: who may write now, and what was made durable, across threads and processes.

The file ``<token>.lock`` is one line of fixed width, within one disk sector and therefore written whole:
``generation synced held boot``. Each request that takes an upload over adds one to the generation; a writer that
no longer finds its own generation stops. ``flock`` ends with the process that held it, so no lock is ever stale.

What always holds: the line changes only under the lock; ``synced`` bytes were durable in some boot before it was
written; ``held`` (-1: none) is where an append began whose bytes do not count until their digest is verified.

Blocks. Imports ``partial``; imported by ``uploads``.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from fastship.receiver.uploads.partial import sync_data

_LINE_BYTES = 96  # within a sector of 512 bytes
_POLL_S = 0.002


class Busy(Exception):
    """Somebody has held the lock for longer than was waited: the artifact is being verified."""


class Gone(Exception):
    """The upload has ended; its lock file has no name any more."""


class Superseded(Exception):
    """A later request took this upload over."""


class State(NamedTuple):
    generation: int = 0
    synced: int = 0
    held: int = -1
    boot: str = "-"


class UploadLock:
    """An own descriptor of the lock file; two of these exclude each other even within a process.

    One of these may be used by several threads, and entered again by the thread that is in it.
    Raises ``FileNotFoundError`` when there is no such file and ``make`` is False.
    """

    def __init__(self, path: Path, *, make: bool = False) -> None:
        flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if make else 0)
        self._fd = os.open(path, flags, 0o644)
        # flock excludes descriptors, not threads: without this, one thread's unlock would end another's hold.
        self._threads = threading.RLock()
        self._depth = 0

    @contextlib.contextmanager
    def locked(self, wait_s: float = 5.0, *, generation: int | None = None) -> Iterator[None]:
        """Hold the lock; with ``generation``, only as long as that is the one in force.

        Raises `Busy` after ``wait_s``, `Gone` when the upload has ended, `Superseded` for another generation.
        """
        with self._threads:
            if self._depth == 0:
                self._acquire(wait_s, generation)
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
                if self._depth == 0:
                    fcntl.flock(self._fd, fcntl.LOCK_UN)

    def _acquire(self, wait_s: float, generation: int | None) -> None:
        deadline = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if generation is not None and self.read().generation != generation:
                    raise Superseded from None
                if time.monotonic() >= deadline:
                    raise Busy from None
                time.sleep(_POLL_S)
        error: Exception | None = None
        if os.fstat(self._fd).st_nlink == 0:
            error = Gone()
        elif generation is not None and self.read().generation != generation:
            error = Superseded()
        if error is not None:
            fcntl.flock(self._fd, fcntl.LOCK_UN)
            raise error

    def read(self) -> State:
        """The line; a new or spoilt one reads as nothing known, which only makes the client send more again."""
        words = os.pread(self._fd, _LINE_BYTES, 0).decode("ascii", "replace").split()
        try:
            return State(int(words[0]), int(words[1]), int(words[2]), words[3])
        except (ValueError, IndexError):
            return State()

    def write(self, state: State, *, durably: bool = False) -> None:
        """Replace the line (under the lock); ``durably`` before an offset is told to anybody. Raises `Unsynced`."""
        line = f"{state.generation:012d} {state.synced:015d} {state.held:015d} {state.boot or '-'}"
        os.pwrite(self._fd, line.ljust(_LINE_BYTES - 1).encode("ascii") + b"\n", 0)
        if durably:
            sync_data(self._fd)

    def close(self) -> None:
        """May be repeated."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
