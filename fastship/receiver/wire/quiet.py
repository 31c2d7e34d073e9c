"""Log lines that a client can cause, as often as it likes: enough of them to see it, not enough to fill a disk.

Imported by ``server``.
"""

from __future__ import annotations

import logging
import threading
import time

_LINES = 10
_WINDOW_S = 60.0


class Quiet(logging.Filter):
    """For one logger. Of each message (before its arguments) `_LINES` a minute pass; the next minute's first says how
    many did not. Exceptions pass."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self._seen: dict[str, tuple[float, int]] = {}  # message -> when its window began, lines in it

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info:
            return True
        now, message = time.monotonic(), str(record.msg)
        with self._lock:
            began, lines = self._seen.get(message, (now, 0))
            if now - began >= _WINDOW_S:
                if lines > _LINES:
                    record.msg = f"{message} ({lines - _LINES} more were not logged)"
                began, lines = now, 0
            self._seen[message] = (began, lines + 1)
        return lines < _LINES
