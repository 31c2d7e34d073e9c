"""`download`: what the destination stored is fetched and looked at here, for servers that cannot read again themselves.

One GET each, digested as it comes; nothing of it is kept. What always holds:

- an artifact is called right only when every byte of it came and their SHA-256 is the receipt's;
- a download that was cut goes on where it was with Range, but only with If-Range and a strong validator (RFC 9110,
  13.1.5), so that no two versions are ever digested as one; without one, or where the answer is not just the rest
  that was asked for, it begins at 0;
- what is wrong is fetched a second time, in full, and its content digested, before anything is said of it: so the
  line's fault is not called the server's, and what rotted (it does not decompress) is told from another's artifact;
- a fault of the destination or of the network is never taken for one of an episode, but ends the asking.

Memory: one piece of 16 KiB, and in the second reading what `ArrivingContent` needs.

Imports ``course``, ``native``, ``verdict``, ``verification``; ``custody`` imports it through the package.
"""

from __future__ import annotations

import email.utils
import hashlib
import re
from collections.abc import Iterable

import msgspec

from fastship.episode import Outcome, Scope, Verdict, now_wall
from fastship.errors import ArtifactError, DestinationError
from fastship.frames import ArrivingContent
from fastship.settings import DestinationSettings, UploadSettings
from fastship.upload.course import Answer, Fault, Request
from fastship.upload.native import episode_url, error_code
from fastship.upload.verdict import verdict_of_misbehaviour, verdict_of_status
from fastship.upload.verification import Again, Findings, Reread, after_fault, after_refusal, inquire, unanswered

_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-[0-9]{1,18}/([0-9]{1,18}|\*)")


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """An episode, and what its receipt says of the artifact; empty: there is no receipt."""

    episode: str
    artifact_sha256: str = ""
    artifact_bytes: int = 0


def download(wanted: Iterable[Wanted], destination: DestinationSettings, upload: UploadSettings) -> Findings:
    """Fetch each artifact, and say what it is. Blocks; may be repeated; keeps to ``upload.bandwidth``.

    "sound" is one that has the SHA-256 that is wanted, or whose content, then given, is sound. Raises
    `DestinationError` when the destination cannot be reached, refuses us, or gives out nothing.
    """
    return inquire((_Fetching(one, destination, upload) for one in wanted), destination, upload)


