"""The ASGI application: routes, the order of decisions, and what becomes of a body.

What always holds: no file work on the event loop; nothing of a body is read before the decisions from the headers;
an exception that nobody foresaw is logged and answered 500 without details; tokens are in no log.

Imported by ``server`` and, as `create_app`, by the package's users.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import re
from collections.abc import Awaitable, Callable, Collection, Iterator
from typing import Any, TypeVar

import msgspec

from fastship import durable, fields
from fastship.errors import ReceiverError
from fastship.receiver.policy import answers, decisions
from fastship.receiver.policy.access import Access, Limits
from fastship.receiver.policy.answers import Answer
from fastship.receiver.policy.decisions import Body, Declared, Facts
from fastship.receiver.policy.load import Load
from fastship.receiver.shares import Shares
from fastship.receiver.store.ending import Ending, storage_failed
from fastship.receiver.store.small import SMALL_BYTES, SMALL_CONTENT_BYTES, Small, SmallStore
from fastship.receiver.store.store import Store
from fastship.receiver.threads import Threads
from fastship.receiver.uploads.lock import Superseded
from fastship.receiver.uploads.partial import Partial, Unsynced
from fastship.receiver.uploads.upload import Upload
from fastship.receiver.verification import Verifications
from fastship.receiver.wire.direct import Takers
from fastship.receiver.wire.ingest import End, Receive, gather, ingest
from fastship.receiver.wire.reading import send_artifact
from fastship.receiver.wire.request import Left, Request, Scope, Send
from fastship.settings import ReceiverSettings

_log = logging.getLogger("fastship.receiver")

IDLE_TIMEOUT_S = 60.0  # a body of which next to nothing comes for so long is given up; what came is kept
_MEND_INTERVAL_S = 3600.0
_HELD_BYTES = 16 << 20  # of small bodies in memory; more go to the disk at once
_METHODS = frozenset(("GET", "HEAD", "OPTIONS", "PUT", "PATCH", "DELETE", "POST"))  # the others are not ours
_READ = ("GET", "HEAD")
_ROUTE = re.compile(r"/v1/(episodes|uploads|receipts|verifications)/([^/]*)")

T = TypeVar("T")
Route = Callable[[Request, str], Awaitable[Answer | None]]


def create_app(settings: ReceiverSettings) -> Receiver:
    """The receiver as an ASGI 3 application. Makes the root. Raises `ReceiverError` when it cannot be used."""
    return Receiver(settings)


class Receiver:
    """One process's receiver. Call `close` when it has no event loop to end its life span."""

    def __init__(self, settings: ReceiverSettings) -> None:
        try:
            from fastship.receiver.metrics import Metrics
        except ImportError as error:
            raise missing_extra(error) from None
        self._settings = settings
        self._store = Store(settings, lambda owner: self._access.stored_bytes(owner))
        self._access = Access(settings.token_file, settings.commits_file, self._store.secret, Limits.usual(settings))
        self._uploads = self._store.uploads
        self._ending = Ending(self._store)
        self._shares = Shares(self._store, settings)
        self._metrics = Metrics(self._store.accounts)
        self._threads = Threads(self._store.stop)
        self._in, self._take, self._lane = self._threads.run, self._threads.take, self._threads.lane
        self._io, self._publishing = self._threads.io, self._threads.publishing
        self._takers = Takers()
        self._small = SmallStore(self._store, self._decide)
        self._verifications = Verifications(self._store)
        self._load = Load(settings.max_requests)
        self._mending: asyncio.Task[None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif scope["type"] == "http":
            await self._serve(Request(scope, receive, send))
        else:  # silence would be consent (ASGI, "Applications")
            raise NotImplementedError(f"not {scope['type']}")

    def close(self) -> None:
        """Let threads end; does not wait for them."""
        self._threads.close()
        self._takers.close()
        self._small.close()
        self._verifications.close()
        self._store.recount.close()

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        self._mending = asyncio.ensure_future(self._mend())
        await send({"type": "lifespan.startup.complete"})
        await receive()
        self._mending.cancel()
        self.close()
        await send({"type": "lifespan.shutdown.complete"})

    async def _mend(self) -> None:
        while True:
            try:
                await self._in(self._publishing, self._store.mend)
            except OSError as error:
                _log.error("%s cannot be looked through now, in an hour again: %s", self._store.root, error)
            except Exception:
                _log.exception("mending %s failed", self._store.root)
            if self._access.limits_what_is_stored():
                self._store.recount.ask()
            await asyncio.sleep(_MEND_INTERVAL_S)

    async def _serve(self, request: Request) -> None:
        try:
            answer = await self._route(request)
            if answer is not None:
                await request.answer(answer)
        except Left:
            pass
        except Exception as error:
            if request.status or not isinstance(error, OSError):
                _log.exception("%s %r failed", request.method, request.path)
            if request.status:
                raise  # too late for an answer: the server cuts the connection
            failed = storage_failed(error) if isinstance(error, OSError) else answers.INTERNAL
            with contextlib.suppress(Left):
                await request.answer(failed)
        finally:
            # A name that a client made up would be a counter for good.
            method = request.method if request.method in _METHODS else "other"
            self._metrics.requests.labels(method, str(request.status)).inc()
            if request.body_bytes:
                self._metrics.body_bytes.inc(request.body_bytes)

    async def _route(self, request: Request) -> Answer | None:
        """The answer, or None when it was sent already (or there is nobody to send it to)."""
        if request.path == "/healthz":
            return self._refuse_method(request, _READ) or Answer(200, {"status": "ok"})
        caller = self._access.caller(request.headers.get("authorization"))
        refused = decisions.admit(caller is not None)
        if caller is None or refused is not None:
            return refused
        request.caller = caller
        wait_s = self._load.wait_s(caller)
        if wait_s:
            return decisions.too_often(wait_s)
        if request.path == "/metrics":
            if (refused := self._refuse_method(request, _READ)) is not None:
                return refused
            text = await self._in(self._io, self._metrics.text)
            await request.text(text, "text/plain; version=0.0.4; charset=utf-8")
            return None
        match = _ROUTE.fullmatch(request.path)
        if "upgrade" in request.headers and request.method in ("PUT", "PATCH"):
            # The HTTP parser reads no body then (RFC 9110, 7.8 would let us ignore the field).
            return answers.error(
                400, "bad-field", "Upgrade is not taken here", ("Connection", "close"), field="Upgrade"
            )
        if match is None:
            return answers.error(404, "not-found", "no such resource; see docs/protocol.md")
        kind, name = match[1], match[2]
        if kind != "uploads":
            refused = decisions.admit(True, name)
            if refused is not None:
                return refused
        routes: dict[str, dict[str, Route]] = {
            "episodes": {"PUT": self._put, "GET": self._get, "HEAD": self._get},
            "uploads": {"PATCH": self._patch, "HEAD": self._head_upload, "DELETE": self._delete_upload},
            "receipts": {"GET": self._get_receipt, "HEAD": self._get_receipt},
            "verifications": {"POST": self._verifications.answer},
        }
        methods = routes[kind]
        return self._refuse_method(request, methods) or await methods[request.method](request, name)

    def _refuse_method(self, request: Request, methods: Collection[str]) -> Answer | None:
        """The answer to a method that is not for this resource, and to OPTIONS."""
        allow = ("Allow", ", ".join(methods))
        if request.method == "OPTIONS":
            return Answer(204, None, (allow, self._limits()))
        return (
            answers.error(405, "bad-method", "this method is not for this resource", allow)
            if request.method not in methods
            else None
        )

    # --- reading ---------------------------------------------------------------------------------------------

    async def _get(self, request: Request, episode: str) -> Answer | None:
        receipt = await self._in(self._io, self._store.receipt, episode)
        if receipt is None:
            return answers.error(404, "not-found", f"episode {episode} is not stored here")
        if self._load.is_sending_enough():
            return decisions.OVERLOADED
        try:
            with self._load.sending():
                await send_artifact(request, self._store.artifact_path(episode), receipt, self._io)
        except FileNotFoundError:
            return answers.error(404, "not-found", f"episode {episode} is not stored here")
        return None

    async def _get_receipt(self, _request: Request, episode: str) -> Answer | None:
        receipt = await self._in(self._io, self._store.receipt, episode)
        if receipt is None:
            return answers.error(404, "not-found", f"episode {episode} is not stored here")
        return Answer(200, msgspec.to_builtins(receipt))

    # --- storing ---------------------------------------------------------------------------------------------

    async def _put(self, request: Request, episode: str) -> Answer | None:
        body = decisions.read_body(request.headers)
        if isinstance(body, Answer):
            return body
        declared = decisions.read_declared(request.headers, episode, body, request.caller.owner)
        if isinstance(declared, Answer):
            return declared
        commit = request.headers.get(self._settings.commit_field.lower())
        if self._is_small(request, declared, body):
            return await self._store_small(request, declared, commit, body)
        facts = await self._in(self._io, self._facts, declared, not body.empty and self._is_full(request))
        verdict = decisions.decide_put(declared, commit, facts)
        if verdict is not None:
            return self._count(verdict)
        if body.complete is False:
            return await self._create(request, declared, body)
        return await self._store_at_once(request, declared, body)

    def _decide(self, declared: Declared, commit: str | None) -> Answer | None:
        return decisions.decide_put(declared, commit, self._facts(declared, False))

    def _is_full(self, request: Request) -> bool:
        return self._load.is_full(request.caller, several=self._access.several())

    def _facts(self, declared: Declared, overloaded: bool) -> Facts:
        settings = self._settings
        owned_bytes, most_owned_bytes = self._shares.stored(declared.owner, declared.length or 1)
        return Facts(
            stored=self._store.receipt(declared.episode),
            room_bytes=self._store.room_bytes(
                self._uploads.token(declared) if declared.sha256 else None, declared.length or 0
            ),
            max_bytes=settings.max_bytes,
            owned_bytes=owned_bytes,
            most_owned_bytes=most_owned_bytes,
            commits=self._access.commits(),
            commit_field=settings.commit_field,
            overloaded=overloaded,
        )

    def _is_small(self, request: Request, declared: Declared, body: Body) -> bool:
        """Whether the body is rather read than asked whether it is wanted: with those that wait it fills no memory."""
        content_bytes = 0 if self._settings.verify == "artifact" else declared.content_bytes
        return (
            body.complete is not False
            and 0 < (body.length or 0) <= min(SMALL_BYTES, _HELD_BYTES - self._load.held_bytes)
            and content_bytes is not None
            and content_bytes <= SMALL_CONTENT_BYTES
            and "expect" not in request.headers
            and not self._is_full(request)
        )

    async def _store_small(self, request: Request, declared: Declared, commit: str | None, body: Body) -> Answer | None:
        """Way 1 for a small artifact."""
        length = body.length or 0
        self._load.held_bytes += length
        try:
            with self._one_more_body(request):
                end, data = await gather(request.receive, limit_bytes=length, idle_timeout_s=IDLE_TIMEOUT_S)
            if end is End.TOO_LONG or (end is End.WHOLE and len(data) != length):
                return _NOT_AS_LONG
            if end is not End.WHOLE:
                if declared.sha256 and not body.sha256:
                    await self._in(self._io, self._keep_cut, request, declared, commit, data)
                return _GIVEN_UP if end is End.IDLE else None
            answer = self._small.submit(Small(declared, commit, body, data))
            return self._count(await asyncio.shield(asyncio.wrap_future(answer)))
        finally:
            self._load.held_bytes -= length

    async def _store_at_once(self, request: Request, declared: Declared, body: Body) -> Answer | None:
        """Way 1: the whole artifact in this body. Until that has come its bytes are a beginning of the upload, too."""
        resumable = declared.sha256 is not None and body.sha256 is None
        partial = await self._in(self._io, self._uploads.one_shot, declared if resumable else None)
        try:
            digest = hashlib.sha256() if body.sha256 else None
            most = declared.length if declared.length is not None else self._settings.max_bytes or None
            try:
                end = await self._ingest(request, partial, most, digest)
            except OSError as error:
                if resumable and not isinstance(error, Unsynced):
                    await self._in(self._io, self._keep, request, declared, partial)
                return storage_failed(error)
            if end is End.TOO_LONG and declared.length is None:
                return self._count(decisions.too_large(self._settings.max_bytes))
            if end is End.TOO_LONG or (end is End.WHOLE and declared.length not in (None, partial.offset)):
                return _NOT_AS_LONG
            if end is not End.WHOLE:
                if resumable:
                    await self._in(self._io, self._keep, request, declared, partial)
                return _GIVEN_UP if end is End.IDLE else None
            if digest is not None and digest.hexdigest() != body.sha256:
                return self._count(answers.digest_mismatch("the body is not what Content-Digest says"))
            lane = self._lane(partial, declared)
            return self._count(await self._in(lane, self._ending.store, partial, declared))
        except Superseded:
            return await self._in(self._io, self._ending.superseded, declared)
        finally:
            try:
                await self._in(self._io, durable.unlink_if_present, partial.path)
            finally:
                partial.close()

    def _keep_cut(self, request: Request, declared: Declared, commit: str | None, data: bytes) -> None:
        """Nothing was decided of a small body before it came."""
        if self._decide(declared, commit) is None and self._shares.may_begin(request.caller, declared) is None:
            self._ending.keep_cut(declared, data)

    def _keep(self, request: Request, declared: Declared, partial: Partial) -> None:
        if self._shares.may_begin(request.caller, declared) is None:  # what is kept is an upload as others are
            self._ending.keep(declared, partial)

    async def _create(self, request: Request, declared: Declared, body: Body) -> Answer | None:
        """Way 2, creation: find or begin the upload; the body, if any, is its first bytes."""
        refused = await self._in(self._io, self._shares.may_begin, request.caller, declared)
        if refused is not None:
            return refused
        upload = await self._take(lambda wait_s: self._uploads.create(declared, wait_s=wait_s))
        if isinstance(upload, Answer):
            return upload
        location = ("Location", f"/v1/uploads/{upload.token}")
        try:
            known = await self._in(self._io, self._ending.known, upload)  # while we waited for it
            if known is not None:
                return self._count(known)
            if not body.empty and upload.partial.offset == 0:
                stopped, answer = await self._append(request, upload, body)
                if stopped and answer is not None and answer.is_about_upload:
                    return answer.with_fields(location)  # who is not told a random name could never go on
                if stopped and declared.sha256 is None:
                    await self._in(self._io, self._ending.forget, upload)
                if stopped:
                    return answer
            offset = await self._in(self._io, upload.tell)
            return Answer(201, None, (location, *answers.about_upload(offset), self._limits()))
        except Superseded:
            return await self._in(self._io, self._ending.superseded, upload.declared)
        finally:
            await self._in(self._io, self._ending.leave, upload)

    async def _patch(self, request: Request, token: str) -> Answer | None:
        """Way 2, append; with ``Upload-Complete: ?1`` the last one, whose answer is the verdict."""
        owner = request.caller.owner
        ended = await self._in(self._io, self._ending.ended, token, owner)
        if ended is not None:
            return ended
        body = decisions.read_body(request.headers)
        if isinstance(body, Answer):
            return body
        append = decisions.read_append(request.headers, body)
        if isinstance(append, Answer):
            return append
        if not body.empty and self._is_full(request):
            return decisions.OVERLOADED.with_fields(*answers.about_upload())
        upload = await self._take(lambda wait_s: self._uploads.take(token, owner, offset=append.offset, wait_s=wait_s))
        if isinstance(upload, Answer):
            return await self._in(self._io, self._ending.ended, token, owner) or upload
        try:
            known = await self._in(self._io, self._ending.known, upload)
            if known is not None:
                return self._count(known)
            offset = await self._in(self._io, upload.tell)
            if offset != append.offset:
                return answers.offset_mismatch(offset, append.offset)
            may = self._shares.may_append
            refused = await self._in(self._io, may, request.caller, upload, append.length, body.length or 0)
            if refused is not None:
                return refused
            stopped, answer = await self._append(request, upload, body)
            if stopped:
                return answer
            if body.complete:
                upload.declared = append.complete(upload.declared)
                lane = self._lane(upload.partial, upload.declared)
                return self._count(await self._in(lane, self._ending.finish, upload))
            offset = await self._in(self._io, upload.tell)
            told = answers.about_upload(offset)
            if body.want_digest:
                sha256 = await self._in(self._io, upload.partial.digest)
                told = (*told, (fields.REPR_DIGEST, fields.format_digest("sha-256", sha256)))
            return Answer(204, None, told)
        except Superseded:
            return await self._in(self._io, self._ending.superseded, upload.declared)
        finally:
            await self._in(self._io, self._ending.leave, upload)

    async def _append(self, request: Request, upload: Upload, body: Body) -> tuple[bool, Answer | None]:
        """Take the body into the upload; (True, answer) when that is the end of this request."""
        partial = upload.partial
        mark = partial.mark()
        digest = hashlib.sha256() if body.sha256 else None
        if digest is not None:
            await self._in(self._io, upload.hold, mark.offset)
        length = upload.declared.length
        most = length if length is not None else self._settings.max_bytes or None
        try:
            end = await self._ingest(request, partial, most - mark.offset if most is not None else None, digest)
        except OSError as error:
            if not isinstance(error, Unsynced):
                with contextlib.suppress(OSError):
                    await self._in(self._io, upload.tell)
            return True, storage_failed(error, *answers.about_upload())
        if digest is not None:
            spoilt = end is not End.WHOLE or digest.hexdigest() != body.sha256
            if spoilt:
                await self._in(self._io, partial.cut_back, mark)
            await self._in(self._io, upload.hold, -1)
            if spoilt and end is End.WHOLE:
                text = "the body is not what Content-Digest says; nothing of it was appended"
                return True, answers.error(400, "digest-mismatch", text, *answers.about_upload(mark.offset))
        if end is End.WHOLE:
            return False, None
        offset = await self._in(self._io, upload.tell)
        if end is End.TOO_LONG:
            if upload.declared.length is None:
                return True, decisions.too_large(self._settings.max_bytes)
            return True, answers.length_mismatch("more has come than Upload-Length said", offset)
        return True, _GIVEN_UP.with_fields(*answers.about_upload(offset)) if end is End.IDLE else None

    async def _head_upload(self, request: Request, token: str) -> Answer | None:
        look = await self._take(lambda wait_s: self._uploads.look(token, request.caller.owner, wait_s=wait_s))
        if isinstance(look, Answer):
            return look
        if look.ended is not None and not await self._in(self._io, self._ending.holds, look.ended):
            return answers.UNKNOWN_UPLOAD
        complete = (fields.UPLOAD_COMPLETE, fields.format_boolean(look.ended is not None))
        told: tuple[tuple[str, str], ...] = (complete, (fields.UPLOAD_OFFSET, str(look.offset)), self._limits())
        if look.length is not None:
            told = (*told, (fields.UPLOAD_LENGTH, str(look.length)))
        return Answer(204, None, told)

    async def _delete_upload(self, request: Request, token: str) -> Answer | None:
        gone = await self._take(lambda wait_s: self._uploads.cancel(token, request.caller.owner, wait_s=wait_s))
        return gone if isinstance(gone, Answer) else Answer(204)

    # --- small -----------------------------------------------------------------------------------------------

    async def _ingest(self, request: Request, partial: Partial, limit: int | None, digest: Any) -> End:
        began = partial.offset
        try:
            with self._one_more_body(request):
                return await ingest(
                    request.receive,
                    partial,
                    self._io,
                    limit_bytes=limit,
                    sync_bytes=self._settings.sync_bytes,
                    idle_timeout_s=IDLE_TIMEOUT_S,
                    body_digest=digest,
                    direct=request.direct,
                    takers=self._takers,
                )
        finally:
            request.body_bytes = max(request.body_bytes, partial.offset - began)  # what went past ``receive``, too

    @contextlib.contextmanager
    def _one_more_body(self, request: Request) -> Iterator[None]:
        with self._load.body(request.caller), self._metrics.open_bodies.track_inprogress():
            yield

    def _limits(self) -> tuple[str, str]:
        limits = {"max-age": int(self._settings.upload_max_age_s)}
        if self._settings.max_bytes:
            limits["max-size"] = self._settings.max_bytes
        return fields.UPLOAD_LIMIT, fields.format_limits(limits)

    def _count(self, verdict: Answer) -> Answer:
        self._metrics.episodes.labels(str(verdict.status)).inc()
        return verdict


_NOT_AS_LONG = answers.length_mismatch("the body is not as long as was said")
_GIVEN_UP = answers.error(
    408, "body-timeout", f"next to nothing came for {IDLE_TIMEOUT_S:.0f} s", ("Connection", "close")
)


def missing_extra(error: ImportError) -> ReceiverError:
    """What is said when the packages of the extra ``receiver`` are not installed."""
    return ReceiverError(
        f"the receiver needs the package {error.name}, which is not installed",
        remedy="pip install 'fastship[receiver]'",
    )
