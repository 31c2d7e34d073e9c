"""What answers and faults mean for an episode: one table, and the rule of proof.

What always holds: an answer is a verdict on the *episode* only where it cannot be the destination's doing
(docs/design.md, Verdicts have a scope), so a rotated token or a wrong URL quarantines nothing; and no verdict is
SHIPPED unless the receiver named what it holds, except where ``destination.proof = "status"`` says otherwise.
Pure; the meaning of a status inside an upload's making (``Upload-Complete: ?0``) is the dialect's, not this module's.

Imports ``course``, ``episode`` and ``fields``; the dialects and the session import it.
"""

from __future__ import annotations

import email.utils
import re

import msgspec

from fastship import fields
from fastship.episode import Manifest, Outcome, Receipt, ReceivedArtifact, Scope, Verdict
from fastship.upload.course import Answer, Fault, FaultKind


class Row(msgspec.Struct, frozen=True):
    outcome: Outcome
    scope: Scope
    retried: bool  # within the attempt; what is not goes up to the episode's own retry at once
    meaning: str


_T, _D, _N, _E = Outcome.TRANSIENT, Scope.DESTINATION, Scope.NETWORK, Scope.EPISODE

_STATUS: dict[int, Row] = {
    # The token is missing, expired or rotated: nothing is wrong with any episode. An operator or a rotation mends it.
    401: Row(_T, _D, False, "the token is not accepted; see destination.token_file"),
    # The token is known but may not do this; as above.
    403: Row(_T, _D, False, "access is refused; see the token's rights at the receiver"),
    # PUT cannot meet a missing *episode*: the URL is wrong, or a proxy has lost its backend.
    404: Row(_T, _D, False, "there is no such resource; see destination.url"),
    # What answers there takes no PUT at all (a plain web server, a wrong path): true of every episode alike.
    405: Row(_T, _D, False, "it does not take uploads there; see destination.url"),
    # A proxy on the way wants credentials.
    407: Row(_T, _D, False, "a proxy asks for authentication"),
    # The server gave up waiting for us: its load or our line. Worth one more request at once.
    408: Row(_T, _D, True, "the destination timed out waiting for the request"),
    # The original's S7: same id, other content. Only a person can say which is right.
    409: Row(Outcome.CONFLICT, _E, False, "the receiver holds another content under this id"),
    # It wants a Content-Length, which every request of ours has: something on the way takes it off.
    411: Row(_T, _D, False, "it asks for a Content-Length, which was sent: is there a proxy between?"),
    # The original's S10: the recorder's commit is not on the allow-list; the body says what to run.
    412: Row(Outcome.REJECTED, _E, False, "the receiver refuses the commit this episode was recorded with"),
    # Of HTTP itself, said by servers and proxies; after a 417 the next request goes without Expect.
    417: Row(_T, _D, True, "it does not know Expect: 100-continue; is there a proxy between?"),
    426: Row(_T, _D, False, "it wants another protocol; is destination.url to begin with https?"),
    431: Row(_T, _D, False, "the fields of the request are too many for it; is there a proxy between?"),
    # The connection reached a server that is not responsible for this host name.
    421: Row(_T, _D, False, "the request was misdirected; see destination.url"),
    # TLS early data was not accepted; the same request later is.
    425: Row(_T, _D, True, "the destination asks to try later"),
    # A rate limit; its Retry-After is obeyed.
    429: Row(_T, _D, True, "the destination limits the rate of requests"),
    # The server does not know the method or the protocol: no retry within the attempt can change that.
    501: Row(_T, _N, False, "the destination does not know this method"),
    505: Row(_T, _N, False, "the destination does not speak this HTTP version"),
    # No room at the receiver (507 of WebDAV, used so by ours), or none for this token: not within seconds.
    507: Row(_T, _N, False, "the receiver has no room"),
    # A captive portal asks for a log-in (RFC 6585, 6).
    511: Row(_T, _N, False, "the network asks for a log-in"),
}
_RANGES: dict[int, Row] = {
    # A 2xx that is neither 200, 201 nor 204 proves nothing (202: perhaps later).
    2: Row(_T, _D, False, "this success status is not one that an upload ends with"),
    # Never followed: the token would go to whomever the answer names.
    3: Row(_T, _D, False, "it redirects, which is not followed because the token would go along; set destination.url"),
    # The original's S9: the receiver will not take this episode as it is (400, 413, 422, ...).
    4: Row(Outcome.REJECTED, _E, False, "the receiver refuses this episode"),
    # The original's S8: the server's bad moment.
    5: Row(_T, _N, True, "the destination failed"),
}
# Pages are a web server's or a proxy's own, and nobody's verdict on an episode. Of one attempt, because one request may
# be odd; three in a row are the destination's (plain HTTP to a TLS port, a client certificate that nginx wants: 400).
_PAGE = Row(
    _T,
    _N,
    False,
    "a web server or proxy refuses it, not a receiver, so it is tried again; see destination.url and that server's log",
)
# Said of the size alone: smaller episodes pass, and this one when the limit is raised.
_PAGE_413 = Row(
    _T, _E, False, "too large for a web server or proxy on the way; raise its limit (nginx: client_max_body_size)"
)
_TO_TLS = b"HTTP request to an HTTPS server"  # Go's net/http, in plain text
_NONSENSE = Row(_T, _D, False, "this is not a final HTTP status")

