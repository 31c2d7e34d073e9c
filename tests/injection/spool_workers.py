"""What stands in for time, processes and the host where a supervisor is turned by hand (`spool_beside`): a clock that
goes on when it is told to, faults at the calls that change the disk, and workers whose steps a test takes.

The workers' side of the channel is this; what the supervisor does with what they say is the real thing.
"""

from __future__ import annotations

import contextlib
import errno
import os
import selectors
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from fastship import ipc, logs
from fastship.episode import Manifest
from fastship.lifecycle import events as ev
from fastship.settings import Settings
from fastship.spool import Spool
from fastship.supervisor import crew, disk, loop, patrol, retention, tally

CHANGING = ("rename", "unlink", "mkdir", "rmdir", "write", "fsync", "utime", "chmod")


class Stop(BaseException):
    """The process ends here."""


class Clock:
    """In the place of the module ``time``, for the supervisor: goes on when it is told to."""

    now = 1000.0
    time = staticmethod(time.time)

    def monotonic(self) -> float:
        return self.now

    def thread_time(self) -> float:
        return 0.0

    def sleep(self, _seconds: float) -> None:
        pass


class Faults:
    """What befalls the next changing calls of ``os``, while somebody is at work."""

    def __init__(self) -> None:
        self.how: str | None = None  # "stop", "EIO", "ENOSPC", "full"
        self.left = 0  # calls before it
        self.on = False
        self.met = False  # it came; not forgotten before `forget`

    def arm(self, how: str, calls: int) -> None:
        self.how, self.left = how, calls

    def forget(self) -> None:
        self.how, self.met = None, False

    def before(self, name: str) -> None:
        if not self.on or self.how is None:
            return
        if self.left:
            self.left -= 1
            return
        self.met = True
        if self.how == "stop":
            raise Stop  # and whatever tidies up on the way out is stopped, too
        number = errno.EIO if self.how == "EIO" else errno.ENOSPC
        if self.how != "full":
            self.how = None
        elif name in ("rename", "unlink", "rmdir", "fsync", "utime", "chmod"):
            return  # a full disk takes these
        raise OSError(number, os.strerror(number))

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        self.on = True
        try:
            yield
        finally:
            self.on = False


FAULTS = Faults()
CLOCK = Clock()