class _Fetching:
    """One artifact: the requests, and what came of them."""

    def __init__(self, wanted: Wanted, destination: DestinationSettings, upload: UploadSettings) -> None:
        self.episode = wanted.episode
        self.taker = self
        self._wanted = wanted
        self._url = episode_url(destination, wanted.episode)
        self._plain = destination.proof == "status"
        self._upload = upload
        self._began_at = now_wall()
        self._earlier = ""  # the SHA-256 of the first reading, which was not right
        self._again_whole(digest_content=not wanted.artifact_sha256)

    def _again_whole(self, *, digest_content: bool) -> None:
        """The next request begins at byte 0."""
        self._digest = hashlib.sha256()
        self._content = ArrivingContent() if digest_content else None
        self._at = 0  # bytes that were digested
        self._highest = 0  # of this reading, however often it began
        self._validator = ""  # what an If-Range may name
        self._total: int | None = None
        self._asked_at = 0  # from where on the request under way wants it
        self._odd = ""  # why its answer cannot be used

    def request(self) -> Request:
        fields = [("Accept-Encoding", "identity"), ("Cache-Control", "no-cache")]  # what is stored, and stored there
        if self._at and self._validator:
            fields += [("Range", f"bytes={self._at}-"), ("If-Range", self._validator)]
        else:
            self._restart()
        self._asked_at = self._at
        self._odd = ""
        timeout_s = self._upload.answer_timeout_s
        return Request(method="GET", url=self._url, fields=tuple(fields), answer_timeout_s=timeout_s)

    def begin(self, answer: Answer) -> bool:
        if answer.status == 206:
            self._odd = self._why_not_the_rest(answer)
            return not self._odd
        if answer.status != 200:
            return False
        self._restart()
        length = answer.field("Content-Length") or ""
        self._total = int(length) if re.fullmatch(r"[0-9]{1,18}", length) else None
        self._validator = _strong_validator(answer)
        return True

    def take(self, piece: bytes) -> None:
        self._digest.update(piece)
        if self._content is not None:
            self._content.take(piece)
        self._at += len(piece)

    def read(self, result: Answer | Fault) -> Reread | Again:
        odd = self._odd
        if isinstance(result, Answer) and result.status == 416:
            odd = "status 416: the rest of what it had is not there"
        if odd:
            self._restart()
            fault = Verdict(outcome=Outcome.TRANSIENT, scope=Scope.DESTINATION, error=odd)
            why = f"it cannot be fetched whole: {odd}"
            return Again(fault, found=Reread(episode=self.episode, verdict="failed", error=why))
        if isinstance(result, Fault):
            progressed, self._highest = self._at > self._highest, max(self._at, self._highest)
            return after_fault(self.episode, result, progressed=progressed)
        if result.status == 206 and self._total is not None and self._at < self._total:  # it gives so much at once
            if self._at > self._asked_at:
                return Again(progressed=True)
            return Again(verdict_of_misbehaviour(result, "status 206 without a byte"))
        if result.status in (200, 206):
            return self._judge(result)
        if result.status in (404, 410) and (self._plain or error_code(result) == "not-found"):
            return self._found("missing", f"it is not stored there (status {result.status})")
        if result.status in (404, 405, 410, 501) or result.status // 100 == 2:
            raise _ungiven(f"it answers {result.status} to a GET of {self.episode}")
        if result.status == 403:
            remedy = "see the token's rights there; S3 says so, too, of what is not there, to whom it does not let list"
            raise unanswered(self.episode, verdict_of_status(result), remedy=remedy)
        return after_refusal(self.episode, result)

    def _restart(self) -> None:
        if self._at:
            highest = self._highest
            self._again_whole(digest_content=self._content is not None)
            self._highest = highest

    def _why_not_the_rest(self, answer: Answer) -> str:
        """Why a 206 is not what follows on the bytes that came: one sentence, or ""."""
        range_ = _CONTENT_RANGE.fullmatch(answer.field("Content-Range") or "")
        if not self._asked_at or range_ is None or int(range_[1]) != self._at:
            return f"status 206 is not about the rest, from byte {self._asked_at} on, that was asked for"
        if self._total is not None and range_[2] not in ("*", str(self._total)):
            return f"it had {self._total} bytes, and now {range_[2]}"
        if answer.field("ETag") not in (None, self._validator) and self._validator.startswith('"'):
            return "it was another one than before, by its ETag"
        return ""

    def _judge(self, answer: Answer) -> Reread | Again:
        """All of it has come."""
        sha256, earlier = self._digest.hexdigest(), self._earlier
        if sha256 == self._wanted.artifact_sha256:
            return self._found("sound")
        content, fault = None, ""
        if self._content is not None:
            try:
                content = self._content.end()
                if self._at < self._wanted.artifact_bytes and not self._content.has_table:
                    content, fault = None, "it ends without its seek table"
            except ArtifactError as error:
                fault = error.message
                if not self._content.has_begun and (answer.field("Content-Type") or "").startswith("text/html"):
                    raise _ungiven(
                        f"it answers {answer.status} and a page (text/html) to a GET of {self.episode}"
                    ) from None
        if not earlier and content is None:
            self._earlier = sha256
            self._again_whole(digest_content=True)
            return Again()
        if earlier and sha256 != earlier:
            why = f"twice it came otherwise, and both times not as shipped: SHA-256 {earlier}, then {sha256}"
            return self._found("failed", why)
        if content is None:
            return self._found("rotted", f"{self._difference(sha256)}: {fault}")
        found = self._found("sound")
        return msgspec.structs.replace(found, content_blake3=content.blake3, content_bytes=content.bytes)

    def _difference(self, sha256: str) -> str:
        shipped = self._wanted.artifact_bytes
        if self._wanted.artifact_sha256 and self._at != shipped:
            return f"{self._at} bytes are there, {shipped} were shipped"
        return f"its {self._at} bytes have SHA-256 {sha256} there"

    def _found(self, verdict: str, error: str = "") -> Reread:
        missing = verdict == "missing"
        return Reread(
            episode=self.episode,
            verdict=verdict,
            error=error,
            artifact_sha256="" if missing else self._digest.hexdigest(),
            artifact_bytes=0 if missing else self._at,
            read_from="" if missing else "download",
            began_at=self._began_at,
            ended_at=now_wall(),
        )


def _strong_validator(answer: Answer) -> str:
    """What If-Range may name: a strong entity tag, else a date a second older than the answer (RFC 9110, 8.8.2.2)."""
    tag = answer.field("ETag")
    if tag is not None:
        return tag if re.fullmatch(r'"[\x21\x23-\x7e]*"', tag) else ""
    modified = answer.field("Last-Modified") or ""
    try:
        then = email.utils.parsedate_to_datetime(modified)
        now = email.utils.parsedate_to_datetime(answer.field("Date") or "")
        return modified if (now - then).total_seconds() >= 1 else ""
    except (TypeError, ValueError):  # ValueError: no date; TypeError: one of them without a zone
        return ""


def _ungiven(how: str) -> DestinationError:
    return DestinationError(
        f"the destination does not give out what it stored: {how}",
        remedy="see destination.url, and whether it allows GET there; nothing is known of what it has",
    )
