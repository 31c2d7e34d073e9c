"""Small records on disk that say whether they are still what was written: a JSON object whose last member is its seal.

    {"episode":"run-17","artifact_bytes":3001411,"seal":"8d1f3c5a9e7b2460"}

The seal is the beginning of the SHA-256 of the object without it. A flipped bit in a record could otherwise be a digit
of a digest, an id or a commit: another record, as valid as the first. It keeps out accidents, nobody who means to. A
record without a seal is taken as it is: earlier versions wrote none.

Pure. Imports nothing of fastship; everything above ``errors`` may import it.
"""

from __future__ import annotations

import hashlib

_MARK = b',"seal":"'
_END = b'"}'
_DIGITS = 16
_SEAL_BYTES = len(_MARK) + _DIGITS + len(_END)


class Spoilt(ValueError):
    """The record is not what was written."""


def seal(record: bytes) -> bytes:
    """A JSON object (compact, with at least one member) with its seal."""
    return record[:-1] + _MARK + _seal_of(record) + _END


def unseal(data: bytes) -> bytes:
    """The object as it was before `seal`. Raises `Spoilt`."""
    data = data.rstrip()
    tail = data[-_SEAL_BYTES:]
    if not tail.startswith(_MARK):
        return data
    record = data[:-_SEAL_BYTES] + b"}"
    if tail != _MARK + _seal_of(record) + _END:
        raise Spoilt("its seal does not fit: bytes of it have changed")
    return record


def _seal_of(record: bytes) -> bytes:
    return hashlib.sha256(record).hexdigest()[:_DIGITS].encode()
