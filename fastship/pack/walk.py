"""The walk over an episode: every entry once, in canonical order, through descriptors, never following a link.

What always holds:
- Order: names by their bytes, a directory as if its name ended in a slash; so depth-first is the order of full paths.
- Memory is one directory's names a level; at most `OPEN_DIRECTORIES` descriptors are open however deep the nesting,
  and no path longer than one name is ever given to the kernel.
- A directory that is not, when it is left, what it was when it was entered (mtime, ctime) raises `EpisodeChanged`.
  Kernels before 6.13 stamp at the timer's tick (1 to 10 ms): two changes within one tick can look like one.

Imports ``errors``; only ``fastship.pack`` imports it. The walk blocks on the disk.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

from fastship.errors import EpisodeChanged, EpisodeUnreadable, PackError

OPEN_DIRECTORIES = 64
"""Far below the usual limit of 1024 descriptors; deeper directories are reopened through ``..`` and compared."""

MOST_NAME_BYTES = 1 << 20
"""Of a member's name: 4,000 directories one in the other, each with the longest name. What is deeper is not packed, for
`extract` would not restore it: each directory on the way costs as many bytes in the tar stream, and there in memory."""

SHOWN_BYTES = 1000  # of a name in a message: they travel between processes, into logs and manifests

_DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_GONE = frozenset((errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ESTALE, errno.ENXIO))

Entry = tuple[int, bytes, bytes, os.stat_result | None]
"""``(directory descriptor, name in it, member name, status)``. The status is there for all but what was a regular
file when its directory was listed. A directory comes as itself: its own descriptor, name ``b""``, and a member name
that ends in a slash. The descriptor is valid until the next entry is asked for."""


class _Level:
    """A directory being walked."""

    __slots__ = ("before", "fd", "names", "others", "prefix_bytes")

    def __init__(self, fd: int, before: os.stat_result, prefix_bytes: int) -> None:
        self.fd = fd  # -1 while it is closed for being far up
        self.before = before
        self.names: list[bytes] = []  # those to come, the next one last; directories with a slash
        self.others: set[bytes] = set()  # neither directories nor regular files
        self.prefix_bytes = prefix_bytes  # of the member names below it


def walk(episode: Path, called: str | None = None) -> Iterator[Entry]:
    """Every entry of ``episode``, itself first, as if that were ``called`` so.

    Raises `EpisodeChanged` and `EpisodeUnreadable`, naming the path.
    """
    top = os.fsencode(called or os.path.basename(os.path.abspath(episode)))
    if not top:
        raise PackError(f"{episode} cannot be packed: it has no name", remedy="name a directory below /")
    levels: list[_Level] = []
    path = top + b"/"
    try:
        try:
            levels.append(_enter(os.open(episode, _DIRECTORY_FLAGS), len(path)))
        except OSError as error:
            raise read_fault(error, top) from None
        yield levels[0].fd, b"", path, levels[0].before
        _list(levels[0], path)
        while levels:
            level = levels[-1]
            if not level.names:
                _leave(levels, path)
                path = path[: levels[-1].prefix_bytes] if levels else b""
                continue
            name = level.names.pop()
            member = path + name
            try:
                if name.endswith(b"/"):
                    if len(member) > MOST_NAME_BYTES:
                        remedy = "move what is so deep up, or into an archive; it is tried again by itself"
                        raise EpisodeUnreadable(f"{printable(member)} is nested too deep", remedy=remedy)
                    level = _enter(os.open(name[:-1], _DIRECTORY_FLAGS, dir_fd=level.fd), len(member))
                    levels.append(level)
                    path = member
                    if len(levels) > OPEN_DIRECTORIES:
                        _close(levels[-1 - OPEN_DIRECTORIES])
                elif level.others and name in level.others:
                    yield level.fd, name, member, os.stat(name, dir_fd=level.fd, follow_symlinks=False)
                    continue
                else:
                    yield level.fd, name, member, None
                    continue
            except OSError as error:
                raise read_fault(error, member) from None
            yield level.fd, b"", member, level.before
            _list(level, member)
    finally:
        for level in levels:
            _close(level)


def read_fault(error: OSError, member: bytes) -> PackError:
    """What an ``OSError`` while reading ``member`` means."""
    path = printable(member)
    if error.errno in _GONE:
        return EpisodeChanged(f"{path} vanished or was replaced while the episode was read")
    if error.errno in (errno.EACCES, errno.EPERM):
        remedy = "let the user that runs fastship read it (chmod, chown or an ACL); it is tried again by itself"
    elif error.errno in (errno.EMFILE, errno.ENFILE):
        remedy = "raise the limit of open files (LimitNOFILE= of the service)"
    else:
        remedy = "look into the kernel's log for faults of the disk; it is tried again by itself"
    return EpisodeUnreadable(f"{path} cannot be read: {error.strerror}", remedy=remedy)


def printable(name: bytes) -> str:
    """A member's name for people and for JSON, harmless on a terminal: UTF-8, all else and control characters as
    ``\\xNN``, and of one longer than `SHOWN_BYTES` (a directory 1,000 deep has one) the beginning and the end.
    """
    if len(name) > SHOWN_BYTES:
        name = name[: SHOWN_BYTES // 2] + b"..." + name[-SHOWN_BYTES // 2 :]
    text = name.decode("utf-8", "backslashreplace")
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else _escaped(one) for one in text)


def _escaped(character: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in character.encode())


def same(before: os.stat_result, after: os.stat_result) -> bool:
    """Whether nothing was written, cut, linked or renamed in between: ctime moves with each of them."""
    return (
        before.st_ctime_ns == after.st_ctime_ns
        and before.st_mtime_ns == after.st_mtime_ns
        and before.st_size == after.st_size
        and before.st_ino == after.st_ino
    )


def _enter(fd: int, prefix_bytes: int) -> _Level:
    try:
        return _Level(fd, os.fstat(fd), prefix_bytes)
    except BaseException:
        os.close(fd)
        raise


def _list(level: _Level, member: bytes) -> None:
    names = level.names
    try:
        with os.scandir(level.fd) as entries:
            for entry in entries:
                name = os.fsencode(entry.name)
                if entry.is_file(follow_symlinks=False):
                    names.append(name)
                elif entry.is_dir(follow_symlinks=False):
                    names.append(name + b"/")
                else:
                    names.append(name)
                    level.others.add(name)
    except OSError as error:
        raise read_fault(error, member) from None
    names.sort(reverse=True)


def _leave(levels: list[_Level], path: bytes) -> None:
    """Close the innermost level, unchanged as it must be, and have its parent open."""
    level = levels[-1]
    try:
        unchanged = same(level.before, os.fstat(level.fd))
        if len(levels) > 1 and levels[-2].fd < 0:
            parent = levels[-2]
            parent.fd = os.open("..", _DIRECTORY_FLAGS, dir_fd=level.fd)
            now = os.fstat(parent.fd)
            unchanged = unchanged and (now.st_dev, now.st_ino) == (parent.before.st_dev, parent.before.st_ino)
    except OSError as error:
        raise read_fault(error, path) from None
    if not unchanged:
        raise EpisodeChanged(f"{printable(path)} changed while it was read: entries came, went or were replaced")
    _close(levels.pop())


def _close(level: _Level) -> None:
    if level.fd >= 0:
        os.close(level.fd)
        level.fd = -1
