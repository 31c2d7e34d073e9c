"""What each owner has stored, counted by reading all receipts: beside the serving, and by one process at a time.

What always holds: it takes a tenth of a thread's time, and so of the disk's; whoever asks while it counts, or just
has, is counted for once more, soon; no number is changed before all are read. `accounts` says what it is right about.

Blocks its own thread on the disk. Imported by ``store``.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections import Counter
from pathlib import Path

from fastship.episode import episode_of_artifact
from fastship.receiver.store.accounts import Accounts
from fastship.receiver.store.receipts import Receipts

_log = logging.getLogger("fastship.receiver")

_TURN_S = 0.01
_SHARE = 0.1  # of the time is for turns; a receipt takes some 30 us, so a million take 5 minutes
_PAUSE_S = 2.0  # at least; or as long as the last one took, while somebody is refused again and again


class Recount:
    """Of the artifacts in ``episodes``."""

    def __init__(self, episodes: Path, receipts: Receipts, accounts: Accounts) -> None:
        self._episodes = episodes
        self._receipts = receipts
        self._accounts = accounts
        self._asked = threading.Event()
        self._closing = threading.Event()
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None

    def ask(self) -> None:
        """Count soon, or when next somebody asks where no thread is to be had now. Does not block."""
        self._asked.set()
        with self._starting:
            if self._thread is None and not self._closing.is_set():
                thread = threading.Thread(target=self._work, name="receiver-recount", daemon=True)
                with contextlib.suppress(RuntimeError):  # not by the system
                    thread.start()
                    self._thread = thread

    def close(self) -> None:
        """Let it end; does not wait for it. May be repeated."""
        self._closing.set()
        self._asked.set()

    def _work(self) -> None:
        while True:
            self._asked.wait()
            self._asked.clear()
            if self._closing.is_set():
                return
            began = time.monotonic()
            try:
                self.run()
            except InterruptedError:
                return
            except OSError as error:
                _log.error("what is stored of whom cannot be counted now: %s", error)
            self._closing.wait(max(_PAUSE_S, time.monotonic() - began))

    def run(self) -> bool:
        """Count now; False where another process does. Raises ``InterruptedError`` after `close`, and ``OSError``."""
        counted: Counter[str] = Counter()
        turn_ends = time.monotonic() + _TURN_S
        with self._accounts.counting() as put:
            if put is None:
                return False
            with os.scandir(self._episodes) as entries:
                for entry in entries:
                    episode = episode_of_artifact(entry.name)
                    if episode is None:
                        continue
                    owner, size = self._receipts.owned(episode)
                    counted[owner] += size
                    if time.monotonic() > turn_ends:
                        if self._closing.wait(_TURN_S / _SHARE - _TURN_S):
                            raise InterruptedError
                        turn_ends = time.monotonic() + _TURN_S
            put(counted)
        return True
