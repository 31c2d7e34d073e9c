"""Restoring members of an artifact below a target directory, whatever the archive tries.

What always holds:
- Nothing is written outside the target: names are walked component by component through descriptors with O_NOFOLLOW;
  absolute names, ``..``, and names through a symlink (the archive's own or one that was there) are refused.
- Nothing that exists is overwritten or changed (O_EXCL); existing directories are entered, their mode and times left.
- Every byte written comes from a frame whose zstd checksum was right, and a file that cannot be completed is removed.
- An episode's marker comes last: what is cut short does not look finished.
- Restored: content, symlinks as they are, hard links, FIFOs, mtimes, permission bits, and, as root, numeric owners.
  Not: setuid, setgid and sticky bits of files (directories keep setgid and sticky), devices and unknown kinds (both
  skipped and reported), files that GNU tar stored as sparse (refused).

The tar parser is `frames.TarReader` for our artifacts and for stock ``.tar.zst`` files. Imports ``errors``,
``episode``, ``frames``; the demo and the command line import it through ``fastship.pack``.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import msgspec

from fastship.episode import MARKER
from fastship.errors import ArtifactError, ExtractError, ExtractRefused
from fastship.frames import ArtifactReader, Header, Kind, Member, TarReader
from fastship.pack.walk import MOST_NAME_BYTES, printable

_DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_CREATE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_NAME_MAX = 255  # bytes of one part of a name (Linux)
_COMPONENTS = 32 << 10  # of a name: without a limit one could make millions of directories
_LONG_NAME_BYTES = 4096
_NAME_PARTS = 4096  # four times what a test packs; each member of that depth costs a walk of some 0.1 s
_MARKER = MARKER.encode()
_MARKER_BYTES = 64 << 10  # it is empty, or a word or two
_FILE_MODE = 0o777
_DIRECTORY_MODE = 0o3777


class ExtractResult(msgspec.Struct, frozen=True):
    """``members`` restored, ``bytes`` of file content written, ``skipped`` names (devices, unknown kinds)."""

    members: int
    bytes: int
    skipped: tuple[str, ...] = ()


def list_members(reader: ArtifactReader) -> Iterator[Member]:
    """The members in tar order: from the index, or by reading the whole tar stream where there is none."""
    return reader.members()


def extract(
    reader: ArtifactReader,
    target: Path,
    members: Sequence[str] = (),
    progress: Callable[[int], None] | None = None,
    *,
    threads: int = 1,
) -> ExtractResult:
    """Restore ``members`` (none: all; a directory means everything below it) under the directory ``target``.

    ``target`` is made if it is not there. With members, only the frames that hold them are read, if the artifact has an
    index. A hard link whose first name is not among them is restored with its content. ``progress`` gets the bytes of
    content written so far. Blocks; ``threads`` frames are decompressed at a time. Raises `ExtractRefused` for what must
    not be written, `ArtifactError` for a damaged artifact or an unknown member, `ExtractError` where the target's file
    system refuses; what was restored by then stays.
    """
    wanted = [_plain(os.fsencode(name)) for name in members]
    found: set[bytes] = set()
    try:
        target.mkdir(parents=True, exist_ok=True)
        opened = _Target(target, progress, _Selection(wanted, set()) if wanted else None)
    except OSError as error:
        remedy = "extract into a directory (-C) that you may read and write"
        raise ExtractError(f"{target}: {error.strerror}", remedy=remedy) from None
    with opened as place:
        for header, tar in _selected(reader, wanted, found, threads):
            place.restore(header, tar)
        if missing := [name for name in wanted if name not in found]:
            raise ArtifactError(
                f"not in the artifact: {', '.join(map(printable, missing))}", remedy="see what is: fastship ls FILE"
            )
        if place.unlinked:
            for header, tar in _selected(reader, list(map(_plain, place.unlinked)), found, threads):
                place.restore_unlinked(header, tar)
        place.finish()
        return ExtractResult(place.members, place.bytes, tuple(place.skipped))


def _selected(
    reader: ArtifactReader, wanted: list[bytes], found: set[bytes], threads: int
) -> Iterator[tuple[Header, TarReader]]:
    """Each selected member's header with the reader that gives its content; notes in ``found`` what matched."""
    if not wanted:
        tar = TarReader(reader.stream(threads))
        for header in tar:
            yield header, tar
        return
    selection = _Selection(wanted, found)
    if reader.has_index:
        spans = _spans(reader, selection)
        tar = TarReader(chain.from_iterable(reader.stream(threads, start=start, end=end) for start, end in spans))
    else:
        tar = TarReader(reader.stream(threads))
    for header in tar:
        if selection.has(header.name):
            yield header, tar


