"""`read_windows`: pieces of an episode's tar stream, without reading the rest: what a compressor is measured on.

What always holds: the episode is only read, and of its files only what lies in the windows; the bytes are those that
`pack` would make there. Imports ``frames`` and its siblings; ``tune`` imports it through the package.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from fastship.errors import EpisodeChanged
from fastship.frames import Kind
from fastship.pack.headers import BLOCK
from fastship.pack.stream import Layout, Owner
from fastship.pack.walk import Entry, printable, read_fault, walk

_FILE_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


def read_windows(episode: Path, owner: Owner, windows: Sequence[tuple[int, int]]) -> list[bytes]:
    """The tar stream's bytes from ``start`` to ``end`` of each window, which stand in order and do not overlap.

    A window beyond the stream's end is shorter, or left out where nothing of it is left. Blocks for about 10 us an
    entry and for the reading. Raises `EpisodeChanged` and `EpisodeUnreadable`.
    """
    cutter = _Cutter(windows)
    layout = Layout(owner)
    for entry in walk(episode):
        if cutter.finished:
            break
        status = entry[3] if entry[3] is not None else _status(entry)
        made = layout.header_of(entry, status)
        if made is None:
            continue
        blocks, kind, _, size = made
        cutter.pass_over(len(blocks), partial(_part, blocks))
        if kind is Kind.FILE and size:
            cutter.pass_over(size, partial(_content, entry))
            cutter.pass_over(-size % BLOCK, partial(_part, bytes(BLOCK)))
    return [bytes(piece) for piece in cutter.pieces if piece]


class _Cutter:
    """Goes over the stream and takes from it what lies in the windows."""

    def __init__(self, windows: Sequence[tuple[int, int]]) -> None:
        self._windows = windows
        self._at = 0  # of the stream
        self._next = 0  # window that is not over
        self.pieces = [bytearray() for _ in windows]

    @property
    def finished(self) -> bool:
        return self._next == len(self._windows)

    def pass_over(self, length: int, read: Callable[[int, int], bytes]) -> None:
        """The next ``length`` bytes of the stream; ``read(at, length)`` gives a part of them."""
        end = self._at + length
        while not self.finished:
            first, last = self._windows[self._next]
            low, high = max(first, self._at), min(last, end)
            if low < high:
                self.pieces[self._next] += read(low - self._at, high - low)
            if last > end:
                break
            self._next += 1
        self._at = end


def _part(data: bytes, at: int, length: int) -> bytes:
    return data[at : at + length]


def _content(entry: Entry, at: int, length: int) -> bytes:
    dir_fd, name, member, _ = entry
    try:
        fd = os.open(name, _FILE_FLAGS, dir_fd=dir_fd)
        try:
            data = bytearray()
            while len(data) < length:
                piece = os.pread(fd, length - len(data), at + len(data))
                if not piece:
                    raise EpisodeChanged(f"{printable(member)} shrank while it was read")
                data += piece
            return bytes(data)
        finally:
            os.close(fd)
    except OSError as error:
        raise read_fault(error, member) from None


def _status(entry: Entry) -> os.stat_result:
    dir_fd, name, member, _ = entry
    try:
        status = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
    except OSError as error:
        raise read_fault(error, member) from None
    if not stat.S_ISREG(status.st_mode):
        raise EpisodeChanged(f"{printable(member)} was replaced while the episode was read")
    return status
