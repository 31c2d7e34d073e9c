"""The session: one thread that carries artifacts to one destination, several at a time.

What always holds: each submitted artifact gets exactly one verdict, in the session's thread, unless it is recalled or
the session drained before it began, or closed before it ended (then it is still in the outbox, and so much of it as
the receiver made durable still at the receiver); one that is sent while it is packed (`Session.stream`) gets none
before it is submitted; no exception in one artifact's course touches another's; an idle session uses no CPU time.

The thread alone touches libcurl. Other threads put what they want into the inbox and wake it.

Imports the other modules of ``upload``; the worker imports it through ``fastship.upload``.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import msgspec

from fastship.episode import Outcome, Scope, Verdict
from fastship.errors import ArtifactError
from fastship.frames import verify_content
from fastship.settings import DestinationSettings, UploadSettings
from fastship.upload.course import (
    Artifact,
    AwaitGrowth,
    CheckArtifact,
    Checked,
    Course,
    Fault,
    FaultKind,
    Growing,
    Growth,
    Remember,
    Request,
    Result,
    Wait,
)
from fastship.upload.curl import Transfers
from fastship.upload.meter import LinkMeter
from fastship.upload.native import native_upload
from fastship.upload.streaming import streamed_upload
from fastship.upload.verdict import verdict_of_fault

log = logging.getLogger(__name__)

PROGRESS_S = 0.2
"""Progress of an artifact is told at most this often: a display's pace."""

METER_S = 0.1
"""How often the link is measured while something is sent."""

METERED_BYTES, METERED_S = 1 << 20, 0.05
"""A body of less that is gone sooner does not show the link: it would tell of the receiver's answer."""

OnProgress = Callable[[str, int, int], None]
"""Called with the episode, the artifact's bytes that the receiver has or was sent, and all its bytes."""
OnVerdict = Callable[[str, Verdict], None]
OnPlace = Callable[[str, str], None]
"""Called with the episode and the URL of an upload that is to be remembered ("": forgotten) beside its artifact."""


