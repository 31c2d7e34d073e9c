"""How much each owner has stored: ``<root>/accounts/<owner>``, one line that all processes add to.

The truth is elsewhere: an artifact in ``episodes/`` is its owner's whose receipt says so. A line is what would come out
if all receipts were read now, so that nobody has to. It is never less than that, but for a power loss; it may be more,
and `recount` puts it right. For that, under the line's ``flock``: it is looked whether the artifact fits, its bytes are
added, it is given its name. Whatever goes wrong in between takes the bytes off again, and

- a kill in between leaves them: too much by what that process was about to name, at most one artifact a thread;
- an operator who removes an artifact, and who sets one aside that rotted, tells nobody: too much by that;
- while all are counted, what is added is added to ``since``, too, which is 0 when that begins. An artifact had its name
  before, and then the listing has it (readdir(3)), or its bytes are in ``since``: their sum is never too little. It is
  too much by what was stored meanwhile and is in both; but who has as much as he may stores nothing meanwhile, so for
  him it is exact, and all is counted whenever somebody is refused;
- nothing is synced: that would be one fsync more for each small artifact. What a process wrote that dies is with the
  kernel. A power loss may take back what the kernel had not written by itself, as it does within about half a minute,
  or the whole line: too little by so much, until all is counted, as it is from each start of a receiver on.

So any number of processes keep a limit exactly. Its price is that artifacts of one owner get their names one after the
other, as names of one directory do anyway.

Blocks on the disk. Imported by ``store`` and ``recount``.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

_log = logging.getLogger("fastship.receiver")

_LINE_BYTES = 64  # within a sector of 512 bytes
_OWNER = re.compile(r"(name|token):[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # as `policy.access` makes them


class Full(Exception):
    """The owner may have no more stored."""

    def __init__(self, stored_bytes: int, most_bytes: int) -> None:
        super().__init__(f"{stored_bytes} of {most_bytes} bytes are stored")
        self.stored_bytes = stored_bytes
        self.most_bytes = most_bytes


class _Line(NamedTuple):
    stored: int = 0
    since: int = 0  # of those, what came after the counting began


class Accounts:
    """Of the owners in ``directory``; ``most_bytes`` says how much one may have, 0: as much as there is room for.

    Safe to use from threads and from several processes at once. ``""`` is nobody, who has no account and no limit.
    """

    def __init__(self, directory: Path, most_bytes: Callable[[str], int]) -> None:
        self._directory = directory
        self.most_bytes = most_bytes

    @contextlib.contextmanager
    def adding(self, owner: str, size: int) -> Iterator[None]:
        """Give an artifact of ``size`` bytes its name within this. Raises `Full`, ``OSError``; adds nothing then."""
        if not owner:
            yield
            return
        with self._line(owner) as fd:
            before = _read(fd, owner)
            most = self.most_bytes(owner)
            if most and before.stored + size > most:
                raise Full(before.stored, most)
            _write(fd, _Line(before.stored + size, before.since + size))
            try:
                yield
            except BaseException:
                _write(fd, before)
                raise

    def stored_bytes(self, owner: str) -> int:
        with self._line(owner) as fd:
            return _read(fd, owner).stored

    def all(self) -> dict[str, int]:
        """The bytes of each who ever had some."""
        return {owner: self.stored_bytes(owner) for owner in self._owners()}

    @contextlib.contextmanager
    def counting(self) -> Iterator[Callable[[Mapping[str, int]], None] | None]:
        """Within this all receipts are read, and what was found is given to the function; None: another is at it."""
        fd = os.open(self._directory / ".counting", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield None
                return
            for owner in self._owners():
                with self._line(owner) as line:
                    _write(line, _read(line, owner)._replace(since=0))
            yield self._put
        finally:
            os.close(fd)

    def _put(self, counted: Mapping[str, int]) -> None:
        for owner in {*self._owners(), *filter(_OWNER.fullmatch, counted)}:
            with self._line(owner) as fd:
                since = _read(fd, owner).since
                _write(fd, _Line(counted.get(owner, 0) + since, since))

    def _owners(self) -> list[str]:
        names = (name.replace(".", ":", 1) for name in os.listdir(self._directory))
        return [name for name in names if _OWNER.fullmatch(name)]

    @contextlib.contextmanager
    def _line(self, owner: str) -> Iterator[int]:
        """The line's file, alone. Its own descriptor each time: that also excludes the threads of a process, and an
        account costs none while nothing is stored for it."""
        fd = os.open(self._directory / owner.replace(":", ".", 1), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield fd
        finally:
            os.close(fd)


def _read(fd: int, owner: str) -> _Line:
    """A new line is 0, and so is a spoilt one until all are counted."""
    raw = os.pread(fd, _LINE_BYTES, 0)
    try:
        return _Line(*map(int, raw.split())) if raw else _Line()
    except (ValueError, TypeError):
        _log.error("the account of %s is spoilt: it is 0 until all is counted again", owner)
        return _Line()


def _write(fd: int, line: _Line) -> None:
    os.pwrite(fd, f"{line.stored:020d} {line.since:020d}".ljust(_LINE_BYTES - 1).encode() + b"\n", 0)