_FAULTS: dict[FaultKind, Row] = {
    # Names and certificates are the destination's (or our settings'): its pause probes them again.
    FaultKind.DNS: Row(_T, _D, False, "its name cannot be resolved"),
    FaultKind.TLS: Row(_T, _D, False, "TLS failed"),
    # Nothing can be sent to this destination until somebody corrects the settings.
    FaultKind.SETTINGS: Row(_T, _D, False, "the settings of the destination cannot be used"),
    # The outbox lost or damaged the artifact: it is packed again.
    FaultKind.ARTIFACT: Row(Outcome.DAMAGED, _E, False, "the artifact cannot be read"),
    FaultKind.STALL: Row(_T, _N, True, "the connection stalled"),
    FaultKind.NETWORK: Row(_T, _N, True, "the connection failed"),
}


def row_of_status(answer: Answer) -> Row:
    """The table's row for an answer that is the verdict on the episode but not a success."""
    row = _STATUS.get(answer.status) or _RANGES.get(answer.status // 100, _NONSENSE)
    if row is _RANGES[4] and (_is_page(answer) or _TO_TLS in answer.body):
        return _PAGE_413 if answer.status == 413 else _PAGE
    if answer.status == 503 and retry_after_s(answer) is not None:
        # An overload that says when it will be over is the destination's; without that it is a 5xx like others.
        return msgspec.structs.replace(row, scope=Scope.DESTINATION, meaning="the destination is overloaded")
    return row


def _is_page(answer: Answer) -> bool:
    return (answer.field("Content-Type") or "").lower().startswith("text/html")


def _title(answer: Answer) -> str:
    """What a page says in short: nginx has nothing but a title to tell a missing client certificate by."""
    title = re.search(r"<title>([^<]{1,100})</title>", answer.text, re.IGNORECASE)
    return f" ({title[1].strip()!r})" if title else ""


class _Said(msgspec.Struct, frozen=True):
    error: str = ""


def _sentence(answer: Answer) -> str:
    """Which of a token's limits it is, in the receiver's own words: the status is the same for several."""
    try:
        said = msgspec.json.decode(answer.body, type=_Said).error
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return ""
    return f": {said[:200]}" if said else ""


def row_of_fault(fault: Fault) -> Row:
    return _FAULTS[fault.kind]


def verdict_of_status(answer: Answer, resumed_at: int = 0) -> Verdict:
    row = row_of_status(answer)
    where = answer.field("Location")
    return Verdict(
        outcome=row.outcome,
        scope=row.scope,
        status=answer.status,
        error=f"status {answer.status}: {row.meaning}{_title(answer) if row is _PAGE else ''}"
        + (_sentence(answer) if answer.status in (429, 507) else "")
        + (f" (it names {where[:200]!r})" if where and answer.status // 100 == 3 else ""),
        body=answer.text,
        retry_after_s=retry_after_s(answer),
        resumed_at=resumed_at,
    )


def verdict_of_fault(fault: Fault, resumed_at: int = 0) -> Verdict:
    row = row_of_fault(fault)
    return Verdict(outcome=row.outcome, scope=row.scope, error=f"{row.meaning}: {fault.message}", resumed_at=resumed_at)


def verdict_of_misbehaviour(answer: Answer, error: str, resumed_at: int = 0) -> Verdict:
    """The destination broke the protocol: nothing is shipped, nothing is the episode's fault, and it is said loudly."""
    return Verdict(
        outcome=Outcome.TRANSIENT,
        scope=Scope.DESTINATION,
        status=answer.status,
        error=error,
        body=answer.text,
        resumed_at=resumed_at,
    )


RETRY_AFTER_MAX_S = 3600.0
"""Longer than that nobody is waited for: a mistyped or forgotten Retry-After would stop all shipping for years."""


def retry_after_s(answer: Answer) -> float | None:
    """``Retry-After`` (RFC 9110, 10.2.3) in seconds up to `RETRY_AFTER_MAX_S`, or None.

    A date counts from the answer's own ``Date``.
    """
    value = (answer.field("Retry-After") or "").strip()
    if re.fullmatch(r"[0-9]{1,9}", value):
        return min(float(value), RETRY_AFTER_MAX_S)
    try:
        then = email.utils.parsedate_to_datetime(value)
        now = email.utils.parsedate_to_datetime(answer.field("Date") or "")
        return min(max(0.0, (then - now).total_seconds()), RETRY_AFTER_MAX_S)
    except (TypeError, ValueError):  # ValueError: no date; TypeError: one of them without a zone
        return None


class Proof(msgspec.Struct, frozen=True):
    """What a success says of the bytes behind it: a ``receipt`` for ours, or ``other``, what it names instead."""

    receipt: Receipt | None = None
    other: str = ""


def read_proof(answer: Answer, manifest: Manifest) -> Proof:
    """What a success proves: its receipt (JSON body), else its ``Repr-Digest``; an empty `Proof` if it has neither.

    Ours is the artifact's SHA-256. Another artifact is as good where the receiver has itself unpacked it and names our
    content digest: the same episode, packed otherwise (docs/protocol.md, What is decided from the headers alone).
    """
    receipt = _decode_receipt(answer.body)
    named = fields.parse_digest(answer.field(fields.REPR_DIGEST), "sha-256")
    if receipt is not None:
        same_artifact = receipt.artifact.sha256 == manifest.artifact_sha256
        same_content = (
            receipt.verified == "content"
            and receipt.content is not None
            and receipt.content.blake3 == manifest.content_blake3
        )
        if receipt.episode != manifest.episode:
            return Proof(other=f"episode {receipt.episode[:200]!r}")
        if same_artifact and receipt.verified == "content" and not same_content:
            return Proof(other="our artifact with another content in its receipt")
        if not same_artifact and not same_content:
            return Proof(other=f"SHA-256 {receipt.artifact.sha256[:64]}")
        if named is not None and named != receipt.artifact.sha256:
            return Proof(other=f"SHA-256 {named} beside another one in its receipt")
        return Proof(receipt=receipt)
    if named is None:
        return Proof()
    if named != manifest.artifact_sha256:
        return Proof(other=f"SHA-256 {named}")
    return Proof(receipt=_own_receipt(manifest, "artifact"))


def shipped(answer: Answer, receipt: Receipt, resumed_at: int = 0) -> Verdict:
    return Verdict(
        outcome=Outcome.SHIPPED,
        scope=Scope.EPISODE,
        status=answer.status,
        body=answer.text,
        receipt=receipt,
        resumed_at=resumed_at,
    )


def believed_receipt(manifest: Manifest) -> Receipt:
    """The receipt where ``destination.proof = "status"`` and the answer named nothing: ``verified`` says so."""
    return _own_receipt(manifest, "status")


def _own_receipt(manifest: Manifest, verified: str) -> Receipt:
    return Receipt(
        episode=manifest.episode,
        artifact=ReceivedArtifact(sha256=manifest.artifact_sha256, bytes=manifest.artifact_bytes),
        verified=verified,  # no content: what the receiver did not say is not in its receipt
    )


def _decode_receipt(body: bytes) -> Receipt | None:
    try:
        receipt = msgspec.json.decode(body, type=Receipt)
    except ValueError:
        return None
    artifact = msgspec.structs.replace(receipt.artifact, sha256=receipt.artifact.sha256.lower())
    content = receipt.content
    if content is not None:
        content = msgspec.structs.replace(content, blake3=content.blake3.lower())
    return msgspec.structs.replace(receipt, artifact=artifact, content=content)