class Session:
    """Ships artifacts over up to ``upload.connections`` connections. All methods are thread-safe.

    ``on_progress``, ``on_verdict`` and ``on_place`` are called in the session's thread, which does nothing else
    meanwhile; they may call ``submit``. What they raise is logged. Make it after any fork: it starts a thread.
    """

    def __init__(
        self,
        destination: DestinationSettings,
        upload: UploadSettings,
        *,
        on_verdict: OnVerdict,
        on_progress: OnProgress | None = None,
        on_place: OnPlace | None = None,
    ) -> None:
        self._destination = destination
        self._upload = upload
        self._on_progress = on_progress
        self._on_verdict = on_verdict
        self._on_place = on_place
        self._transfers: Transfers[_Passage] = Transfers(destination, upload)
        self._lock = threading.Condition()
        self._queue: deque[_Passage] = deque()
        self._streams: dict[str, _Passage] = {}  # sent while packed, by episode; until submitted or dropped
        self._bandwidth: float | None = None  # a new limit that the thread has not taken up yet
        self._draining = False
        self._closing = False
        self._closed = False  # the thread has let go of everything
        self._under_way: set[_Passage] = set()  # changed by the thread alone, under the lock
        self._checked: list[tuple[_Passage, Checked]] = []
        self._waits: list[_Waiting] = []  # a heap, the next due first
        self._count = itertools.count()
        self._meter = LinkMeter()
        self._moved_bytes = 0  # in requests that ended
        self._thread = threading.Thread(target=self._run, name="fastship-upload", daemon=True)
        self._thread.start()

    def submit(self, artifact: Artifact, *, first_attempt: bool, url: str = "") -> None:
        """Ship ``artifact`` when its turn comes, in the order of submission; returns at once.

        ``first_attempt`` False: something of it may be at the receiver, go on from there; ``url``: in this upload.
        Of one that is being sent since it was packed this says that it is whole, and where it is now. Do not submit an
        artifact again before its verdict. Raises ``RuntimeError`` once the session drains or is closed.
        """
        manifest = artifact.manifest
        with self._lock:
            if self._draining or self._closing:
                raise RuntimeError("the session takes no more artifacts")
            passage = self._streams.pop(manifest.episode, None)
            if passage is None:
                passage = _Passage(Growing(manifest.episode, artifact.path, manifest.code_commit), url, first_attempt)
                self._queue.append(passage)
            passage.path, passage.first_attempt = artifact.path, first_attempt
            passage.growth = Growth(manifest.artifact_bytes, manifest)
            self._transfers.wake()

    def stream(self, growing: Growing, available_bytes: int, *, url: str = "") -> Callable[[int], None]:
        """Begin to send an artifact that is being packed; `submit` it when it is whole, or `drop` it.

        The function that is given back says how many bytes of its file will not change any more, at first
        ``available_bytes``; it costs a microsecond. ``url``: an upload that has some of them. Raises ``OSError`` where
        the file cannot be opened, ``RuntimeError`` as `submit`.
        """
        passage = _Passage(growing, url, first_attempt=True)
        passage.growth = Growth(available_bytes)
        passage.fd = os.open(growing.path, os.O_RDONLY | os.O_CLOEXEC)
        with self._lock:
            if self._draining or self._closing:
                passage.close()
                raise RuntimeError("the session takes no more artifacts")
            self._streams[growing.episode] = passage
            self._queue.append(passage)
            self._transfers.wake()

        def advance(available_bytes: int) -> None:
            passage.growth = Growth(available_bytes)
            awaited = passage.awaited_bytes
            if awaited is not None and available_bytes >= awaited:
                self._transfers.wake()

        return advance

    def drop(self, episode: str) -> None:
        """Packing failed: what was sent of it while it was packed is given up. May be repeated, also after `submit`."""
        with self._lock:
            passage = self._streams.pop(episode, None)
            if passage is not None and not self._closed:
                passage.growth = Growth(dropped=True)
                self._transfers.wake()

    def recall(self) -> list[str]:
        """Take back what was submitted and has not begun: it gets no verdict."""
        with self._lock:
            back = [passage for passage in self._queue if passage.growth.manifest is not None]
            self._queue = deque(passage for passage in self._queue if passage.growth.manifest is None)
        for passage in back:
            passage.close()
        return [passage.episode for passage in back]

    def set_bandwidth(self, bytes_per_s: float) -> None:
        """Limit what all of the session's transfers send together; 0: no limit. Takes effect at once."""
        with self._lock:
            self._bandwidth = bytes_per_s
            if not self._closed:
                self._transfers.wake()

    def flow(self) -> tuple[float | None, int]:
        """Bytes a second that the link takes (None: not known yet), and the bytes that wait to be sent."""
        with self._lock:
            waiting = [passage.growth.bytes - passage.done_bytes for passage in (*self._queue, *self._under_way)]
        return self._meter.bytes_per_s, sum(waiting)

    @property
    def in_flight(self) -> int:
        """Artifacts that have begun and have no verdict yet."""
        with self._lock:
            return len(self._under_way)

    @property
    def queued(self) -> int:
        """Artifacts that have not begun."""
        with self._lock:
            return len(self._queue)

    def drain(self, timeout_s: float) -> bool:
        """Begin nothing more and block until all under way have their verdicts: True, or False after ``timeout_s``.

        What was queued is dropped without a verdict; what waits for a retry gets its verdict now. May be repeated.
        """
        with self._lock:
            self._draining = True
            self._clear_queue()
            if not self._closed:
                self._transfers.wake()
            return self._lock.wait_for(lambda: not self._under_way, timeout_s)

    def close(self) -> None:
        """Cut everything at once, without verdicts, and end the thread. May be repeated; not from a callback."""
        with self._lock:
            self._draining = self._closing = True
            self._clear_queue()
            if not self._closed:
                self._transfers.wake()
        self._thread.join()

    def _clear_queue(self) -> None:
        for passage in self._queue:
            passage.close()
        self._queue.clear()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # The session's thread from here on.

    def _run(self) -> None:
        try:
            while self._take_inbox():
                for passage, result, sent_bytes in self._transfers.poll(self._sleep_s()):
                    passage.sending_bytes = 0
                    passage.sent_bytes += sent_bytes
                    self._moved_bytes += sent_bytes
                    self._advance(passage, result)
                self._measure()
                self._tell_progress()
        except Exception as error:
            log.exception("the upload session ends because of a fault of its own")
            with self._lock:
                self._closing = self._draining = True
                self._under_way |= set(self._queue)
            for passage in list(self._under_way):
                self._tell(passage, _fault_of_ours(error))
        finally:
            with self._lock:
                self._closing = self._draining = self._closed = True
                self._clear_queue()
                self._transfers.close()
                for passage in self._under_way:
                    passage.close()
                self._under_way.clear()
                self._lock.notify_all()

    def _take_inbox(self) -> bool:
        """Do what other threads and the clock ask for; False: end."""
        with self._lock:
            if self._closing:
                return False
            bandwidth, self._bandwidth = self._bandwidth, None
            checked, self._checked = self._checked, []
            draining = self._draining
        if bandwidth is not None:
            self._transfers.set_bandwidth(bandwidth)
        for passage, result in checked:
            self._advance(passage, result)
        for passage in [one for one in self._under_way if one.has_grown()]:
            passage.awaited_bytes = None
            self._advance(passage, passage.growth)
        now = time.monotonic()
        while self._waits and (draining or self._waits[0].due <= now):
            waiting = heapq.heappop(self._waits)
            if draining:
                self._finish(waiting.passage, waiting.wait.verdict)
            else:
                self._advance(waiting.passage, None)
        while self._begin_next():
            pass
        return True

    def _begin_next(self) -> bool:
        with self._lock:
            if not self._queue or len(self._under_way) >= self._upload.connections:
                return False
            passage = self._queue.popleft()
            passage.course = self._course_of(passage)
            self._under_way.add(passage)
        fault = passage.open()
        if fault:
            self._finish(passage, verdict_of_fault(fault))
        else:
            self._advance(passage, None)
        return True

    def _course_of(self, passage: _Passage) -> Course:
        manifest = passage.growth.manifest
        if manifest is None or passage.url:
            return streamed_upload(passage.growing, self._destination, self._upload, url=passage.url)
        artifact = Artifact(manifest, passage.path)
        return native_upload(artifact, self._destination, self._upload, first_attempt=passage.first_attempt)

    def _advance(self, passage: _Passage, result: Result) -> None:
        """Tell the course what came of its last step and do the next one, or end with its verdict."""
        try:
            step = passage.course.send(result)
            match step:
                case Request():
                    if passage.fd < 0 and step.body is not None and step.body.length_bytes:
                        self._finish(passage, verdict_of_fault(Fault(FaultKind.ARTIFACT, f"{passage.path} is gone")))
                        return
                    passage.sending_bytes = step.body.length_bytes if step.body else 0
                    passage.sending_since = time.monotonic()
                    if step.body is not None:
                        passage.offset = passage.done_bytes = step.body.offset
                    self._transfers.start(passage, step, passage.fd)
                case Wait():
                    due = time.monotonic() + step.seconds
                    heapq.heappush(self._waits, _Waiting(due, next(self._count), passage, step))
                    log.info("%s: again in %.1f s: %s", passage.episode, step.seconds, step.verdict.error)
                case CheckArtifact():
                    why = f" ({step.why[:300]})" if step.why else ""
                    log.warning("%s: the receiver finds its digest wrong%s; reading it again", passage.episode, why)
                    # Minutes for a large one: a thread, so that the others go on. A daemon, so that close() may cut it.
                    threading.Thread(
                        target=self._check, args=(passage, step), name="fastship-check", daemon=True
                    ).start()
                case AwaitGrowth():
                    passage.awaited_bytes = step.bytes  # first: what grows from now on wakes us
                    if passage.has_grown():
                        self._transfers.wake()
                case Remember():
                    if self._on_place is not None and not passage.growth.dropped:
                        self._on_place(passage.episode, step.url)
                    self._advance(passage, None)
        except StopIteration as stop:
            self._finish(passage, stop.value)
        except Exception as error:
            log.exception("%s: a fault of our own in its upload", passage.episode)
            self._finish(passage, _fault_of_ours(error))

    def _finish(self, passage: _Passage, verdict: Verdict) -> None:
        self._transfers.cancel(passage)
        passage.close()
        self._tell(passage, verdict)

    def _tell(self, passage: _Passage, verdict: Verdict) -> None:
        verdict = msgspec.structs.replace(verdict, sent_bytes=passage.sent_bytes)
        with self._lock:
            packing = self._streams.get(passage.episode) is passage
            if packing:  # nobody waits for a verdict yet; `submit` will find no stream, and ship it anew
                del self._streams[passage.episode]
        if not packing and passage.growth.manifest is not None:
            try:
                self._on_verdict(passage.episode, verdict)
            except Exception:
                log.exception("%s: what follows its verdict failed", passage.episode)
        with self._lock:  # only now: whoever waits in drain() finds every callback done
            self._under_way.discard(passage)
            self._lock.notify_all()

    def _check(self, passage: _Passage, step: CheckArtifact) -> None:
        """In a thread of its own."""
        manifest = passage.growth.manifest
        assert manifest is not None
        try:
            with open(passage.path, "rb") as file:
                intact = hashlib.file_digest(file, "sha256").hexdigest() == manifest.artifact_sha256
            if intact and step.content:
                found = verify_content(passage.path)
                intact = (found.blake3, found.bytes) == (manifest.content_blake3, manifest.content_bytes)
        except ArtifactError as error:
            log.error("%s: %s", passage.episode, error.message)
            intact = False
        except OSError as error:
            log.error("%s: %s: %s", passage.episode, passage.path, error.strerror)
            intact = False
        with self._lock:
            if not self._closed:
                self._checked.append((passage, Checked(intact)))
                self._transfers.wake()

    def _sleep_s(self) -> float | None:
        now = time.monotonic()
        dues = [waiting.due for waiting in self._waits[:1]]
        if self._on_progress is not None:
            dues += [passage.progress_due for passage in self._under_way if passage.sending_bytes]
        if any(passage.sending_bytes for passage in self._under_way):
            dues.append(now + METER_S)
        return max(0.0, min(dues) - now) if dues else None

    def _measure(self) -> None:
        now, moved_bytes, busy = time.monotonic(), self._moved_bytes, False
        for passage in self._under_way:
            long = passage.sending_bytes >= METERED_BYTES or now - passage.sending_since >= METERED_S
            if passage.sending_bytes and long:
                moved = self._transfers.moved_bytes(passage)
                passage.done_bytes = passage.offset + moved
                moved_bytes += moved
                busy |= moved < passage.sending_bytes
        self._meter.sample(now, moved_bytes, busy)

    def _tell_progress(self) -> None:
        if self._on_progress is None:
            return
        now = time.monotonic()
        for passage in list(self._under_way):
            if passage.sending_bytes and now >= passage.progress_due:
                passage.progress_due = now + PROGRESS_S
                done = passage.offset + self._transfers.sent_bytes(passage)
                if done != passage.told_bytes:
                    passage.told_bytes = done
                    try:
                        self._on_progress(passage.episode, done, passage.growth.bytes)
                    except Exception:
                        log.exception("%s: telling its progress failed", passage.episode)


