"""What the supervisor does on the disk without being asked by a worker: look, notice, sweep, clean up, serve operators.

What always holds: the regular look is the truth and inotify a hint; looks never cost more than `LOOK_SHARE` of a core
over time, however many episodes there are; nothing is decided here but by `lifecycle.infer`: findings go to
the book as events.

Imports ``spool``, ``pack`` (fingerprints), ``lifecycle``, ``settings``; the supervisor's loop imports it.
"""

from __future__ import annotations

import os
import selectors
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from fastship import logs, status
from fastship.episode import is_episode_id
from fastship.errors import PackError, UsageError
from fastship.lifecycle import CLAIMED, Book, State, infer
from fastship.lifecycle.events import Event, Found, Gone, Released
from fastship.pack import fingerprint
from fastship.settings import Settings
from fastship.spool import Spool, remedy_for, requests

if TYPE_CHECKING:
    from fastship.spool import Look
    from fastship.spool.watch import MarkerWatch

log = logs.Logger(__name__)

NOTICE_S = 0.02  # markers are gathered for so long: a recorder that makes many files wakes us 50 times a second at most
LOOK_SHARE = 0.005  # of one core
LOOKING_SHARE = 0.1  # of the time, where a look waits for a slow disk, or the process was stopped in the middle of one
SLOWER = "until then markers are seen every spool.scan_interval_s only"
TOLD_AT_ONCE = 10  # lines of the log
LINK_REMEDY = "links are not followed: move the directory itself into episodes/"
CLOSED_REMEDY = "let the user that runs fastship read it (chmod, chown or an ACL)"
HOLD_LOOK_S = 60.0  # held episodes are looked at again so often: it takes a walk through each


