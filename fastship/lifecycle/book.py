"""The rules: ``decide(book, event, now) -> commands``.

What always holds: no command retires an episode without a receipt; only a verdict of scope EPISODE, a poison
episode or an impossible name quarantines; a paused destination has at most one episode trying it; an episode
is with at most one worker; an entry changes its state in `Book.move` alone, which refuses what is not legal.

Pure: no I/O, no clock. Imports ``states``, ``events`` and ``episode``; the supervisor imports it.
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Mapping

import msgspec

from fastship.episode import Outcome, Scope
from fastship.lifecycle.events import (
    Answered,
    Assign,
    Budget,
    Command,
    Discard,
    Event,
    Found,
    Gone,
    Hold,
    Measure,
    Measured,
    PackBegan,
    Packed,
    PackFailed,
    Quarantine,
    Released,
    Report,
    Retire,
    Returned,
    Share,
    Tick,
    WorkerJoined,
    WorkerLeaving,
    WorkerLeft,
)
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


QUEUE_DEPTH = 16
"""Small episodes given to a worker ahead, so that it never waits for the supervisor between two of them: tiny ones are
packed in about 10 ms."""

MEASURE_AHEAD = 8  # episodes measured at once when the next one has no size yet


class Book:
    """All that the supervisor knows of the episodes with a marker, the workers and the destination."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.budget = Budget(policy.cores)
        self.entries: dict[str, Entry] = {}
        self.ready: list[tuple[str, str]] = []  # sorted (key, episode) of the READY ones
        self.waiting: set[str] = set()  # the WAITING ones
        self.packed: set[str] = set()  # those whose artifact, made since the start, is in the outbox
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
        """Go by new settings: the destination may be another one now, so nothing of the old one's pause counts."""
        self.policy = policy
        self.budget = Budget(policy.cores)
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
        return self.draining or not self.ready or (self.policy.once and self.breaker.paused)

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


def decide(book: Book, event: Event, now: float, *, more: bool = False) -> list[Command]:
    """What to do about ``event``. ``now``: seconds of a monotonic clock.

    ``more``: another event follows at once, and what can be given out is decided with that.
    """
    commands: list[Command] = []
    match event:
        case Found():
            _found(book, event, commands)
        case Measured():
            _measured(book, event)
        case WorkerJoined():
            book.workers[event.worker] = set()
        case WorkerLeaving():
            book.leaving.add(event.worker)
        case WorkerLeft():
            _left(book, event, commands)
        case PackBegan():
            book.move(book.entries[event.episode], State.PACKING)
        case Packed():
            _packed(book, event)
        case PackFailed():
            _pack_failed(book, event, now, commands)
        case Answered():
            _answered(book, event, now, commands)
        case Returned():
            _returned(book, event)
        case Released():
            _released(book, event, commands)
        case Gone():
            entry = book.entries.get(event.episode)
            if entry is not None and entry.state not in CLAIMED:
                book.move(entry, State.GONE)
        case Budget():
            _budget(book, event, commands)
        case Tick():
            pass
    if more:
        return commands
    _wake(book, now)
    _assign(book, now, commands)
    _share(book, commands)
    return commands


def _found(book: Book, event: Found, commands: list[Command]) -> None:
    seen = {episode for _, episode in event.ready} | set(event.held)
    new: list[tuple[str, str]] = []
    before = len(book.entries)
    for key, episode in event.ready:
        entry = book.entries.get(episode)
        if entry is None:
            book.entries[episode] = Entry(episode=episode, key=key, state=State.READY)
            new.append((key, episode))
        elif entry.state is State.HELD:  # its hold is gone
            entry.key = key
            book.move(entry, State.READY)
    if len(new) > 32:  # one sort instead of many insertions into a long list
        book.ready.extend(new)
        book.ready.sort()
    else:
        for item in new:
            bisect.insort(book.ready, item)
    for episode in event.held:
        if episode not in book.entries:
            book.entries[episode] = Entry(episode=episode, key=episode, state=State.HELD)
    book.scanned += len(book.entries) - before + len(event.impossible)
    for name in event.impossible:
        text = f"{name!r} cannot be an episode's id: letters, digits and ._- only, at most 200, a letter or digit first"
        commands.append(Quarantine(name, None, text, ""))
    if event.complete:
        for episode in [name for name in book.entries if name not in seen]:
            if book.entries[episode].state not in CLAIMED:  # a worker's will say what is wrong
                book.move(book.entries[episode], State.GONE)