class _Passage:
    """One artifact on its way: its course once it has begun, its open file, and what was sent of it."""

    def __init__(self, growing: Growing, url: str, first_attempt: bool) -> None:
        self.growing = growing
        self.path = growing.path  # where its file is now
        self.url = url
        self.first_attempt = first_attempt
        self.growth = Growth()  # replaced by the thread that packs, in one step
        self.awaited_bytes: int | None = None  # the course waits until there are so many
        self.course: Course = _no_course()
        self.fd = -1
        self.sent_bytes = 0  # in all requests that ended
        self.offset = 0  # where the body under way began
        self.sending_bytes = 0  # of the body under way
        self.sending_since = 0.0
        self.done_bytes = 0  # that the receiver has, as far as is known
        self.progress_due = 0.0
        self.told_bytes = -1

    @property
    def episode(self) -> str:
        return self.growing.episode

    def has_grown(self) -> bool:
        """Whether what the course waits for has come."""
        growth = self.growth
        if self.awaited_bytes is None:
            return False
        return growth.bytes >= self.awaited_bytes or growth.manifest is not None or growth.dropped

    def open(self) -> Fault | None:
        """Open the artifact's file, and see that it is as long as it should be before anything is promised.

        One that is gone is asked for all the same, where it is not the first attempt.
        """
        manifest = self.growth.manifest
        try:
            if self.fd < 0:
                self.fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            size = os.fstat(self.fd).st_size
        except OSError as error:
            if isinstance(error, FileNotFoundError) and not self.first_attempt:
                return None  # the receiver may have all of it (`Outbox.give_up`)
            return Fault(FaultKind.ARTIFACT, f"{self.path}: {error.strerror}")
        if manifest is not None and size != manifest.artifact_bytes:
            return Fault(
                FaultKind.ARTIFACT, f"{self.path} has {size} bytes, its manifest says {manifest.artifact_bytes}"
            )
        return None

    def close(self) -> None:
        """May be repeated."""
        self.course.close()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class _Waiting(NamedTuple):
    """Ordered by time, then by arrival."""

    due: float
    number: int
    passage: _Passage
    wait: Wait


def _no_course() -> Course:
    """Of an artifact that gets its verdict without ever having begun."""
    raise AssertionError("never begun")
    yield


def _fault_of_ours(error: Exception) -> Verdict:
    return Verdict(
        outcome=Outcome.TRANSIENT,
        scope=Scope.NETWORK,
        error=f"a fault of fastship's own, see the log: {type(error).__name__}: {error}",
    )
