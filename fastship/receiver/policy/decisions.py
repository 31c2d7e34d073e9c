"""What is decided from a request's headers alone, before one byte of its body is read.

What always holds: pure functions of values, and the order is that of docs/protocol.md: access, id, size and room,
commit, already stored, conflict, what the owner may have, overload. ``None`` as a decision means: go on.

Imported by most of the package; imports only ``answers`` and, for its values, ``access``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import msgspec

from fastship import fields
from fastship.episode import Receipt, is_episode_id
from fastship.receiver.policy import answers
from fastship.receiver.policy.access import CommitList, Limits
from fastship.receiver.policy.answers import Answer

_COMMIT = re.compile(r"[0-9a-fA-F]{40}")
_RANGE = re.compile(r"bytes=(\d{0,15})-(\d{0,15})")


class Declared(msgspec.Struct, frozen=True, kw_only=True):
    """What a client says of the artifact it is about to send. Digests are lower-case hex."""

    episode: str
    sha256: str | None = None
    length: int | None = None  # of the whole artifact, bytes
    content_blake3: str | None = None
    content_bytes: int | None = None
    owner: str = ""  # of the upload: `access.Caller`; not said by the client


class Body(msgspec.Struct, frozen=True, kw_only=True):
    """What a client says of the body of this request."""

    length: int | None  # None: chunked
    sha256: str | None = None  # Content-Digest
    complete: bool | None = None  # Upload-Complete
    want_digest: bool = False  # Want-Repr-Digest asks for sha-256

    @property
    def empty(self) -> bool:
        return self.length == 0


class Held(NamedTuple):
    """Unfinished uploads of one owner, and their bytes: of each what it declared, or, where that is more, what came."""

    uploads: int
    bytes: int
    of_all: int  # uploads, whoever's


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What the receiver knows when a PUT comes."""

    stored: Receipt | None = None
    room_bytes: int = 1 << 62  # free space less the reserve less what other uploads have declared
    max_bytes: int = 0  # 0: no limit
    owned_bytes: int = 0  # stored for this owner
    most_owned_bytes: int = 0  # 0: no limit
    commits: CommitList | None = None  # None: any or no commit
    commit_field: str = "X-Cis490-Code-Commit"
    overloaded: bool = False


def admit(allowed: bool, episode: str | None = None) -> Answer | None:
    """401 for a request without an accepted token, 400 for an id that cannot be one."""
    if not allowed:
        text = "a bearer token that this receiver accepts is required"
        return answers.error(401, "unauthorized", text, ("WWW-Authenticate", 'Bearer realm="fastship"'))
    if episode is not None and not is_episode_id(episode):
        text = "an episode's id is 1 to 200 of A-Z a-z 0-9 . _ - and starts with a letter or digit"
        return answers.error(400, "bad-episode-id", text)
    return None


def read_body(headers: Mapping[str, str]) -> Body | Answer:
    """The request's framing and its ``Upload-Complete``, ``Content-Digest``, ``Want-Repr-Digest``."""
    length = fields.parse_integer(headers.get("content-length"))
    if "transfer-encoding" in headers:
        length = None
    elif length is None and "content-length" in headers:
        return _bad_field("Content-Length", "a number of at most 15 digits")
    elif length is None:
        length = 0  # RFC 9112, 6.3: no length and no transfer coding is no body
    complete = fields.parse_boolean(headers.get("upload-complete"))
    if complete is None and "upload-complete" in headers:
        return _bad_field(fields.UPLOAD_COMPLETE, "?0 or ?1")
    sha256 = _digest(headers, fields.CONTENT_DIGEST, "sha-256")
    if isinstance(sha256, Answer):
        return sha256
    wanted = headers.get("want-repr-digest", "")
    want_digest = re.search(r"(^|[,\s])sha-256\s*=\s*([1-9]|10)\b", wanted) is not None
    return Body(length=length, sha256=sha256, complete=complete, want_digest=want_digest)


