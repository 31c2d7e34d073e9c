"""Who may store, how much of it, and which recorders' commits are taken: two files that are edited while it runs.

A line of the token file is ``TOKEN [name=NAME] [rate=N/s] [uploads=N] [upload-bytes=SIZE] [stored-bytes=SIZE]
[# comment]``. Who calls is known by NAME, where there is one, so that a new token of the same name goes on with the old
one's uploads, and what was stored with that counts; else by the token itself.

What always holds: a changed file is in force at the next request; a file that cannot be read or understood any more
leaves what was last read in force (and is logged once); tokens are compared in constant time and never logged, nor is
any word of their lines: it may be one of a token.

Blocks for one ``stat`` a call, and to read a changed file. Imported by ``app``.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import threading
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import msgspec

from fastship.errors import ReceiverError
from fastship.settings import ReceiverSettings
from fastship.settings.units import parse_size

_log = logging.getLogger("fastship.receiver")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_RATE = re.compile(r"([0-9]{1,6}(?:\.[0-9]{1,3})?)/s")
_REMEDIATION = re.compile(r"#\s*remediation:\s*(.*)", re.IGNORECASE)

T = TypeVar("T")


class _Watched(Generic[T]):
    """The parsed content of a file, read again when its modification time, size or inode changes."""

    def __init__(self, path: str, setting: str) -> None:
        self._path = Path(path)
        self._seen: tuple[int, int, int] | None = None
        self._lock = threading.Lock()
        try:
            self._value = self._read()
        except (OSError, ValueError) as error:
            remedy = "make it readable for the receiver" if isinstance(error, OSError) else "mend what is written there"
            raise ReceiverError(f"receiver.{setting}: {path} cannot be read: {error}", remedy=remedy) from None

    def parse(self, text: str) -> T:
        raise NotImplementedError

    def _read(self) -> T:
        with open(self._path, encoding="utf-8") as file:
            stat = os.fstat(file.fileno())
            value = self.parse(file.read())
        self._seen = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
        return value

    def value(self) -> T:
        with self._lock:
            try:
                stat = os.stat(self._path)
                if (stat.st_mtime_ns, stat.st_size, stat.st_ino) != self._seen:
                    self._value = self._read()
            except (OSError, ValueError) as error:
                if self._seen is not None:
                    _log.error("%s cannot be read, its last content stays in force: %s", self._path, error)
                self._seen = None  # read it as soon as it can be again
            return self._value

    def last(self) -> T:
        """As it was when it was last asked for."""
        return self._value


class Limits(NamedTuple):
    """What one caller may do; 0: no limit."""

    rate: float = 0.0  # requests a second
    uploads: int = 0  # unfinished
    upload_bytes: int = 0
    stored_bytes: int = 0

    @classmethod
    def usual(cls, settings: ReceiverSettings) -> Limits:
        """Of a caller whose line says nothing else."""
        return cls(
            settings.token_rate, settings.token_uploads, settings.token_upload_bytes, settings.token_stored_bytes
        )


NO_LIMITS = Limits()


class Caller(NamedTuple):
    """Who sent a request. ``owner`` tells nothing of the token; "" where there are none."""

    owner: str = ""
    limits: Limits = NO_LIMITS


class _Tokens(NamedTuple):
    callers: dict[bytes, Caller]
    stored_bytes: dict[str, int]  # of an owner: the most that a line of his says; 0 is more than anything


class _TokenFile(_Watched[_Tokens]):
    def __init__(self, path: str, setting: str, key: bytes, limits: Limits) -> None:
        self._key = key
        self._limits = limits
        super().__init__(path, setting)

    def parse(self, text: str) -> _Tokens:
        callers: dict[bytes, Caller] = {}
        for number, line in enumerate(text.splitlines(), 1):
            words = line.split()
            if words and not words[0].startswith("#"):
                try:
                    callers[_digest(words[0])] = self._caller(words)
                except ValueError:
                    raise ValueError(
                        f"line {number}: after the token may stand name=NAME, rate=N/s, uploads=N, upload-bytes=SIZE, "
                        "stored-bytes=SIZE"
                    ) from None
        stored: dict[str, int] = {}
        for owner, limits in callers.values():
            known = stored.get(owner, limits.stored_bytes)
            stored[owner] = max(known, limits.stored_bytes) if known and limits.stored_bytes else 0
        return _Tokens(callers, stored)

    def _caller(self, words: list[str]) -> Caller:
        # Keyed: what is kept of a token beside its uploads cannot be used to guess it.
        owner = "token:" + hmac.new(self._key, words[0].encode(), hashlib.sha256).hexdigest()[:32]
        limits = self._limits
        for word in words[1:]:
            if word.startswith("#"):
                break
            key, _, value = word.partition("=")
            if key == "name" and _NAME.fullmatch(value):
                owner = f"name:{value}"
            elif key == "rate" and (rate := _RATE.fullmatch(value)):
                limits = limits._replace(rate=float(rate[1]))
            elif key == "uploads" and value.isascii() and value.isdigit():
                limits = limits._replace(uploads=int(value))
            elif key == "upload-bytes":
                limits = limits._replace(upload_bytes=parse_size(value))
            elif key == "stored-bytes":
                limits = limits._replace(stored_bytes=parse_size(value))
            else:
                raise ValueError
        return Caller(owner, limits)


class CommitList(msgspec.Struct, frozen=True):
    """The recorders' commits that are taken, lower-case hex; the first is the head."""

    commits: tuple[str, ...]
    remediation: str


