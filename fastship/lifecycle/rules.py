"""The rules: ``decide(book, event, now) -> commands``.

What always holds: no command retires an episode without a receipt; only a verdict of scope EPISODE, a poison
episode or an impossible name quarantines; a paused destination has at most one episode trying it.

Pure: no I/O, no clock. Imports ``episode`` and all of ``lifecycle`` but ``giveway``; the supervisor imports it.
"""

from __future__ import annotations

import bisect

from fastship.episode import Outcome, Scope
from fastship.lifecycle.book import Book, Breaker, Entry
from fastship.lifecycle.events import (
    Answered,
    Budget,
    Command,
    Discard,
    Event,
    Found,
    Gone,
    Hold,
    Measured,
    PackBegan,
    Packed,
    PackFailed,
    Quarantine,
    Recall,
    Released,
    Report,
    Retire,
    Returned,
    Room,
    Tick,
    Undone,
    WorkerJoined,
    WorkerLeaving,
    WorkerLeft,
)
from fastship.lifecycle.sharing import give_out, share
from fastship.lifecycle.states import CLAIMED, State


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
        case Undone():
            _undone(book, event, now)
        case Room():
            _room(book, event, now)
        case Tick():
            pass
    if more:
        return commands
    _wake(book, now)
    give_out(book, now, commands)
    share(book, commands)
    return commands


def _found(book: Book, event: Found, commands: list[Command]) -> None:
    seen = {episode for _, episode in event.ready} | set(event.held)
    new: list[tuple[str, str]] = []
    before = len(book.entries)
    in_order = True
    for key, episode in event.ready:
        entry = book.entries.get(episode)
        if entry is None:
            book.entries[episode] = Entry(episode=episode, key=key, state=State.READY)
            new.append((key, episode))
        elif entry.state is State.HELD:  # its hold is gone
            entry.key = key
            book.move(entry, State.READY)
        elif entry.key != key:  # `spool.order` was set otherwise
            entry.key, in_order = key, False
    if not in_order:
        book.ready = sorted((book.entries[episode].key, episode) for _, episode in book.ready)
    if len(new) > 32:  # one sort instead of many insertions into a long list
        book.ready.extend(new)
        book.ready.sort()
    else:
        for item in new:
            bisect.insort(book.ready, item)
    for episode in event.held:
        if episode not in book.entries:
            book.entries[episode] = Entry(episode=episode, key=episode, state=State.HELD)
    for episode in event.packed:
        entry = book.entries.get(episode)
        if entry is not None and entry.state in (State.READY, State.WAITING, State.HELD):
            book.packed.add(episode)
    book.scanned += len(book.entries) - before + len(event.impossible)
    for name in event.impossible:
        text = f"{name!r} cannot be an episode's id: letters, digits and ._- only, at most 200, a letter or digit first"
        commands.append(Quarantine(name, None, text, ""))
    if event.complete:
        for episode in book.undone.keys() - seen:
            del book.undone[episode]
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
    entry.wants_room = False
    book.packed.add(entry.episode)
    book.move(entry, State.SHIPPING)


CHANGES_BEFORE_HOLD = 3
"""Packs dropped in a row because the episode changed under them, before it is held."""


FOR_WANT_OF_ROOM = frozenset({"disk-short", "outbox-full"})
"""Codes of failed packs that are tried again as soon as the disk has room."""


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
    said, entry.wants_room = entry.wants_room, event.code in FOR_WANT_OF_ROOM
    _postpone(book, entry, event.error, now, own_fault=True)
    if not (said and entry.wants_room):  # a full disk would fill the log as well
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
        own_fault = verdict.scope is Scope.EPISODE
        _postpone(book, entry, event.error, now, verdict.retry_after_s or 0.0, own_fault=own_fault)
        fields: dict[str, object] = {"episode": event.episode, "status": verdict.status, "error": event.error}
        commands.append(Report("warning", "attempt-failed", fields))


