"""Threads that Ctrl-C cannot hang: starting one, and waiting for what it does.

What always holds: a ``KeyboardInterrupt`` may fall between any two instructions of the waiting thread, and waiting
again still ends. `threading.Event`, ``Condition`` and `concurrent.futures` are written in Python on top of a lock:
interrupted at the wrong instruction they leave it taken for ever, or release it twice. So what is waited for here is a
flag, and what wakes is a `queue.SimpleQueue`, written in C.

Imports nothing of fastship; ``compress`` and ``reader`` import it.
"""

from __future__ import annotations

import queue
import signal
import threading
from collections.abc import Callable


class Outcome:
    """What becomes of work given to a thread: its owner calls `begin` and `wait`, the thread sets ``error`` and calls
    `end`. To be used again, also after it was not waited for."""

    __slots__ = ("_woken", "error", "finished")

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self.finished = False
        self._woken: queue.SimpleQueue[None] = queue.SimpleQueue()

    def begin(self) -> None:
        """It goes to a thread now. A new queue: in the old one there may still be a waking that nobody waited for."""
        self.error = None
        self.finished = False
        self._woken = queue.SimpleQueue()

    def end(self) -> None:
        self.finished = True
        self._woken.put(None)

    def wait(self) -> None:
        """Block until it has ended. Repeatable."""
        while not self.finished:
            self._woken.get()


def start_thread(run: Callable[[], None], name: str) -> threading.Thread:
    """A running daemon thread, which gets no signals; the caller gets its own when ``start``, which waits, is over."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        thread = threading.Thread(target=run, name=name, daemon=True)
        thread.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return thread
