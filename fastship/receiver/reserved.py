"""How much the unfinished uploads have declared and not yet sent: room that is promised already.

What always holds: it costs at most 2 % of a core however many uploads there are. So a number may be out of date by
the bytes that came, and by the uploads that other processes began, since the last look through the directory;
``fresh`` looks now, which whoever is about to refuse an upload asks for.

Blocks on the disk. Imported by ``uploads``.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

_LOOK_S = 1.0
_LOOK_SHARE = 0.02  # of a core


class Reserved:
    """Of the uploads in ``directory``; ``declared`` reads an upload's length, None where it has none or is gone."""

    def __init__(self, directory: Path, declared: Callable[[str], int | None]) -> None:
        self._directory = directory
        self._declared = declared
        self._lock = threading.Lock()
        self._records: dict[str, tuple[int, int | None]] = {}  # token -> (the record's mtime_ns, length)
        self._rests: dict[str, int] = {}
        self._next_look = 0.0

    def bytes(self, but: str | None = None, *, fresh: bool = False) -> int:
        """What all uploads other than ``but`` have yet to send, less what ``but`` has sent."""
        with self._lock:
            if fresh or time.monotonic() >= self._next_look:
                self._look()
            total = sum(self._rests.values())
            if but is None:
                return total
            return total - self._rests.get(but, 0) - self._sent(but)

    def note(self, token: str, length: int | None) -> None:
        """This process began an upload, or (None) ended one: so much is known without a look."""
        with self._lock:
            if length is None:
                self._rests.pop(token, None)
            else:
                self._rests[token] = max(0, length - self._sent(token))

    def _look(self) -> None:
        began = time.monotonic()
        records: dict[str, tuple[int, int | None]] = {}
        sizes: dict[str, int] = {}
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
                    sizes[token] = status.st_size
                    continue
                known = self._records.get(token)
                if known is None or known[0] != status.st_mtime_ns:
                    known = (status.st_mtime_ns, self._declared(token))
                records[token] = known
        self._records = records
        self._rests = {
            token: max(0, length - sizes[token])
            for token, (_, length) in records.items()
            if length is not None and token in sizes
        }
        ended = time.monotonic()
        self._next_look = ended + max(_LOOK_S, (ended - began) / _LOOK_SHARE)

    def _sent(self, token: str) -> int:
        try:
            return os.stat(self._directory / f"{token}.part").st_size
        except FileNotFoundError:
            return 0
