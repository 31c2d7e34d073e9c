"""The native dialect: how fastship speaks to its own receiver (docs/protocol.md, ways 1 and 2).

Pure: ``prepare_*`` build a `Request`, `read_answer` says what an `Answer` asks for, and `native_upload` is the
course through them. What always holds in a course:

- it sends from the offset the receiver named last, never from below it, except when an artifact that arrived
  damaged is explicitly sent again from 0 (at most `RESTARTS` times);
- a request is repeated at most ``upload.retries`` times in a row without the receiver's offset reaching a new
  height, so every course ends, whatever is answered. This is the only place where requests are repeated;
- with ``destination.proof = "status"`` it only ever sends the artifact whole: a server that cannot name what it
  holds may take an empty creation for the episode.

Imports ``course``, ``verdict`` and what lies below ``upload``; the session imports it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Generator
from typing import TypeAlias
from urllib.parse import quote, urljoin, urlsplit, urlunsplit

import msgspec

from fastship import fields
from fastship.episode import Manifest, Outcome, Scope, Verdict
from fastship.settings import DestinationSettings, UploadSettings
from fastship.upload.course import (
    Answer,
    Artifact,
    Body,
    CheckArtifact,
    Checked,
    Course,
    Fault,
    Request,
    Result,
    Step,
    Wait,
)
from fastship.upload.verdict import (
    believed_receipt,
    read_proof,
    retry_after_s,
    row_of_fault,
    row_of_status,
    shipped,
    verdict_of_fault,
    verdict_of_misbehaviour,
    verdict_of_status,
)
from fastship.upload.webdav import find_directory, may_lack_directory

RESTARTS = 2
"""Times that an artifact is sent again from 0 because it arrived with a wrong digest and is right here."""

VERIFY_BYTES_PER_S = 20_000_000
"""After the last byte the receiver digests, decompresses and syncs: its answer is given 1 s more for each 20 MB."""

RETRY_AFTER_SPREAD = 0.25
"""A Retry-After is stretched by up to this part, so that all hosts it was told to do not come back at once."""


DIGEST_MISMATCH = "digest-mismatch"
"""The receiver's error code that tells a wrong digest from its other reasons for a 400 about an episode."""


CONTENT_MISMATCH = ("content-mismatch", "artifact-invalid")
"""Those that say what no artifact of ours can be: a bit of it, or of what was said of it, changed somewhere."""


class _ErrorBody(msgspec.Struct, frozen=True):
    code: str | None = None
    error: str = ""


class UploadPlace(msgspec.Struct, frozen=True):
    """Where an upload stands: its resource, the receiver's offset, and the most one append may carry."""

    url: str
    offset: int
    append_limit_bytes: int | None = None


class CreateAgain(msgspec.Struct, frozen=True):
    """The receiver lost or refused this append: ask it anew where the upload stands."""


class Mismatch(msgspec.Struct, frozen=True):
    """The receiver has it all, and its SHA-256 or (``content``) its content is not the one announced."""

    content: bool = False


class Final(msgspec.Struct, frozen=True):
    """The verdict on the episode."""


class Misbehaviour(msgspec.Struct, frozen=True):
    """The answer breaks the protocol."""

    error: str


Reading: TypeAlias = UploadPlace | CreateAgain | Mismatch | Final | Misbehaviour


def episode_url(destination: DestinationSettings, episode: str) -> str:
    return f"{destination.url.rstrip('/')}/v1/episodes/{quote(episode, safe='')}"


def prepare_whole(manifest: Manifest, destination: DestinationSettings, upload: UploadSettings) -> Request:
    """Way 1: the artifact in one PUT."""
    return Request(
        method="PUT",
        url=episode_url(destination, manifest.episode),
        fields=_episode_fields(manifest, destination),
        body=Body(0, manifest.artifact_bytes),
        answer_timeout_s=answer_timeout_s(manifest.artifact_bytes, upload),
    )