def _measured(book: Book, event: Measured) -> None:
    entry = book.entries.get(event.episode)
    if entry is not None:
        entry.frames = max(1, event.frames)


def _left(book: Book, event: WorkerLeft, commands: list[Command]) -> None:
    had = [book.entries[episode] for episode in book.workers.pop(event.worker, set())]
    book.loads.pop(event.worker, None)
    book.shares.pop(event.worker, None)
    book.leaving.discard(event.worker)
    at = [entry for entry in had if entry.state in (State.PACKING, State.SHIPPING)]
    for entry in had:
        if book.breaker.probe == entry.episode:
            book.breaker.probe = None
        entry.worker = None
        if not event.died or entry not in at:
            book.move(entry, State.READY)
            continue
        entry.kills += 1
        report: dict[str, object] = {"episode": entry.episode, "stage": str(entry.state), "error": event.error}
        if entry.kills >= book.policy.poison_after:
            text = f"{entry.kills} workers died at this episode, the last time: {event.error}"
            commands.append(Quarantine(entry.episode, None, text, ""))
            book.move(entry, State.CONDEMNED)
        else:
            commands.append(Report("warning", "worker-died", report))
            book.move(entry, State.READY)


def _packed(book: Book, event: Packed) -> None:
    entry = book.entries[event.episode]
    entry.changes = 0
    book.packed.add(entry.episode)
    book.move(entry, State.SHIPPING)


CHANGES_BEFORE_HOLD = 3
"""Packs dropped in a row because the episode changed under them, before it is held."""


def _pack_failed(book: Book, event: PackFailed, now: float, commands: list[Command]) -> None:
    entry = book.entries[event.episode]
    book.packed.discard(event.episode)
    if book.breaker.probe == event.episode:
        book.breaker.probe = None  # it told nothing of the destination: another one will
    if event.code == "episode-changed":
        entry.changes += 1
        if entry.changes >= CHANGES_BEFORE_HOLD:
            text = f"it went on changing after its marker was set: {event.error}"
            commands.append(Hold(event.episode, "changing", None, text, "", event.fingerprint))
            book.move(entry, State.HELD)
            return
    _postpone(book, entry, event.error, now)
    fields: dict[str, object] = {"episode": event.episode, "code": event.code, "error": event.error}
    commands.append(Report("warning", "pack-failed", fields))


def _answered(book: Book, event: Answered, now: float, commands: list[Command]) -> None:
    entry, verdict = book.entries[event.episode], event.verdict
    _judge_destination(book, event, now, commands)
    if verdict.outcome is Outcome.SHIPPED and event.unchanged:
        assert verdict.receipt is not None
        commands.append(Retire(event.episode, verdict.receipt, event.manifest))
        book.move(entry, State.RETIRED)
    elif verdict.outcome is Outcome.CONFLICT:
        commands.append(_hold(event))
        book.move(entry, State.HELD)
    elif verdict.outcome is Outcome.REJECTED:
        commands.append(Quarantine(event.episode, verdict.status, verdict.error, verdict.body))
        book.move(entry, State.CONDEMNED)
    else:
        if verdict.outcome is Outcome.DAMAGED:
            commands.append(Discard(event.episode))
            book.packed.discard(event.episode)
        error = verdict.error
        if verdict.outcome is Outcome.SHIPPED:
            # The receiver holds what was packed, not what is here now: packed again, that will be a conflict.
            error = "the episode changed after it was packed; the receiver holds it as it was before"
        _postpone(book, entry, error, now, verdict.retry_after_s or 0.0)
        fields: dict[str, object] = {"episode": event.episode, "status": verdict.status, "error": error}
        commands.append(Report("warning", "attempt-failed", fields))


def _hold(event: Answered) -> Hold:
    verdict, manifest = event.verdict, event.manifest
    sha256 = manifest.artifact_sha256
    return Hold(event.episode, "conflict", verdict.status, verdict.error, verdict.body, manifest.fingerprint, sha256)


WELL = frozenset({Outcome.SHIPPED, Outcome.CONFLICT, Outcome.REJECTED})
"""Outcomes that only a destination in order can give."""