def _hold(event: Answered) -> Hold:
    verdict, manifest = event.verdict, event.manifest
    sha256 = manifest.artifact_sha256
    return Hold(event.episode, "conflict", verdict.status, verdict.error, verdict.body, manifest.fingerprint, sha256)


WELL = frozenset({Outcome.SHIPPED, Outcome.CONFLICT, Outcome.REJECTED})
"""Outcomes that only a destination in order can give."""


def _judge_destination(book: Book, event: Answered, now: float, commands: list[Command]) -> None:
    """The circuit breaker: a verdict on the episode proves the destination well, a fault of its own pauses it.

    While it is paused only the probe's verdict proves so much: another attempt was let in before the pause, by a token
    that may be no good any more. But then it is worth to try at once. What workers have not begun they give back: the
    whole line of each would be refused like the first.
    """
    breaker, verdict, policy = book.breaker, event.verdict, book.policy
    probing = breaker.probe == event.episode
    if probing:
        breaker.probe = None
    if verdict.outcome in WELL:
        if breaker.paused and not probing and not policy.once:
            breaker.until = min(breaker.until, now)
            return
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
    if not breaker.paused and not policy.once:
        commands.extend(Recall(worker) for worker in book.workers if worker not in book.leaving)
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


def _undone(book: Book, event: Undone, now: float) -> None:
    """Offered again later and later: the receiver will answer the same, and the disk perhaps something else."""
    entry = book.entries.get(event.episode)
    if entry is None:  # it left the book when it was decided
        entry = Entry(episode=event.episode, key=event.key, state=State.SHIPPING)
        entry.attempts = book.undone.get(event.episode, 0)
        book.entries[event.episode] = entry
    elif entry.state is not State.HELD:
        return  # a look came between: it has its turn already
    _postpone(book, entry, event.error, now, own_fault=True)
    book.undone[event.episode] = entry.attempts


def _budget(book: Book, event: Budget, commands: list[Command]) -> None:
    """Said in the log when giving way begins, when packing pauses or goes on, and when all is as it was."""
    before, book.budget = book.budget, event
    cores, most = event.cores, book.policy.cores
    if cores >= most > before.cores:
        commands.append(Report("info", "no-longer-giving-way", {"cores": cores}))
    elif cores < most and (before.cores >= most or (cores == 0) != (before.cores == 0)):
        name = "giving-way" if cores else "packing-paused"
        commands.append(Report("info", name, {"cores": cores, "of": most, "why": event.why}))


def _room(book: Book, event: Room, now: float) -> None:
    before, book.room = book.room, event
    if before.short and not event.short:
        for entry in [book.entries[episode] for episode in book.waiting]:
            if entry.wants_room:
                entry.not_before = now
                book.move(entry, State.READY)


def _postpone(book: Book, entry: Entry, error: str, now: float, at_least_s: float = 0.0, *, own_fault: bool) -> None:
    """The episode's own retry: later and later, from pause_min_s to pause_max_s."""
    book.transient += 1
    entry.attempts += 1
    entry.error, entry.own_fault = error, own_fault
    pause_s = min(book.policy.pause_min_s * 2.0 ** min(entry.attempts - 1, 30), book.policy.pause_max_s)
    entry.not_before = now + max(pause_s, at_least_s)
    book.move(entry, State.WAITING)


def _wake(book: Book, now: float) -> None:
    """What has waited long enough is ready. In a single pass nothing is attempted twice."""
    if book.policy.once:
        return
    while (due := book.next_alarm()) is not None and due.not_before <= now:
        book.move(due, State.READY)


def next_wake(book: Book) -> float | None:
    """When, on ``decide``'s clock, time alone will change something; None: never."""
    waiting = book.next_alarm()
    times = [] if waiting is None else [waiting.not_before]
    if book.breaker.paused and book.breaker.probe is None and book.ready:
        times.append(book.breaker.until)
    return min(times, default=None)