def prepare_creation(manifest: Manifest, destination: DestinationSettings, upload: UploadSettings) -> Request:
    """Way 2, first step: an empty PUT that makes the upload, or finds it and its offset again. May be repeated."""
    return Request(
        method="PUT",
        url=episode_url(destination, manifest.episode),
        fields=(
            *_episode_fields(manifest, destination),
            (fields.UPLOAD_DRAFT_INTEROP_VERSION, fields.INTEROP_VERSION),
            (fields.UPLOAD_COMPLETE, fields.format_boolean(False)),
            (fields.UPLOAD_LENGTH, str(manifest.artifact_bytes)),
        ),
        body=Body(),
        answer_timeout_s=answer_timeout_s(manifest.artifact_bytes, upload),
    )


def prepare_append(manifest: Manifest, place: UploadPlace, upload: UploadSettings) -> Request:
    """Way 2, the rest: from the receiver's offset on, as much as it takes at once. No Repr-Digest (RFC 9530, 3)."""
    rest = manifest.artifact_bytes - place.offset
    length = min(rest, place.append_limit_bytes or rest)
    return Request(
        method="PATCH",
        url=place.url,
        fields=(
            ("Content-Type", fields.PARTIAL_UPLOAD),
            (fields.UPLOAD_DRAFT_INTEROP_VERSION, fields.INTEROP_VERSION),
            (fields.UPLOAD_OFFSET, str(place.offset)),
            (fields.UPLOAD_COMPLETE, fields.format_boolean(length == rest)),
        ),
        body=Body(place.offset, length),
        answer_timeout_s=answer_timeout_s(manifest.artifact_bytes, upload),
    )


def prepare_proof(manifest: Manifest, destination: DestinationSettings, upload: UploadSettings) -> Request:
    """Ask what the receiver holds, after a success that did not say."""
    return Request(
        method="HEAD",
        url=episode_url(destination, manifest.episode),
        fields=(("Want-Repr-Digest", "sha-256=10"),),
        answer_timeout_s=answer_timeout_s(manifest.artifact_bytes, upload),
    )


def answer_timeout_s(artifact_bytes: int, upload: UploadSettings) -> float:
    return upload.answer_timeout_s + artifact_bytes / VERIFY_BYTES_PER_S


def read_answer(request: Request, answer: Answer, most_bytes: int, known_url: str | None) -> Reading:
    """What an answer to ``request`` asks for (docs/protocol.md, How the client reads an answer).

    ``most_bytes`` is all that the receiver can have of the artifact, ``known_url`` the upload's resource when an
    earlier answer named it. Raises nothing, whatever was answered.
    """
    appending = request.method == "PATCH"
    creating = not appending and request.body == Body()
    complete = fields.parse_boolean(answer.field(fields.UPLOAD_COMPLETE))
    offset = fields.parse_integer(answer.field(fields.UPLOAD_OFFSET))
    # A server of the draft need not repeat ?0 beside an offset; without both it is about the episode.
    about_upload = complete is False or (complete is None and offset is not None and (appending or creating))
    if about_upload and answer.status in (200, 201, 204):
        return _read_place(request, answer, offset or 0, most_bytes, known_url)
    if about_upload and answer.status == 409:
        return CreateAgain() if offset is None else _read_place(request, answer, offset, most_bytes, known_url)
    if about_upload and answer.status == 400:
        return (
            CreateAgain()
        )  # this append arrived damaged and was dropped: its offset is asked for and it is sent again
    if answer.status in (404, 410) and (about_upload or appending):
        return CreateAgain()  # the upload is gone, not the episode
    if answer.status == 400 and complete is True and error_code(answer) in (None, DIGEST_MISMATCH):
        return Mismatch()
    if answer.status == 422 and complete is True and error_code(answer) in CONTENT_MISMATCH:
        return Mismatch(content=True)
    return Final()