def _plain(name: bytes) -> bytes:
    """A name as it is asked for: without the ``./`` and ``/`` around it that say nothing."""
    return name.strip(b"/").removeprefix(b"./").strip(b"/")


class _Selection:
    def __init__(self, wanted: list[bytes], found: set[bytes]) -> None:
        self._wanted = frozenset(wanted)
        self._found = found

    def has(self, name: bytes) -> bool:
        """Whether the member or a directory above it was asked for."""
        name = _plain(name)
        if len(name) > _LONG_NAME_BYTES:  # going up it costs the square of its length
            hits = [one for one in self._wanted if name == one or name.startswith(one + b"/")]
            self._found.update(hits)
            return bool(hits)
        hit = False
        while name:
            if name in self._wanted:
                self._found.add(name)
                hit = True
            name = name.rpartition(b"/")[0]
        return hit


def _spans(reader: ArtifactReader, selection: _Selection) -> Iterator[tuple[int, int | None]]:
    """The parts of the tar stream that hold the selected members, neighbours joined."""
    start: int | None = None
    for member in reader.members():
        if selection.has(member.name):
            start = member.tar_offset if start is None else start
        elif start is not None:
            yield start, member.tar_offset
            start = None
    if start is not None:
        yield start, None


class _Target:
    """The directory written to. Keeps one directory open, the one last used, so that neighbours cost no walk."""

    def __init__(self, path: Path, progress: Callable[[int], None] | None, selection: _Selection | None) -> None:
        self._selection = selection  # None: all
        self._root = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._fd = os.dup(self._root)
        self._open: list[tuple[bytes, tuple[int, int]]] = []  # components of the open directory, each with its identity
        self._made: dict[bytes, Header] = {}  # directories made here, with what to set at the end
        self._implied: set[tuple[int, int]] = (
            set()
        )  # those that no member has named yet; not by name: a name can be long
        self._progress = progress
        self._owner = os.geteuid() == 0
        self._marker: tuple[tuple[bytes, ...], Header, bytes] | None = None  # put off to the end, with its content
        self.unlinked: dict[bytes, list[Header]] = {}  # hard links whose first name is not here, by that name
        self.skipped: list[str] = []
        self.members = 0
        self.bytes = 0

    def __enter__(self) -> _Target:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)
        os.close(self._root)

    def restore(self, header: Header, tar: TarReader) -> None:
        """Make one member; its directory comes into being where the archive did not name it before."""
        name = header.name
        if header.is_sparse:
            remedy = "unpack it with zstd -d | tar x"
            raise ExtractRefused(f"{printable(name)} is stored as a GNU sparse file", remedy=remedy)
        with _faults_of(name):
            self.members += self._make(_components(name), header, tar)

    def restore_unlinked(self, header: Header, tar: TarReader) -> None:
        """Give a first name that was not selected to the links to it that were."""
        links = self.unlinked.pop(header.name, [])
        if links:
            first = _components(links[0].name)
            with _faults_of(links[0].name):
                self._make(first, header, tar)
                self._make_marker()  # if it is the first: links to it come now
                for link in links[1:]:
                    self._link(first, _components(link.name))
            self.members += len(links)

    def finish(self) -> None:
        """Make the marker, then set the directories' modes and times, children first: writing into them undoes it."""
        if self.unlinked:
            name = next(iter(self.unlinked))
            raise ArtifactError(f"a hard link leads to {printable(name)}, which is not in the artifact")
        self._make_marker()
        for path in sorted(self._made, reverse=True):
            with _faults_of(path):
                self._enter(tuple(path.split(b"/")), make=False)
                self._set(self._fd, self._made[path], _DIRECTORY_MODE)

    def _make(self, components: tuple[bytes, ...], header: Header, tar: TarReader) -> bool:
        """Whether it was made: not when it was skipped or put off."""
        if header.kind is Kind.DIRECTORY:
            self._make_directory(components, header)
            return True
        if not components:
            raise ExtractRefused(f"a member has the name {printable(header.name)!r}")
        if header.kind is Kind.HARD_LINK:
            return self._make_hard_link(components, header)
        if header.kind is Kind.FILE and components[1:] == (_MARKER,) and header.data_bytes <= _MARKER_BYTES:
            self._put_off_marker(components, header, b"".join(tar.data()))
        elif header.kind is Kind.FILE:
            self._make_file(components, header, tar.data())
        elif header.kind is Kind.SYMLINK:
            if b"\0" in header.link:
                raise ExtractRefused(f"{printable(header.name)} is a symlink to a name with a NUL")
            last = self._enter_parent(components)
            os.symlink(header.link, last, dir_fd=self._fd)
            self._set_unfollowed(last, header)
        elif header.kind is Kind.FIFO:
            last = self._enter_parent(components)
            os.mkfifo(last, 0o600, dir_fd=self._fd)
            self._set_unfollowed(last, header)
            os.chmod(last, header.mode & _FILE_MODE, dir_fd=self._fd)
        else:
            self.skipped.append(printable(header.name))
            return False
        return True

    def _make_directory(self, components: tuple[bytes, ...], header: Header) -> None:
        if not components:
            return  # "./": the target itself, which is not ours to change
        last = self._enter_parent(components)
        path = b"/".join(components)
        try:
            os.mkdir(last, 0o700, dir_fd=self._fd)
            ours = True
        except FileExistsError:
            ours = path in self._made
        self._enter(components, make=False)  # refuses what is there and no directory
        if ours or self._open[-1][1] in self._implied:
            self._made[path] = header

    def _put_off_marker(self, components: tuple[bytes, ...], header: Header, content: bytes) -> None:
        self._make_marker()  # of another episode
        last = self._enter_parent(components)
        with contextlib.suppress(FileNotFoundError):
            os.stat(last, dir_fd=self._fd, follow_symlinks=False)
            raise FileExistsError
        self._marker = (components, header, content)

    def _make_marker(self) -> None:
        """An episode's marker that was put off: extraction into a spool, or one that is cut short, never leaves an
        episode that says it is finished and is not."""
        if self._marker is not None:
            (components, header, content), self._marker = self._marker, None
            with _faults_of(b"/".join(components)):
                self._make_file(components, header, (memoryview(content),) if content else ())

    def _make_file(self, components: tuple[bytes, ...], header: Header, pieces: Iterable[memoryview]) -> None:
        last = self._enter_parent(components)
        fd = os.open(last, _CREATE_FLAGS, 0o600, dir_fd=self._fd)
        try:
            try:
                for piece in pieces:
                    self._write(fd, piece)
                self._set(fd, header, _FILE_MODE)
            finally:
                os.close(fd)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(last, dir_fd=self._fd)
            raise

    def _write(self, fd: int, piece: memoryview) -> None:
        self.bytes += len(piece)
        while piece:
            piece = piece[os.write(fd, piece) :]
        if self._progress is not None:
            self._progress(self.bytes)

    def _make_hard_link(self, components: tuple[bytes, ...], header: Header) -> bool:
        if self._marker is not None and _components(header.link) == self._marker[0]:
            self._make_marker()
        # What is there under a name that was not asked for is not the archive's.
        if self._selection is None or self._selection.has(header.link):
            with contextlib.suppress(FileNotFoundError):
                self._link(_components(header.link), components)
                return True
        self.unlinked.setdefault(header.link, []).append(header)
        return False

    def _link(self, first: tuple[bytes, ...], components: tuple[bytes, ...]) -> None:
        if not first:
            raise ExtractRefused("a hard link leads to the target directory itself")
        self._enter(first[:-1], make=False)
        there = os.dup(self._fd)
        try:
            if stat.S_ISDIR(os.stat(first[-1], dir_fd=there, follow_symlinks=False).st_mode):
                raise ExtractRefused(f"{printable(b'/'.join(components))} is a hard link to a directory")
            last = self._enter_parent(components)
            os.link(first[-1], last, src_dir_fd=there, dst_dir_fd=self._fd, follow_symlinks=False)
        finally:
            os.close(there)

    def _enter_parent(self, components: tuple[bytes, ...]) -> bytes:
        self._enter(components[:-1], make=True)
        return components[-1]

    def _enter(self, components: tuple[bytes, ...], *, make: bool) -> None:
        """Have the directory open, coming from the one that is, making what is missing where ``make`` says so."""
        common = 0
        for (there, _), component in zip(self._open, components, strict=False):
            if there != component:
                break
            common += 1
        self._ascend(common)
        for component in components[len(self._open) :]:
            try:
                fd = os.open(component, _DIRECTORY_FLAGS, dir_fd=self._fd)
            except FileNotFoundError:
                if not make:
                    raise
                os.mkdir(component, dir_fd=self._fd)
                fd = os.open(component, _DIRECTORY_FLAGS, dir_fd=self._fd)
                self._implied.add(_identity(fd))
            os.close(self._fd)
            self._fd = fd
            self._open.append((component, _identity(fd)))

    def _ascend(self, depth: int) -> None:
        """Go up to ``depth`` components through ``..``, or to the target where that leads elsewhere."""
        while len(self._open) > depth > 0:
            try:
                fd = os.open("..", _DIRECTORY_FLAGS, dir_fd=self._fd)
            except PermissionError:  # a directory that has its final mode already
                depth = 0
                break
            os.close(self._fd)
            self._fd = fd
            self._open.pop()
            if _identity(fd) != self._open[-1][1]:  # somebody moves directories while we work
                depth = 0
        if not depth and self._open:
            os.close(self._fd)
            self._fd = os.dup(self._root)
            self._open.clear()

    def _set(self, fd: int, header: Header, mode_mask: int) -> None:
        if self._owner:
            os.fchown(fd, header.uid, header.gid)
        os.fchmod(fd, header.mode & mode_mask)
        os.utime(fd, ns=(header.mtime_ns, header.mtime_ns))

    def _set_unfollowed(self, last: bytes, header: Header) -> None:
        if self._owner:
            os.chown(last, header.uid, header.gid, dir_fd=self._fd, follow_symlinks=False)
        os.utime(last, ns=(header.mtime_ns, header.mtime_ns), dir_fd=self._fd, follow_symlinks=False)


