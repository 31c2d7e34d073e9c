"""Verification of an artifact while it arrives, so that little is left to do after its last byte.

What always holds: `Following` either finds exactly what `verify_content` would find in the whole file, or nothing: at
the first thing that is not as fastship's own packer writes it (a frame of unknown or large size, damage, more frames
or content than are worth it) it gives up without a word, and `verify_content` is the judge, with its limits and its
messages. What it gives out it has checked in full: every frame decompressed, and the seek table and the member index,
which come last, compared with what was seen. Memory: T+2 frames of at most 32 MiB each, and 16 bytes a frame.

The file itself is what stands between who writes and who verifies: nothing is buffered, neither waits for the other.
Imports its siblings; the receiver imports it through ``fastship.frames``.
"""

from __future__ import annotations

import contextlib
import os
import threading
from array import array
from collections import deque
from collections.abc import Callable, Generator

import zstandard

from fastship.errors import ArtifactError
from fastship.frames.reader import WHOLE_FRAME_BYTES, ArtifactReader, FrameThreads, decompress_frame
from fastship.frames.seektable import SKIPPABLE_HEADER, FrameTable
from fastship.frames.threads import start_thread
from fastship.frames.verify import Digested, VerifiedContent, check_index, most_content_bytes, most_members

START_BYTES = 4 << 20  # of a file; what is smaller is verified in some milliseconds when it is whole
_IDLE_S = 60.0  # without a new byte: whoever appends may have gone, and the thread and its place are others' to have
_MAX_FRAMES = 1 << 18  # 2 TiB in frames of 8 MiB; crumbs are cheaper to verify in the end
_HEADER_BYTES = 18  # the longest frame header (RFC 8878, 3.1.1.1)
_POLL_S = 0.2


class _GivenUp(Exception):
    """Not worth following, or nobody wants it any more."""