def install(patch: pytest.MonkeyPatch) -> None:
    """Put the clock, the faults and the workers where the supervisor will find them."""

    def wrapped(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            FAULTS.before(name)
            return None if name == "fsync" else real(*args, **more)  # the order of syncs is others' to try

        return call

    for name in CHANGING:
        patch.setattr(os, name, wrapped(name, getattr(os, name)))
    real_open = os.open

    def opened(path: Any, flags: int, *args: Any, **more: Any) -> int:
        if flags & os.O_CREAT:
            FAULTS.before("create")
        return real_open(path, flags, *args, **more)

    patch.setattr(os, "open", opened)
    for module in (loop, patrol, disk, tally, retention, crew):
        patch.setattr(module, "time", CLOCK)
    for name, stub in (("Crew", Crew), ("Courtesy", Courtesy), ("DiskWatch", DiskWatch), ("Retention", Retention)):
        patch.setattr(loop, name, stub)
    patch.setattr(logs.Logger, "_say", said)


def said(_logger: object, method: str, event: str, fields: dict[str, object]) -> None:
    """In the place of the log: a traceback in it is a fault of ours, whatever befalls the disk."""
    assert method != "exception", f"{event} {fields}"


# --- in the place of processes and of the host ---------------------------------------------------------------------


class Worker:
    """A worker and the supervisor's hand on it in one: its steps are the rules', what it says waits to be heard."""

    restrained = True
    bandwidth = 0
    waits_in = ""

    def __init__(self, number: int) -> None:
        self.number = self.pid = number
        self.ready = self.leaving = self.gone = False
        self.under_way: list[ipc.UnderWay] = []
        self.still_s: dict[str, float] = {}
        self.unsent: list[ipc.ToWorker] = []
        self.queue: deque[ipc.Assignment] = deque()
        self.packing: str | None = None
        self.partial: Manifest | None = None
        self.shipping: dict[str, tuple[Manifest, bool]] = {}  # and whether its upload has begun
        self.said: deque[ipc.FromWorker] = deque([ipc.Ready()])
        self.hears = 0
        self.draining = self.paused = False
        self.exit_status: int | None = None

    def messages(self) -> Iterator[ipc.FromWorker]:
        while self.hears and self.said:
            self.hears -= 1
            yield self.said.popleft()
        if self.exit_status is not None and not self.said:
            self.gone = True

    def take(self, message: ipc.ToWorker) -> None:
        match message:
            case ipc.Assignment():
                self.queue.append(message)
            case ipc.Shares() if message.threads is not None:
                self.paused = message.threads == 0
            case ipc.Recall() if not self.draining:
                self.give_back()
                for episode in [one for one, (_, begun) in self.shipping.items() if not begun]:
                    del self.shipping[episode]
                    self.said.append(ev.Returned(episode))
            case ipc.Drain():
                self.draining = True
                self.give_back()
                self.end_if_drained()

    def give_back(self) -> None:
        self.said.extend(ev.Returned(one.episode) for one in self.queue)
        self.queue.clear()

    def end_if_drained(self) -> None:
        if self.draining and self.packing is None and not self.shipping and self.exit_status is None:
            self.exit_status = 0

    def kill(self) -> None:
        if self.exit_status is None:
            self.exit_status = -9

    @property
    def busy_with(self) -> set[str]:
        own = {one.episode for one in self.queue} | set(self.shipping)
        return own | ({self.packing} if self.packing else set())


class Crew:
    """As `supervisor.crew.Crew`, of such workers."""

    def __init__(self, settings: Settings, _lock_fd: int, _selector: selectors.BaseSelector) -> None:
        self.settings = settings
        self.hands: dict[int, Worker] = {}
        self._numbers = 0

    def hire(self, *, threads: int) -> Worker:
        self._numbers += 1
        return self.hands.setdefault(self._numbers, Worker(self._numbers))

    def begins(self, hand: Worker) -> None:
        hand.ready = True

    def restrain(self) -> None: ...

    def send(self, number: int, message: ipc.ToWorker) -> None:
        if number in self.hands:
            self.hands[number].unsent.append(message)

    def flush(self) -> None:
        for hand in self.hands.values():
            for message in hand.unsent:
                if hand.exit_status is None:
                    hand.take(message)
                else:
                    hand.gone = True
            hand.unsent.clear()

    def silent(self, _timeout_s: float) -> list[Worker]:
        return []

    def reap(self) -> list[tuple[Worker, str]]:
        ended = [hand for hand in self.hands.values() if hand.gone]
        for hand in ended:
            del self.hands[hand.number]
        return [(hand, f"ended with {hand.exit_status}") for hand in ended]

    def share_bandwidth(self, _total: int, _book: object) -> None: ...

    def dismiss(self) -> None:
        self.hands.clear()


class Courtesy:
    """What the host gives, as a rule says."""

    def __init__(self, _settings: Settings) -> None:
        self.next: ev.Budget | None = None

    def turn(self, _pids: object) -> ev.Budget | None:
        told, self.next = self.next, None
        return told

    def status(self) -> None:
        return None


class DiskWatch:
    """What the disk has, as a rule says."""

    status = None
    missing_bytes = 0

    def __init__(self, _settings: Settings, _spool: Spool, _book: object) -> None:
        self.next: ev.Room | None = None

    def turn(self) -> ev.Room | None:
        told, self.next = self.next, None
        return told


class Retention:
    """A rule removes copies, where this would in a thread."""

    status = None

    def __init__(self, _settings: Settings, spool: Spool) -> None:
        spool.shelf.finish_removals()  # its first round

    def turn(self, **_: object) -> None: ...

    def close(self) -> None: ...
