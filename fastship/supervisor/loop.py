"""The loop: reap, receive, obey, scan, decide, execute, report.

What always holds: the supervisor alone moves episodes between states, under the spool lock; it decides nothing
itself (``lifecycle.decide`` does) and moves no bytes itself (the workers do); signals only raise flags; an
exception in a step of the loop is logged and the loop goes on, but for those that say nothing can ever work
(`WorkerCannotStart`).

Imports everything below it but ``receiver`` and ``upload``; the shipper imports it.
"""

from __future__ import annotations

import contextlib
import selectors
import time
from collections import deque
from collections.abc import Callable

import msgspec

from fastship import ipc, logs, status
from fastship.episode import is_episode_id, now_wall
from fastship.errors import FastshipError, PackError, SpoolBusy, SpoolError, UsageError
from fastship.lifecycle import Book, Policy, decide, next_wake
from fastship.lifecycle import events as ev
from fastship.pack import measure
from fastship.settings import Settings
from fastship.spool import HoldRecord, Spool, remedy_for
from fastship.supervisor.crew import Crew, Hand
from fastship.supervisor.disk import DiskWatch
from fastship.supervisor.host import Courtesy, most_threads, thread_count
from fastship.supervisor.patrol import Patrol
from fastship.supervisor.retention import Retention
from fastship.supervisor.signals import Signals
from fastship.supervisor.tally import Tally

log = logs.Logger(__name__)

STOP_LOOK_S = 0.25  # the stop flag is looked at as often as this: with the workers' end that makes half a second
LOCK_WAIT_S = 5.0  # the workers of a supervisor that was killed need a moment to notice
RETIRE_SPACING = 4.0  # times what the last group commit took: a fifth of the time goes into them at most
REPORT_S = 1.0
OBSERVE_S = 0.25
GATHER_S = 0.003  # between two readings of what the workers say; they have work for longer than that (QUEUE_DEPTH)


