"""Reading an artifact: whole, in parallel, or only the frames that hold what is asked for.

What always holds:
- No size in a file is believed: a frame's size is compared with the seek table's before it is decompressed, and what
  comes out is compared again. What is wrong raises `ArtifactError`.
- Memory is bounded: ``stream`` holds T+2 frames of at most 32 MiB each; larger frames, and files without a seek table,
  are decompressed by one thread in pieces of 1 MiB with a zstd window of at most 128 MiB (what stock ``zstd -d``
  takes without ``--long``; a longer window is refused).
- A frame's own checksum is verified wherever its content is given out.

Stock ``.tar.zst`` files (one frame or several, sizes unknown) read as well, from their beginning.
Imports ``errors`` and its siblings, and zstandard; everything above imports it through ``fastship.frames``.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import zstandard

from fastship.errors import ArtifactError
from fastship.frames import index, seektable
from fastship.frames.index import Member
from fastship.frames.seektable import SKIPPABLE_HEADER, FrameTable
from fastship.frames.tar import TarReader
from fastship.frames.threads import Outcome, start_thread

ReadAt = Callable[[int, int], bytes]
"""``read_at(offset, length)``: exactly those bytes of the artifact, fewer only at its end. Called in one thread."""

WINDOW_BYTES = 128 << 20  # ZSTD_WINDOWLOG_LIMIT_DEFAULT = 27 (zstd.h)
WHOLE_FRAME_BYTES = 32 << 20
_PIECE_BYTES = 1 << 20
_SENTINEL_BYTES = 1024
_REMEDY = "read it again from where it came; if it is in the outbox, remove it: it is packed again"


class ArtifactReader:
    """An artifact, from a file (`ArtifactReader.open`) or from any source of byte ranges, an HTTP server's say.

    ``table`` is the seek table, ``frames`` counts the data frames, ``content_bytes`` is the tar stream's length; all
    None without a seek table. Not for use by two threads at once. Raises `ArtifactError`, and what ``read_at`` raises.
    """

    def __init__(self, read_at: ReadAt, total_bytes: int) -> None:
        self._read_at = read_at
        self._fd = -1
        self.total_bytes = total_bytes
        self._cached: tuple[int, bytes] = (-1, b"")
        self.table = seektable.decode(read_at, total_bytes)
        self._index_frame: int | None = None
        if self.table is not None:
            self._index_frame = self._find_index(self.table)

    @classmethod
    def open(cls, path: Path | str) -> Self:
        """Open a file; `close` it, or use the reader as a context manager."""
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise _unreadable(path, error) from None

        def read_at(offset: int, length: int) -> bytes:
            try:
                return os.pread(fd, length, offset)
            except OSError as error:
                raise _unreadable(path, error) from None

        try:
            reader = cls(read_at, os.fstat(fd).st_size)
        except BaseException:
            os.close(fd)
            raise
        reader._fd = fd
        return reader

    def close(self) -> None:
        """Repeatable."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def content_bytes(self) -> int | None:
        return None if self.table is None else self.table.content_bytes

    @property
    def frames(self) -> int | None:
        if self.table is None:
            return None
        return sum(1 for number in range(len(self.table)) if self.table.content_size(number))

    @property
    def has_index(self) -> bool:
        """Whether `members` reads the member index; without one it reads the whole tar stream."""
        return self._index_frame is not None

    def members(self) -> Iterator[Member]:
        """The members in tar order. Only a complete iteration has checked the index for damage."""
        if self._index_frame is None or self.table is None:
            return (header.member() for header in TarReader(self.stream()))
        start, end = self.table.compressed_offsets[self._index_frame : self._index_frame + 2]
        payload = start + SKIPPABLE_HEADER.size
        return index.decode(lambda offset, length: self._read_at(payload + offset, length), end - payload)

    def read(self, tar_offset: int, length: int) -> bytes:
        """Bytes of the tar stream (fewer only at its end), decompressing only the frames that hold them."""
        return b"".join(self.stream(start=tar_offset, end=tar_offset + length))

    def stream(self, threads: int = 1, *, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """The tar stream's bytes from ``start`` to ``end`` in order, ``threads`` frames at a time.

        The last frame of a part is remembered, so that neighbouring parts do not decompress it again.
        """
        if self.table is None:
            return _cut(self._decompress_pieces(0, self.total_bytes), start, end)
        whole = start == 0 and end is None
        end = self.table.content_bytes if end is None else min(end, self.table.content_bytes)
        numbers = range(len(self.table)) if whole else self.table.overlapping(start, end)
        if not numbers:
            return iter(())
        chunks = self._frames_in_order(self.table, numbers, threads, remember=not whole)
        base = self.table.content_offsets[numbers[0]]
        return chunks if whole else _cut(chunks, start - base, end - base)

    def _frames_in_order(self, table: FrameTable, numbers: range, threads: int, *, remember: bool) -> Iterator[bytes]:
        pending: deque[tuple[int, _Frame]] = deque()
        with contextlib.ExitStack() as cleanup:
            readers = None
            with_content = (number for number in numbers if table.content_size(number))  # the member index has none
            if threads > 1 and len(list(itertools.islice(with_content, 2))) > 1:
                readers = cleanup.enter_context(FrameThreads(threads))
            for number in numbers:
                size = table.content_size(number)
                start, end = table.compressed_offsets[number : number + 2]
                if number == self._cached[0]:
                    while pending:
                        yield pending.popleft()[1].take()
                    yield self._cached[1]
                elif not size:
                    self._check_skippable(start, end)
                elif size > WHOLE_FRAME_BYTES or end - start > 2 * size + 4096:
                    while pending:
                        yield pending.popleft()[1].take()
                    yield from self._large_frame(start, end, size)
                elif readers is None:
                    content = decompress_frame(self._bytes(start, end), size)
                    if remember:
                        self._cached = (number, content)
                    yield content
                else:
                    pending.append((number, readers.decompress(self._bytes(start, end), size)))
                    if len(pending) > threads + 1:
                        yield pending.popleft()[1].take()
            while pending:
                number, frame = pending.popleft()
                content = frame.take()
                if remember and not pending:
                    self._cached = (number, content)
                yield content

    def _large_frame(self, start: int, end: int, size: int) -> Iterator[bytes]:
        total = 0
        for piece in self._decompress_pieces(start, end):
            total += len(piece)
            if total > size:
                break
            yield piece
        if total != size:
            raise ArtifactError(f"a frame does not hold the {size} bytes the seek table speaks of", remedy=_REMEDY)

    def _decompress_pieces(self, start: int, end: int) -> Iterator[bytes]:
        """Whatever zstd frames stand in the file's bytes ``start`` to ``end``, in pieces of 1 MiB, in this thread.

        python-zstandard's reader ends silently at a cut: so a frame of random bytes, known to nobody, is appended to
        the source, and must be the last thing that comes out. They repeat, so that the frame is much shorter than they
        are: of one cut within an uncompressed block the frame itself is taken for the rest, and comes out as it is.
        """
        if start == end:
            raise ArtifactError("the file is empty", remedy=_REMEDY)
        sentinel = os.urandom(16) * (_SENTINEL_BYTES // 16)
        source = _Source(self._bytes, start, end, zstandard.ZstdCompressor().compress(sentinel))
        reader = zstandard.ZstdDecompressor(max_window_size=WINDOW_BYTES).stream_reader(
            source,  # type: ignore[arg-type]  # it only calls read()
            read_size=_PIECE_BYTES,
            read_across_frames=True,
        )
        held = b""
        while True:
            try:
                piece = reader.read(_PIECE_BYTES)
            except zstandard.ZstdError as error:
                raise ArtifactError(f"not a sound zstd file: {error}", remedy=_zstd_remedy(error)) from None
            if not piece:
                break
            held += piece
            if len(held) > _SENTINEL_BYTES:
                yield held[:-_SENTINEL_BYTES]
                held = held[-_SENTINEL_BYTES:]
        if held != sentinel:
            raise ArtifactError("the zstd file is cut: its last frame is not complete", remedy=_REMEDY)

    def _find_index(self, table: FrameTable) -> int | None:
        """The number of the index frame: the last of the table, when it is one of ours."""
        last = len(table) - 1
        if last < 0 or table.content_size(last):
            return None
        magic = self._check_skippable(*table.compressed_offsets[last : last + 2])
        return last if magic == index.INDEX_MAGIC else None

    def _check_skippable(self, start: int, end: int) -> int:
        """The magic of what must be one skippable frame: content must not hide behind a size of 0."""
        header = self._read_at(start, SKIPPABLE_HEADER.size)
        magic, length = SKIPPABLE_HEADER.unpack(header) if len(header) == SKIPPABLE_HEADER.size else (0, 0)
        if magic & 0xFFFFFFF0 != 0x184D2A50 or start + SKIPPABLE_HEADER.size + length != end:
            raise ArtifactError("the seek table calls something empty that is not", remedy=_REMEDY)
        return int(magic)

    def _bytes(self, start: int, end: int) -> bytes:
        data = self._read_at(start, end - start)
        if len(data) != end - start:
            raise ArtifactError(f"the artifact ends at byte {start + len(data)} of {self.total_bytes}", remedy=_REMEDY)
        return data


class _Source:
    """What the streaming decompressor reads from: part of the artifact, then the sentinel frame.

    The sentinel comes in one piece with the last bytes of the artifact: libzstd 1.5.7, holding the beginning of a frame
    header from an earlier piece, takes a whole frame at the beginning of the next piece in its stead.
    """

    def __init__(self, read: Callable[[int, int], bytes], start: int, end: int, sentinel: bytes) -> None:
        self._read, self._at, self._end, self._sentinel = read, start, end, sentinel

    def read(self, count: int) -> bytes:
        if self._at == self._end:
            return b""
        data = self._read(self._at, min(self._end, self._at + count))
        self._at += len(data)
        return data if self._at < self._end else data + self._sentinel


class _Frame(Outcome):
    """One frame given to a thread to decompress."""

    __slots__ = ("_compressed", "_content", "_size")

    def __init__(self, compressed: bytes, size: int) -> None:
        super().__init__()
        self._compressed, self._size = compressed, size
        self._content = b""

    def decompress(self) -> None:
        self._content = decompress_frame(self._compressed, self._size)
        self._compressed = b""

    def take(self) -> bytes:
        """Blocks until it is there. Raises what decompressing it raised."""
        self.wait()
        if self.error is not None:
            raise self.error
        return self._content


class FrameThreads:
    """Threads that decompress for one stream; leaving it drops what none has begun and waits for the rest."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._started: list[threading.Thread] = []
        self._work: queue.SimpleQueue[_Frame | None] = queue.SimpleQueue()
        self._left = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._left = True
        self._work.put(None)
        for thread in self._started:
            thread.join()

    def decompress(self, compressed: bytes, size: int) -> _Frame:
        if len(self._started) < self._count:
            with contextlib.suppress(RuntimeError):  # the system has no more: those there are do it, or this one
                self._started.append(start_thread(self._run, f"frames-read-{len(self._started)}"))
        frame = _Frame(compressed, size)
        if self._started:
            self._work.put(frame)
        else:
            self._do(frame)
        return frame

    def _run(self) -> None:
        while (frame := self._work.get()) is not None:
            self._do(frame)
        self._work.put(None)  # for the next one

    def _do(self, frame: _Frame) -> None:
        try:
            if not self._left:
                frame.decompress()
        except BaseException as error:  # raised again where it is taken, whatever it is
            frame.error = error
        frame.end()


_of_thread = threading.local()


def decompress_frame(compressed: bytes, size: int) -> bytes:
    """One frame of exactly ``size`` bytes of content. Runs in any thread, without the GIL."""
    decompressor = getattr(_of_thread, "decompressor", None)
    if decompressor is None:
        decompressor = _of_thread.decompressor = zstandard.ZstdDecompressor()
    try:
        claimed = zstandard.get_frame_parameters(compressed).content_size
        # Asked first: the decompressor allocates what a frame claims, without looking at max_output_size.
        if claimed not in (size, zstandard.CONTENTSIZE_UNKNOWN):
            raise ArtifactError(f"a frame says {claimed} bytes, the seek table {size}", remedy=_REMEDY)
        content = decompressor.decompress(compressed, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ArtifactError(f"a frame is damaged: {error}", remedy=_REMEDY) from None
    if len(content) != size:
        raise ArtifactError(f"a frame holds {len(content)} bytes, the seek table says {size}", remedy=_REMEDY)
    return content


def _cut(chunks: Iterator[bytes], start: int, end: int | None) -> Iterator[bytes]:
    """Bytes ``start`` to ``end`` of what ``chunks`` make together."""
    at = 0
    with contextlib.closing(chunks):  # type: ignore[type-var]  # always a generator
        for chunk in chunks:
            piece = chunk[max(start - at, 0) : None if end is None else max(end - at, 0)]
            at += len(chunk)
            if piece:
                yield piece
            if end is not None and at >= end:
                return


def _zstd_remedy(error: zstandard.ZstdError) -> str:
    if "too much memory" in str(error):
        return "its zstd window is over 128 MiB: unpack it with zstd -d --long=31 | tar x"
    return _REMEDY


def _unreadable(path: Path | str, error: OSError) -> ArtifactError:
    remedy = "is it yours to read? of faults of the disk the kernel's log says more"
    return ArtifactError(f"{path}: cannot be read: {error.strerror}", remedy=remedy)