def read_declared(headers: Mapping[str, str], episode: str, body: Body, owner: str = "") -> Declared | Answer:
    """What a PUT says of the artifact; 400 or 415 for what cannot be understood rather than a guess."""
    if headers.get("fastship-episode", episode) != episode:  # a flipped bit of either would store it under another id
        return _bad_field(fields.FASTSHIP_EPISODE, "the id that the request's path names")
    if "content-range" in headers:  # RFC 9110, 14.5: a piece must not be taken for the whole
        return answers.error(400, "bad-field", "Content-Range is not taken here; use a resumable upload")
    if headers.get("content-encoding", "identity").lower() != "identity":
        return answers.error(415, "bad-field", "Content-Encoding is not taken here: send the artifact's own bytes")
    length = fields.parse_integer(headers.get("upload-length"))
    if length is None and "upload-length" in headers:
        return _bad_field(fields.UPLOAD_LENGTH, "a number of bytes")
    if body.complete is not False and body.length is not None:
        if length not in (None, body.length):
            return answers.length_mismatch("Upload-Length is not the length of this complete body")
        length = body.length
    if length is not None and body.length is not None and body.length > length:
        return answers.length_mismatch("the body is longer than Upload-Length")
    sha256 = _digest(headers, fields.REPR_DIGEST, "sha-256")
    if isinstance(sha256, Answer):
        return sha256
    content = _read_content(headers)
    if isinstance(content, Answer):
        return content
    blake3, content_bytes = content
    return Declared(
        episode=episode,
        sha256=sha256,
        length=length,
        content_blake3=blake3,
        content_bytes=content_bytes,
        owner=owner,
    )


def _read_content(headers: Mapping[str, str]) -> tuple[str | None, int | None] | Answer:
    blake3 = _digest(headers, fields.FASTSHIP_CONTENT_DIGEST, "blake3")
    if isinstance(blake3, Answer):
        return blake3
    content_bytes = fields.parse_integer(headers.get("fastship-content-length"))
    if content_bytes is None and "fastship-content-length" in headers:
        return _bad_field(fields.FASTSHIP_CONTENT_LENGTH, "a number of bytes")
    return blake3, content_bytes


class Append(msgspec.Struct, frozen=True):
    """What a PATCH says: where its body begins and, if it knows, how long the artifact and what is its content."""

    offset: int
    length: int | None
    content_blake3: str | None = None
    content_bytes: int | None = None

    def complete(self, declared: Declared) -> Declared:
        """What was declared before, and of the content what is told only now."""
        if declared.content_blake3 is not None or self.content_blake3 is None:
            return declared
        content = {"content_blake3": self.content_blake3, "content_bytes": self.content_bytes}
        return msgspec.structs.replace(declared, **content)


def read_append(headers: Mapping[str, str], body: Body) -> Append | Answer:
    """The fields of a PATCH (section "Upload Append" of the draft)."""
    if headers.get("content-type", "").split(";")[0].strip().lower() != fields.PARTIAL_UPLOAD:
        text = f"an append has Content-Type: {fields.PARTIAL_UPLOAD}"
        return answers.error(415, "bad-field", text, *answers.about_upload(), field="Content-Type")
    offset = fields.parse_integer(headers.get("upload-offset"))
    if offset is None:
        return _bad_field(fields.UPLOAD_OFFSET, "a number of bytes").with_fields(*answers.about_upload())
    if body.complete is None:
        return _bad_field(fields.UPLOAD_COMPLETE, "?0 or ?1").with_fields(*answers.about_upload())
    length = fields.parse_integer(headers.get("upload-length"))
    if length is None and "upload-length" in headers:
        return _bad_field(fields.UPLOAD_LENGTH, "a number of bytes").with_fields(*answers.about_upload())
    if body.complete and body.length is not None:
        if length not in (None, offset + body.length):
            text = "Upload-Offset and Content-Length do not add up to Upload-Length"
            return answers.length_mismatch(text)
        length = offset + body.length
    content = _read_content(headers)
    if isinstance(content, Answer):
        return content.with_fields(*answers.about_upload())
    return Append(offset, length, *content)


def decide_put(declared: Declared, commit: str | None, facts: Facts) -> Answer | None:
    """The verdict on a PUT whose access and id are in order, in the protocol's order."""
    size = declared.length or 0
    if facts.max_bytes and size > facts.max_bytes:
        return too_large(facts.max_bytes)
    if size > facts.room_bytes:
        return NO_ROOM
    if facts.commits is not None:
        refused = _decide_commit(commit, facts.commits, facts.commit_field)
        if refused is not None:
            return refused
    if facts.stored is not None:
        known = compare(declared.sha256, declared.content_blake3, facts.stored)
        if known is not None:
            return known
    else:
        refused = decide_stored(facts.owned_bytes, facts.most_owned_bytes, max(1, size))
        if refused is not None:
            return refused
    return OVERLOADED if facts.overloaded else None


def compare(sha256: str | None, content_blake3: str | None, stored: Receipt) -> Answer | None:
    """200 when the stored episode is proven to be the same, 409 when it is another, None when that is not yet known.

    The content digest counts only where the receiver itself verified it.
    """
    if sha256 == stored.artifact.sha256:
        return answers.stored(200, stored)
    verified = stored.content if stored.verified == "content" else None
    if verified is not None and content_blake3 is not None:
        return answers.stored(200, stored) if content_blake3 == verified.blake3 else answers.conflict(stored)
    return answers.conflict(stored) if sha256 is not None else None