class Supervisor:
    """One run: a single pass (``once``) or until told to stop. Used once; not thread-safe."""

    def __init__(
        self,
        settings: Settings,
        *,
        once: bool,
        stop_check: Callable[[], bool] | None = None,
        heartbeat: Callable[[], None] | None = None,
        observer: Callable[[status.Snapshot], None] | None = None,
        reload: Callable[[], Settings] | None = None,
    ) -> None:
        self._settings = settings
        self._once = once
        self._stop_check = stop_check
        self._heartbeat = heartbeat
        self._observer = observer
        self._reload = reload
        self._spool = Spool(settings.spool.root, order=settings.spool.order)
        self._book = Book(policy_of(settings, once=once))
        self._selector = selectors.DefaultSelector()
        self._events: deque[ev.Event] = deque()
        self._retirements: list[ev.Retire] = []
        self._signals = Signals()
        self._tally = Tally(settings.destination.url, once=once)
        self._courtesy = Courtesy(settings)
        self._disk = DiskWatch(settings, self._spool, self._book)
        self._retention = Retention(settings, self._spool)
        self._drain_until: float | None = None
        self._deciding = False
        self._stopping = False
        self._hiring = False
        self._heard_at = 0.0  # when workers' messages were last read
        self._next_report = self._next_observe = self._retire_at = 0.0
        self._patrol = Patrol(
            settings, self._spool, self._book, self._selector, feed=self._feed, settle=self._flush_retirements
        )

    def run(self) -> status.PassResult:
        """Take the spool, work, let go of it. Raises `SpoolBusy`, `SpoolError`, `WorkerCannotStart`."""
        self._spool.paths.require(["episodes"])
        self._spool.create()
        self._lock = self._spool.lock(wait_s=LOCK_WAIT_S)
        self._crew = Crew(self._settings, self._lock.fd, self._selector)
        try:
            with self._signals.handled(self._selector) if self._reload else contextlib.nullcontext():
                self._begin()
                self._loop()
        finally:
            status.notify("STOPPING=1")
            self._book.draining = True
            self._flush_retirements()  # what was proven until the last moment; ending workers may take a while
            self._crew.dismiss()
            self._patrol.close()
            self._retention.close()
            self._report(final=True)
            self._lock.release()
            self._selector.close()
        return self._tally.totals(self._book)

    def _begin(self) -> None:
        try:
            self._patrol.repair()
            if not self._once:
                self._patrol.watch()
            self._look_at_disk()  # before anything is given out
            self._patrol.look()
        except OSError as error:
            where = error.filename or self._spool.paths.root
            raise SpoolError(f"{where}: {error.strerror}", remedy=remedy_for(error)) from None
        self._hiring = not self._once or bool(self._book.ready)  # an empty pass needs no workers
        status.notify("READY=1")

    def _loop(self) -> None:
        # Each step for itself: whatever keeps one of them failing, signals are obeyed and workers heard.
        steps = (self._reap, self._receive, self._obey, self._scan, self._decide_by_time, self._retire, self._report)
        while not self._finished():
            for step in steps:
                try:
                    step()
                except FastshipError:
                    raise
                except Exception:
                    log.exception("step-failed")
                    time.sleep(STOP_LOOK_S)  # whatever it is, not in a busy loop

    def _scan(self) -> None:
        if not self._once and self._drain_until is None:
            self._patrol.turn(self._heartbeat)
            self._retention.turn(missing_bytes=self._disk.missing_bytes, paused=self._book.breaker.paused)

    def _decide_by_time(self) -> None:
        self._look_at_disk()
        self._feed(self._give_way() or ev.Tick())

    def _retire(self) -> None:
        if time.monotonic() >= self._retire_at:
            self._flush_retirements()

    def _finished(self) -> bool:
        if self._stopping:
            return True
        if self._drain_until is not None:
            return not self._crew.hands or time.monotonic() >= self._drain_until
        return self._once and self._book.idle()

    def _give_way(self) -> ev.Budget | None:
        """The cores for packing, where others want more or fewer of them now. In a single pass nothing waits."""
        return None if self._once else self._courtesy.turn(hand.pid for hand in self._crew.hands.values())

    def _look_at_disk(self) -> None:
        room = self._disk.turn()
        if room is not None:
            self._feed(room)

    def _hire(self) -> None:
        count = worker_count(self._settings)
        while self._drain_until is None and sum(1 for hand in self._crew.hands.values() if not hand.leaving) < count:
            if self._crew.hire(threads=most_threads(self._settings)) is None:
                break
        self._crew.restrain()

    # --- reap ------------------------------------------------------------------------------------------------

    def _reap(self) -> None:
        timeout_s = self._settings.workers.heartbeat_timeout_s
        for hand in self._crew.silent(timeout_s):
            self._hear_all(hand)  # what it said while we were busy with the disk counts
        for hand in self._crew.silent(timeout_s):
            log.error("worker-silent", worker=hand.number, pid=hand.pid, for_s=timeout_s)
            hand.kill()
        for hand, how in self._crew.reap():  # raises WorkerCannotStart
            died = not hand.leaving or hand.exit_status != 0
            if died:
                with contextlib.suppress(OSError):  # then the next start does
                    self._spool.outbox.drop_temporaries(hand.pid)
            if hand.ready:
                self._feed(ev.WorkerLeft(hand.number, died, how))
            (log.warning if died else log.info)("worker-left", worker=hand.number, pid=hand.pid, how=how)
        if self._hiring:
            self._hire()

    # --- receive ---------------------------------------------------------------------------------------------

    def _timeout(self) -> float:
        """Seconds until something is due. What is overdue waits for a message, not for time: not counted."""
        now = time.monotonic()
        times = [now + STOP_LOOK_S]
        if not self._once and self._drain_until is None:
            times.append(max(now, self._patrol.next_due()))
        if self._observer is not None:
            times.append(max(now, self._next_observe))
        if self._retirements:
            times.append(max(now, self._retire_at))
        wake = next_wake(self._book)
        if wake is not None and wake > now:
            times.append(wake)
        return min(times) - now

    def _receive(self) -> None:
        self._crew.flush()
        readable = self._selector.select(self._timeout())
        # When small episodes come in their hundreds, to be woken by each costs more than what there is to do.
        pause_s = self._heard_at + GATHER_S - time.monotonic()
        if pause_s > 0:
            time.sleep(pause_s)
        for key, _ in readable:
            source = key.data
            if isinstance(source, Hand):
                self._hear_all(source)
            else:
                source()  # inotify or a signal

    def _hear_all(self, hand: Hand) -> None:
        for message in hand.messages():
            self._heard(hand, message)
        self._decide_all()
        self._heard_at = time.monotonic()

    def _heard(self, hand: Hand, message: ipc.FromWorker) -> None:
        match message:
            case ipc.Ready():
                self._crew.begins(hand)
                self._events.append(ev.WorkerJoined(hand.number))
            case ipc.Beat():
                self._beat(hand, message)
            case ev.Answered():
                self._tally.answered(self._book, message)
                self._events.append(message)
            case ev.PackFailed():
                self._tally.pack_failed(self._book, message.episode, message.error)
                self._events.append(message)
            case _:
                self._events.append(message)

    def _beat(self, hand: Hand, message: ipc.Beat) -> None:
        """Where nothing moves that is said, and no more: whatever hangs there may come to its end yet."""
        limit_s = self._settings.workers.stall_report_s
        before = {episode for episode, still_s in hand.still_s.items() if limit_s and still_s >= limit_s}
        hand.beat(message.under_way, paused=self._book.shares.get(hand.number) == 0)
        after = {episode for episode, still_s in hand.still_s.items() if limit_s and still_s >= limit_s}
        for episode in sorted(after - before):
            where = hand.waits_in() or "not known"
            remedy = "see whether its file system answers (ls, df); it goes on by itself"
            fields = {"worker": hand.number, "pid": hand.pid, "for_s": limit_s, "waits_in": where}
            log.warning("pack-stalled", episode=episode, **fields, remedy=remedy)
        for episode in sorted(before - after):
            log.info("pack-no-longer-stalled", episode=episode, worker=hand.number)

    # --- decide, execute -------------------------------------------------------------------------------------

    def _feed(self, event: ev.Event) -> None:
        """Tell the book and carry out what it says. Events that come of that wait for their turn."""
        self._events.append(event)
        self._decide_all()

    def _decide_all(self) -> None:
        if self._deciding:
            return
        self._deciding = True
        try:
            while self._events:
                self._decide(self._events.popleft())
        finally:
            self._deciding = False
        self._share_bandwidth()

    def _decide(self, event: ev.Event) -> None:
        for command in decide(self._book, event, time.monotonic(), more=bool(self._events)):
            try:
                self._execute(command)
            except OSError as error:
                log.error("command-failed", command=type(command).__name__, error=str(error), remedy=remedy_for(error))
                if isinstance(command, ev.Quarantine | ev.Hold) and is_episode_id(command.episode):
                    self._undone(command.episode, error)

    def _execute(self, command: ev.Command) -> None:
        match command:
            case ev.Measure():
                self._events.append(ev.Measured(command.episode, self._frames_of(command.episode)))
            case ev.Assign():
                self._crew.send(command.worker, _assignment(command))
            case ev.Share():
                self._crew.send(command.worker, ipc.Shares(threads=command.threads))
            case ev.Recall():
                self._crew.send(command.worker, ipc.Recall())
            case ev.Retire():
                self._retirements.append(command)
            case ev.Quarantine():
                self._quarantine(command)
            case ev.Hold():
                self._hold(command)
            case ev.Discard():
                self._spool.outbox.remove(command.episode)
            case ev.Report():
                getattr(log, command.level)(command.event, **command.fields)

    def _frames_of(self, episode: str) -> int:
        """About how many frames an episode has, counted no further than all cores could be busy with."""
        frame_bytes = self._settings.pack.frame_bytes
        limit = 2 * thread_count(self._settings) * frame_bytes
        try:
            size = measure(self._spool.paths.episodes / episode, limit)
        except (PackError, OSError):
            return 1  # the worker will say what is wrong
        return 1 + (size.bytes + 1024 * size.files) // frame_bytes

    def _quarantine(self, command: ev.Quarantine) -> None:
        log.error(
            "quarantined",
            episode=ascii(command.episode),
            status=command.status_code,
            error=command.error,
            **_remediation_in(command),
        )
        self._spool.quarantine(command.episode, status_code=command.status_code, error=command.error, body=command.body)
        self._tally.quarantined(self._book, command.episode, command.error)

    def _hold(self, command: ev.Hold) -> None:
        log.error("held", episode=command.episode, reason=command.reason, status=command.status, error=command.error)
        self._spool.hold(
            HoldRecord(
                episode=command.episode,
                reason=command.reason,
                status=command.status,
                error=command.error,
                body=command.body,
                fingerprint=command.fingerprint,
                artifact_sha256=command.artifact_sha256,
                held_at=now_wall(),
            )
        )
        self._tally.held(self._book, command.episode, command.error)

    def _flush_retirements(self) -> None:
        """The group commit: all episodes proven since the last one are retired together.

        The first at once; under load commits are spaced by what they cost, so that batches grow with the disk's
        slowness and the supervisor stays with its workers for most of the time.
        """
        batch, self._retirements = self._retirements, []
        if not batch:
            return
        began = time.monotonic()
        try:
            failed = self._spool.retire([(one.episode, one.receipt, one.manifest) for one in batch])
        except OSError as error:  # no receipt could be made durable, so none was moved
            failed = dict.fromkeys((one.episode for one in batch), error)
        for one in batch:
            if one.episode in failed:
                why = failed[one.episode]
                log.error("retire-failed", episode=one.episode, error=str(why), remedy=remedy_for(why))
                self._undone(one.episode, why)
            else:
                self._tally.retired(one.manifest)
        now = time.monotonic()
        self._retire_at = now + RETIRE_SPACING * (now - began)

    def _undone(self, episode: str, error: OSError) -> None:
        """The disk refused what was decided. Nothing is lost: it is in ``episodes/``, and is offered again later."""
        text = f"{error.strerror}; {remedy_for(error)}"
        self._tally.undone(self._book, episode, text)
        self._feed(ev.Undone(episode, self._spool.key(episode), text))

    # --- drain, stop, reload ---------------------------------------------------------------------------------

    def _obey(self) -> None:
        """What signals and the caller's stop flag ask for."""
        if "stop" in self._signals.raised:
            self._stopping = True
        if self._drain_until is None and ("drain" in self._signals.raised or (self._stop_check and self._stop_check())):
            limit_s = self._settings.workers.drain_timeout_s
            log.info("draining", limit_s=limit_s)
            status.notify("STOPPING=1")
            self._drain_until = time.monotonic() + limit_s
            self._book.draining = True
            self._dismiss_present()
        if self._signals.take("reload"):
            self._reload_settings()

    def _dismiss_present(self) -> None:
        for hand in list(self._crew.hands.values()):
            if not hand.leaving:
                self._feed(ev.WorkerLeaving(hand.number))
                hand.leaving = True
                self._crew.send(hand.number, ipc.Drain())

    def _reload_settings(self) -> None:
        """New settings, new workers; the old ones finish what they began. Wrong settings change nothing."""
        if self._reload is None:
            return
        status.notify("RELOADING=1")
        try:
            new = self._reload()
            if new.spool.root != self._settings.spool.root:
                raise UsageError("spool.root cannot change while running", remedy="restart the daemon")
            policy = policy_of(new, once=self._once)
        except FastshipError as error:
            log.error("reload-refused", error=error.message, remedy=error.remedy)
        else:
            log.info("reloaded")
            self._settings = new
            self._book.begin_afresh(policy)
            self._courtesy = Courtesy(new)
            self._disk = DiskWatch(new, self._spool, self._book)
            self._retention.close()
            self._retention = Retention(new, self._spool)
            self._tally.url = new.destination.url
            self._spool.order = new.spool.order
            self._patrol.settings = self._crew.settings = new
            self._dismiss_present()
            self._hire()
        status.notify("READY=1")

    # --- report ----------------------------------------------------------------------------------------------

    def _share_bandwidth(self) -> None:
        total = self._settings.upload.bandwidth
        if total:
            self._crew.share_bandwidth(total, self._book)

    def _report(self, *, final: bool = False) -> None:
        now = time.monotonic()
        observed = self._observer is not None and (final or now >= self._next_observe)
        written = final or now >= self._next_report
        if not observed and not written:
            return
        snapshot = self._tally.snapshot(
            self._book,
            self._crew.hands.values(),
            recording=self._patrol.recording,
            draining=self._drain_until is not None,
            host=None if self._once else self._courtesy.status(),
            disk=self._disk.status,
            retention=self._retention.status,
        )
        if written and not final and not self._lock.is_ours():
            raise SpoolBusy(
                f"{self._spool.paths.lock} was removed or replaced: another fastship could begin beside this one",
                remedy="leave state/ alone while fastship runs; start it again",
            )
        if written:
            self._next_report = now + REPORT_S
            status.write(self._spool.paths.state, snapshot)
        if observed and self._observer is not None:
            self._next_observe = now + OBSERVE_S
            with contextlib.suppress(OSError):  # shown on what is full, or gone: the work goes on
                self._observer(snapshot)


