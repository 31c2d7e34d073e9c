"""A worker process: packs the episodes it is given and ships them, the next one packed while the last one uploads, and
a large one sent while it is packed.

Three threads beside the frame pool's: the main one reads messages and beats, one packs, one (of `upload.Session`)
moves bytes. For small episodes the hand-overs between them are what costs, so few are made. What always holds: a
worker writes in the outbox only, in files of episodes it was given; it changes nothing in ``episodes/``; it ends at
once when its supervisor is gone, and because it inherited the spool lock no other supervisor can have begun before
it has.

Imports ``pack``, ``frames``, ``upload``, ``spool`` (the outbox alone), ``ipc`` and below. Run by the supervisor as
``python -m fastship.worker FD``; nothing imports it.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import logging
import os
import queue
import signal
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from fastship import ipc, logs
from fastship.episode import MARKER, Manifest, Outcome, Verdict
from fastship.errors import EpisodeChanged, EpisodeUnfinished, EpisodeUnmovable, FastshipError, OutboxFull, PackError
from fastship.frames import FramePool, KeptFrames
from fastship.lifecycle.events import Answered, PackBegan, Packed, PackFailed, Returned
from fastship.pack import Flow, LevelControl, PackOptions, code_commit, fingerprint, measure, pack
from fastship.spool import Headroom, Outbox, Ratio
from fastship.spool.layout import Layout
from fastship.upload import Artifact, Growing, Session

BEAT_S = 0.25
MEASURED_BYTES, MEASURED_ENTRIES = 1 << 60, 10_000  # 0.1 s: of an episode with more the first ones count
GLANCE_MEMBERS = 128  # looked at again within 1 ms or so: a hand-over to another thread costs more

log = logging.getLogger(__name__)  # not structlog: slow to load, for a worker that has nothing to say


class _Progress:
    """How far one episode is; written by the thread that works on it, read by the main one."""

    __slots__ = ("done_bytes", "shipping", "since", "total_bytes")

    def __init__(self) -> None:
        self.shipping = False
        self.done_bytes = 0
        self.total_bytes = 0
        self.since = time.monotonic()


class _ToShip(NamedTuple):
    """An artifact that nobody was told of yet."""

    manifest: Manifest
    reused: bool
    first_attempt: bool
    url: str  # an upload that has some of it


class _Outgoing:
    """An artifact's partial as a sink: sent while it is written, once ``stream_bytes`` of it are there (0: never).

    Writing raises `DiskShort` where there is no ``room``.

    ``begin`` is told how many bytes those are and gives back what is to be told of each further size.
    """

    def __init__(
        self,
        file: io.FileIO,
        room: Headroom,
        kept: KeptFrames,
        stream_bytes: int,
        begin: Callable[[int], Callable[[int], None]],
    ) -> None:
        self._file = file
        self._room = room
        self._kept = kept
        self._stream_bytes = stream_bytes
        self._begin = begin
        self._advance: Callable[[int], None] | None = None
        self._bytes = 0

    def write(self, data: memoryview) -> int:
        self._room.grow(self._bytes, data.nbytes)
        written = self._file.write(data)
        self._bytes += written
        if self._advance is not None:
            self._advance(self._bytes)
        elif self._stream_bytes and self._bytes >= self._stream_bytes and not self._kept.left:
            self._advance = self._begin(self._bytes)
        return written


class Worker:
    """All of the process but its start."""

    def __init__(self, channel: ipc.WorkerEnd, welcome: ipc.Welcome) -> None:
        settings = welcome.settings
        self._channel = channel
        self._layout = Layout(Path(settings.spool.root))
        self._outbox = Outbox(self._layout.outbox)
        self._settings = settings
        self._pool = FramePool()
        self._queue: queue.SimpleQueue[ipc.Assignment | None] = queue.SimpleQueue()
        self._under_way: dict[str, _Progress] = {}
        self._manifests: dict[str, Manifest] = {}
        self._draining = False
        self._may_pack = threading.Event()  # cleared while packing gives way to others on this host
        self._may_pack.set()
        self._session = Session(
            settings.destination,
            settings.upload,
            on_progress=self._shipped_bytes,
            on_verdict=self._judged,
            on_place=self._placed,
        )
        self._checks: list[threading.Thread] = []
        self._ratio = Ratio()
        level = settings.pack.level
        self._options = PackOptions(
            level=LevelControl(settings.pack.level_min, settings.pack.level_max, self._flow)
            if level == "auto"
            else level,
            frame_bytes=settings.pack.frame_bytes,
            owner=settings.pack.owner,
            page_cache=settings.pack.page_cache,
        )
        # A server that proves nothing may take an empty creation for the episode.
        self._stream_bytes = settings.upload.stream_bytes if settings.destination.proof == "receipt" else 0
        self._packer = threading.Thread(target=self._pack_all, name="pack", daemon=True)
        self._packer.start()

    def run(self) -> int:
        """Until drained (0) or the supervisor is gone (1)."""
        self._channel.send(ipc.Ready())
        next_beat = 0.0
        while True:
            message = self._channel.receive(timeout_s=BEAT_S)
            match message:
                case ipc.Assignment():
                    self._queue.put(message)
                case ipc.Shares():
                    if message.threads == 0:
                        self._may_pack.clear()
                    elif message.threads is not None:
                        self._pool.set_threads(message.threads)
                        self._may_pack.set()
                    if message.bandwidth is not None:
                        self._session.set_bandwidth(message.bandwidth)
                case ipc.Recall():
                    self._recall()
                case ipc.Drain():
                    self._drain()
            if time.monotonic() >= next_beat:
                self._channel.send(ipc.Beat(self._progress()))
                next_beat = time.monotonic() + BEAT_S
            if self._packer.is_alive():
                continue
            if not self._draining:
                return 1  # an exception that nobody foresaw ended it and is printed: the episode goes to another worker
            # Nothing more is begun, and what waits for a retry gets its verdict now: the artifacts go on another day.
            if self._session.drain(0.0):
                for check in self._checks:
                    check.join()
                return 0

    def _drain(self) -> None:
        if self._draining:
            return
        self._draining = True
        self._return_queued()
        self._queue.put(None)
        if not self._under_way:
            self._packer.join(BEAT_S)  # it has nothing to do and ends at once: so do we

    def _recall(self) -> None:
        if self._draining:
            return  # all of it was given back, or is about to end
        self._return_queued()
        for episode in self._session.recall():
            del self._under_way[episode], self._manifests[episode]
            self._channel.send(Returned(episode))

    def _return_queued(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                assignment = self._queue.get_nowait()
                if assignment is not None:
                    self._channel.send(Returned(assignment.episode))

    def _progress(self) -> list[ipc.UnderWay]:
        now = time.monotonic()
        return [
            ipc.UnderWay(episode, p.shipping, p.done_bytes, p.total_bytes, now - p.since)
            for episode, p in list(self._under_way.items())
        ]

    # --- the pack thread -------------------------------------------------------------------------------------

    def _pack_all(self) -> None:
        with contextlib.suppress(ipc.Closed):  # the main thread reads the end of file, too
            packed: _ToShip | None = None
            while True:
                if packed is not None and self._queue.empty():
                    self._ship(packed)
                    packed = None
                assignment = self._queue.get()
                if assignment is None:
                    if packed is not None:
                        self._ship(packed)
                    return
                self._under_way[assignment.episode] = _Progress()
                began = PackBegan(assignment.episode)
                if packed is None:
                    self._channel.send(began)
                else:
                    self._ship(packed, began)
                packed = self._attempt(assignment)

    def _attempt(self, assignment: ipc.Assignment) -> _ToShip | None:
        episode = assignment.episode
        try:
            manifest, reused = self._artifact_of(assignment)
        except FastshipError as error:
            self._pack_failed(
                episode, error.code, f"{error.message}; {error.remedy}" if error.remedy else error.message
            )
        except Exception as error:  # a bug, or a kind of I/O error nobody thought of: the worker lives on
            log.exception("packing %s failed", episode)
            self._pack_failed(episode, "internal", f"{type(error).__name__}: {error}")
        else:
            url = self._outbox.find_upload(episode, self._settings.destination.url) if reused else ""
            return _ToShip(manifest, reused, assignment.first_attempt and not reused, url)
        return None

    def _ship(self, packed: _ToShip, *began: PackBegan) -> None:
        """Say that an episode is packed, with what begins now in the same packet, and hand it to the session."""
        manifest = packed.manifest
        episode = manifest.episode
        progress = _Progress()
        progress.shipping, progress.total_bytes = True, manifest.artifact_bytes
        self._under_way[episode] = progress
        self._manifests[episode] = manifest
        self._channel.send(Packed(episode, manifest, packed.reused), *began)
        artifact = Artifact(manifest, self._outbox.artifact(episode))
        self._session.submit(artifact, first_attempt=packed.first_attempt, url=packed.url)

    def _pack_failed(self, episode: str, code: str, error: str) -> None:
        self._session.drop(episode)
        with contextlib.suppress(OSError):
            self._outbox.drop_partial(episode)
        found = ""
        with contextlib.suppress(PackError, OSError):
            found = fingerprint(self._layout.episodes / episode, owner=self._options.owner)
        del self._under_way[episode]
        self._channel.send(PackFailed(episode, code, error, found))

    def _artifact_of(self, assignment: ipc.Assignment) -> tuple[Manifest, bool]:
        """The artifact of an episode as it is now: the one in the outbox (True), or packed anew (False).

        One that was given up for its receipt's room has its manifest left: enough to ask for that receipt again.
        """
        episode = assignment.episode
        directory = self._layout.episodes / episode
        _require_movable(directory, self._layout.shipped)
        manifest = self._outbox.find(episode)
        if manifest is None and self._settings.destination.proof == "receipt":
            manifest = self._outbox.find_given_up(episode)
        if manifest is not None and manifest.fingerprint == fingerprint(directory, owner=self._options.owner):
            _require_marker(directory)
            return manifest, True
        progress = self._under_way[episode]

        def advanced(done_bytes: int) -> None:
            progress.done_bytes = done_bytes
            self._may_pack.wait()

        self._may_pack.wait()
        try:
            room = self._room_for(assignment)
            with self._outbox.begin(episode) as file:
                kept = KeptFrames(file.fileno())
                begin = functools.partial(self._begin_stream, episode, kept)
                sink = _Outgoing(file, room, kept, self._stream_bytes, begin)
                manifest = pack(directory, sink, self._options, self._pool, advanced, kept)
                file.truncate()
            _require_marker(directory)
            self._outbox.commit(manifest)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise OutboxFull(f"{self._layout.outbox}: {error.strerror}", remedy="free some space") from None
            path = error.filename or self._layout.outbox
            raise PackError(f"{path}: {error.strerror}", remedy="see what is wrong with the outbox") from None
        self._ratio.add(manifest.content_bytes, manifest.artifact_bytes)
        return manifest, False

    def _room_for(self, assignment: ipc.Assignment) -> Headroom:
        """What the artifact may take of the disk. Raises `DiskShort` where it would be too large, by what is known.

        One of a single frame that fits as it is needs no walk for that; of more, nobody has counted all (see
        `MEASURED_ENTRIES`: 15 ms for 6,000 files, 3 % of what packing files of 16 kB costs).
        """
        room = Headroom(
            self._outbox,
            assignment.episode,
            floor_bytes=assignment.floor_bytes,
            outbox_limit_bytes=self._settings.disk.outbox_limit_bytes,
        )
        frame_bytes = self._options.frame_bytes
        if assignment.frames > 1 or frame_bytes > room.most_bytes():
            episode = self._layout.episodes / assignment.episode
            size = measure(episode, MEASURED_BYTES, limit_entries=MEASURED_ENTRIES)
            room.require(self._ratio.estimate_bytes(size.bytes))
        return room

    def _begin_stream(self, episode: str, kept: KeptFrames, available_bytes: int) -> Callable[[int], None]:
        """Send what there is of the partial, and go on where an interrupted packing's upload stands.

        That upload has bytes of whole frames of this boot only: if all of those were taken again, none that differs.
        """
        destination = self._settings.destination.url
        url = self._outbox.find_upload(episode, destination) if kept.taken_all else ""
        if not url:
            self._outbox.note_upload(episode, "", destination)
        commit = code_commit(self._layout.episodes / episode)
        growing = Growing(episode, self._outbox.partial(episode), commit)
        return self._session.stream(growing, available_bytes, url=url)

    def _flow(self) -> Flow:
        return Flow(*self._session.flow())

    # --- the session's thread --------------------------------------------------------------------------------

    def _placed(self, episode: str, url: str) -> None:
        try:
            self._outbox.note_upload(episode, url, self._settings.destination.url)
        except OSError as error:  # after a crash it is sent from the start, nothing worse
            log.warning("which upload has some of %s cannot be written down: %s", episode, error)

    def _shipped_bytes(self, episode: str, done_bytes: int, total_bytes: int) -> None:
        progress = self._under_way.get(episode)  # gone where packing failed and its upload is being dropped
        if progress is not None and progress.shipping:  # else it is being packed still, and that is what is shown
            progress.done_bytes, progress.total_bytes = done_bytes, total_bytes

    def _judged(self, episode: str, verdict: Verdict) -> None:
        if verdict.outcome is not Outcome.SHIPPED or self._manifests[episode].members <= GLANCE_MEMBERS:
            self._answer(episode, verdict)
            return
        # Looking at an episode again takes as long as it has files: not on the thread that moves bytes.
        check = threading.Thread(target=self._answer, args=(episode, verdict), name="check", daemon=True)
        self._checks = [one for one in self._checks if one.is_alive()]
        try:
            check.start()
        except RuntimeError:  # the system has no thread for us: what is sent meanwhile waits
            self._answer(episode, verdict)
        else:
            self._checks.append(check)

    def _answer(self, episode: str, verdict: Verdict) -> None:
        manifest = self._manifests.pop(episode)
        unchanged, unseen = True, ""
        if verdict.outcome is Outcome.SHIPPED:
            try:
                now = fingerprint(self._layout.episodes / episode, owner=self._options.owner)
                unchanged = now == manifest.fingerprint
            except EpisodeChanged:
                unchanged = False
            except PackError as error:  # a disk that fails, not a recorder that goes on
                unchanged, unseen = False, f"{error.message}; {error.remedy}"
            except OSError as error:
                unchanged, unseen = False, str(error)
        del self._under_way[episode]  # first: it may be given to us again as soon as it is answered
        with contextlib.suppress(ipc.Closed):
            self._channel.send(Answered(episode, verdict, manifest, unchanged, unseen))


def _require_movable(directory: Path, target: Path) -> None:
    """Before anything is sent: its owner and mode are part of the content, so that what would be mended once the
    receiver has it, by chown or chmod, would be a conflict.

    Whoever moves a directory to another one writes into it (``..``); an owner may give himself leave to. Out of a
    sticky directory, owners alone move (``unlink(2)``, ``rename(2)``).
    """
    try:
        status = os.stat(directory, follow_symlinks=False)
        if status.st_dev != os.stat(target).st_dev:
            remedy = "unmount it, and record within the spool's own file system"
            raise EpisodeUnmovable(f"{directory.name} is on another file system than {target}", remedy=remedy)
        user, parent = os.geteuid(), os.stat(directory.parent)
        sticky = parent.st_mode & stat.S_ISVTX and user not in (0, parent.st_uid)
        if status.st_uid != user and (sticky or not os.access(directory, os.W_OK, effective_ids=True)):
            remedy = "let recorders and fastship share an owner, or a group that may write; it is tried again by itself"
            raise EpisodeUnmovable(f"{directory.name} could not be moved to {target}: not its owner", remedy=remedy)
    except OSError:
        return  # reading it will say what is wrong


def _require_marker(directory: Path) -> None:
    """After the walk: if it was there all the time it was packed, and when it goes later the fingerprint tells."""
    if not os.path.exists(directory / MARKER):
        raise EpisodeUnfinished(f"{directory.name}/{MARKER} was taken away: it is not finished after all")


def main(fd: int) -> int:
    """The process. Ends with `ipc.BOOT_FAILED` when what it needs is not there."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the supervisor's to read
    channel = ipc.WorkerEnd(socket.socket(fileno=fd))
    try:
        welcome = channel.receive(timeout_s=30.0)
        if not isinstance(welcome, ipc.Welcome):
            return ipc.BOOT_FAILED
        logs.configure(welcome.settings.log)
        try:
            worker = Worker(channel, welcome)
        except Exception as error:
            sys.stderr.write(f"fastship: worker cannot start: {type(error).__name__}: {error}\n")
            return ipc.BOOT_FAILED
        return worker.run()
    except ipc.Closed:
        return 1


if __name__ == "__main__":
    status = main(int(sys.argv[1]))
    sys.stderr.flush()
    os._exit(status)  # at once: threads may be in the middle of a frame or of a request, and nothing is owed
