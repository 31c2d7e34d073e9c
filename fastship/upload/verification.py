"""`reread`: the destination is asked to read again what it stored (docs/protocol.md, Verification).

What always holds: an answer is believed only when it is a whole document about the episode that was asked for; a fault
of the destination or of the network is never taken for one of an episode, but ends the asking.

The loop is `download`'s, too: `inquire` carries any `Inquiry` to its end. It runs in a thread of its own, because an
interruption (Ctrl-C) that falls into one of libcurl's callbacks would be printed by it and lost.

Imports ``course``, ``curl``, ``native`` and ``verdict``; ``download`` imports it, ``custody`` through the package.
"""

from __future__ import annotations

import heapq
import queue
import random
import threading
import time
from collections.abc import Generator, Iterable, Iterator
from typing import NamedTuple, Protocol, TypeAlias
from urllib.parse import quote

import msgspec

from fastship.episode import Outcome, Receipt, Scope, Verdict
from fastship.errors import DestinationError
from fastship.settings import DestinationSettings, UploadSettings
from fastship.upload.course import Answer, Body, Fault, Request, Taker
from fastship.upload.curl import Transfers
from fastship.upload.native import Retries, error_code
from fastship.upload.verdict import retry_after_s, row_of_fault, row_of_status, verdict_of_fault, verdict_of_status

AT_ONCE = 2
"""Artifacts that are asked for at once: as many as a receiver reads at once (`fastship.receiver.verification`)."""


class Reread(msgspec.Struct, frozen=True, kw_only=True):
    """What the receiver found, or what was found in what it sent (``read_from`` "download")."""

    episode: str
    verdict: str  # "sound", "mended", "rotted", "missing"; "failed": it could not tell
    error: str = ""
    artifact_sha256: str = ""
    artifact_bytes: int = 0
    content_blake3: str | None = None
    content_bytes: int | None = None
    read_from: str = ""  # "disk" or "file", or "download"
    cached_bytes: int | None = None
    began_at: str = ""
    ended_at: str = ""
    set_aside: str = ""
    receipt: Receipt | None = None


Findings: TypeAlias = Generator[Reread, None, None]
"""To be closed by who does not want all."""


class Again(NamedTuple):
    """Make the next request: at once, or after a ``fault`` with a wait, as often as `Retries` allows."""

    fault: Verdict | None = None
    asked_s: float | None = None  # what time the destination wants until then
    progressed: bool = False  # something came of it all the same
    found: Reread | None = None  # what it comes to if that was the last time; None: the asking ends


class Inquiry(Protocol):
    """What is asked about one episode: requests, and what their answers mean."""

    episode: str

    @property
    def taker(self) -> Taker | None: ...

    def request(self) -> Request: ...

    def read(self, result: Answer | Fault) -> Reread | Again:
        """Raises `DestinationError`."""


def reread(episodes: Iterable[str], destination: DestinationSettings, upload: UploadSettings) -> Findings:
    """Ask for each of ``episodes``, and say what the receiver found as it comes. Blocks; may be repeated.

    Raises `DestinationError` when the destination cannot be reached, refuses us, or cannot read again.
    """
    return inquire((_Asking(episode, destination, upload) for episode in episodes), destination, upload)


def inquire(inquiries: Iterable[Inquiry], destination: DestinationSettings, upload: UploadSettings) -> Findings:
    """Carry each to its end, `AT_ONCE` at a time. Raises `DestinationError`."""
    transfers: Transfers[str] = Transfers(destination, upload)
    told: queue.SimpleQueue[Reread | BaseException | None] = queue.SimpleQueue()
    left = threading.Event()

    def run() -> None:
        try:
            for found in _inquire(iter(inquiries), transfers, upload, left):
                told.put(found)
            told.put(None)
        except BaseException as error:  # raised again where it is waited for, whatever it is
            told.put(error)

    thread = threading.Thread(target=run, name="fastship-verify", daemon=True)
    thread.start()
    try:
        while (one := told.get()) is not None:
            if isinstance(one, BaseException):
                raise one
            yield one
    finally:
        left.set()
        transfers.wake()
        thread.join()
        transfers.close()