def _identity(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def _components(name: bytes) -> tuple[bytes, ...]:
    """The name's parts; refused when it would lead out of the target."""
    parts = tuple(part for part in name.split(b"/") if part not in (b"", b"."))
    if len(name) > MOST_NAME_BYTES + _NAME_MAX or len(parts) > _COMPONENTS:
        raise ExtractRefused(f"a member has a name of {len(name)} bytes in {len(parts)} parts: no episode has one")
    if len(parts) > _NAME_PARTS:
        raise ExtractRefused(f"a member is {len(parts)} directories deep; at most {_NAME_PARTS} are made")
    if name.startswith(b"/") or b".." in parts or b"\0" in name:
        remedy = "the archive is hostile or was made by hand; look at it with zstd -d | tar tv"
        raise ExtractRefused(f"the name {printable(name)!r} leads out of the target directory", remedy=remedy)
    return parts


@contextlib.contextmanager
def _faults_of(name: bytes) -> Iterator[None]:
    try:
        yield
    except FileExistsError:
        remedy = "extract into an empty directory (-C), or move what is there away"
        raise ExtractRefused(f"{printable(name)} is there already and is not overwritten", remedy=remedy) from None
    except OSError as error:
        if isinstance(error, NotADirectoryError) or error.errno == errno.ELOOP:
            remedy = "extract into an empty directory; if it is one, the archive is hostile"
            raise ExtractRefused(f"{printable(name)} would be written through a link or file", remedy=remedy) from None
        remedy = "extract into a directory (-C) whose file system has room and takes such names and owners"
        raise ExtractError(f"{printable(name)} cannot be restored: {error.strerror}", remedy=remedy) from None
    except OverflowError:
        raise ArtifactError(f"{printable(name)} has an owner or time that cannot be") from None