def decide_share(held: Held, limits: Limits, most_uploads: int, new_bytes: int, *, begins: bool) -> Answer | None:
    """Whether its owner may have ``new_bytes`` more in unfinished uploads, and with ``begins`` one upload more.

    Nothing here is about the episode: a client waits, or finishes what it has.
    """
    if begins and limits.uploads and held.uploads >= limits.uploads:
        return TOO_MANY_UPLOADS
    if begins and held.of_all >= most_uploads:
        return OVERLOADED
    return QUOTA if limits.upload_bytes and held.bytes + new_bytes > limits.upload_bytes else None


def too_often(wait_s: float) -> Answer:
    text = "this token has a limit of requests a second"
    return answers.error(429, "rate-limited", text, ("Retry-After", str(max(1, math.ceil(wait_s)))))


def too_large(max_bytes: int) -> Answer:
    text = f"this receiver takes artifacts of at most {max_bytes} bytes"
    limit = (fields.UPLOAD_LIMIT, fields.format_limits({"max-size": max_bytes}))
    return answers.error(413, "too-large", text, answers.ABOUT_EPISODE, limit, max_bytes=max_bytes)


def decide_stored(stored_bytes: int, most_bytes: int, wanted_bytes: int) -> Answer | None:
    """Whether an owner may have so many bytes stored beside what he has; ``most_bytes`` 0: no limit."""
    return full(stored_bytes, most_bytes) if most_bytes and stored_bytes + wanted_bytes > most_bytes else None


def full(stored_bytes: int, most_bytes: int) -> Answer:
    text = f"this token has {stored_bytes} bytes stored here and may have {most_bytes}: this artifact would be too much"
    return answers.error(507, "stored-quota", text, stored_bytes=stored_bytes, max_bytes=most_bytes)


OVERLOADED = answers.error(503, "overloaded", "as many requests as are allowed are being served", ("Retry-After", "2"))
TOO_MANY_UPLOADS = answers.error(
    429, "too-many-uploads", "this token has as many unfinished uploads as it may have", ("Retry-After", "60")
)
QUOTA = answers.error(507, "quota", "this token's unfinished uploads have as many bytes as they may have")
NO_ROOM = answers.error(507, "no-room", "the receiver's file system has no room for this artifact")


def parse_range(value: str | None, size: int) -> tuple[int, int] | Answer | None:
    """``(first, end)`` of a ``Range`` field, None to send everything, or the 416 (RFC 9110, section 14).

    Several ranges, other units and bad syntax are ignored, as section 14.2 allows.
    """
    match = _RANGE.fullmatch((value or "").replace(" ", ""))
    if match is None or not (match[1] or match[2]):
        return None
    if not match[1]:
        first, end = max(0, size - int(match[2])), size
    else:
        first, end = int(match[1]), min(size, int(match[2]) + 1 if match[2] else size)
        if match[2] and int(match[2]) < first:
            return None
    if first >= size or first >= end:
        text = f"the artifact has {size} bytes"
        return answers.error(416, "bad-range", text, ("Content-Range", f"bytes */{size}"))
    return first, end


def _decide_commit(commit: str | None, allowed: CommitList, field: str) -> Answer | None:
    if commit is None or not _COMMIT.fullmatch(commit):
        text = f"the field {field} with the recorder's commit (40 hex digits) is required"
        return answers.error(400, "commit-missing", text, answers.ABOUT_EPISODE)
    if commit.lower() in allowed.commits:
        return None
    return answers.error(
        412,
        "commit-rejected",
        "the recorder's commit is not one that this receiver takes",
        answers.ABOUT_EPISODE,
        your_commit=commit.lower(),
        head_commit=allowed.commits[0] if allowed.commits else "",
        remediation=allowed.remediation,
    )


def _digest(headers: Mapping[str, str], field: str, algorithm: str) -> str | Answer | None:
    """A digest of 32 bytes. Other algorithms are ignored (RFC 9530, section 2), a spoilt value of ours is 400."""
    value = headers.get(field.lower())
    found = fields.parse_digest(value, algorithm)
    if found is not None and len(found) == 64:
        return found
    spoilt = value is not None and (found is not None or re.search(rf"(^|[,\s]){algorithm}\s*=", value))
    return _bad_field(field, f"{algorithm}=:base64 of 32 bytes:") if spoilt else None


def _bad_field(field: str, wanted: str) -> Answer:
    return answers.error(400, "bad-field", f"{field} must be {wanted}", field=field)
