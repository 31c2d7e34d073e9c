"""The store read through again, the longest unread first, whether a receiver runs on it or not.

What always holds: memory is bounded by `_TOGETHER` names, whatever the store holds; one that is interrupted is gone on
with by the next, because the order is that of the receipts' modification times, which say when each was last read and
found right; what is stored while it runs is not its business.

Blocks on the disk. Imported, as `scrub` and what it gives, by the command line through the package.
"""

from __future__ import annotations

import heapq
import os
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import msgspec

from fastship.episode import episode_of_artifact
from fastship.errors import ReceiverError
from fastship.receiver.store.custody import Custody, Finding, Pace
from fastship.receiver.store.store import Store
from fastship.settings import ReceiverSettings

_TOGETHER = 1 << 16  # names from one look through the store: some 10 MB


class Unchecked(msgspec.Struct, frozen=True):
    """An artifact that could not be checked now; nothing is known of it."""

    episode: str
    error: str


class Scrub:
    """Of the store below ``settings.root``, at most ``bytes_per_s`` of it (0: no limit).

    ``keep``: what rotted is left where it is. Raises `ReceiverError` where there is no store.
    """

    def __init__(self, settings: ReceiverSettings, *, bytes_per_s: float = 0.0, keep: bool = False) -> None:
        root = Path(settings.root)
        for name in ("episodes", "secret"):
            if not os.access(root / name, os.R_OK):
                what = "cannot be read" if (root / name).exists() else f"is not a receiver's root: it has no {name}"
                remedy = "name the directory that fastship receive --root has, as a user who may read it"
                raise ReceiverError(f"{root} {what}", remedy=remedy)
        self._store = Store(settings)
        self._custody = Custody(self._store, pace=Pace(bytes_per_s), keep=keep)

    @property
    def read_bytes(self) -> int:
        """So far, of artifacts."""
        return self._custody.read_bytes

    def run(self, *, stopped: Callable[[], bool] = lambda: False) -> Generator[Finding | Unchecked, None, None]:
        """Each artifact once, as it is found. Raises ``InterruptedError`` soon after ``stopped`` says so."""
        began_ns = time.time_ns()
        after = (-1, "")
        while batch := self._oldest(after, began_ns):
            for after in batch:
                episode = after[1]
                try:
                    found = self._custody.check(episode, stopped=stopped, wait=False, not_before_ns=began_ns)
                except BlockingIOError:
                    yield Unchecked(episode, "somebody else is reading it")
                except InterruptedError:
                    raise
                except OSError as error:
                    yield Unchecked(episode, f"it cannot be checked: {error.strerror or error}")
                else:
                    if found is not None:
                        yield found

    def _oldest(self, after: tuple[int, str], before_ns: int) -> list[tuple[int, str]]:
        """The next ones in the order of (when last read, id); those that were read since the run began are through."""
        return heapq.nsmallest(_TOGETHER, (one for one in self._all() if after < one and one[0] < before_ns))

    def _all(self) -> Iterator[tuple[int, str]]:
        with os.scandir(self._store.episodes) as entries:
            for entry in entries:
                if (episode := episode_of_artifact(entry.name)) is not None:
                    yield self._store.checked_ns(episode), episode