class Following:
    """Of a file of which `advance` says how much there is. A thread begins with the first `START_BYTES`.

    ``place`` is asked then whether there is room for one more; it gives what is called when the thread ends, or None.
    `advance` and `abandon` do not block.
    """

    def __init__(self, *, threads: int, place: Callable[[], Callable[[], None] | None], max_ratio: int = 0) -> None:
        self._threads = threads
        self._max_ratio = max_ratio
        self._place = place
        self._changed = threading.Condition()
        self._available = 0
        self._wanted = 0  # the thread sleeps until so many bytes are there
        self._total: int | None = None
        self._started = self._ended = self._abandoned = False
        self._found: VerifiedContent | None = None

    def advance(self, fd: int, end: int) -> None:
        """The first ``end`` bytes of the file ``fd`` are there and do not change any more. It is always the same file,
        but may be another descriptor of it each time; none is used when the call is over."""
        if not self._started:
            if end < START_BYTES:
                return
            self._start(fd)
        with self._changed:
            self._available = end
            if end >= self._wanted:
                self._changed.notify_all()

    @property
    def is_under_way(self) -> bool:
        """Whether it has begun and not given up: `finish` has less to do than `verify_content`."""
        return self._started and (not self._ended or self._found is not None)

    def finish(self, total_bytes: int, stopped: Callable[[], bool]) -> VerifiedContent | None:
        """What is in the file, now that it is whole; None where that is not known. Blocks for what is left to do.

        May be repeated. Raises ``InterruptedError`` soon after ``stopped`` says so.
        """
        if not self._started:
            return None
        with self._changed:
            if self._total is None:
                self._total = total_bytes
            self._changed.notify_all()
            while not self._ended:
                self._changed.wait(_POLL_S)
                if stopped():
                    self._abandoned = True
                    raise InterruptedError("the verification was told to stop")
        return self._found if self._total == total_bytes else None

    def abandon(self) -> None:
        """Nobody will ask. May be repeated."""
        with self._changed:
            self._abandoned = True
            self._changed.notify_all()

    def _start(self, of: int) -> None:
        self._started = self._ended = True  # until a thread has begun: whoever waits for the end waits for one
        release = self._place()
        if release is None:
            return
        try:
            fd = os.dup(of)
        except OSError:  # no descriptor to be had: `verify_content` is the judge
            release()
            return

        def run() -> None:
            found = None
            try:
                found = self._verify(fd)
            except (_GivenUp, ArtifactError, zstandard.ZstdError, OSError):
                pass
            finally:
                os.close(fd)
                with self._changed:
                    self._found, self._ended = found, True
                    self._changed.notify_all()
                release()

        self._ended = False
        try:
            start_thread(run, "frames-follow")
        except RuntimeError:  # no thread
            self._ended = True
            os.close(fd)
            release()

    def _verify(self, fd: int) -> VerifiedContent:
        sizes = array("Q")
        with contextlib.closing(self._contents(fd, sizes)) as contents:
            found = Digested(contents).judge()
        assert self._total is not None
        if self._max_ratio and (found.members or 0) > most_members(self._total):
            raise _GivenUp
        reader = ArtifactReader(lambda offset, length: os.pread(fd, length, offset), self._total)
        if reader.table is not None:
            # The last frame seen is the table's own.
            seen = FrameTable(zip(sizes[:-2:2], sizes[1:-2:2], strict=True))
            if seen.compressed_offsets != reader.table.compressed_offsets:
                raise _GivenUp
            if seen.content_offsets != reader.table.content_offsets:
                raise _GivenUp
        check_index(reader, found.members)
        return found

    def _contents(self, fd: int, sizes: array[int]) -> Generator[bytes, None, None]:
        """The frames' contents in order, as they come. ``sizes`` is given each frame's, compressed and content."""
        pending: deque[Callable[[], bytes]] = deque()
        with contextlib.ExitStack() as cleanup:
            pool = cleanup.enter_context(FrameThreads(self._threads)) if self._threads > 1 else None
            at = content_bytes = 0
            while self._has_come(at + 1):
                if len(sizes) >= 2 * _MAX_FRAMES:
                    raise _GivenUp
                end, size = self._frame(fd, at)
                sizes.extend((end - at, size))
                content_bytes += size
                if self._max_ratio and content_bytes > most_content_bytes(end, self._max_ratio):
                    raise _GivenUp
                if size:
                    compressed = os.pread(fd, end - at, at)
                    if pool is None:
                        yield decompress_frame(compressed, size)
                    else:
                        pending.append(pool.decompress(compressed, size).take)
                        if len(pending) > self._threads + 1:
                            yield pending.popleft()()
                at = end
            while pending:
                yield pending.popleft()()

    def _frame(self, fd: int, at: int) -> tuple[int, int]:
        """Where the frame at ``at`` ends, when it has come, and its content's size; 0: a skippable frame."""
        self._has_come(at + _HEADER_BYTES)
        header = os.pread(fd, _HEADER_BYTES, at)
        if len(header) >= SKIPPABLE_HEADER.size:
            magic, length = SKIPPABLE_HEADER.unpack_from(header)
            if magic & 0xFFFFFFF0 == 0x184D2A50:
                return self._must_come(at + SKIPPABLE_HEADER.size + length), 0
        frame = zstandard.get_frame_parameters(header)
        if not 0 < frame.content_size <= WHOLE_FRAME_BYTES:
            raise _GivenUp
        end, last = at + zstandard.frame_header_size(header), False
        while not last:  # RFC 8878, 3.1.1.2: three bytes say whether it is the last block, its type and size
            self._must_come(end + 3)
            block = int.from_bytes(os.pread(fd, 3, end), "little")
            last = bool(block & 1)
            end += 3 + (1 if block >> 1 & 3 == 1 else block >> 3)  # type 1: one byte, repeated
            if end - at > 2 * frame.content_size + 4096:
                raise _GivenUp
        return self._must_come(end + (4 if frame.has_checksum else 0)), frame.content_size

    def _must_come(self, end: int) -> int:
        if not self._has_come(end):
            raise _GivenUp
        return end

    def _has_come(self, end: int) -> bool:
        """Wait for the file's first ``end`` bytes; False when it is whole and shorter."""
        if self._abandoned:
            raise _GivenUp
        if self._available >= end:
            return True
        with self._changed:
            self._wanted = end
            while self._available < end and self._total is None:
                before = self._available
                woken = self._changed.wait(_IDLE_S)
                if self._abandoned or not (woken or self._available > before):
                    raise _GivenUp
            return self._available >= end