def _inquire(
    pending: Iterator[Inquiry], transfers: Transfers[str], upload: UploadSettings, left: threading.Event
) -> Iterator[Reread]:
    """Until all is told, or nobody waits for it any more."""
    under_way: dict[str, tuple[Inquiry, Retries]] = {}
    due: list[tuple[float, str]] = []
    while not left.is_set():
        while len(under_way) < AT_ONCE and (inquiry := next(pending, None)) is not None:
            under_way[inquiry.episode] = inquiry, Retries(upload, random.random)
            heapq.heappush(due, (0.0, inquiry.episode))
        if not under_way:
            return
        now = time.monotonic()
        while due and due[0][0] <= now:
            episode = heapq.heappop(due)[1]
            inquiry = under_way[episode][0]
            transfers.start(episode, inquiry.request(), -1, inquiry.taker)
        for episode, result, _ in transfers.poll(due[0][0] - now if due else None):
            inquiry, retries = under_way[episode]
            found = inquiry.read(result)
            if isinstance(found, Again):
                if found.progressed:
                    retries.progressed()
                seconds = 0.0 if found.fault is None else retries.next_wait_s(found.asked_s)
                if seconds is not None:
                    heapq.heappush(due, (time.monotonic() + seconds, episode))
                    continue
                if found.found is None:
                    assert found.fault is not None
                    raise unanswered(episode, found.fault)
                found = found.found
            del under_way[episode]
            yield found


class _Asking:
    """That the receiver reads an episode's artifact again."""

    taker: Taker | None = None

    def __init__(self, episode: str, destination: DestinationSettings, upload: UploadSettings) -> None:
        self.episode = episode
        self._url = f"{destination.url.rstrip('/')}/v1/verifications/{quote(episode, safe='')}"
        self._upload = upload

    def request(self) -> Request:
        timeout_s = self._upload.answer_timeout_s
        return Request(method="POST", url=self._url, body=Body(), answer_timeout_s=timeout_s, alive=True)

    def read(self, result: Answer | Fault) -> Reread | Again:
        if isinstance(result, Fault):
            return after_fault(self.episode, result)
        if result.status == 200:
            try:
                found = msgspec.json.decode(result.body, type=Reread)
            except (msgspec.MsgspecError, UnicodeDecodeError):
                found = None
            if found is not None and found.episode == self.episode:
                if found.verdict != "failed":
                    return found
                fault = Verdict(outcome=Outcome.TRANSIENT, scope=Scope.EPISODE, error=found.error)
                return Again(fault, found=found)
            raise _unable(f"it answers {result.status} and something that is not about {self.episode}")
        if result.status == 404 and error_code(result) == "not-stored":
            return Reread(episode=self.episode, verdict="missing", error="it is not stored there")
        if result.status in (404, 405, 501) or result.status // 100 == 2:
            raise _unable(f"it answers {result.status} to that")
        return after_refusal(self.episode, result)


def after_fault(episode: str, fault: Fault, *, progressed: bool = False) -> Again:
    """Raises `DestinationError` where asking again is in vain."""
    verdict = verdict_of_fault(fault)
    if not row_of_fault(fault).retried:
        raise unanswered(episode, verdict)
    return Again(verdict, progressed=progressed)


def after_refusal(episode: str, answer: Answer) -> Again:
    """Raises `DestinationError` where asking again is in vain."""
    verdict = verdict_of_status(answer)
    if not row_of_status(answer).retried:
        raise unanswered(episode, verdict)
    return Again(verdict, retry_after_s(answer))


def unanswered(episode: str, verdict: Verdict, *, remedy: str = "") -> DestinationError:
    return DestinationError(
        f"the destination cannot be asked about {episode}: {verdict.error}",
        remedy=remedy or "nothing is known of what it has; mend that, and ask again",
    )


def _unable(how: str) -> DestinationError:
    return DestinationError(
        f"the destination cannot read again what it stored: {how}",
        remedy="if it is not fastship's receiver, or an older one: fastship verify --download fetches what it has and "
        "looks at it here; else see destination.url",
    )