def verdict_of_final(answer: Answer, resumed_at: int) -> Verdict:
    """What a `Final` that is no success comes to."""
    verdict = verdict_of_status(answer, resumed_at)
    if answer.status // 100 == 5 and fields.parse_boolean(answer.field(fields.UPLOAD_COMPLETE)) is False:
        # Of this upload alone (another request took over, it is being verified): no reason to pause all.
        return msgspec.structs.replace(verdict, scope=Scope.NETWORK)
    return verdict


def error_code(answer: Answer) -> str | None:
    """The ``code`` of a JSON error body; None where it has none."""
    return _error_body(answer).code


def _error_body(answer: Answer) -> _ErrorBody:
    try:
        return msgspec.json.decode(answer.body, type=_ErrorBody)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return _ErrorBody()


def _read_place(request: Request, answer: Answer, offset: int, most_bytes: int, known_url: str | None) -> Reading:
    if offset > most_bytes:
        return Misbehaviour(f"the receiver claims {offset} bytes of an artifact of {most_bytes}")
    limit = fields.parse_limits(answer.field(fields.UPLOAD_LIMIT)).get("max-append-size") or None
    url = request.url if request.method == "PATCH" else known_url
    location = answer.field("Location")
    if location is not None:
        url = _at_the_destination(request.url, location)
        if url is None:
            return Misbehaviour(
                f"the upload's Location {location[:200]!r} is not at the destination: "
                "let the receiver answer a relative one"
            )
    if url is None:
        return Misbehaviour("the receiver made an upload without saying where (no Location)")
    return UploadPlace(url, offset, limit)


def _at_the_destination(base: str, location: str) -> str | None:
    """``location`` as a URL at the scheme, host and port of ``base``; None where it is not there or no URL.

    The token belongs to the destination: an upload that is somewhere else would take it there. The result is put
    together from the destination's own authority, so that no two readers of a crafted URL can differ on the host.
    """
    ports = {"http": 80, "https": 443}
    try:
        own, other = urlsplit(base), urlsplit(urljoin(base, location))
        same = (own.scheme, own.hostname) == (other.scheme, other.hostname)
        if not same or (own.port or ports.get(own.scheme)) != (other.port or ports.get(other.scheme)):
            return None
    except ValueError:
        return None
    path = other.path
    prefix = own.path.rpartition("/v1/")[0]
    if prefix and path.startswith("/v1/uploads/"):
        path = prefix + path  # a proxy took the prefix of destination.url off: the receiver does not know of it
    url = urlunsplit((own.scheme, own.netloc, path, other.query, ""))
    return url if re.fullmatch(r"[!-~]+", url) else None


def commit_fields(code_commit: str | None, destination: DestinationSettings) -> tuple[tuple[str, str], ...]:
    return ((destination.commit_field, code_commit),) if code_commit else ()


def _episode_fields(manifest: Manifest, destination: DestinationSettings) -> tuple[tuple[str, str], ...]:
    return (
        ("Content-Type", "application/zstd"),
        (fields.REPR_DIGEST, fields.format_digest("sha-256", manifest.artifact_sha256)),
        (fields.FASTSHIP_CONTENT_DIGEST, fields.format_digest("blake3", manifest.content_blake3)),
        (fields.FASTSHIP_CONTENT_LENGTH, str(manifest.content_bytes)),
        *commit_fields(manifest.code_commit, destination),
        (fields.FASTSHIP_EPISODE, manifest.episode),
    )


class Retries:
    """How often in a row, and after what wait, a request is repeated without progress."""

    def __init__(self, upload: UploadSettings, jitter: Callable[[], float]) -> None:
        self._upload = upload
        self._jitter = jitter  # uniform in [0, 1)
        self._failures = 0

    def progressed(self) -> None:
        self._failures = 0

    def next_wait_s(self, asked_s: float | None = None) -> float | None:
        """Count a failure; the seconds to wait before the next request, or None when it is enough.

        Full jitter between retry_min_s and a ceiling that doubles up to retry_max_s ("Exponential Backoff And
        Jitter", AWS Architecture Blog, 2015). ``asked_s`` is the destination's Retry-After: obeyed, and where it is
        longer than retry_max_s not waited for here, because the attempt would only hold a connection.
        """
        self._failures += 1
        if self._failures > self._upload.retries:
            return None
        if asked_s is not None:
            if asked_s > self._upload.retry_max_s:
                return None
            return asked_s * (1 + RETRY_AFTER_SPREAD * self._jitter())
        lowest = min(self._upload.retry_min_s, self._upload.retry_max_s)
        ceiling = min(self._upload.retry_max_s, self._upload.retry_min_s * 2.0 ** min(self._failures, 60))
        return lowest + (ceiling - lowest) * self._jitter()


