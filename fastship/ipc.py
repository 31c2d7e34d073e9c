"""The messages between the supervisor and a worker, and the channel that carries them.

A channel is one end of a ``SOCK_SEQPACKET`` pair: one packet has one or more whole messages, so nothing is ever half
read, and the death of either side is the end of file at the other. What always holds: the supervisor never blocks on a
worker (its sends either go at once or the worker counts as stuck); a worker that reads end of file has lost
its supervisor and ends at once; no message holds a secret (token files travel as paths).

Imports ``lifecycle`` and ``settings``; the supervisor and the worker import it.
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from collections import deque

import msgspec

from fastship.lifecycle.events import Answered, PackBegan, Packed, PackFailed, Returned
from fastship.settings import Settings


class Welcome(msgspec.Struct, frozen=True, tag=True):
    """Supervisor to worker, first and once: all that it needs to know."""

    worker: int
    settings: Settings
    threads: int  # the most that its share of cores can ever be


class Assignment(msgspec.Struct, frozen=True, tag=True):
    """Supervisor to worker: pack (unless the outbox has it already) and ship this episode."""

    episode: str
    first_attempt: bool
    frames: int = 1  # about; as far as it was measured
    floor_bytes: int = 0  # free space that packing it may not go below


class Shares(msgspec.Struct, frozen=True, tag=True):
    """Supervisor to worker, at any time: its part of what the host gives. Takes effect at the next frame."""

    threads: int | None = None  # None: as before; 0: packing pauses
    bandwidth: int | None = None  # bytes a second, 0: no limit


class Recall(msgspec.Struct, frozen=True, tag=True):
    """Supervisor to worker: the destination is paused; give back what is not begun, in the line or on the way."""


class Drain(msgspec.Struct, frozen=True, tag=True):
    """Supervisor to worker: give back what is not begun, finish the rest, end with status 0."""


class Ready(msgspec.Struct, frozen=True, tag=True):
    """Worker to supervisor, first and once: it has started and can take assignments."""


class UnderWay(msgspec.Struct, frozen=True):
    """One episode in a heartbeat."""

    episode: str
    shipping: bool
    done_bytes: int
    total_bytes: int
    seconds: float


class Beat(msgspec.Struct, frozen=True, tag=True):
    """Worker to supervisor: it lives, and how far it is. Every half second at least."""

    under_way: list[UnderWay] = []


ToWorker = Welcome | Assignment | Shares | Recall | Drain
FromWorker = Ready | Beat | PackBegan | Packed | PackFailed | Answered | Returned

BOOT_FAILED = 71
"""Exit status of a worker that says that another one would not start either."""

_BUFFER_BYTES = 2 << 20  # SO_SNDBUF: a verdict's body is at most 64 KiB of text, a manifest is far smaller


class Closed(Exception):
    """The other side is gone."""


class Stuck(Exception):
    """The other side does not read: its queue of messages is full."""


class SupervisorEnd:
    """The supervisor's end: never blocks."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._sock.setblocking(False)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[list[FromWorker]] = msgspec.msgpack.Decoder(list[FromWorker])
        self._received: deque[FromWorker] = deque()  # of the packets read, what was not asked for yet

    def fileno(self) -> int:
        return self._sock.fileno()

    def send(self, *messages: ToWorker) -> None:
        """One packet. Raises `Closed` when the worker is gone, `Stuck` when it does not read."""
        try:
            self._sock.send(self._encoder.encode(messages))
        except BlockingIOError:
            raise Stuck from None
        except OSError:
            raise Closed from None

    def receive(self) -> FromWorker | None:
        """The next message, None when there is none now. Raises `Closed` at the end of file."""
        if self._received:
            return self._received.popleft()
        try:
            packet = self._sock.recv(_BUFFER_BYTES)
        except BlockingIOError:
            return None
        except OSError:
            raise Closed from None
        if not packet:
            raise Closed
        self._received.extend(self._decoder.decode(packet))
        return self._received.popleft()

    def close(self) -> None:
        self._sock.close()


class WorkerEnd:
    """The worker's end: any thread may send, one thread receives; both block."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._lock = threading.Lock()
        self._decoder: msgspec.msgpack.Decoder[list[ToWorker]] = msgspec.msgpack.Decoder(list[ToWorker])
        self._received: deque[ToWorker] = deque()

    def send(self, *messages: FromWorker) -> None:
        """One packet: the supervisor hears all of them at once. Raises `Closed` when it is gone, or cannot be told."""
        packet = msgspec.msgpack.encode(messages)
        try:
            with self._lock:
                self._sock.send(packet)
        except OSError:
            # It would wait for ever for what it was not told (the kernel had no memory, say). So the channel ends, for
            # both sides and for the thread that receives: the worker's episodes go to another one.
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)
            raise Closed from None

    def receive(self, timeout_s: float) -> ToWorker | None:
        """The next message, None when none came within ``timeout_s``. Raises `Closed` at the end of file."""
        if self._received:
            return self._received.popleft()
        readable, _, _ = select.select([self._sock], [], [], timeout_s)
        if not readable:
            return None
        try:
            packet = self._sock.recv(_BUFFER_BYTES)
        except OSError:
            raise Closed from None
        if not packet:
            raise Closed
        self._received.extend(self._decoder.decode(packet))
        return self._received.popleft()


def pair() -> tuple[SupervisorEnd, socket.socket]:
    """A channel: the supervisor's end, and the socket that the worker's process inherits (`WorkerEnd`)."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    for sock in (ours, theirs):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
    return SupervisorEnd(ours), theirs
