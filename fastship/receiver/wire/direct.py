"""A body's bytes from the client's socket to the file in one thread, past the event loop, the parser and the heap.

Why: through the loop a GB costs twice the CPU of what must be done with it (receive, digest, write).

What always holds: this is only ever a faster way of doing what the loop does. `Taking` ends as soon as bytes come
slowly, or the client has gone, or anything is odd, and the loop, which finds the same connection at the next byte,
goes on and decides what it means. So a slow client never holds a thread, and there is no limit, timeout or answer here.

Blocks; called in threads. Imported by ``ingest`` and ``connection``.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any, Protocol

from fastship.receiver.uploads.partial import Digest, Partial

PIECE_BYTES = 1 << 20  # received, digested and written at once: of 256 KiB to 1 MiB the one that costs least CPU
_WAKE_BYTES = PIECE_BYTES // 2  # a thread woken for every packet costs 5 % more CPU
_PATIENCE_S = 0.02  # for so many bytes; who sends less than 25 MB/s is served as well by the loop
_AT_ONCE = 8  # bodies in a process; each has a thread that receives, at times one that digests, and 2 pieces of memory


class Direct(Protocol):
    """A connection whose body may be read from its socket (``EXTENSION``)."""

    @property
    def left(self) -> int:
        """Bytes of the body that have not been handed to the application; 0 where it cannot be known or lent."""

    def borrow(self) -> socket.socket | None:
        """The socket, at the next byte of the body, while the loop does not read it. None: read with ``receive``."""

    def give_back(self, taken: int) -> None:
        """The loop reads again; ``taken`` bytes of the body have been read meanwhile."""


EXTENSION = "fastship.connection"
"""In a request's scope: ``body``, a `Direct` where there is one, and ``cut``, which ends the connection at once."""


class Takers:
    """The threads of a process for this. `close` lets them end."""

    def __init__(self) -> None:
        self._free = threading.Semaphore(_AT_ONCE)
        self._receiving = ThreadPoolExecutor(_AT_ONCE, "receiver-take")
        self._beside = ThreadPoolExecutor(2 * _AT_ONCE, "receiver-digest")  # one digests, one syncs

    @contextlib.contextmanager
    def one(self) -> Iterator[bool]:
        """Whether there is a thread for a body; it is kept for it."""
        free = self._free.acquire(blocking=False)
        try:
            yield free
        finally:
            if free:
                self._free.release()

    def submit(self, taking: Taking) -> Future[int]:
        return self._receiving.submit(taking.run, self._beside)

    def close(self) -> None:
        self._receiving.shutdown(wait=False)
        self._beside.shutdown(wait=False)


class Taking:
    """Append at most ``most_bytes`` from ``source`` to ``partial``; `run` says how many it was.

    Until `run` has ended the partial is nobody else's (its digests may be behind its offset), but for its `sync`.
    Raises what `Partial.put` and `Partial.sync` raise; every byte below the partial's offset is digested then, too.
    """

    def __init__(
        self, source: socket.socket, partial: Partial, most_bytes: int, sync_bytes: int, body_digest: Digest | None
    ) -> None:
        self._source = source
        self._partial = partial
        self._left = most_bytes
        self._sync_bytes = sync_bytes
        self._digests = [digest for digest in (partial.running, body_digest) if digest is not None]
        self._stopped = False

    def stop(self) -> None:
        """Let `run` end soon, with what it has."""
        self._stopped = True

    def run(self, beside: Executor) -> int:
        began = self._partial.offset
        digesting: Future[Any] | None = None
        syncing: Future[Any] | None = None
        unsynced_bytes = 0
        pieces = [memoryview(bytearray(min(PIECE_BYTES, self._left))) for _ in range(2)]
        try:
            while self._left and not self._stopped:
                pieces.reverse()
                count = self._receive(pieces[0])
                self._partial.put(pieces[0][:count])
                if digesting is not None:
                    digesting.result()
                digesting = beside.submit(self._digest, pieces[0][:count])
                unsynced_bytes += count
                if unsynced_bytes >= self._sync_bytes:
                    if syncing is not None:
                        syncing.result()
                    syncing = beside.submit(self._partial.sync)
                    unsynced_bytes = 0
        finally:
            if digesting is not None:
                digesting.result()
            if syncing is not None:
                syncing.result()
        return self._partial.offset - began

    def _receive(self, piece: memoryview) -> int:
        """Fill the piece. Fewer bytes, and a stop, when they come slowly or not at all any more."""
        source, count = self._source, 0
        wanted = min(len(piece), self._left)
        source.settimeout(_PATIENCE_S)
        while count < wanted:
            source.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, min(_WAKE_BYTES, wanted - count))
            try:
                got = source.recv_into(piece[count:wanted])
            except OSError:  # too slow, or reset, which the loop will find as well
                got = 0
            if not got:
                self._stopped = True
                break
            count += got
        self._left -= count
        return count

    def _digest(self, piece: memoryview) -> None:
        for digest in self._digests:
            digest.update(piece)
