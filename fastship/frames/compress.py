"""The frame pool: fixed pieces of the tar stream in, independent zstd frames out, in order, on T threads.

What always holds:
- The same bytes come out whatever T is and however it changes: a frame depends on its content and level alone
  (``levels``). With a `LevelChoice` the level depends on the moment; and frames that an interrupted packing left are
  taken as they are.
- ``commit`` is called in the thread that fills the frames, in frame order.
- At most T+2 frames are held: T being compressed, one waiting, one being filled. Buffers are anonymous memory whose
  pages cost nothing until touched, and the one used last is used first: a small episode touches only its own size.
- With one thread, and for an artifact of one frame, compression runs in the calling thread: no thread is started.
- A fault in a thread is raised in the caller at the next call; the pool stays usable. Nothing here forks, and a
  process that used more than one thread must not fork either (design.md).

Imports zstandard and its siblings; the worker and ``pack`` see `FramePool` through the package.
"""

from __future__ import annotations

import mmap
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Protocol, Self

import zstandard

from fastship.frames.index import index_compressor
from fastship.frames.kept import KeptFrames
from fastship.frames.levels import FASTEST_LEVEL, parameters, worthwhile_level
from fastship.frames.threads import Outcome, start_thread

Commit = Callable[[bytes, int], None]
"""Called with one compressed frame and the number of tar stream bytes in it."""

COMPRESSORS = 3
"""A thread's: the fastest, with which frames are sampled, and those of two levels between which a choice may swing."""


class LevelChoice(Protocol):
    """Chooses the level of each frame; called by the thread that fills the frames."""

    def next_level(self, threads: int, content_bytes: int, filled_s: float) -> int:
        """For a frame that took ``filled_s`` to fill."""

    def told(self, level: int, content_bytes: int, compressed_bytes: int, seconds: float) -> None:
        """What a frame came to: ``seconds`` of one thread."""


class _FixedLevel:
    """The same for all."""

    def __init__(self, level: int) -> None:
        self._level = level

    def next_level(self, _threads: int, _content_bytes: int, _filled_s: float) -> int:
        return self._level

    def told(self, level: int, content_bytes: int, compressed_bytes: int, seconds: float) -> None:
        pass


class _Slot(Outcome):
    """One frame on its way: its buffer, how much of it is used, and what became of it."""

    __slots__ = ("buffer", "dropped", "level", "result", "seconds", "used", "view")

    def __init__(self, frame_bytes: int) -> None:
        super().__init__()
        self.buffer = mmap.mmap(-1, frame_bytes)
        self.view = memoryview(self.buffer)
        self.used = 0
        self.level = 0
        self.seconds = 0.0  # that compressing it took
        self.dropped = False  # nobody wants it any more
        self.result = b""


class _Compressors(dict[int, zstandard.ZstdCompressor]):
    """One thread's compressors by level: their tables are costly to make and are not shared.

    Those used last are kept, `COMPRESSORS` of them: level 9 alone holds 14 MiB.
    """

    def get_for(self, level: int) -> zstandard.ZstdCompressor:
        made = self.pop(level, None) or zstandard.ZstdCompressor(compression_params=parameters(level))
        self[level] = made  # now the last in order
        while len(self) > COMPRESSORS:
            del self[next(iter(self))]
        return made

    def run(self, slot: _Slot) -> None:
        began = time.perf_counter()
        frame = slot.view[: slot.used]
        slot.level = worthwhile_level(slot.level, frame, self.get_for(FASTEST_LEVEL))
        slot.result = self.get_for(slot.level).compress(frame)
        slot.seconds = time.perf_counter() - began


class FramePool:
    """Buffers, threads and compressors that outlive the artifacts made with them. One artifact at a time.

    ``threads`` (at least 1) is this process's share of cores. Use as a context manager, or `close` it.
    """

    def __init__(self, threads: int = 1) -> None:
        self._wanted = max(1, threads)
        self._alive = 0
        self._threads: list[threading.Thread] = []
        self._work: queue.SimpleQueue[_Slot | None] = queue.SimpleQueue()
        self._free: list[_Slot] = []
        self._frame_bytes = 0
        self._inline = _Compressors()
        self.index_compressor = index_compressor()
        self._stream: FrameStream | None = None
        self._closed = False

    @property
    def threads(self) -> int:
        return self._wanted

    def set_threads(self, threads: int) -> None:
        """Change the share of cores (at least 1); from any thread, at any time. Takes effect at the next frame."""
        self._wanted = max(1, threads)

    def open(
        self, *, level: int | LevelChoice, frame_bytes: int, commit: Commit, kept: KeptFrames | None = None
    ) -> FrameStream:
        """Begin an artifact. Fill ``stream.buffer``, ``submit`` each full frame and ``finish`` with the last.

        Frames of ``kept`` are committed instead of being made again, for as long as they hold what is submitted.
        """
        if self._closed or self._stream is not None:
            raise RuntimeError(
                "the frame pool is closed" if self._closed else "the frame pool makes one artifact at a time"
            )
        if frame_bytes != self._frame_bytes:
            self._free.clear()
            self._frame_bytes = frame_bytes
        self._stream = FrameStream(self, level, commit, kept)
        return self._stream

    def close(self) -> None:
        """End the threads and give the memory back. Blocks until the frames under way are compressed. Repeatable."""
        self._closed = True
        self._retire_threads(0)
        for thread in self._threads:
            thread.join()
        self._threads.clear()
        self._free.clear()
        self._inline.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is KeyboardInterrupt:
            self._threads.clear()  # they end by themselves, or with the process
        self.close()

    def _take_slot(self) -> _Slot:
        return self._free.pop() if self._free else _Slot(self._frame_bytes)

    def _give_slot(self, slot: _Slot) -> None:
        slot.result, slot.error, slot.dropped = b"", None, False
        if len(self._free) < self._wanted + 2:
            self._free.append(slot)

    def _compress_here(self, slot: _Slot) -> None:
        self._inline.run(slot)

    def _compress_elsewhere(self, slot: _Slot) -> None:
        while self._alive < self._wanted:
            try:
                self._threads.append(start_thread(self._run, f"frames-{len(self._threads)}"))
            except RuntimeError:  # the system has no more: it is asked again at the next frame
                break
            self._alive += 1
        self._retire_threads(self._wanted)
        slot.begin()
        if self._alive:
            self._work.put(slot)
        else:
            self._inline.run(slot)
            slot.end()

    def _retire_threads(self, keep: int) -> None:
        while self._alive > keep:
            self._work.put(None)
            self._alive -= 1
        self._threads = [thread for thread in self._threads if thread.is_alive()]

    def _run(self) -> None:
        compressors = _Compressors()
        while (slot := self._work.get()) is not None:
            try:
                if not slot.dropped:
                    compressors.run(slot)
            except BaseException as error:  # raised again in the caller, whatever it is
                slot.error = error
            slot.end()
        if self._closed:  # each takes one and gives it back: so all end, also one whose start was interrupted
            self._work.put(None)