def _assignment(command: ev.Assign) -> ipc.Assignment:
    return ipc.Assignment(command.episode, command.first_attempt, command.frames, command.floor_bytes)


def _remediation_in(command: ev.Quarantine) -> dict[str, str]:
    """What the receiver tells the operator of a refused commit to run: the original's S10."""
    if command.status_code != 412:
        return {}
    try:
        told = msgspec.json.decode(command.body, type=dict[str, object])
    except (ValueError, RecursionError):  # nested thousands deep: hostile, or broken
        return {"body": command.body}
    return {name: str(told[name]) for name in ("your_commit", "head_commit", "remediation") if name in told}


def worker_count(settings: Settings) -> int:
    """Worker processes: ``workers.count``, or one for each core to pack with."""
    return settings.workers.count or thread_count(settings)


def policy_of(settings: Settings, *, once: bool) -> Policy:
    """What the rules need of the settings. Raises `SettingsError` when a worker would not fit its memory."""
    return Policy(
        cores=thread_count(settings),
        in_flight=2 * settings.upload.connections,  # half of them in line, so that a connection never waits
        poison_after=settings.workers.poison_after,
        pause_min_s=settings.destination.pause_min_s,
        pause_max_s=settings.destination.pause_max_s,
        pause_after=settings.destination.pause_after,
        most_threads=most_threads(settings),
        once=once,
    )