class _CommitFile(_Watched[CommitList]):
    def parse(self, text: str) -> CommitList:
        commits, remediation = [], []
        for line in (line.strip() for line in text.splitlines()):
            words = line.lower().split()
            told = _REMEDIATION.match(line)
            if told:
                remediation.append(told[1])
            elif words and not line.startswith("#"):
                if _COMMIT.fullmatch(words[0]):
                    commits.append(words[0])
                else:
                    _log.warning("%s: %r is not a commit of 40 hex digits", self._path, line[:60])
        return CommitList(tuple(commits), "\n".join(remediation))


class Access:
    """The two lists. ``""`` for a file: everybody, or any commit. Raises `ReceiverError` when one cannot be read.

    ``key`` is a secret of the receiver, ``limits`` are of callers whose line says nothing else. What is stored is
    counted for those who have tokens, so a limit of that is refused without a token file.
    """

    def __init__(self, token_file: str, commits_file: str, key: bytes = b"", limits: Limits = NO_LIMITS) -> None:
        if limits.stored_bytes and not token_file:
            raise ReceiverError(
                "receiver.token_stored_bytes limits what each token may store, and there are no tokens",
                remedy="set receiver.token_file, or leave it at 0",
            )
        self._everybody = Caller("", limits)
        self._tokens = _TokenFile(token_file, "token_file", key, limits) if token_file else None
        self._commits = _CommitFile(commits_file, "commits_file") if commits_file else None

    def caller(self, authorization: str | None) -> Caller | None:
        """Who has the bearer token of an ``Authorization`` field's value (RFC 6750, section 2.1); None: nobody."""
        if self._tokens is None:
            return self._everybody
        scheme, _, token = (authorization or "").strip().partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            return None
        given = _digest(token.strip())
        # All are compared, so the time tells nothing of which one was near.
        found = [caller for known, caller in self._tokens.value().callers.items() if hmac.compare_digest(given, known)]
        return found[0] if found else None

    def several(self) -> bool:
        """Whether there is more than one caller."""
        return self._tokens is not None and len(self._tokens.value().callers) > 1

    def stored_bytes(self, owner: str) -> int:
        """How much may be stored for this owner; 0: no limit. An owner whose tokens are gone stores no more."""
        return self._tokens.last().stored_bytes.get(owner, 0) if self._tokens is not None else 0

    def limits_what_is_stored(self) -> bool:
        """Of anybody."""
        return self._tokens is not None and any(self._tokens.value().stored_bytes.values())

    def commits(self) -> CommitList | None:
        """The allow-list now in force; None when there is none."""
        return self._commits.value() if self._commits is not None else None


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()