def _judge_destination(book: Book, event: Answered, now: float, commands: list[Command]) -> None:
    """The circuit breaker: a verdict on the episode proves the destination well, a fault of its own pauses it."""
    breaker, verdict, policy = book.breaker, event.verdict, book.policy
    probing = breaker.probe == event.episode
    if probing:
        breaker.probe = None
    if verdict.outcome in WELL:
        if breaker.paused:
            commands.append(Report("info", "destination-well", {"after": breaker.reason}))
        book.breaker = Breaker()
        return
    if verdict.scope is Scope.EPISODE:
        return
    if verdict.scope is Scope.NETWORK:
        breaker.faults += 1
        if breaker.faults < policy.pause_after and not probing:
            return
    if breaker.paused and not probing:
        return  # one of those under way when it was paused says the same again
    breaker.pause_s = min(max(breaker.pause_s * 2, policy.pause_min_s), policy.pause_max_s)
    breaker.paused = True
    breaker.until = now + max(breaker.pause_s, verdict.retry_after_s or 0.0)
    breaker.reason = verdict.error
    for_s = round(breaker.until - now, 1)
    fields: dict[str, object] = {"status": verdict.status, "error": verdict.error, "for_s": for_s}
    commands.append(Report("error", "destination-paused", fields))


def _returned(book: Book, event: Returned) -> None:
    if book.breaker.probe == event.episode:
        book.breaker.probe = None
    book.move(book.entries[event.episode], State.READY)


def _released(book: Book, event: Released, commands: list[Command]) -> None:
    entry = book.entries.get(event.episode)
    if entry is None:
        _found(book, Found([(event.key, event.episode)], complete=False), commands)
    elif entry.state in (State.HELD, State.WAITING):
        entry.key = event.key
        entry.attempts = entry.changes = entry.kills = 0
        book.move(entry, State.READY)


def _budget(book: Book, event: Budget, commands: list[Command]) -> None:
    """Said in the log when giving way begins, when packing pauses or goes on, and when all is as it was."""
    before, book.budget = book.budget, event
    cores, most = event.cores, book.policy.cores
    if cores >= most > before.cores:
        commands.append(Report("info", "no-longer-giving-way", {"cores": cores}))
    elif cores < most and (before.cores >= most or (cores == 0) != (before.cores == 0)):
        name = "giving-way" if cores else "packing-paused"
        commands.append(Report("info", name, {"cores": cores, "of": most, "why": event.why}))


def _postpone(book: Book, entry: Entry, error: str, now: float, at_least_s: float = 0.0) -> None:
    """The episode's own retry: later and later, from pause_min_s to pause_max_s."""
    book.transient += 1
    entry.attempts += 1
    entry.error = error
    pause_s = min(book.policy.pause_min_s * 2.0 ** min(entry.attempts - 1, 30), book.policy.pause_max_s)
    entry.not_before = now + max(pause_s, at_least_s)
    book.move(entry, State.WAITING)


def _wake(book: Book, now: float) -> None:
    """What has waited long enough is ready. In a single pass nothing is attempted twice."""
    if book.policy.once:
        return
    while (due := _next_alarm(book)) is not None and due.not_before <= now:
        book.move(due, State.READY)


def _next_alarm(book: Book) -> Entry | None:
    """The WAITING entry whose time comes first. Alarms that no longer mean anything are dropped on the way."""
    while book.alarms:
        time_s, episode = book.alarms[0]
        entry = book.entries.get(episode)
        if entry is not None and entry.state is State.WAITING and entry.not_before == time_s:
            return entry
        heapq.heappop(book.alarms)
    return None


def next_wake(book: Book) -> float | None:
    """When, on ``decide``'s clock, time alone will change something; None: never."""
    waiting = _next_alarm(book)
    times = [] if waiting is None else [waiting.not_before]
    if book.breaker.paused and book.breaker.probe is None and book.ready:
        times.append(book.breaker.until)
    return min(times, default=None)


