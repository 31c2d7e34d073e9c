"""Who may store and which recorders' commits are taken: two files that an operator edits while the receiver runs.

What always holds: a changed file is in force at the next request; a file that cannot be read any more leaves what
was last read in force (and is logged once); tokens are compared in constant time and never logged.

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
from typing import Generic, TypeVar

import msgspec

from fastship.errors import ReceiverError

_log = logging.getLogger("fastship.receiver")
_COMMIT = re.compile(r"[0-9a-f]{40}")
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
        except (OSError, UnicodeDecodeError) as error:
            raise ReceiverError(
                f"receiver.{setting}: {path} cannot be read: {error}", remedy="make it readable for the receiver"
            ) from None

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
            except (OSError, UnicodeDecodeError) as error:
                if self._seen is not None:
                    _log.error("%s cannot be read, its last content stays in force: %s", self._path, error)
                self._seen = None  # read it as soon as it can be again
            return self._value


class _TokenFile(_Watched[tuple[bytes, ...]]):
    def parse(self, text: str) -> tuple[bytes, ...]:
        lines = (line.strip() for line in text.splitlines())
        return tuple(_digest(line) for line in lines if line and not line.startswith("#"))


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
    """The two lists. ``""`` for a file: everybody, or any commit. Raises `ReceiverError` when one cannot be read."""

    def __init__(self, token_file: str, commits_file: str) -> None:
        self._tokens = _TokenFile(token_file, "token_file") if token_file else None
        self._commits = _CommitFile(commits_file, "commits_file") if commits_file else None

    def allows(self, authorization: str | None) -> bool:
        """Whether an ``Authorization`` field's value names an accepted bearer token (RFC 6750, section 2.1)."""
        if self._tokens is None:
            return True
        scheme, _, token = (authorization or "").strip().partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            return False
        given = _digest(token.strip())
        # All are compared, so the time tells nothing of which one was near.
        return sum([hmac.compare_digest(given, known) for known in self._tokens.value()]) > 0

    def commits(self) -> CommitList | None:
        """The allow-list now in force; None when there is none."""
        return self._commits.value() if self._commits is not None else None


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()
