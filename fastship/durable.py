"""Durable writing, in one place: what a crash or a power loss may and may not undo.

What always holds: when a function here returns, what its name says has reached the file system's journal or
the disk (``fsync``), and if it is interrupted at any instruction the reader finds the old state or the new
one, never a piece of one. The order is always: write a temporary file, fsync it, rename or link it into
place, fsync the directory (the order of SQLite's and restic's writers; ext4, xfs and btrfs need the last step
for the *name* to survive).

Imports only ``errors``; everything above may import it. All calls block on the disk and raise ``OSError``.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import re
import stat
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

TEMP_PREFIX = ".tmp-"
_NUMBER = re.compile(r"~[0-9]+\Z")
"""Names starting so are nobody's: left by a crash, removed by `remove_temporaries`."""


def sync_directory(path: Path | str) -> None:
    """Make renames, links and unlinks in directory ``path`` survive a power loss. Idempotent."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_directories(paths: Iterable[Path]) -> None:
    """Make those directories that are missing, and what is missing above them; their names survive a power loss.

    Also the names of those that were there: whoever made one may have died before it was synced. (Not where we may
    not read the directory above: then neither did we make anything in it.) May be repeated.
    """
    above: dict[Path, bool] = {}  # to be synced, in this order; whether we made something in it
    for path in paths:
        missing = [path]
        # A root that cannot be looked at looks like one that is missing; there is nothing above it, and mkdir says why.
        while missing[0].parent != missing[0] and not os.path.lexists(missing[0].parent):
            missing.insert(0, missing[0].parent)
        for one in missing:
            made = not os.path.lexists(one)
            one.mkdir(exist_ok=True)
            above[one.parent] = above.get(one.parent, False) or made
    for parent, made in above.items():
        try:
            sync_directory(parent)
        except PermissionError:
            if made:
                raise


def write_all(fd: int, data: bytes | memoryview) -> None:
    """Write every byte of ``data`` at the descriptor's offset (``write(2)`` may take fewer)."""
    view = memoryview(data)
    while view.nbytes:
        view = view[os.write(fd, view) :]


def write_file(path: Path, data: bytes, *, sync: bool = True, mode: int = 0o644) -> None:
    """Put ``data`` at ``path``, replacing what is there, atomically; durably unless ``sync`` is False.

    A reader sees the old content or the new. With ``sync=False`` a power loss may leave either, or an empty
    file: only for what can be made again.
    """
    # Its own for each thread: two that wrote one name at once would write into one file.
    temporary = path.with_name(f"{TEMP_PREFIX}{path.name}.{threading.get_native_id()}.{os.getpid()}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    try:
        try:
            write_all(fd, data)
            if sync:
                os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(temporary, path)
    except BaseException:
        unlink_if_present(temporary)
        raise
    if sync:
        sync_directory(path.parent)


def append_lines(path: Path, lines: Iterable[bytes]) -> None:
    """Append each of ``lines`` (without newline) to a journal and make all of them durable with one fsync.

    A line torn by a crash is closed off first, so it spoils itself only; one that the disk does not take whole is cut
    off again, so that trying it for as long as a disk is full leaves nothing behind. The directory is synced each time:
    that the file is not new does not say that whoever made it lived to do so. Group commit: the cost is the same
    however many lines.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    try:
        size = os.fstat(fd).st_size
        torn = size > 0 and os.pread(fd, 1, size - 1) != b"\n"
        try:
            write_all(fd, (b"\n" if torn else b"") + b"".join(line + b"\n" for line in lines))
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(fd, size)
            raise
        os.fsync(fd)
    finally:
        os.close(fd)
    sync_directory(path.parent)


def rename_directory(source: Path | str, target: Path | str) -> None:
    """``rename(2)`` of a directory into another one, also where it is read-only (mode 0555) and ours.

    The kernel wants to write its ``..`` and refuses that to all but root; so the mode is widened for the moment.
    A crash in that moment leaves it widened, which a fingerprint notices: a hold at worst, never a loss.
    """
    try:
        os.rename(source, target)
    except PermissionError:
        mode = stat.S_IMODE(os.stat(source, follow_symlinks=False).st_mode)
        if mode & stat.S_IWUSR:
            raise
        os.chmod(source, mode | stat.S_IWUSR)
        moved = source
        try:
            os.rename(source, target)
            moved = target
        finally:
            os.chmod(moved, mode)


def move(source: Path, target: Path) -> None:
    """Rename ``source`` to ``target`` durably, in both directories. Raises ``FileExistsError`` when there is a target.

    For directories the kernel itself refuses a non-empty target; the check before it gives the clear error.
    The caller holds the spool lock, so nobody of ours makes the target in between.
    """
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, "is there already", os.fspath(target))
    rename_directory(source, target)
    sync_directory(target.parent)
    if source.parent != target.parent:
        sync_directory(source.parent)


def publish(source: Path, target: Path) -> None:
    """Give the synced file ``source`` the name ``target`` without ever replacing another file.

    ``link(2)`` is the atomic create-if-absent; raises ``FileExistsError`` when somebody was first. A crash
    between link and unlink leaves two names of one file: the caller's cleanup removes ``source``.
    """
    os.link(source, target)
    sync_directory(target.parent)
    os.unlink(source)


def free_bytes(place: Path | str | int) -> int:
    """What a user without privileges may still write to the file system of a path or a descriptor (statvfs(3))."""
    disk = os.statvfs(place)
    return disk.f_bavail * disk.f_frsize


def free_path(directory: Path, name: str, suffix: str = "") -> Path:
    """``directory/name`` and ``suffix``, or with ``~1``, ``~2``... between them where that is taken."""
    target, number = directory / f"{name}{suffix}", 0
    while os.path.lexists(target):
        number += 1
        target = directory / f"{name}~{number}{suffix}"
    return target


def unnumbered(name: str) -> str:
    """The name that `free_path` was asked for, of what it was given."""
    return _NUMBER.sub("", name)


def unlink_if_present(path: Path | str) -> bool:
    """Remove a file; True when it was there. Not durable by itself: only for what may safely come back."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        return False
    return True


def remove_temporaries(
    directory: Path, *, pid: int | None = None, is_old: Callable[[float], bool] | None = None
) -> None:
    """Remove what interrupted `write_file` calls left in ``directory``.

    Call only while holding its lock, or for those of a process that has ended (``pid``), or for those that by their
    mtime are so old that whoever wrote them is not writing any more (``is_old``).
    """
    ending = "" if pid is None else f".{pid}"
    with os.scandir(directory) as entries:
        for entry in entries:
            ours = entry.name.startswith(TEMP_PREFIX) and entry.name.endswith(ending)
            if ours and not entry.is_dir(follow_symlinks=False):
                if is_old is not None:
                    try:
                        young = not is_old(entry.stat(follow_symlinks=False).st_mtime)
                    except FileNotFoundError:
                        continue
                    if young:
                        continue
                unlink_if_present(entry.path)


@functools.cache
def boot_id() -> str:
    """The kernel's id of this boot (``random(4)``), or ``""`` where there is none.

    Data written in this boot is in the page cache or on disk whatever process died; data of another boot
    that was not synced may be wrong, however right its size looks.
    """
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""
