"""Signals as flags: handlers only raise one and wake the loop.

Imports nothing of fastship; the supervisor's loop imports it.
"""

from __future__ import annotations

import contextlib
import selectors
import signal
import socket
import threading
from collections.abc import Iterator
from types import FrameType


class Signals:
    """SIGTERM and SIGINT raise "drain", a second one "stop", SIGHUP "reload"."""

    def __init__(self) -> None:
        self.raised: set[str] = set()

    def take(self, flag: str) -> bool:
        """Whether ``flag`` is raised; lowers it."""
        there = flag in self.raised
        self.raised.discard(flag)
        return there

    @contextlib.contextmanager
    def handled(self, selector: selectors.BaseSelector) -> Iterator[None]:
        """Handle them here and now, and make ``selector`` wake with ``data`` None. Only the main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.setblocking(False)
            theirs.setblocking(False)
            selector.register(ours, selectors.EVENT_READ, lambda: ours.recv(4096))
            numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
            before = {number: signal.signal(number, self._handle) for number in numbers}
            wakeup_before = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
            try:
                yield
            finally:
                signal.set_wakeup_fd(wakeup_before)
                for number, handler in before.items():
                    signal.signal(number, handler)
                selector.unregister(ours)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            self.raised.add("reload")
        else:
            self.raised.add("stop" if "drain" in self.raised else "drain")
