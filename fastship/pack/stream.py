"""The canonical tar stream of an episode, written straight into frame buffers.

What always holds: a file's bytes go from the page cache into the frame by ``preadv(2)`` and are not copied again; each
byte is digested once, as its frame is handed over; a file that is not the same after it was read as before, or of
which fewer bytes came, raises `EpisodeChanged`. The layout (headers, order, padding) depends on names, kinds, modes,
owners, sizes, whole-second mtimes and links alone.

The *fingerprint* is the BLAKE3 of all header blocks in order, each followed by the nanoseconds of its mtime: what can
be known of the members without reading them. Imports ``errors``, ``frames`` and its siblings; ``pack.packing`` alone
imports it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Literal, Protocol

import blake3

from fastship import pagecache
from fastship.errors import EpisodeChanged, EpisodeUnreadable
from fastship.frames import Kind
from fastship.pack.headers import BLOCK, END_OF_ARCHIVE, header
from fastship.pack.walk import Entry, printable, read_fault, same, walk

Owner = Literal["keep", "zero"]

_FILE_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_ZEROS = bytes(BLOCK)
_FINGERPRINT_BATCH_BYTES = 64 << 10  # BLAKE3 is at its speed from 16 KiB on
_KINDS = {
    stat.S_IFREG: Kind.FILE,
    stat.S_IFDIR: Kind.DIRECTORY,
    stat.S_IFLNK: Kind.SYMLINK,
    stat.S_IFIFO: Kind.FIFO,
    stat.S_IFCHR: Kind.CHARACTER_DEVICE,
    stat.S_IFBLK: Kind.BLOCK_DEVICE,
}


class Layout:
    """Makes each entry's header blocks and sees the same inode again: what packing and fingerprinting share."""

    def __init__(self, owner: Owner) -> None:
        self._keep_owner = owner == "keep"
        self._first_names: dict[tuple[int, int], bytes] = {}
        self._fingerprint = blake3.blake3()
        self._batch = bytearray()
        self.skipped: list[str] = []  # sockets

    def header_of(self, entry: Entry, status: os.stat_result) -> tuple[bytes, Kind, bytes, int] | None:
        """Header blocks, kind, link target and content size of an entry; None for a socket, which is skipped."""
        dir_fd, name, member, _ = entry
        kind = _KINDS.get(stat.S_IFMT(status.st_mode))
        if kind is None:
            self.skipped.append(printable(member))
            return None
        link, size, device = b"", 0, None
        if kind is not Kind.DIRECTORY and status.st_nlink > 1:
            first = self._first_names.setdefault((status.st_dev, status.st_ino), member)
            if first is not member:
                kind, link = Kind.HARD_LINK, first
        if kind is Kind.FILE:
            size = status.st_size
        elif kind is Kind.SYMLINK:
            link = _read_link(dir_fd, name, member)
        elif kind in (Kind.CHARACTER_DEVICE, Kind.BLOCK_DEVICE):
            device = (os.major(status.st_rdev), os.minor(status.st_rdev))
        uid, gid = (status.st_uid, status.st_gid) if self._keep_owner else (0, 0)
        # Index 8 is the mtime in whole seconds, an int floored by the kernel, without the detour over a float.
        blocks = header(member, status.st_mode & 0o7777, uid, gid, size, int(status[8]), kind, link, device)
        self.note(blocks, status.st_mtime_ns)
        return blocks, kind, link, size

    def note(self, blocks: bytes, mtime_ns: int) -> None:
        """Take a member into the fingerprint."""
        batch = self._batch
        batch += blocks
        batch += (mtime_ns % 1_000_000_000).to_bytes(4, "little")
        if len(batch) > _FINGERPRINT_BATCH_BYTES:
            self._fingerprint.update(batch)
            self._batch = bytearray()

    def fingerprint(self) -> str:
        self._fingerprint.update(self._batch)
        self._batch = bytearray()
        return self._fingerprint.hexdigest()


class MemberTaker(Protocol):
    """See `fastship.frames.index.IndexWriter`."""

    def add(
        self,
        tar_offset: int,
        size: int,
        mtime: int,
        uid: int,
        gid: int,
        mode: int,
        kind: Kind,
        name: bytes,
        link: bytes,
    ) -> None: ...


class FrameTaker(Protocol):
    """What becomes of the stream: see `fastship.frames.ArtifactWriter`."""

    @property
    def buffer(self) -> memoryview: ...
    @property
    def index(self) -> MemberTaker: ...
    def submit(self, used: int, /) -> memoryview: ...
    def finish(self, used: int, /) -> None: ...


