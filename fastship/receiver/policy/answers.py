"""What the receiver answers, as values: a status, fields and a JSON body.

What always holds: every answer that is not an artifact's bytes has a JSON body or none; an error's body has at
least ``error`` (a sentence for people) and ``code`` (stable, for programs). ``Upload-Complete`` says whom the
answer is about: ``?0`` the upload, which can go on; ``?1`` or absent, the episode.

Pure: no I/O. Imported by everything in the package.
"""

from __future__ import annotations

from typing import Any

import msgspec

from fastship import fields
from fastship.episode import Receipt

_PROBLEMS = "https://iana.org/assignments/http-problem-types#"  # registered by the draft, section "Problem Types"
_UPLOAD_GOES_ON = (fields.UPLOAD_COMPLETE, fields.format_boolean(False))
OFFSET_MISMATCH = _PROBLEMS + "mismatching-upload-offset"
LENGTH_MISMATCH = _PROBLEMS + "inconsistent-upload-length"


class Answer(msgspec.Struct, frozen=True):
    """One response. ``fields`` are in the order they are sent; ``body`` is the JSON document."""

    status: int
    body: dict[str, Any] | None = None
    fields: tuple[tuple[str, str], ...] = ()

    @property
    def content_type(self) -> str:
        return "application/problem+json" if self.body and "type" in self.body else "application/json"

    @property
    def is_about_upload(self) -> bool:
        return _UPLOAD_GOES_ON in self.fields

    def with_fields(self, *more: tuple[str, str]) -> Answer:
        return Answer(self.status, self.body, (*self.fields, *more))


def error(status: int, code: str, text: str, *more: tuple[str, str], **details: Any) -> Answer:
    """An error answer; ``more`` are fields, ``details`` further members of the body."""
    return Answer(status, {"error": text, "code": code, **details}, more)


def about_upload(offset: int | None = None) -> tuple[tuple[str, str], ...]:
    """The fields that make an answer one about the upload, which can go on (at ``offset``)."""
    return (_UPLOAD_GOES_ON,) if offset is None else (_UPLOAD_GOES_ON, (fields.UPLOAD_OFFSET, str(offset)))


ABOUT_EPISODE = (fields.UPLOAD_COMPLETE, fields.format_boolean(True))


def digests_of(receipt: Receipt) -> tuple[tuple[str, str], ...]:
    """The digest fields of a stored episode."""
    found = [(fields.REPR_DIGEST, fields.format_digest("sha-256", receipt.artifact.sha256))]
    if receipt.content is not None:
        found.append((fields.FASTSHIP_CONTENT_DIGEST, fields.format_digest("blake3", receipt.content.blake3)))
        found.append((fields.FASTSHIP_CONTENT_LENGTH, str(receipt.content.bytes)))
    return tuple(found)


def stored(status: int, receipt: Receipt) -> Answer:
    """201 (stored now) or 200 (was stored already), with the receipt."""
    return Answer(status, msgspec.to_builtins(receipt), (ABOUT_EPISODE, *digests_of(receipt)))


def conflict(receipt: Receipt) -> Answer:
    """409: another content stands under this id."""
    text = f"episode {receipt.episode} is stored already with another content; it is not replaced"
    return error(409, "conflict", text, ABOUT_EPISODE, stored=msgspec.to_builtins(receipt))


def offset_mismatch(expected: int, provided: int) -> Answer:
    """409 about the upload: go on at ``expected``."""
    return error(
        409,
        "offset-mismatch",
        f"the upload is at offset {expected}, not {provided}",
        *about_upload(expected),
        type=OFFSET_MISMATCH,
        title="offset from request does not match offset of resource",
        **{"expected-offset": expected, "provided-offset": provided},
    )


def length_mismatch(text: str, offset: int | None = None) -> Answer:
    """400 about the upload: the request's idea of the whole length cannot be."""
    title = "inconsistent length values for upload"
    return error(400, "inconsistent-length", text, *about_upload(offset), type=LENGTH_MISMATCH, title=title)


def digest_mismatch(text: str) -> Answer:
    """400 about the episode: what came is not what its digest says."""
    return error(400, "digest-mismatch", text, ABOUT_EPISODE)


UNKNOWN_UPLOAD = error(404, "unknown-upload", "no such upload; create it again", *about_upload())
SUPERSEDED = error(
    503, "superseded", "another request on this upload took over from this one", *about_upload(), ("Retry-After", "2")
)
BEING_VERIFIED = error(
    503, "being-verified", "the artifact has arrived and is being verified", *about_upload(), ("Retry-After", "10")
)
STOPPING = error(503, "stopping", "the receiver is being stopped", *about_upload(), ("Retry-After", "2"))
INTERNAL = error(500, "internal", "the receiver failed; its log says why")
