"""Copies in ``shipped/`` that the operator does not want kept: removed by age, by size or for room, the oldest first.

What always holds: with no rule set nothing is removed; a copy goes only after the receiver has just read the episode
again and found what its receipt says (`custody`), and only while it still is what was shipped; a receiver that does not
say so keeps the copy here, which is logged and shown; what is not shipped is never looked at.

A thread of the supervisor's own does it, since a receiver takes its time to read. It is under the same spool lock, and
touches nothing but ``shipped/``.

Imports ``custody`` (when it has to ask), ``pack``, ``spool``, ``settings``, ``status``; the loop imports it.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import msgspec

from fastship import durable, logs, status
from fastship.errors import DestinationError, FastshipError, PackError
from fastship.pack import fingerprint
from fastship.settings import Settings
from fastship.spool import Copy, Spool

if TYPE_CHECKING:
    from fastship.custody import Ledger

log = logs.Logger(__name__)

SHORT_S, IDLE_S = 2.0, 10.0  # between two rounds while the disk is short; where the last one had nothing to remove
SHORT_SPACING = 20.0  # times the CPU of the last one, at least: a twentieth of a core
ASK_AGAIN_S = 3600.0  # about a copy that the receiver did not confirm
ASKED_AT_ONCE = 2  # as many as a receiver reads at once; what is no longer to go then was read in vain
CLOSE_S = 5.0
_OWNERS: tuple[Literal["keep", "zero"], ...] = ("keep", "zero")


class Retention:
    """Of one run of the daemon. `turn` is called in the loop; all else is done in a thread, one round at a time."""

    def __init__(self, settings: Settings, spool: Spool) -> None:
        self.status: status.RetentionStatus | None = None
        self._settings = settings
        self._rules = settings.retention
        self._spool = spool
        self._shelf = spool.shelf
        self._on = bool(self._rules.shipped_keep_days or self._rules.shipped_max_bytes or self._rules.shipped_make_room)
        self._kept: dict[str, float] = {}  # copies that were not confirmed, and when that was
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._next_round = self._next_short = 0.0
        self._wanted_free_bytes = 0  # of the disk, before copies stop making room
        self._total_bytes = 0
        self._round_cpu_s = 0.0  # of the last one; how long it waited for the receiver is no reason to wait again
        self._removed = 0  # in it

    def turn(self, *, missing_bytes: int, paused: bool) -> None:
        """Begin a round when one is due. ``missing_bytes``: so much of the disk must become free; ``paused``: the
        destination is, and nobody is to be asked."""
        now = time.monotonic()
        short = missing_bytes > 0 and bool(self._rules.shipped_make_room or self._rules.shipped_max_bytes)
        first = self._next_round == 0.0  # what a crash left is removed whoever can be asked
        if (now < self._next_round and not (short and now >= self._next_short)) or (paused and not first):
            return
        if self._thread is not None:
            if self._thread.is_alive():
                return
            self._thread = None
            self._next_short = now + max(SHORT_S if self._removed else IDLE_S, SHORT_SPACING * self._round_cpu_s)
            if now < self._next_round:
                return
        self._next_round = now + self._rules.quarantine_cleanup_interval_s
        if not self._on and not first:
            return
        self._wanted_free_bytes = self._free_bytes() + missing_bytes if self._rules.shipped_make_room else 0
        self._spool.ages.look()
        thread = threading.Thread(target=self._round, name="retention", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            self._waits(f"the system has no thread for it: {error}")
        else:
            self._thread = thread

    def close(self) -> None:
        """Remove no more copies. One that is being removed is finished by the next start."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(CLOSE_S)

    def _round(self) -> None:
        """In the thread."""
        began, self._removed = time.thread_time(), 0
        try:
            self._shelf.finish_removals()
            if self._on:
                self._work()
        except DestinationError as error:
            self._waits(f"{error.message}; {error.remedy}")
        except (OSError, FastshipError) as error:
            self._waits(str(error))
        except Exception as error:
            log.exception("retention-failed")
            self._waits(f"{type(error).__name__}: {error}")
        finally:
            self._round_cpu_s = time.thread_time() - began

    def _work(self) -> None:
        copies = self._shelf.copies()
        self._total_bytes = sum(one.bytes for one in copies)
        present = {one.name for one in copies}
        self._kept = {name: at for name, at in self._kept.items() if name in present}
        self._tell(copies=len(copies), bytes=self._total_bytes, kept=len(self._kept), waits="")
        left = len(copies)
        ledger: Ledger | None = None  # reads every journal: only when there is something to ask
        waiting = (one for one in copies if self._is_to_be_asked(one))
        while chunk := list(itertools.islice(self._due(waiting), ASKED_AT_ONCE)):
            ledger = ledger or _open_ledger(self._settings)
            for copy, why in self._ask(ledger, chunk):
                because = self._reason(copy)
                if self._stopping.is_set() or not because:
                    return
                if why:
                    self._keep(copy, why)
                    continue
                try:
                    whole = self._shelf.remove(copy.name)
                except OSError as error:  # an operator was first, or it may not be moved
                    self._keep(copy, str(error))
                    continue
                if not whole:
                    log.warning("copy-not-removed", copy=copy.name, remedy="see what is left of it in shipped/")
                left -= 1
                self._removed += 1
                self._total_bytes -= copy.bytes
                log.info("copy-removed", copy=copy.name, because=because, bytes=copy.bytes)
                before = self.status or status.RetentionStatus()
                self._tell(copies=left, bytes=self._total_bytes, removed=before.removed + 1)

    def _due(self, copies: Iterator[Copy]) -> Iterator[Copy]:
        """Those that a rule names, the oldest first: behind the first that none names there is no other."""
        return itertools.takewhile(lambda one: not self._stopping.is_set() and bool(self._reason(one)), copies)

    def _reason(self, copy: Copy) -> str:
        """Which rule would have it gone now; empty: none."""
        rules = self._rules
        if rules.shipped_keep_days and self._spool.ages.age_s(copy.retired_at) > rules.shipped_keep_days * 86400:
            return "age"
        if rules.shipped_max_bytes and self._total_bytes > rules.shipped_max_bytes:
            return "size"
        if self._wanted_free_bytes and self._free_bytes() < self._wanted_free_bytes:
            return "room"
        return ""

    def _is_to_be_asked(self, copy: Copy) -> bool:
        at = self._kept.get(copy.name)
        return at is None or time.monotonic() - at >= ASK_AGAIN_S

    def _ask(self, ledger: Ledger, copies: list[Copy]) -> Iterator[tuple[Copy, str]]:
        """Each with why it is not to be removed, or "": the receiver has it, and it is what was shipped."""
        answers = {one.episode: one for one in ledger.check({copy.episode for copy in copies}, local=False)}
        for copy in copies:
            found = answers[copy.episode]
            if found.state != "equal":
                yield copy, found.error
            elif found.receipt is None:
                yield copy, "its receipt is lost"
            else:
                yield copy, self._changed(copy)

    def _changed(self, copy: Copy) -> str:
        """Whether somebody worked in the copy: what is there then may be nowhere else."""
        path = self._spool.paths.shipped / copy.name
        try:
            if any(fingerprint(path, owner=owner) == copy.fingerprint for owner in _OWNERS):  # whatever was set then
                return ""
        except (PackError, OSError) as error:
            return str(error)
        return "it is not what was shipped: it was changed in shipped/, or is an older copy"

    def _keep(self, copy: Copy, why: str) -> None:
        self._kept[copy.name] = time.monotonic()
        remedy = "compare with: fastship verify --local; it is asked about again in an hour"
        log.warning("copy-kept", copy=copy.name, why=why, remedy=remedy)
        self._tell(kept=len(self._kept), why=f"{copy.name}: {why}")

    def _waits(self, why: str) -> None:
        if self.status is None or self.status.waits != why:
            log.warning("copies-wait", why=why)
        self._tell(waits=why)

    def _tell(self, **changes: object) -> None:
        self.status = msgspec.structs.replace(self.status or status.RetentionStatus(), **changes)

    def _free_bytes(self) -> int:
        return durable.free_bytes(self._spool.paths.shipped)


def _open_ledger(settings: Settings) -> Ledger:
    from fastship.custody import Ledger  # libcurl with it, which a supervisor needs for nothing else

    return Ledger(settings)
