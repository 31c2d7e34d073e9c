"""The HTTP fields that both ends write and read: names, and their values to and from Python.

What always holds: a value that does not follow its specification reads as None (the field is then treated as
absent or answered 400 by the caller's choice), and nothing here raises for what a peer sent.

Sources: RFC 9530 (digest fields), RFC 9651 (structured fields), draft-ietf-httpbis-resumable-upload-12
(interop version 8). Imports nothing of fastship; ``upload`` and ``receiver`` import it.
"""

from __future__ import annotations

import base64
import binascii
import re

INTEROP_VERSION = "8"  # draft-ietf-httpbis-resumable-upload, "Upload-Draft-Interop-Version"

REPR_DIGEST = "Repr-Digest"
CONTENT_DIGEST = "Content-Digest"
FASTSHIP_CONTENT_DIGEST = "Fastship-Content-Digest"
FASTSHIP_CONTENT_LENGTH = "Fastship-Content-Length"
FASTSHIP_EPISODE = "Fastship-Episode"
UPLOAD_COMPLETE = "Upload-Complete"
UPLOAD_OFFSET = "Upload-Offset"
UPLOAD_LENGTH = "Upload-Length"
UPLOAD_LIMIT = "Upload-Limit"
UPLOAD_DRAFT_INTEROP_VERSION = "Upload-Draft-Interop-Version"
PARTIAL_UPLOAD = "application/partial-upload"  # media type of an append, section 5 of the draft

_INTEGER = re.compile(r"[0-9]{1,15}")  # RFC 9651, 3.3.1: at most 15 digits
_MEMBER = re.compile(r"\s*([a-z*][a-z0-9_.*-]*)\s*=\s*:([A-Za-z0-9+/=]*):\s*(?:;[^,]*)?")


def format_digest(algorithm: str, hex_digest: str) -> str:
    """``("sha-256", "00ff..")`` -> ``sha-256=:AP8..:`` (RFC 9530, section 2)."""
    return f"{algorithm}=:{base64.b64encode(bytes.fromhex(hex_digest)).decode('ascii')}:"


def parse_digest(value: str | None, algorithm: str) -> str | None:
    """The hex digest that ``value`` (a dictionary of digests) gives for ``algorithm``, or None.

    Of several the last one counts (RFC 9651, 4.2.2).
    """
    for member in reversed((value or "").split(",")):
        match = _MEMBER.fullmatch(member)
        if match and match[1] == algorithm:
            try:
                return base64.b64decode(match[2], validate=True).hex()
            except (binascii.Error, ValueError):
                return None
    return None


def format_boolean(value: bool) -> str:
    """RFC 9651, 3.3.6: ``?1`` or ``?0``."""
    return "?1" if value else "?0"


def parse_boolean(value: str | None) -> bool | None:
    """True for ``?1``, False for ``?0``, None for anything else or absence."""
    return {"?1": True, "?0": False}.get((value or "").split(";")[0].strip())


def parse_integer(value: str | None) -> int | None:
    """A non-negative integer of at most 15 digits, or None."""
    text = (value or "").split(";")[0].strip()
    return int(text) if _INTEGER.fullmatch(text) else None


def parse_limits(value: str | None) -> dict[str, int]:
    """``Upload-Limit: max-size=10, max-age=60`` -> ``{"max-size": 10, "max-age": 60}``; odd members drop out."""
    limits: dict[str, int] = {}
    for member in (value or "").split(","):
        key, _, number = member.partition("=")
        parsed = parse_integer(number)
        if parsed is not None:
            limits[key.strip()] = parsed
    return limits


def format_limits(limits: dict[str, int]) -> str:
    """The inverse of `parse_limits`."""
    return ", ".join(f"{key}={number}" for key, number in limits.items())