def _assign(book: Book, now: float, commands: list[Command]) -> None:
    """Give ready episodes, in order, to the workers with the least to do, until nobody has room."""
    breaker = book.breaker
    if not book.ready or book.draining:
        return
    loads = {worker: _load(book, worker) for worker in book.workers if worker not in book.leaving}
    while book.ready:
        if breaker.paused and (breaker.probe is not None or now < breaker.until or book.policy.once):
            return
        entry = _next(book)
        if entry is None:
            return
        if entry.frames is None:
            # Only when somebody could take it: its size is not asked for long before it matters.
            if any(_has_room(book, load, None) for load in loads.values()):
                ahead = (
                    book.ready[:MEASURE_AHEAD] if entry.episode == book.ready[0][1] else [(entry.key, entry.episode)]
                )
                commands.extend(Measure(episode) for _, episode in ahead if book.entries[episode].frames is None)
            return
        free = [worker for worker, load in loads.items() if _has_room(book, load, entry)]
        if not free:
            return
        worker = min(free, key=lambda number: (loads[number].frames, number))
        book.move(entry, State.QUEUED)
        entry.worker = worker
        entry.claimed_at = now
        book.workers[worker].add(entry.episode)
        loads[worker].add(entry)
        if breaker.paused:
            breaker.probe = entry.episode
        commands.append(Assign(worker, entry.episode, first_attempt=entry.attempts == 0 and entry.kills == 0))


def _next(book: Book) -> Entry | None:
    """The ready episode whose turn it is: while packing is paused, the first that only has to be shipped."""
    if book.budget.cores or not book.restrained:
        return book.entries[book.ready[0][1]]
    packed = [book.entries[episode] for episode in book.packed]
    ready = [entry for entry in packed if entry.state is State.READY]
    return min(ready, key=lambda entry: (entry.key, entry.episode), default=None)


def _load(book: Book, worker: int) -> Load:
    load = book.loads.get(worker)
    if load is None:
        load = book.loads[worker] = Load(worker)
        for episode in book.workers[worker]:
            load.add(book.entries[episode])
    return load


def _has_room(book: Book, load: Load, entry: Entry | None) -> bool:
    """Whether the worker of ``load`` may be given ``entry`` (None: any at all) now.

    A large episode goes to a worker with nothing to pack; small ones may queue. A suspect (a worker died at it)
    is packed and shipped alone, so that a second death convicts nobody else. What ships bounds what is packed:
    the outbox does not grow faster than the link takes it.
    """
    if load.suspect or (entry is not None and entry.kills and (load.packing or load.shipping)):
        return False
    if load.shipping >= book.policy.in_flight:
        return False
    if not load.packing:
        if not book.restrained or (entry is not None and entry.episode in book.packed):
            return True
        return sum(1 for other in book.workers if _load(book, other).frames) < book.budget.cores
    if book.restrained and not book.shares.get(load.worker):
        return False
    small = load.small and (entry is None or entry.frames == 1)
    return small and load.packing < QUEUE_DEPTH and len(book.workers) * load.packing <= len(book.ready)


def share_cores(cores: int, frames: Mapping[int, int], most_threads: int = 1 << 20) -> dict[int, int]:
    """The core budget: threads for each packing worker, from the frames it has to pack.

    Each gets one; what is left goes, one by one, to the worker with the most frames a thread, never more
    threads than frames or than ``most_threads``: many small episodes = N workers x 1 thread, one huge one = every core.
    """
    shares = dict.fromkeys(frames, 1)
    for _ in range(cores - len(frames)):
        hungry = [worker for worker in frames if shares[worker] < min(frames[worker], most_threads)]
        if not hungry:
            break
        shares[max(hungry, key=lambda worker: frames[worker] / shares[worker])] += 1
    return shares


def _share(book: Book, commands: list[Command]) -> None:
    loads = {worker: _load(book, worker).frames for worker in book.workers}
    frames = {worker: load for worker, load in loads.items() if load}
    cores = book.policy.cores
    paused: dict[int, int] = {}
    if book.restrained:
        # Fewer cores than workers: those that pack go on, so that what is begun comes to its end; the others pause.
        cores = book.budget.cores
        order = sorted(frames, key=lambda worker: (not book.shares.get(worker), worker))
        paused = dict.fromkeys(order[cores:], 0)
        frames = {worker: frames[worker] for worker in order[:cores]}
    for worker, threads in (share_cores(cores, frames, book.policy.most_threads) | paused).items():
        if book.shares.get(worker) != threads:
            book.shares[worker] = threads
            commands.append(Share(worker, threads))
