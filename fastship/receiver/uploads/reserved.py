"""What the unfinished uploads hold: the room that is promised to them, and how many and how much is whose.

Room is promised for what an upload has declared and not yet sent, and for an hour after something last came of it: else
one client that declares and never sends could have all the room for as long as uploads are kept.

What always holds: it costs at most 2 % of a core however many uploads there are, and at most 10 % while somebody asks
for ``fresh`` numbers. So a number may be out of date by the bytes that came, and by the uploads that other processes
began, since the last look through the directory; ``fresh`` looks now, which whoever is about to refuse asks for.

Blocks on the disk. Imported by ``uploads``.
"""

from __future__ import annotations

import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from fastship.receiver.policy.decisions import Declared, Held

_LOOK_S = 1.0
_LOOK_SHARE = 0.02  # of a core
_FRESH_SHARE = 0.1
_CHEAP_S = 0.005  # a look at some hundreds of uploads, which may be taken for each request
_PROMISED_S = 3600.0


class _Known(NamedTuple):
    owner: str
    bytes: int
    rest: int  # promised


class Reserved:
    """Of the uploads in ``directory``; ``read`` reads what one declared, None where it is gone."""

    def __init__(self, directory: Path, read: Callable[[str], Declared | None]) -> None:
        self._directory = directory
        self._read = read
        self._lock = threading.Lock()
        self._records: dict[str, tuple[int, Declared | None]] = {}  # token -> (the record's mtime_ns, what it says)
        self._known: dict[str, _Known] = {}
        self._rest = 0
        self._owned: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0])  # owner -> uploads, bytes
        self._next_look = self._next_fresh = 0.0

    def bytes(self, but: str | None = None, *, fresh: bool = False) -> int:
        """What all uploads other than ``but`` have yet to send, less what ``but`` has sent."""
        with self._lock:
            self._look(fresh)
            if but is None:
                return self._rest
            known = self._known.get(but)
            return self._rest - (known.rest if known else 0) - self.arrived(but)

    def held(self, owner: str, *, fresh: bool = False) -> Held:
        with self._lock:
            self._look(fresh)
            uploads, size = self._owned.get(owner, (0, 0))
            return Held(uploads, size, len(self._known))

    def arrived(self, token: str) -> int:
        """The bytes of its part, durable or not; 0 where there is none."""
        try:
            return os.stat(self._directory / f"{token}.part").st_size
        except FileNotFoundError:
            return 0

    def note(self, token: str, declared: Declared | None) -> None:
        """This process began an upload or was told its length, or (None) ended it: so much is known without a look."""
        with self._lock:
            self._put(token, self._judge(declared, self.arrived(token)) if declared is not None else None)

    def _look(self, fresh: bool) -> None:
        began = time.monotonic()
        if began < (self._next_fresh if fresh else self._next_look):
            return
        now = time.time()
        records: dict[str, tuple[int, Declared | None]] = {}
        parts: dict[str, os.stat_result] = {}
        with os.scandir(self._directory) as entries:
            for entry in entries:
                token, _, kind = entry.name.rpartition(".")
                if kind not in ("json", "part"):
                    continue
                try:
                    status = entry.stat()
                except FileNotFoundError:
                    continue
                if kind == "part":
                    parts[token] = status
                    continue
                known = self._records.get(token)
                if known is None or known[0] != status.st_mtime_ns:
                    known = (status.st_mtime_ns, self._read(token))
                records[token] = known
        self._records = records
        self._known.clear()
        self._owned.clear()
        self._rest = 0
        for token, (noted_ns, declared) in records.items():
            part = parts.get(token)
            if declared is not None and part is not None:
                idle_s = now - max(noted_ns / 1e9, part.st_mtime)
                self._put(token, self._judge(declared, part.st_size, promised=idle_s < _PROMISED_S))
        took_s = time.monotonic() - began
        self._next_look = began + took_s + max(_LOOK_S, took_s / _LOOK_SHARE)
        self._next_fresh = began + took_s + (took_s / _FRESH_SHARE if took_s > _CHEAP_S else 0)

    @staticmethod
    def _judge(declared: Declared, sent: int, *, promised: bool = True) -> _Known:
        length = declared.length or 0
        return _Known(declared.owner, max(length, sent), max(0, length - sent) if promised else 0)

    def _put(self, token: str, known: _Known | None) -> None:
        for one, sign in ((self._known.pop(token, None), -1), (known, 1)):
            if one is not None:
                owned = self._owned[one.owner]
                owned[0] += sign
                owned[1] += sign * one.bytes
                self._rest += sign * one.rest
                if not owned[0]:
                    del self._owned[one.owner]
        if known is not None:
            self._known[token] = known
