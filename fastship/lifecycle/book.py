"""What the supervisor knows: the episodes with a marker, the workers, the destination.

What always holds: an episode is with at most one worker; an entry changes its state in `Book.move` alone, which refuses
what is not legal. Pure: no I/O, no clock. Imports ``states`` and ``events``; ``sharing``, ``rules`` and the supervisor
import it.
"""

from __future__ import annotations

import bisect
import heapq

import msgspec

from fastship.lifecycle.events import Budget, Room
from fastship.lifecycle.states import CLAIMED, TRANSITIONS, State


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """The settings that the rules need."""

    cores: int
    in_flight: int  # artifacts a worker may have shipping before it is given more
    poison_after: int
    pause_min_s: float
    pause_max_s: float
    pause_after: int
    most_threads: int = 1 << 20  # of one worker: what its memory allows
    once: bool = False  # one pass: every episode is attempted once and nothing waits


class Entry(msgspec.Struct, kw_only=True):
    """One episode in the book."""

    episode: str
    key: str
    state: State
    worker: int | None = None
    frames: int | None = None
    attempts: int = 0  # ended without a verdict on the episode, in a row
    changes: int = 0  # packs dropped because it changed, in a row
    kills: int = 0  # workers that died at it
    not_before: float = 0.0
    claimed_at: float = 0.0
    error: str = ""
    wants_room: bool = False  # the disk was too short to pack it
    own_fault: bool = False  # its last attempt ended for a reason that says nothing of others


class Breaker(msgspec.Struct, kw_only=True):
    """The destination's circuit breaker: closed, open (``paused``) until ``until``, half open with a ``probe``."""

    paused: bool = False
    until: float = 0.0
    pause_s: float = 0.0
    probe: str | None = None
    faults: int = 0  # network faults in a row
    reason: str = ""


class Load:
    """What one worker has, counted."""

    __slots__ = ("frames", "packing", "shipping", "small", "suspect", "worker")

    def __init__(self, worker: int) -> None:
        self.worker = worker
        self.frames = 0  # still to pack
        self.packing = 0  # episodes, those in line included
        self.shipping = 0
        self.small = True  # every one to pack has one frame
        self.suspect = False  # a worker died at one of them

    def add(self, entry: Entry) -> None:
        if entry.kills:
            self.suspect = True
        if entry.state is State.SHIPPING:
            self.shipping += 1
        else:
            frames = entry.frames or 1
            self.packing += 1
            self.frames += frames
            if frames > 1:
                self.small = False


