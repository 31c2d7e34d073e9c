"""Way 3 of the native dialect: an artifact is sent while it is being packed (docs/protocol.md).

Its length and digest are not known when the upload is created, so the upload gets a random name, which is remembered
beside the artifact in the outbox; the receiver tells the digest of what it has when all was sent, and only when that
is the artifact's own is the upload published. What always holds in a course:

- nothing is published of which the receiver did not name our SHA-256;
- it sends only bytes that will not change, from the offset that the receiver named last;
- it can only help: whatever is wrong with the upload before it is published ends in way 2, once the artifact is whole.
  So every rule about what an episode is told stands in one place, and from here come two verdicts alone: that of a
  published one, and that the destination cannot be reached, after which the next attempt finds the upload where it
  stands. Way 2 would begin another one from 0.

Pure, as ``native``, whose requests and readings it uses. The session imports it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Generator
from typing import TypeAlias

from fastship import fields
from fastship.episode import Manifest, Outcome, Scope, Verdict
from fastship.settings import DestinationSettings, UploadSettings
from fastship.upload.course import (
    Answer,
    Artifact,
    AwaitGrowth,
    Body,
    Course,
    Fault,
    Growing,
    Growth,
    Remember,
    Request,
    Result,
    Step,
    Wait,
)
from fastship.upload.native import (
    CreateAgain,
    Final,
    Retries,
    UploadPlace,
    answer_timeout_s,
    commit_fields,
    episode_url,
    error_code,
    native_upload,
    prove,
    read_answer,
    verdict_of_final,
)
from fastship.upload.verdict import (
    retry_after_s,
    row_of_fault,
    row_of_status,
    verdict_of_fault,
    verdict_of_misbehaviour,
    verdict_of_status,
)

APPEND_BYTES = 4 << 20
"""Least that an append carries, but the last one: each costs the receiver a sync and the line a round trip. Where
``upload.stream_bytes`` is less, that."""

WHOLE = 1 << 62
"""More than any artifact has: `AwaitGrowth` of it waits until the artifact is whole."""
_PARTIAL = ("Content-Type", fields.PARTIAL_UPLOAD)
_INTEROP = (fields.UPLOAD_DRAFT_INTEROP_VERSION, fields.INTEROP_VERSION)
_PUBLISHING = (fields.UPLOAD_COMPLETE, fields.format_boolean(True))
_DROPPED = Verdict(outcome=Outcome.TRANSIENT, scope=Scope.EPISODE, error="packing it failed while it was being sent")

_UNREACHED = frozenset({401, 403, 407, 408, 421, 425, 429, 500, 502, 503, 504, 507, 511})
"""Statuses that say nothing of the upload: it stands, and there is no getting at it now."""

_Next: TypeAlias = Generator[Step, Result, Request | Verdict | None]
"""Gives the request that follows or the verdict; None gives the streaming up."""


def streamed_upload(
    growing: Growing,
    destination: DestinationSettings,
    upload: UploadSettings,
    *,
    url: str = "",
    jitter: Callable[[], float] = random.random,
) -> Course:
    """The course of one attempt that begins while the artifact is packed. ``url``: an upload that has some of it.

    When the artifact is dropped it ends soon, with a verdict that says nothing of the episode.
    """
    verdict = yield from _StreamCourse(growing, destination, upload, url, jitter).run()
    if verdict is not None:
        return verdict
    growth = yield AwaitGrowth(WHOLE)
    assert isinstance(growth, Growth), f"an AwaitGrowth ends in a Growth, not {growth!r}"
    if growth.manifest is None:
        return _DROPPED
    artifact = Artifact(growth.manifest, growing.path)
    return (yield from native_upload(artifact, destination, upload, first_attempt=False, jitter=jitter))


class _StreamCourse:
    """Until it is published, or given up."""

    def __init__(
        self,
        growing: Growing,
        destination: DestinationSettings,
        upload: UploadSettings,
        url: str,
        jitter: Callable[[], float],
    ) -> None:
        self._growing = growing
        self._destination = destination
        self._upload = upload
        self._url = url
        self._jitter = jitter
        self._retries = Retries(upload, jitter)
        self._growth = Growth()
        self._highest = -1  # offset the receiver ever named
        self._resumed_at = 0

    def run(self) -> Generator[Step, Result, Verdict | None]:
        """The verdict on what was published, or on a destination that is not there; None: way 2."""
        yield from self._await(0)
        following = self._look() if self._url else (yield from self._begin())
        while isinstance(following, Request):
            result = yield following
            if isinstance(result, Fault):
                verdict = verdict_of_fault(result, self._resumed_at)
                following = yield from self._again(verdict, row_of_fault(result).retried, unreached=True)
                continue
            assert isinstance(result, Answer), f"a request ends in an Answer or a Fault, not {result!r}"
            reading = read_answer(following, result, self._growth.bytes, self._url or None)
            match reading:
                case UploadPlace():
                    following = yield from self._go_on(following, result, reading)
                case CreateAgain():
                    following = yield from self._after_loss(result)
                case Final() if _PUBLISHING in following.fields and result.status in (200, 201):
                    manifest = self._growth.manifest
                    assert manifest is not None
                    return (yield from prove(result, manifest, self._destination, self._upload, self._resumed_at))
                case Final():
                    verdict, retried = verdict_of_final(result, self._resumed_at), row_of_status(result).retried
                    # A 500 of the receiver's own may be about what it has of this very upload.
                    unreached = result.status in _UNREACHED and not (result.status == 500 and error_code(result))
                    following = yield from self._again(verdict, retried, retry_after_s(result), unreached=unreached)
                case _:  # a mismatch or a misbehaviour
                    following = None
        return following

    def _begin(self) -> _Next:
        """Where the id is taken, way 2 asks with the digest what that means: nothing is sent in vain."""
        known = yield self._request("HEAD", episode_url(self._destination, self._growing.episode))
        return self._create() if isinstance(known, Answer) and known.status == 404 else None

    def _go_on(self, request: Request, answer: Answer, place: UploadPlace) -> _Next:
        """Send what there is beyond the receiver's offset, or publish when that is all."""
        if place.url != self._url:
            self._url = place.url
            yield Remember(place.url)
        if request.method != "PATCH" or answer.status == 409:
            self._resumed_at = place.offset
        if place.offset > self._highest:
            self._highest = place.offset
            self._retries.progressed()
        elif request.method == "PATCH" and request.body != Body():
            error = f"status {answer.status}: the receiver stays at offset {place.offset}"
            return (yield from self._again(verdict_of_misbehaviour(answer, error, self._resumed_at), retried=True))
        yield from self._await(place.offset + min(APPEND_BYTES, self._upload.stream_bytes))
        if self._growth.dropped:
            return (yield from self._cancel())
        manifest = self._growth.manifest
        if manifest is None or place.offset < manifest.artifact_bytes:
            return self._append(place)
        told = fields.parse_digest(answer.field(fields.REPR_DIGEST), "sha-256")
        if told == manifest.artifact_sha256:
            return self._publish(manifest)
        if told is None and request.body != Body():
            return self._ask_digest(place)
        return (yield from self._cancel())  # it does not say, or it has something else: it is sent anew by way 2

    def _after_loss(self, answer: Answer) -> _Next:
        """The upload is gone, perhaps because it was published and we were not told, or the last append was damaged."""
        gone = answer.status in (404, 410)
        if gone:
            if fields.parse_boolean(answer.field(fields.UPLOAD_COMPLETE)) is not False:
                return None  # whoever says so may not know of uploads at all: way 2 asks, and this one is remembered
            self._url, self._highest = "", -1
            yield Remember("")
        following = yield from self._again(verdict_of_status(answer, self._resumed_at), retried=True)
        return (yield from self._begin()) if gone and isinstance(following, Request) else following

    def _again(
        self, verdict: Verdict, retried: bool, asked_s: float | None = None, *, unreached: bool = False
    ) -> _Next:
        """After a failure: where does the upload stand? ``unreached``: that is where it will be found."""
        seconds = self._retries.next_wait_s(asked_s) if retried else None
        if seconds is not None:
            yield Wait(seconds, verdict)
        elif not self._url or not unreached:
            return None
        elif self._is_whole:
            return verdict
        else:
            yield from self._await(WHOLE)  # the destination is left alone meanwhile
            if self._growth.dropped:
                return None
            self._retries = Retries(self._upload, self._jitter)
        return self._look() if self._url else self._create()

    def _cancel(self) -> _Next:
        yield self._request("DELETE", self._url, body=Body())
        yield Remember("")
        return None

    def _await(self, enough_bytes: int) -> Generator[Step, Result, None]:
        growth = yield AwaitGrowth(enough_bytes)
        assert isinstance(growth, Growth), f"an AwaitGrowth ends in a Growth, not {growth!r}"
        self._growth = growth

    # The requests.

    def _create(self) -> Request:
        """Length and digest are not known: the receiver gives the upload a random name. An empty one is no loss."""
        url = episode_url(self._destination, self._growing.episode)
        told = (
            *commit_fields(self._growing.code_commit, self._destination),
            (fields.FASTSHIP_EPISODE, self._growing.episode),
        )
        incomplete = (fields.UPLOAD_COMPLETE, fields.format_boolean(False))
        return self._request("PUT", url, ("Content-Type", "application/zstd"), *told, incomplete, body=Body())

    def _look(self) -> Request:
        return self._request("HEAD", self._url)

    def _append(self, place: UploadPlace) -> Request:
        rest = self._growth.bytes - place.offset
        length = min(rest, place.append_limit_bytes or rest)
        return self._patch(place.offset, Body(place.offset, length), last=length == rest and self._is_whole)

    def _ask_digest(self, place: UploadPlace) -> Request:
        return self._patch(place.offset, Body(), last=True)

    def _publish(self, manifest: Manifest) -> Request:
        length = (fields.UPLOAD_LENGTH, str(manifest.artifact_bytes))
        content = (
            (fields.FASTSHIP_CONTENT_DIGEST, fields.format_digest("blake3", manifest.content_blake3)),
            (fields.FASTSHIP_CONTENT_LENGTH, str(manifest.content_bytes)),
        )
        offset = (fields.UPLOAD_OFFSET, str(manifest.artifact_bytes))
        return self._request("PATCH", self._url, _PARTIAL, offset, _PUBLISHING, length, *content, body=Body())

    def _patch(self, offset: int, body: Body, *, last: bool) -> Request:
        want = (("Want-Repr-Digest", "sha-256=10"),) if last else ()
        told = (fields.UPLOAD_OFFSET, str(offset)), (fields.UPLOAD_COMPLETE, fields.format_boolean(False))
        return self._request("PATCH", self._url, _PARTIAL, *told, *want, body=body)

    @property
    def _is_whole(self) -> bool:
        return self._growth.manifest is not None

    def _request(self, method: str, url: str, *told: tuple[str, str], body: Body | None = None) -> Request:
        timeout_s = answer_timeout_s(self._growth.bytes, self._upload)
        return Request(method=method, url=url, fields=(*told, _INTEROP), body=body, answer_timeout_s=timeout_s)