class TarStream:
    """Fills the frames of ``writer`` with an episode. ``content_bytes`` is the tar stream's length so far."""

    def __init__(
        self,
        writer: FrameTaker,
        owner: Owner,
        progress: Callable[[int], None] | None,
        page_cache: pagecache.Care = "keep",
    ) -> None:
        self._writer = writer
        self._view = writer.buffer
        self._frame_bytes = len(self._view)
        self._fill = 0  # of the frame
        self._before = 0  # tar stream bytes in earlier frames
        self._progress = progress
        self._owner: Owner = owner
        self._page_cache: pagecache.Care = page_cache
        self.digest = blake3.blake3()
        self.layout = Layout(owner)

    @property
    def content_bytes(self) -> int:
        return self._before + self._fill

    def write_episode(self, episode: Path, name: str | None = None) -> None:
        """The whole tar stream, of an episode called ``name``.

        Raises `EpisodeChanged`, `EpisodeUnreadable`, and what the writer raises.
        """
        for entry in walk(episode, name):
            status = entry[3]
            if status is None:
                self._add_file(entry)
            else:
                self._add_other(entry, status)
        self._write(END_OF_ARCHIVE)
        self.digest.update(self._view[: self._fill])
        self._writer.finish(self._fill)
        if self._progress is not None:
            self._progress(self.content_bytes)

    def _add_other(self, entry: Entry, status: os.stat_result) -> None:
        listed_as_directory = not entry[1]
        if stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode) != listed_as_directory:
            raise EpisodeChanged(f"{printable(entry[2])} was replaced while the episode was read")
        made = self.layout.header_of(entry, status)
        if made is not None:
            blocks, kind, link, size = made
            self._index(entry[2], status, size, kind, link)
            self._write(blocks)

    def _add_file(self, entry: Entry) -> None:
        """The hot path: five system calls a small file (openat, fstat, preadv, fstat or the end, close)."""
        dir_fd, name, member, _ = entry
        try:
            fd = os.open(name, _FILE_FLAGS, dir_fd=dir_fd)
        except OSError as error:
            raise read_fault(error, member) from None
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise EpisodeChanged(f"{printable(member)} was replaced while the episode was read")
            made = self.layout.header_of(entry, status)
            assert made is not None
            blocks, kind, link, size = made
            self._index(member, status, size, kind, link)
            self._write(blocks)
            if not size:
                if not link and _has_content(fd, member):
                    raise EpisodeChanged(
                        f"{printable(member)} says that it is empty and has content: it grows, or is of /proc"
                    )
                return
            self._write_content(fd, size, member)
            if not same(status, os.fstat(fd)):
                raise EpisodeChanged(f"{printable(member)} changed while it was read")
        finally:
            os.close(fd)

    def _index(self, member: bytes, status: os.stat_result, size: int, kind: Kind, link: bytes) -> None:
        uid, gid = (status.st_uid, status.st_gid) if self._owner == "keep" else (0, 0)
        mode = status.st_mode & 0o7777
        self._writer.index.add(self._before + self._fill, size, int(status[8]), uid, gid, mode, kind, member, link)

    def _write_content(self, fd: int, size: int, member: bytes) -> None:
        giving_back = pagecache.to_be_given_back(fd, size, self._page_cache)
        done = given = 0
        while done < size:
            fill = self._fill
            want = min(size - done, self._frame_bytes - fill)
            try:
                got = os.preadv(fd, (self._view[fill : fill + want],), done)
            except OSError as error:
                raise read_fault(error, member) from None
            if not got:
                raise EpisodeChanged(f"{printable(member)} shrank while it was read")
            done += got
            self._fill = fill + got
            if self._fill == self._frame_bytes:
                self._next_frame()
                if giving_back:  # while a file of GBs is read, not after
                    pagecache.give_back(fd, given, done)
                    given = done
        if giving_back:
            pagecache.give_back(fd, 0, 0)
        padding = -size % BLOCK
        if padding:
            self._write(_ZEROS[:padding])

    def _write(self, data: bytes) -> None:
        fill, end = self._fill, self._fill + len(data)
        if end < self._frame_bytes:
            self._view[fill:end] = data
            self._fill = end
            return
        while data:
            room = self._frame_bytes - self._fill
            piece, data = data[:room], data[room:]
            self._view[self._fill : self._fill + len(piece)] = piece
            self._fill += len(piece)
            if self._fill == self._frame_bytes:
                self._next_frame()

    def _next_frame(self) -> None:
        self.digest.update(self._view)
        self._view = self._writer.submit(self._frame_bytes)
        self._before += self._frame_bytes
        self._fill = 0
        if self._progress is not None:
            self._progress(self._before)


def _has_content(fd: int, member: bytes) -> bool:
    """Whether a file of no bytes has some: it grew since it was looked at, or its file system does not know sizes."""
    try:
        return bool(os.pread(fd, 1, 0))
    except OSError as error:
        raise read_fault(error, member) from None


def _read_link(dir_fd: int, name: bytes, member: bytes) -> bytes:
    try:
        return os.readlink(name, dir_fd=dir_fd)
    except OSError as error:
        if isinstance(error, PermissionError):
            raise EpisodeUnreadable(f"{printable(member)} cannot be read: {error.strerror}") from None
        raise EpisodeChanged(f"{printable(member)} was replaced while the episode was read") from None
