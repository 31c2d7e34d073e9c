"""The spool's directories, and the lock that says whose they are.

What always holds: all directories are real directories on one file system (a rename between them is atomic);
whoever moves an episode holds the lock. Workers inherit the lock's descriptor: the lock is free only once the
supervisor *and* every worker of it have ended, so a new supervisor never meets an old worker's writes.

Imports ``durable`` and ``errors``; the rest of ``spool`` imports it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shlex
import stat
import time
from collections.abc import Sequence
from pathlib import Path

from fastship import durable
from fastship.episode import is_episode_id
from fastship.errors import SpoolBusy, SpoolError, UsageError

DIRECTORIES = ("episodes", "outbox", "shipped", "quarantine", "holds", "receipts", "state", "state/requests")


def episode_of(name: str) -> str:
    """The id of an entry of ``shipped/`` or ``quarantine/``, which is called so or, where that was taken, ``id~N``.

    No id holds a ``~``, so the number is ours (`durable.free_path`). In ``quarantine/`` are names, too, that cannot be
    ids; those are returned as they are.
    """
    return durable.unnumbered(name)


def require_id(episode: str) -> None:
    """Raises `UsageError` for what cannot be an id."""
    if not is_episode_id(episode):
        raise UsageError(f"{episode!r} cannot be an episode's id", remedy="letters, digits and ._- only, at most 200")


class Layout:
    """The paths below a spool's root."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.episodes = root / "episodes"
        self.outbox = root / "outbox"
        self.shipped = root / "shipped"
        self.quarantine = root / "quarantine"
        self.holds = root / "holds"
        self.receipts = root / "receipts"
        self.state = root / "state"
        self.requests = root / "state" / "requests"
        self.lock = root / "state" / "lock"

    def require(self, names: Sequence[str] = DIRECTORIES) -> None:
        """That these directories are there, for whoever is not to make any: where the spool's disk is not mounted, one
        made below would be waited at for ever. Raises `SpoolError`."""
        for name in names:
            try:
                found = stat.S_ISDIR((self.root / name).stat().st_mode)
            except (FileNotFoundError, NotADirectoryError):
                found = False
            except PermissionError:
                raise
            except OSError as error:
                remedy = "see the kernel's log for faults of the disk"
                raise SpoolError(f"{self.root / name}: cannot be used: {error.strerror}", remedy=remedy) from None
            if not found:
                raise SpoolError(
                    f"{self.root} is not a spool yet: it has no {name}",
                    remedy=f"mount its disk, correct spool.root, or: fastship init {shlex.quote(str(self.root))}",
                )

    def create(self) -> None:
        """Make what is missing and check the rest. Raises `SpoolError`. May be repeated."""
        if not str(self.root) or str(self.root) == ".":
            raise SpoolError("no spool is set", remedy="set [spool] root in fastship.toml, or: fastship init DIR")
        paths = [self.root / name for name in DIRECTORIES]
        try:
            # Durably: an episode that is moved into a directory whose name is lost is lost, too.
            durable.make_directories([self.root, *paths])
            devices = {path.lstat().st_dev: path for path in reversed(paths)}
            links = [path for path in paths if os.path.islink(path)]
            read_only = [path for path in paths if os.statvfs(path).f_flag & os.ST_RDONLY]
        except OSError as error:
            for path in filter(os.path.islink, paths):
                raise _link(path) from None
            raise SpoolError(
                f"{error.filename or self.root}: cannot be used: {error.strerror}",
                remedy="check spool.root, who owns it, and the kernel's log for faults of the disk",
            ) from None
        for path in paths:
            if path in links:
                raise _link(path)
            if path in read_only:
                raise SpoolError(
                    f"{path}: is on a read-only file system",
                    remedy="see the kernel's log for why; mount it for writing",
                )
            if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
                raise SpoolError(f"{path}: no permission", remedy=f"it must be writable for uid {os.geteuid()}")
        if len(devices) > 1:
            places = " and ".join(str(path) for path in devices.values())
            raise SpoolError(
                f"{places} are on different file systems", remedy="a spool must be on one: moving is renaming"
            )


def _link(path: Path) -> SpoolError:
    return SpoolError(
        f"{path}: is a symbolic link",
        remedy="the spool's own directories may not be links: move what it leads to here, or set spool.root to there",
    )


def remedy_for(error: OSError) -> str:
    """What to do where a move within the spool was refused."""
    if error.errno in (errno.EXDEV, errno.EBUSY):
        return "it is a mount point or on another file system: unmount it and record within the spool's own"
    if error.errno in (errno.EPERM, errno.EACCES):
        return "let the user that runs fastship rename it (its owner or group, no immutable flag: lsattr -d)"
    if error.errno == errno.EROFS:
        return "the spool is read-only: see the kernel's log for why, and mount it for writing"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "free space on the spool's file system"
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return "raise the limit of open files (ulimit -n, LimitNOFILE= of the service)"
    return "see the kernel's log for faults of the disk"


class Lock:
    """The spool lock (``flock(2)``), held from construction to `release`, and by every process that inherits `fd`."""

    def __init__(self, path: Path, *, wait_s: float) -> None:
        """Raises `SpoolBusy` when another instance runs, or when what is left of one holds it after ``wait_s``;
        `SpoolError` where the file cannot be made."""
        self._path = path
        try:
            self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            remedy = "the spool's file system must take new files: is it full, or mounted read-only?"
            raise SpoolError(f"{path}: cannot be made: {error.strerror}", remedy=remedy) from None
        deadline = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                owner = ""
                with contextlib.suppress(OSError):
                    owner = os.pread(self.fd, 20, 0).decode("ascii", "replace").strip()
                if time.monotonic() < deadline and not _is_running(owner):
                    time.sleep(0.02)
                    continue
                os.close(self.fd)
                raise SpoolBusy(
                    f"another fastship holds {path.parent.parent}" + (f" (process {owner})" if owner else ""),
                    remedy="see what it does with: fastship status",
                ) from None
        with contextlib.suppress(OSError):  # who it is, for people: a full disk stops nobody for it
            os.ftruncate(self.fd, 0)
            os.pwrite(self.fd, f"{os.getpid()}\n".encode(), 0)

    def is_ours(self) -> bool:
        """Whether the file of this lock still is the one that another instance would lock."""
        try:
            return os.path.samestat(os.stat(self._path), os.fstat(self.fd))
        except OSError:
            return False

    def release(self) -> None:
        """Let go in this process. May be repeated."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _is_running(pid: str) -> bool:
    """Whether a process is more than an entry that nobody has waited for (``proc_pid_stat(5)``)."""
    try:
        state = Path(f"/proc/{int(pid)}/stat").read_text(encoding="latin-1").rpartition(")")[2].split()[0]
    except (OSError, ValueError, IndexError):
        return False
    return state not in "ZX"
