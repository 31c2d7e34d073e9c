"""Counting what came of it: totals, recent results, and the `status.Snapshot` for eyes.

Decides nothing. Imports ``lifecycle``, ``status``; the supervisor's loop imports it.
"""

from __future__ import annotations

import heapq
import os
import time
from collections import deque
from collections.abc import Iterable

from fastship import status
from fastship.episode import Manifest, Outcome
from fastship.ipc import UnderWay
from fastship.lifecycle import Book, State
from fastship.lifecycle.events import Answered
from fastship.supervisor.crew import Hand

RECENT = 20


class Tally:
    """Of one run of the supervisor."""

    def __init__(self, url: str, *, once: bool) -> None:
        self.url = url
        self._once = once
        self._started = time.monotonic()
        self._started_wall = time.time()
        self._recent: deque[status.EpisodeResult] = deque(maxlen=RECENT)
        self._shipped = self._held = self._fatal = 0
        self._bytes_in = self._bytes_out = 0

    def retired(self, manifest: Manifest) -> None:
        self._shipped += 1
        self._bytes_in += manifest.content_bytes
        self._bytes_out += manifest.artifact_bytes

    def undone(self, book: Book, episode: str, error: str) -> None:
        """What was decided of it, the disk refused."""
        self._add(book, episode, "transient", error=error)

    def held(self, book: Book, episode: str, error: str) -> None:
        self._held += 1
        self._add(book, episode, "conflict", error=error)

    def quarantined(self, book: Book, episode: str, error: str) -> None:
        self._fatal += 1
        self._add(book, episode, "quarantined", error=error)

    def answered(self, book: Book, message: Answered) -> None:
        """A verdict, before the book hears of it; what is held or quarantined for it is counted then."""
        verdict = message.verdict
        if verdict.outcome is Outcome.SHIPPED and message.unchanged:
            self._add(book, message.episode, "shipped", manifest=message.manifest, resumed_at=verdict.resumed_at)
        elif verdict.outcome not in (Outcome.CONFLICT, Outcome.REJECTED):
            self._add(book, message.episode, "transient", manifest=message.manifest, error=message.error)

    def pack_failed(self, book: Book, episode: str, error: str) -> None:
        self._add(book, episode, "transient", error=error)

    def _add(
        self,
        book: Book,
        episode: str,
        outcome: str,
        *,
        manifest: Manifest | None = None,
        resumed_at: int = 0,
        error: str = "",
    ) -> None:
        entry = book.entries.get(episode)
        self._recent.append(
            status.EpisodeResult(
                episode=episode.encode("utf-8", "backslashreplace").decode(),
                outcome=outcome,
                bytes_in=manifest.content_bytes if manifest else 0,
                bytes_out=manifest.artifact_bytes if manifest else 0,
                seconds=time.monotonic() - entry.claimed_at if entry is not None and entry.claimed_at else 0.0,
                resumed_at=resumed_at,
                error=error,
            )
        )

    def totals(self, book: Book) -> status.PassResult:
        """Since the start. Of a single pass: what was not tried because the destination is paused failed, too."""
        untried = len(book.ready) if self._once and book.idle() else 0
        return status.PassResult(
            scanned=book.scanned,
            shipped=self._shipped,
            transient_failures=book.transient + untried,
            conflicts=book.count(State.HELD) if self._once else self._held,
            fatal=self._fatal,
            bytes_in=self._bytes_in,
            bytes_out=self._bytes_out,
            seconds=time.monotonic() - self._started,
        )

    def snapshot(
        self,
        book: Book,
        hands: Iterable[Hand],
        *,
        recording: int,
        draining: bool,
        host: status.HostStatus | None = None,
        disk: status.DiskStatus | None = None,
        retention: status.RetentionStatus | None = None,
    ) -> status.Snapshot:
        """Everything, now."""
        present = list(hands)
        breaker = book.breaker
        state = "up" if not breaker.paused else "probing" if breaker.probe is not None else "paused"
        retry_in_s = max(0.0, breaker.until - time.monotonic()) if breaker.paused else 0.0
        return status.Snapshot(
            pid=os.getpid(),
            started_at=self._started_wall,
            updated_at=time.time(),
            draining=draining,
            host=host,
            disk=disk,
            retention=retention,
            ready=len(book.ready) + len(book.waiting),
            recording=recording,
            held=book.count(State.HELD),
            totals=self.totals(book),
            destination=status.DestinationStatus(
                url=self.url, state=state, reason=breaker.reason, retry_in_s=retry_in_s
            ),
            progress=[_progress(hand, one) for hand in present for one in hand.under_way],
            recent=list(self._recent),
            waiting=_waiting(book),
            workers=[_worker(hand, book) for hand in present],
        )


def _progress(hand: Hand, one: UnderWay) -> status.EpisodeProgress:
    return status.EpisodeProgress(
        episode=one.episode,
        stage="shipping" if one.shipping else "packing",
        worker=hand.number,
        done_bytes=one.done_bytes,
        total_bytes=one.total_bytes,
        seconds=one.seconds,
        still_s=round(hand.still_s.get(one.episode, 0.0), 1),
    )


def _waiting(book: Book) -> list[status.WaitingEpisode]:
    now = time.monotonic()
    entries = (book.entries[episode] for episode in book.waiting)
    most = heapq.nlargest(RECENT, entries, key=lambda entry: (entry.attempts, entry.episode))
    return [
        status.WaitingEpisode(
            episode=entry.episode,
            attempts=entry.attempts,
            retry_in_s=round(max(0.0, entry.not_before - now), 1),
            error=entry.error,
        )
        for entry in most
    ]


def _worker(hand: Hand, book: Book) -> status.WorkerStatus:
    states = [book.entries[episode].state for episode in book.workers.get(hand.number, ())]
    return status.WorkerStatus(
        number=hand.number,
        pid=hand.pid,
        threads=book.shares.get(hand.number, 0),
        packing=sum(state is not State.SHIPPING for state in states),
        shipping=sum(state is State.SHIPPING for state in states),
    )