def native_upload(
    artifact: Artifact,
    destination: DestinationSettings,
    upload: UploadSettings,
    *,
    first_attempt: bool,
    jitter: Callable[[], float] = random.random,
) -> Course:
    """The course of one attempt. ``first_attempt`` False: something of it may be at the receiver already."""
    return (yield from _NativeCourse(artifact.manifest, destination, upload, jitter).run(first_attempt))


class _NativeCourse:
    """One attempt: what it knows between two requests."""

    def __init__(
        self, manifest: Manifest, destination: DestinationSettings, upload: UploadSettings, jitter: Callable[[], float]
    ) -> None:
        self._manifest = manifest
        self._destination = destination
        self._upload = upload
        self._retries = Retries(upload, jitter)
        self._restarts = 0
        self._url: str | None = None  # of the upload's resource
        self._highest = 0  # offset the receiver ever named, since the last restart
        self._resumed_at = 0
        self._plain = destination.proof == "status"
        self._made_directory = False
        self._doubted = False  # a refusal for good was asked for once more

    def run(self, first_attempt: bool) -> Course:
        small = self._manifest.artifact_bytes <= self._upload.one_shot_bytes
        request = self._whole() if small and first_attempt else self._ask_anew()
        while True:
            result = yield request
            if isinstance(result, Answer):
                following = yield from self._read(request, result)
            else:
                assert isinstance(result, Fault), f"a request ends in an Answer or a Fault, not {result!r}"
                following = yield from self._after_fault(result)
            if isinstance(following, Verdict):
                return following
            request = following

    def _whole(self) -> Request:
        return prepare_whole(self._manifest, self._destination, self._upload)

    def _ask_anew(self) -> Request:
        """The request that finds out where things stand: idempotent, and the answer to every doubt."""
        if self._plain:
            return self._whole()
        return prepare_creation(self._manifest, self._destination, self._upload)

    def _after_fault(self, fault: Fault) -> Generator[Step, Result, Request | Verdict]:
        verdict = verdict_of_fault(fault, self._resumed_at)
        if not row_of_fault(fault).retried:
            return verdict
        return (yield from self._wait(verdict))

    def _read(self, request: Request, answer: Answer) -> Generator[Step, Result, Request | Verdict]:
        reading = read_answer(request, answer, self._manifest.artifact_bytes, self._url)
        match reading:
            case UploadPlace():
                return (yield from self._go_on(request, answer, reading))
            case CreateAgain():
                error = f"status {answer.status}: the receiver lost or refused this part of the upload"
                return (yield from self._wait(verdict_of_misbehaviour(answer, error, self._resumed_at)))
            case Mismatch():
                return (yield from self._check(answer, reading.content))
            case Misbehaviour():
                return verdict_of_misbehaviour(answer, reading.error, self._resumed_at)
            case Final() if answer.status in (200, 201, 204):
                return (yield from prove(answer, self._manifest, self._destination, self._upload, self._resumed_at))
            case Final() if may_lack_directory(answer):
                head = prepare_proof(self._manifest, self._destination, self._upload)
                make, self._made_directory = self._plain and not self._made_directory, True
                return (yield from find_directory(answer, head, self._resumed_at, make=make)) or self._whole()
            case Final():
                verdict = verdict_of_final(answer, self._resumed_at)
                if verdict.outcome is Outcome.REJECTED and answer.status != 422 and not self._doubted:
                    # What it refuses for good it read in a request's head, where one flipped bit is enough. 422 is said
                    # of a body, which has its digest.
                    self._doubted = True
                    return (yield from self._wait(verdict))
                if not row_of_status(answer).retried:
                    return verdict
                return (yield from self._wait(verdict, retry_after_s(answer)))

    def _wait(self, verdict: Verdict, asked_s: float | None = None) -> Generator[Step, Result, Request | Verdict]:
        """A failure without progress: wait and ask anew, or end with ``verdict`` when there were enough of them."""
        seconds = self._retries.next_wait_s(asked_s)
        if seconds is None:
            return verdict
        yield Wait(seconds, verdict)
        return self._ask_anew()

    def _go_on(
        self, request: Request, answer: Answer, place: UploadPlace
    ) -> Generator[Step, Result, Request | Verdict]:
        """Append from where the receiver says it stands."""
        self._url = place.url
        if request.method != "PATCH" or answer.status == 409:
            self._resumed_at = place.offset
        if place.offset > self._highest:
            self._highest = place.offset
            self._retries.progressed()
        elif request.method == "PATCH":
            # It answered and yet it has no more than before: so bounded, or two confused ends would go round for ever.
            error = f"status {answer.status}: the receiver stays at offset {place.offset}"
            return (yield from self._wait(verdict_of_misbehaviour(answer, error, self._resumed_at)))
        return prepare_append(self._manifest, place, self._upload)

    def _check(self, answer: Answer, content: bool) -> Generator[Step, Result, Request | Verdict]:
        """A digest does not match: whose bytes are wrong? Ours: pack again. The line's: send it again from 0."""
        checked = yield CheckArtifact(content, _error_body(answer).error)
        assert isinstance(checked, Checked), f"a CheckArtifact ends in a Checked, not {checked!r}"
        if not checked.intact:
            return Verdict(
                outcome=Outcome.DAMAGED,
                scope=Scope.EPISODE,
                status=answer.status,
                error="the artifact in the outbox is not what it was packed as: its file, or its manifest, changed",
                body=answer.text,
                resumed_at=self._resumed_at,
            )
        self._restarts += 1
        if self._restarts > RESTARTS and content:
            return verdict_of_status(answer, self._resumed_at)  # right here, and it will not have it: for an operator
        if self._restarts > RESTARTS:
            return Verdict(
                outcome=Outcome.TRANSIENT,
                scope=Scope.NETWORK,
                status=answer.status,
                error=f"the artifact arrived damaged {self._restarts} times though it is right here: "
                "the network or the receiver's disk changes bytes",
                body=answer.text,
                resumed_at=self._resumed_at,
            )
        self._highest = self._resumed_at = 0
        return self._whole()  # a PUT from byte 0 drops whatever the receiver has of it


def prove(
    answer: Answer,
    manifest: Manifest,
    destination: DestinationSettings,
    upload: UploadSettings,
    resumed_at: int,
) -> Generator[Step, Result, Verdict]:
    """A success is believed when the receiver names what it holds, and that is ours."""
    proof = read_proof(answer, manifest)
    if not proof.receipt and not proof.other and destination.proof == "receipt":
        result = yield prepare_proof(manifest, destination, upload)
        if isinstance(result, Fault):
            return verdict_of_fault(result, resumed_at)
        assert isinstance(result, Answer), f"a request ends in an Answer or a Fault, not {result!r}"
        if result.status == 200:
            proof = read_proof(result, manifest)
    if proof.receipt:
        return shipped(answer, proof.receipt, resumed_at)
    if proof.other:
        error = f"status {answer.status}, but the receiver says that it holds {proof.other}, not this artifact"
        return verdict_of_misbehaviour(answer, error, resumed_at)
    if destination.proof == "status":
        return shipped(answer, believed_receipt(manifest), resumed_at)
    error = (
        f"status {answer.status}, but the receiver names no digest of what it holds: if it never can, "
        'set destination.proof = "status" to believe the bare status'
    )
    return verdict_of_misbehaviour(answer, error, resumed_at)
