"""A file that a command makes under a name that the user gave: all of it, or nothing.

What always holds: it grows as ``FILE.partial`` and gets its name when all of it is on the disk, so who reads FILE finds
the old one or the new one; a command that was killed leaves at most the partial, which the next one with that FILE
takes away.

Imports ``durable``; only ``cli`` imports it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from fastship import durable


def require_absent(path: Path) -> None:
    """Raises ``FileExistsError`` where something has that name, a link that leads nowhere too."""
    if os.path.lexists(path):
        partial = _partial(path)
        if _is_same(partial, path):  # who made it was killed between its last two steps
            durable.unlink_if_present(partial)
        raise FileExistsError(errno.EEXIST, "is there already", os.fspath(path))


@contextlib.contextmanager
def new_file(path: Path, *, replace: bool) -> Iterator[BinaryIO]:
    """What the body writes (unbuffered) becomes ``path``, once it ended well; else nothing of it is left.

    Raises ``FileExistsError`` where something has that name, or got it meanwhile, and is not to be replaced, and any
    other ``OSError``. Only a file may be replaced; its permissions are kept.
    """
    if not replace:
        require_absent(path)
    partial = _partial(path)
    try:
        fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        with open(fd, "wb", buffering=0) as file:
            if replace and path.exists():
                os.fchmod(fd, stat.S_IMODE(path.stat().st_mode))
            yield file
            os.fsync(fd)
        if replace:
            os.replace(partial, path)
            durable.sync_directory(path.parent)
        else:
            _publish(partial, path)
    finally:
        durable.unlink_if_present(partial)


def _publish(partial: Path, path: Path) -> None:
    try:
        durable.publish(partial, path)
    except OSError as error:
        if error.errno not in {errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK}:
            raise
        durable.move(partial, path)  # FAT and its like have no hard links


def _partial(path: Path) -> Path:
    return path.parent / f"{path.name}.partial"  # `Path.with_name` raises for "." and "/"


def _is_same(one: Path, other: Path) -> bool:
    try:
        return os.path.samestat(one.lstat(), other.lstat())
    except OSError:
        return False
