"""`reread`: the destination is asked to read again what it stored (docs/protocol.md, Verification).

What always holds: an answer is believed only when it is a whole document about the episode that was asked for; a fault
of the destination or of the network is never taken for one of an episode, but ends the asking.

Imports ``course``, ``curl``, ``native`` and ``verdict``; ``custody`` imports it through the package.
"""

from __future__ import annotations

import heapq
import random
import time
from collections.abc import Iterable, Iterator
from urllib.parse import quote

import msgspec

from fastship.episode import Outcome, Receipt, Scope, Verdict
from fastship.errors import DestinationError
from fastship.settings import DestinationSettings, UploadSettings
from fastship.upload.course import Answer, Body, Fault, Request
from fastship.upload.curl import Transfers
from fastship.upload.native import Retries, error_code
from fastship.upload.verdict import retry_after_s, row_of_fault, row_of_status, verdict_of_fault, verdict_of_status

AT_ONCE = 2
"""Artifacts that are asked for at once: as many as a receiver reads at once (`fastship.receiver.verification`)."""


class Reread(msgspec.Struct, frozen=True, kw_only=True):
    """What the receiver found."""

    episode: str
    verdict: str  # "sound", "mended", "rotted", "missing"; "failed": it could not tell
    error: str = ""
    artifact_sha256: str = ""
    artifact_bytes: int = 0
    content_blake3: str | None = None
    content_bytes: int | None = None
    read_from: str = ""  # "disk" or "file"
    cached_bytes: int | None = None
    began_at: str = ""
    ended_at: str = ""
    set_aside: str = ""
    receipt: Receipt | None = None


def reread(episodes: Iterable[str], destination: DestinationSettings, upload: UploadSettings) -> Iterator[Reread]:
    """Ask for each of ``episodes``, and say what the receiver found as it comes. Blocks; may be repeated.

    Raises `DestinationError` when the destination cannot be reached, refuses us, or cannot read again.
    """
    transfers: Transfers[str] = Transfers(destination, upload)
    pending = iter(episodes)
    retries: dict[str, Retries] = {}
    due: list[tuple[float, str]] = []
    try:
        while True:
            while len(retries) < AT_ONCE and (episode := next(pending, None)) is not None:
                retries[episode] = Retries(upload, random.random)
                due.append((0.0, episode))
            if not retries:
                return
            now = time.monotonic()
            while due and due[0][0] <= now:
                episode = heapq.heappop(due)[1]
                transfers.start(episode, _request(episode, destination, upload), -1)
            for episode, result, _ in transfers.poll(due[0][0] - now if due else None):
                found, verdict, asked_s = _read(episode, result)
                seconds = retries[episode].next_wait_s(asked_s) if verdict is not None else None
                if seconds is None:
                    if found is None:
                        assert verdict is not None
                        raise _unanswered(episode, verdict)
                    del retries[episode]
                    yield found
                    continue
                heapq.heappush(due, (time.monotonic() + seconds, episode))
    finally:
        transfers.close()


def _request(episode: str, destination: DestinationSettings, upload: UploadSettings) -> Request:
    url = f"{destination.url.rstrip('/')}/v1/verifications/{quote(episode, safe='')}"
    return Request(method="POST", url=url, body=Body(), answer_timeout_s=upload.answer_timeout_s, alive=True)


def _read(episode: str, result: Answer | Fault) -> tuple[Reread | None, Verdict | None, float | None]:
    """What was found; and where it is worth to ask again, why, and what time the destination wants until then.

    Raises `DestinationError`.
    """
    if isinstance(result, Fault):
        verdict = verdict_of_fault(result)
        if not row_of_fault(result).retried:
            raise _unanswered(episode, verdict)
        return None, verdict, None
    if result.status == 200:
        try:
            found = msgspec.json.decode(result.body, type=Reread)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            found = None
        if found is not None and found.episode == episode:
            if found.verdict != "failed":
                return found, None, None
            return found, Verdict(outcome=Outcome.TRANSIENT, scope=Scope.EPISODE, error=found.error), None
        raise _unable(f"it answers {result.status} and something that is not about {episode}")
    if result.status == 404 and error_code(result) == "not-stored":
        return Reread(episode=episode, verdict="missing", error="it is not stored there"), None, None
    if result.status in (404, 405, 501) or result.status // 100 == 2:
        raise _unable(f"it answers {result.status} to that")
    verdict = verdict_of_status(result)
    if not row_of_status(result).retried:
        raise _unanswered(episode, verdict)
    return None, verdict, retry_after_s(result)


def _unable(how: str) -> DestinationError:
    return DestinationError(
        f"the destination cannot read again what it stored: {how}",
        remedy="see destination.url; a server that is not fastship's receiver, or is older, has to be looked at there",
    )


def _unanswered(episode: str, verdict: Verdict) -> DestinationError:
    return DestinationError(
        f"the destination cannot be asked about {episode}: {verdict.error}",
        remedy="nothing is known of what it has; mend that, and ask again",
    )