class Book:
    """All that the supervisor knows of the episodes with a marker, the workers and the destination."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.budget = Budget(policy.cores)
        self.room = Room()
        self.entries: dict[str, Entry] = {}
        self.ready: list[tuple[str, str]] = []  # sorted (key, episode) of the READY ones
        self.waiting: set[str] = set()  # the WAITING ones
        self.packed: set[str] = set()  # those whose artifact is in the outbox, as far as is known
        self.undone: dict[str, int] = {}  # attempts of those that the disk would not let be retired or quarantined
        self.alarms: list[tuple[float, str]] = []  # a heap of (not_before, episode): theirs, and some of the past
        self.workers: dict[int, set[str]] = {}  # what each has
        self.loads: dict[int, Load] = {}  # the same, counted when it is asked for; forgotten when it changes
        self.leaving: set[int] = set()  # workers that drain
        self.shares: dict[int, int] = {}
        self.breaker = Breaker()
        self.draining = False
        self.scanned = 0  # episodes that were ever entered
        self.transient = 0  # attempts that ended without a verdict on the episode

    def begin_afresh(self, policy: Policy) -> None:
        """Go by new settings: the destination may be another one now, so nothing of the old one's pause counts; what
        they leave of cores and disk is told anew."""
        self.policy = policy
        self.budget = Budget(policy.cores)
        self.room = Room()
        self.breaker = Breaker()
        for episode in self.waiting:
            self.entries[episode].not_before = 0.0
        self.alarms = [(0.0, episode) for episode in self.waiting]

    def count(self, *states: State) -> int:
        """How many entries are in one of ``states``."""
        return sum(1 for entry in self.entries.values() if entry.state in states)

    @property
    def restrained(self) -> bool:
        """Whether packing gives way now. Not while draining: what was begun is finished then."""
        return self.budget.cores < self.policy.cores and not self.draining

    def idle(self) -> bool:
        """Whether a pass is over: nothing is with a worker and nothing can be given to one."""
        if any(self.workers.values()):
            return False
        if self.draining or not self.ready:
            return True
        return self.policy.once and (self.breaker.paused or self.next_ready() is None)

    def next_ready(self) -> Entry | None:
        """The ready episode whose turn it is: while packing is paused, the first that only has to be shipped.

        A paused destination is tried by the one that was tried least: the first in order may be refused for a reason of
        its own, would be ready again at the end of each pause, and nothing else would ever be tried.
        """
        if not self.ready:
            return None
        probing = self.breaker.paused

        def turn(entry: Entry) -> tuple[int, str, str]:
            return entry.attempts if probing else 0, entry.key, entry.episode

        names = self.ready if probing else self.ready[:1]
        first = min((self.entries[episode] for _, episode in names), key=turn)
        paused = self.restrained and not self.budget.cores
        if not paused and not self.room.short:
            return first
        packed = [self.entries[episode] for episode in self.packed]
        ready = [entry for entry in packed if entry.state is State.READY]
        if ready:
            return min(ready, key=turn)
        return first if not paused and self.lends else None

    @property
    def lends(self) -> bool:
        """Whether one artifact may be packed although the disk is short: with no other on its way it will soon be gone.

        Where the destination takes nothing, the first one to be packed waits in the outbox, and there is no second. But
        one that is kept there by itself (it is held, too large for a proxy, or cannot be moved) keeps no other waiting.
        """
        if any(self.load(worker).packing for worker in self.workers):
            return False
        entries = [self.entries[episode] for episode in self.packed]
        return all(one.state is State.HELD or (one.state is State.WAITING and one.own_fault) for one in entries)

    def move(self, entry: Entry, state: State) -> None:
        """Change an entry's state; an illegal change is our bug."""
        assert state in TRANSITIONS[entry.state], f"{entry.episode}: {entry.state} -> {state}"
        if entry.worker is not None:
            self.loads.pop(entry.worker, None)
        if entry.state in CLAIMED and state not in CLAIMED and entry.worker is not None:
            self.workers.get(entry.worker, set()).discard(entry.episode)
            entry.worker = None
        if entry.state is State.READY:
            index = bisect.bisect_left(self.ready, (entry.key, entry.episode))
            del self.ready[index]
        self.waiting.discard(entry.episode)
        entry.state = state
        if state is State.READY:
            bisect.insort(self.ready, (entry.key, entry.episode))
        elif state is State.WAITING:
            self.waiting.add(entry.episode)
            heapq.heappush(self.alarms, (entry.not_before, entry.episode))
        elif state not in TRANSITIONS:
            self.packed.discard(entry.episode)
            del self.entries[entry.episode]

    def next_alarm(self) -> Entry | None:
        """The WAITING entry whose time comes first. Alarms that no longer mean anything are dropped on the way."""
        while self.alarms:
            time_s, episode = self.alarms[0]
            entry = self.entries.get(episode)
            if entry is not None and entry.state is State.WAITING and entry.not_before == time_s:
                return entry
            heapq.heappop(self.alarms)
        return None

    def load(self, worker: int) -> Load:
        """What ``worker`` has, counted when it is asked for."""
        load = self.loads.get(worker)
        if load is None:
            load = self.loads[worker] = Load(worker)
            for episode in self.workers[worker]:
                load.add(self.entries[episode])
        return load
