"""The artifact as a whole: data frames, then the member index, then the seek table.

What always holds: ``write`` gets the artifact's bytes in order, once, from the calling thread, a frame a call; the
same tar stream, level and frame size give the same bytes (``kept`` frames stay as they were made). Imports its
siblings; ``pack`` imports it by the package.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from types import TracebackType
from typing import Self

from fastship.frames.compress import FramePool, LevelChoice
from fastship.frames.index import IndexWriter
from fastship.frames.kept import KeptFrames
from fastship.frames.seektable import MAX_ENTRIES, encode


class ArtifactWriter:
    """Writes one artifact: fill ``buffer``, ``submit`` full frames, add members to ``index``, ``finish``.

    ``write(bytes)`` receives the artifact; what it raises is raised by ``submit`` and ``finish``. As a context
    manager it frees the pool when left early.
    """

    def __init__(
        self,
        pool: FramePool,
        write: Callable[[bytes], object],
        *,
        level: int | LevelChoice,
        frame_bytes: int,
        kept: KeptFrames | None = None,
    ) -> None:
        self._write = write
        self._entries = array("I")
        self._stream = pool.open(level=level, frame_bytes=frame_bytes, commit=self._commit, kept=kept)
        self.index = IndexWriter(pool.index_compressor)
        self.frames = 0  # data frames committed
        self.artifact_bytes = 0

    @property
    def levels(self) -> dict[int, int]:
        """Data frames by level; 0: kept ones."""
        return self._stream.levels

    @property
    def buffer(self) -> memoryview:
        """Of the frame to fill, ``frame_bytes`` long; what is in it is stale."""
        return self._stream.buffer

    def submit(self, used: int) -> memoryview:
        """A full frame; returns the next buffer. Blocks for the compressors (`FrameStream.submit`)."""
        return self._stream.submit(used)

    def finish(self, used: int) -> None:
        """The last frame (``used`` may be 0), the member index and the seek table."""
        self._stream.finish(used)
        index = self.index.finish()
        if index is not None:
            self._entries.extend((len(index), 0))
            self._put(index)
        if len(self._entries) // 2 <= MAX_ENTRIES:
            self._put(encode(self._entries))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stream.__exit__(kind, error, traceback)

    def _commit(self, compressed: bytes, content_bytes: int) -> None:
        self.frames += 1
        self._entries.extend((len(compressed), content_bytes))
        self._put(compressed)

    def _put(self, data: bytes) -> None:
        self._write(data)
        self.artifact_bytes += len(data)
