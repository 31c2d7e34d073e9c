"""The worker processes as the supervisor holds them: started, spoken to, listened to, reaped.

What always holds: workers are started afresh (never forked from a process with threads), inherit the spool
lock and their channel and nothing else, and stand in a session of their own: a terminal's Ctrl-C reaches the
supervisor alone, and the kernel knows them as a scheduling group (``host``). A worker that cannot start is not
started for ever: `WorkerCannotStart`.

Imports ``host``, ``ipc`` and below; the supervisor's loop imports it.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import fastship
from fastship import ipc, logs
from fastship.errors import WorkerCannotStart
from fastship.lifecycle import Book, State
from fastship.settings import Settings
from fastship.supervisor.host import restrain, restrain_group

log = logs.Logger(__name__)

BOOTS_BEFORE_GIVING_UP = 3  # workers in a row that ended before they were ready, whatever their status
HIRE_AGAIN_S = 1.0  # after the system gave no process
START_REMEDY = "is the installation whole and readable, and is there room for processes, memory and open files?"
TERMINATE_S = 3.0  # from SIGTERM to SIGKILL
LISTENING_S = 0.5  # a turn of the loop that takes longer was held up


class Hand:
    """One worker process."""

    def __init__(self, number: int, process: subprocess.Popen[bytes], channel: ipc.SupervisorEnd) -> None:
        self.number = number
        self.process = process
        self.channel = channel
        self.ready = False
        self.restrained = False  # its scheduling group, too
        self.leaving = False  # told to drain
        self.gone = False  # its channel is at its end
        self.heard_at = time.monotonic()
        self.under_way: list[ipc.UnderWay] = []
        self.still_s: dict[str, float] = {}  # of those under way: for how long no byte of it was read
        self._beat_at = self.heard_at
        self.bandwidth = 0
        self.unsent: list[ipc.ToWorker] = []  # goes with the next `Crew.flush`

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def exit_status(self) -> int | None:
        return self.process.poll()

    def messages(self) -> Iterator[ipc.FromWorker]:
        """What it has said since; ends when there is no more now, and marks it gone at the end of file."""
        try:
            while (message := self.channel.receive()) is not None:
                self.heard_at = time.monotonic()
                yield message
        except ipc.Closed:
            self.gone = True

    def beat(self, under_way: list[ipc.UnderWay], *, paused: bool) -> None:
        """How far it says it is. ``paused``: it was told not to pack.

        A thread that hangs in the kernel (a dead network file system) stops neither the beats nor the process, but the
        bytes. Counted from beat to beat, so that a host which stood still in between did not stop them.
        """
        now = time.monotonic()
        passed_s, self._beat_at = min(now - self._beat_at, LISTENING_S), now
        before = {one.episode: one.done_bytes for one in self.under_way if not one.shipping}
        self.still_s = {
            one.episode: self.still_s.get(one.episode, 0.0) + passed_s
            for one in under_way
            if not one.shipping and not paused and before.get(one.episode) == one.done_bytes
        }
        self.under_way = under_way

    def waits_in(self) -> str:
        """Where in the kernel its threads wait without being interruptible, as far as /proc tells: for people."""
        found = set()
        for task in Path(f"/proc/{self.pid}/task").glob("*"):
            with contextlib.suppress(OSError, IndexError):
                if (task / "stat").read_text().rpartition(")")[2].split()[0] == "D":
                    found.add((task / "wchan").read_text())
        return ", ".join(sorted(found))

    def kill(self) -> None:
        """SIGKILL. A worker owes nothing: whatever it was at begins again."""
        self.process.kill()


class Crew:
    """All workers of one supervisor."""

    def __init__(self, settings: Settings, lock_fd: int, selector: selectors.BaseSelector) -> None:
        self.settings = settings
        self.hands: dict[int, Hand] = {}
        self._lock_fd = lock_fd
        self._selector = selector
        self._numbers = 0
        self._failed_boots = 0
        self._hire_at = 0.0
        self._looked_at = time.monotonic()  # when `silent` was last asked

    def hire(self, *, threads: int) -> Hand | None:
        """Start one more worker. Does not wait for it. None: the system gave no process, ask again.

        Raises `WorkerCannotStart` when there is no worker and starting more is of no use.
        """
        if time.monotonic() < self._hire_at:
            return None
        try:
            process, channel = self._start()
        except OSError as error:
            self._failed_boots += 1
            if not self.hands and self._failed_boots >= BOOTS_BEFORE_GIVING_UP:
                raise WorkerCannotStart(f"a worker process could not start: {error}", remedy=START_REMEDY) from None
            log.error("worker-not-started", error=str(error), remedy=START_REMEDY)
            self._hire_at = time.monotonic() + HIRE_AGAIN_S
            return None
        restrain(process.pid, self.settings.host)
        self._numbers += 1
        hand = Hand(self._numbers, process, channel)
        self.hands[hand.number] = hand
        self._selector.register(channel, selectors.EVENT_READ, hand)
        self.send(hand.number, ipc.Welcome(hand.number, self.settings, threads))
        return hand

    def _start(self) -> tuple[subprocess.Popen[bytes], ipc.SupervisorEnd]:
        channel, theirs = ipc.pair()
        environment = dict(os.environ)
        # The package that runs now, wherever it is, and (-P) nothing of the working directory.
        environment["PYTHONPATH"] = os.pathsep.join(
            part for part in (str(Path(fastship.__file__).parent.parent), environment.get("PYTHONPATH")) if part
        )
        try:
            with theirs:
                process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "fastship.worker", str(theirs.fileno())],
                    pass_fds=(theirs.fileno(), self._lock_fd),
                    stdin=subprocess.DEVNULL,
                    stdout=2,  # standard output is the command's
                    env=environment,
                    start_new_session=True,
                )
        except OSError:
            channel.close()
            raise
        return process, channel

    def begins(self, hand: Hand) -> None:
        """It says that it is ready: whatever kept others from starting is over."""
        hand.ready = True
        self._failed_boots = 0

    def restrain(self) -> None:
        """What `hire` could not do yet. Does not wait: to be called again and again."""
        for hand in self.hands.values():
            if not hand.restrained:
                hand.restrained = restrain_group(hand.pid, self.settings.host)

    def send(self, number: int, message: ipc.ToWorker) -> None:
        """With the next `flush`. To a worker that may be gone already: then it is reaped, and what it had goes back."""
        hand = self.hands.get(number)
        if hand is not None:
            hand.unsent.append(message)

    def flush(self) -> None:
        """Send what was said since: one packet for each worker, so that each wakes once. Before any wait."""
        for hand in self.hands.values():
            if not hand.unsent:
                continue
            try:
                hand.channel.send(*hand.unsent)
            except ipc.Closed:
                hand.gone = True
            except ipc.Stuck:
                hand.kill()
            hand.unsent.clear()

    def silent(self, timeout_s: float) -> list[Hand]:
        """The workers not heard of for so long. One that is starting has the same time. To be asked all the time.

        Only time in which we listened counts: where the whole host stood still (suspended, or every process stopped)
        or a disk held us, the workers had no chance to be heard either. Each of them counted as dead then, and three
        such pauses would have quarantined a sound episode.
        """
        now = time.monotonic()
        away_s = now - self._looked_at - LISTENING_S
        self._looked_at = now
        if away_s > 0:
            for hand in self.hands.values():
                hand.heard_at = min(now, hand.heard_at + away_s)
        if not timeout_s:
            return []
        oldest = now - timeout_s
        return [hand for hand in self.hands.values() if hand.heard_at < oldest and hand.exit_status is None]

    def reap(self) -> list[tuple[Hand, str]]:
        """The workers that have ended, each with how. Call after their last messages were read.

        Raises `WorkerCannotStart` when starting more is of no use.
        """
        ended = []
        for hand in list(self.hands.values()):
            if not hand.gone:
                continue
            try:
                status = hand.process.wait(timeout=1.0)
            except subprocess.TimeoutExpired:  # it closed its channel and lives: no worker of ours
                hand.kill()
                status = hand.process.wait()
            self._forget(hand)
            ended.append((hand, f"killed by signal {-status}" if status < 0 else f"ended with status {status}"))
            # One that is told to leave while it starts (settings were read anew) does so, and is no failure.
            failed = not hand.ready and not hand.leaving
            self._failed_boots += failed
            if failed and (status == ipc.BOOT_FAILED or self._failed_boots >= BOOTS_BEFORE_GIVING_UP):
                raise WorkerCannotStart(
                    f"a worker process could not start ({ended[-1][1]})",
                    remedy="what it printed above says why; is the installation whole?",
                )
        return ended

    def share_bandwidth(self, total: int, book: Book) -> None:
        """Divide ``total`` bytes a second evenly among the workers that ship (all, while none does)."""
        shipping = [
            hand
            for hand in self.hands.values()
            if any(book.entries[one].state is State.SHIPPING for one in book.workers.get(hand.number, ()))
        ] or list(self.hands.values())
        for hand in shipping:
            share = max(1, total // len(shipping))
            if hand.bandwidth != share:
                hand.bandwidth = share
                self.send(hand.number, ipc.Shares(bandwidth=share))

    def dismiss(self) -> None:
        """End every worker now: those told to drain have had their time. Takes seconds at most.

        One that not even SIGKILL ends (it waits for a dead disk) is left: it holds the spool lock until it is gone.
        """
        for hand in self.hands.values():
            hand.process.terminate()
        deadline = time.monotonic() + TERMINATE_S
        for hand in list(self.hands.values()):
            try:
                hand.process.wait(timeout=max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                hand.kill()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    hand.process.wait(timeout=TERMINATE_S)
            self._forget(hand)

    def _forget(self, hand: Hand) -> None:
        self._selector.unregister(hand.channel)
        hand.channel.close()
        del self.hands[hand.number]
