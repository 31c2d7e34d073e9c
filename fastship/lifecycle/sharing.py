"""Who packs what with how many cores: episodes are given out in order, and the core budget is divided.

What always holds: a paused destination has at most one episode trying it; an episode at which a worker died is alone
with its worker; nothing is given out to be packed while packing gives way to others on the host, and but for one at a
time while the disk is short.

Pure: no I/O, no clock. Imports ``book``, ``events`` and ``states``; ``rules`` calls it after every event.
"""

from __future__ import annotations

from collections.abc import Mapping

from fastship.lifecycle.book import Book, Entry, Load
from fastship.lifecycle.events import Assign, Command, Measure, Share
from fastship.lifecycle.states import State

QUEUE_DEPTH = 16
"""Small episodes given to a worker ahead, so that it never waits for the supervisor between two of them: tiny ones are
packed in about 10 ms."""

MEASURE_AHEAD = 8  # episodes measured at once when the next one has no size yet


def give_out(book: Book, now: float, commands: list[Command]) -> None:
    """Give ready episodes, in order, to the workers with the least to do, until nobody has room."""
    breaker = book.breaker
    if not book.ready or book.draining:
        return
    loads = {worker: book.load(worker) for worker in book.workers if worker not in book.leaving}
    while book.ready:
        if breaker.paused and (breaker.probe is not None or now < breaker.until or book.policy.once):
            return
        entry = book.next_ready()
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
        room = book.room
        floor_bytes = room.lent_floor_bytes if room.short and book.lends else room.floor_bytes
        book.move(entry, State.QUEUED)
        entry.worker = worker
        entry.claimed_at = now
        book.workers[worker].add(entry.episode)
        loads[worker].add(entry)
        if breaker.paused:
            breaker.probe = entry.episode
        first_attempt = entry.attempts == 0 and entry.kills == 0
        commands.append(Assign(worker, entry.episode, first_attempt, entry.frames, floor_bytes))


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
        return sum(1 for other in book.workers if book.load(other).frames) < book.budget.cores
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


def share(book: Book, commands: list[Command]) -> None:
    loads = {worker: book.load(worker).frames for worker in book.workers}
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