class Patrol:
    """Of one run of the supervisor. ``feed`` tells the book; ``settle`` finishes what was decided but not yet done."""

    def __init__(
        self,
        settings: Settings,
        spool: Spool,
        book: Book,
        selector: selectors.BaseSelector,
        *,
        feed: Callable[[Event], None],
        settle: Callable[[], None],
    ) -> None:
        self.settings = settings
        self.recording = 0  # unfinished episodes at the last look
        self._spool = spool
        self._book = book
        self._selector = selector
        self._feed = feed
        self._settle = settle
        self._watch: MarkerWatch | None = None
        self._said_full = False
        self._told: set[str] = set()  # unfinished episodes and links at the last look
        self._notice_at: float | None = None
        self._steps = 0  # of the clock
        self._next_look = self._next_pass = self._next_hold_look = self._next_cleanup = 0.0

    def repair(self) -> None:
        """Bring what a crash left to a state that `infer` knows; afterwards nothing has to be remembered."""
        self._spool.remove_temporaries()
        self._spool.finish_quarantines()
        self._sweep()
        self._cleanup()

    def watch(self) -> None:
        """Notice markers at once from now on, where the kernel helps."""
        from fastship.spool.watch import MarkerWatch  # a single pass does not watch

        paths = self._spool.paths
        try:
            self._watch = MarkerWatch(paths.episodes, paths.requests)
        except OSError as error:
            log.warning("no-inotify", error=str(error), remedy=SLOWER)
            return
        self._selector.register(self._watch, selectors.EVENT_READ, self.notice)

    def close(self) -> None:
        """Let go of inotify."""
        if self._watch is not None:
            if self._notice_at is None:
                self._selector.unregister(self._watch)
            self._watch.close()
            self._watch = None

    def next_due(self) -> float:
        """When `turn` has something to do."""
        return min(self._next_look, self._next_pass, self._notice_at or self._next_look)

    def turn(self, heartbeat: Callable[[], None] | None) -> None:
        """Whatever is due now."""
        now = time.monotonic()
        if self._notice_at is not None and now >= self._notice_at and self._watch is not None:
            self._notice_at = None
            self._selector.register(self._watch, selectors.EVENT_READ, self.notice)
        if now >= self._next_look:
            self._next_look = now + self.settings.spool.scan_interval_s  # where it fails; else `look` knows better
            self._try("look", self.look)
        if now >= self._next_pass:
            self._next_pass = now + self.settings.spool.scan_interval_s
            self._try("pass", self._pass)
            status.notify("WATCHDOG=1")
            if heartbeat is not None:
                self._try("heartbeat", heartbeat)

    def _try(self, what: str, step: Callable[[], None]) -> None:
        """What fails is logged, and neither keeps the others from their turn nor is tried again before its own."""
        try:
            step()
        except OSError as error:
            log.error(f"{what}-failed", error=str(error))
        except Exception:
            log.exception(f"{what}-failed")

    def notice(self) -> None:
        """What inotify says. Each episode is looked at before it is believed."""
        if self._watch is None:
            return
        marked, asked, overflowed = self._watch.read()
        ready = [(self._spool.key(name), name) for name in marked if self._is_ready(name)]
        if ready:
            self.recording = max(0, self.recording - len(ready))
            self._feed(Found(ready, complete=False))
        if asked:
            self._try("requests", self._serve_requests)
        if overflowed:
            self._next_look = 0.0
        self._selector.unregister(self._watch)
        self._notice_at = time.monotonic() + NOTICE_S

    def _is_ready(self, name: str) -> bool:
        # Names that cannot be ids wait for the regular look, which says so.
        if not is_episode_id(name):
            return False
        state = infer(self._spool.facts(name))
        if state is State.PACKED and name not in self._book.entries:
            self._settle()  # the marker is noticed late: it is shipped already, and about to be retired
            state = infer(self._spool.facts(name))
        return state in (State.READY, State.PACKED)

    def look(self) -> None:
        """The truth: one look through ``episodes/``."""
        began, began_cpu = time.monotonic(), time.thread_time()
        self._settle()
        look = self._spool.look()
        if self._watch is not None:
            late = [name for name in self._watch.follow(look.recording) if self._is_ready(name)]
            look.ready.extend((self._spool.key(name), name) for name in late)
            if self._watch.full and not self._said_full:
                self._said_full = True
                remedy = f"raise fs.inotify.max_user_watches; {SLOWER}"
                log.warning("inotify-full", unfinished=len(look.recording), remedy=remedy)
        self.recording = len(look.recording)
        self._tell_what_is_not_shipped(look)
        self._feed(Found(look.ready, look.held, look.impossible, packed=tuple(self._spool.outbox.packed())))
        self._look_at_holds(look.held)
        now, cost_s = time.monotonic(), time.thread_time() - began_cpu
        spacing_s = max(cost_s / LOOK_SHARE, (now - began) / LOOKING_SHARE)
        self._next_look = now + max(self.settings.spool.scan_interval_s, spacing_s)

    def _tell_what_is_not_shipped(self, look: Look) -> None:
        """Once each: links in the place of an episode, and episodes whose marker this user could not even see."""
        recording = set(look.recording)
        told = [(name, "it is a symbolic link", LINK_REMEDY) for name in look.links if name not in self._told]
        for name in recording - self._told:
            if not os.access(self._spool.paths.episodes / name, os.R_OK | os.X_OK, effective_ids=True):
                told.append((name, "it cannot be looked into", CLOSED_REMEDY))
        self._told = recording.union(look.links)
        for name, error, remedy in told[:TOLD_AT_ONCE]:
            log.warning("not-shipped", episode=ascii(name), error=error, remedy=remedy)
        if len(told) > TOLD_AT_ONCE:
            log.warning("not-shipped", episodes=len(told) - TOLD_AT_ONCE, error="more of the same")

    def _look_at_holds(self, held: list[str]) -> None:
        """Release the holds whose episode changed (or, held because it was changing, has stopped to)."""
        if not held or time.monotonic() < self._next_hold_look:
            return
        self._next_hold_look = time.monotonic() + HOLD_LOOK_S
        for episode in held:
            record = self._spool.find_hold(episode)
            if record is None or not (record.fingerprint or record.reason == "changing"):  # that changed as it was held
                continue
            try:
                now = fingerprint(self._spool.paths.episodes / episode, owner=self.settings.pack.owner)
            except (PackError, OSError):
                continue
            if (now != record.fingerprint) == (record.reason != "changing"):
                log.info("hold-released", episode=episode, reason=record.reason)
                self._spool.release(episode)
                self._feed(Released(episode, self._spool.key(episode)))
            elif record.reason == "changing":
                self._spool.hold(msgspec.structs.replace(record, fingerprint=now))

    def _pass(self) -> None:
        """Once every scan interval: sweep, clean up, the requests that inotify may have missed."""
        if self._spool.unfinished:
            self._try("quarantines", self._spool.finish_quarantines)
        self._sweep()
        if time.monotonic() >= self._next_cleanup:
            self._cleanup()
        self._serve_requests()
        self._spool.ages.look()
        if self._spool.ages.steps != self._steps:  # found here, or by one of those who asked for an age before
            self._steps = self._spool.ages.steps
            log.warning("clock-stepped", remedy="nothing is cleaned up for its age before it is as old since now")
        requests.forget_old(self._spool.paths.requests, self._spool.ages, older_than_s=3600.0)

    def _sweep(self) -> None:
        for episode in self._spool.sweep():
            log.info("swept", episode=episode)

    def _cleanup(self) -> None:
        retention = self.settings.retention
        self._next_cleanup = time.monotonic() + retention.quarantine_cleanup_interval_s
        for name in self._spool.clean_quarantine(retention.quarantine_keep_days):
            log.info("quarantine-cleaned", entry=name)

    def _serve_requests(self) -> None:
        for path, request in requests.pending(self._spool.paths.requests):
            if request is None:
                reply = requests.Answer(ok=False, text="the request cannot be read")
            else:
                reply = self._serve(request)
            try:
                requests.answer(path, reply)
            except OSError as error:  # no room for it, or not ours to remove: neither keeps the others waiting
                log.error("request-not-answered", path=os.fspath(path), answer=reply.text, error=str(error))

    def _serve(self, request: requests.Request) -> requests.Answer:
        entry = self._book.entries.get(request.episode)
        if entry is not None and entry.state in CLAIMED:
            text = f"{request.episode} is being worked on"
            return requests.Answer(ok=False, text=text, remedy="try again in a moment")
        try:
            effect = requests.carry_out(self._spool, request)
        except UsageError as error:
            return requests.Answer(ok=False, text=error.message, remedy=error.remedy)
        except OSError as error:
            where = error.filename or request.episode
            return requests.Answer(ok=False, text=f"{where}: {error.strerror}", remedy=remedy_for(error))
        if effect.gone is not None:
            self._feed(Gone(effect.gone))
        if effect.ready is not None:
            self._feed(Released(effect.ready, self._spool.key(effect.ready)))
        log.info("operator", action=request.action, episode=request.episode, effect=effect.text)
        return requests.Answer(ok=True, text=effect.text)