class FrameStream:
    """The frames of one artifact. Left without ``finish`` (an error, a drain) it drops what is under way."""

    def __init__(
        self, pool: FramePool, level: int | LevelChoice, commit: Commit, kept: KeptFrames | None = None
    ) -> None:
        self._pool = pool
        self._levels: LevelChoice = _FixedLevel(level) if isinstance(level, int) else level
        self._commit = commit
        self._kept = kept
        self.levels: dict[int, int] = {}  # frames committed by level; 0: kept ones, whose level nobody knows
        self._returned_at = time.perf_counter()  # the buffer was given to be filled
        self._pending: deque[_Slot] = deque()
        self._filling: _Slot | None = pool._take_slot()
        self.buffer = self._filling.view  # of the frame to fill: frame_bytes long, with stale bytes in it

    def submit(self, used: int) -> memoryview:
        """Take the first ``used`` bytes of ``buffer`` as a frame; the buffer to fill next, which is another.

        Blocks while T frames are being compressed and one waits. Raises what ``commit`` or a compressor raised.
        """
        pool, slot = self._pool, self._filling
        assert slot is not None
        threads = pool.threads
        if self._take(slot, used, threads):
            self._returned_at = time.perf_counter()
            return self.buffer
        if threads == 1:
            self._compress_here(slot)
            self._returned_at = time.perf_counter()
            return self.buffer
        self._filling = None  # first: interrupted in between, the buffer is lost and not filled while it is compressed
        pool._compress_elsewhere(slot)
        self._pending.append(slot)
        self._drain(threads + 1)
        self._filling = pool._take_slot()
        self.buffer = self._filling.view
        self._returned_at = time.perf_counter()
        return self.buffer

    def finish(self, used: int) -> None:
        """Take the last frame, shorter or empty (then there is none), and commit all."""
        slot = self._filling
        assert slot is not None
        if used and self._pending and self._pool.threads > 1:
            self.submit(used)
        elif used and not self._take(slot, used, 1):
            self._compress_here(slot)
        self._drain(0)
        self._close()

    def _take(self, slot: _Slot, used: int, threads: int) -> bool:
        """Commit the frame from what was kept (True), or settle at which level it is to be compressed."""
        if self._kept is not None:
            frame = self._kept.take(slot.view[:used])
            if frame is not None:
                self.levels[0] = self.levels.get(0, 0) + 1
                self._commit(frame, used)
                return True
            self._kept = None  # it offers nothing more
        slot.used = used
        slot.level = self._levels.next_level(threads, used, time.perf_counter() - self._returned_at)
        return False

    def _compress_here(self, slot: _Slot) -> None:
        self._drain(0)
        self._pool._compress_here(slot)
        self._done(slot)

    def _done(self, slot: _Slot) -> None:
        self._levels.told(slot.level, slot.used, len(slot.result), slot.seconds)
        self.levels[slot.level] = self.levels.get(slot.level, 0) + 1
        self._commit(slot.result, slot.used)
        slot.result = b""

    def abort(self) -> None:
        """Drop every frame not yet committed; waits for those being compressed. Repeatable, also after ``finish``."""
        self._drop()
        for slot in self._pending:
            slot.wait()
            self._pool._give_slot(slot)
        self._pending.clear()
        self._close()

    def _drop(self) -> None:
        for slot in self._pending:
            slot.dropped = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is KeyboardInterrupt:  # people do not wait: what is being compressed is left to the thread that does it
            self._drop()
            self._pending.clear()
        self.abort()

    def _drain(self, keep: int) -> None:
        """Commit every finished frame at the head, waiting until at most ``keep`` are under way."""
        pending = self._pending
        while pending and (len(pending) > keep or pending[0].finished):
            slot = pending[0]
            slot.wait()
            if slot.error is not None:
                raise slot.error
            self._done(slot)
            pending.popleft()
            self._pool._give_slot(slot)

    def _close(self) -> None:
        if self._pool._stream is self:
            self._pool._stream = None
            if self._filling is not None:
                self._pool._give_slot(self._filling)
            self._filling = None
