"""Removing a tree for good, whatever was recorded into it.

`shutil.rmtree` recurses and keeps a descriptor a level: a tree 1,000 deep ends in an exception, not in its removal.
Here what is deep is moved up until it is not. What always holds: no link is followed, no other file system entered, a
few descriptors are open, and no path longer than one name is given to the kernel.

Imports nothing of fastship; ``store`` imports it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

_DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def remove_tree(path: Path) -> bool:
    """Remove the directory and all below it; whether all of it went. What may not be removed stays, and no error is
    raised for it. May be repeated. Blocks for as long as there are files."""
    with contextlib.suppress(OSError):
        os.chmod(path, 0o700)
        top = os.open(path, _DIRECTORY_FLAGS)
        try:
            _empty(top)
        finally:
            os.close(top)
    with contextlib.suppress(OSError):
        os.rmdir(path)
    return not os.path.lexists(path)


def _empty(top: int) -> None:
    """Round by round, each directory of ``top`` is emptied: its files removed, its directories moved into ``top``."""
    device = os.fstat(top).st_dev
    numbers = iter(range(1 << 62))
    stuck: set[str] = set()
    while names := [name for name in _clear(top, device) if name not in stuck]:
        for name in names:
            try:
                os.chmod(name, 0o700, dir_fd=top)  # as we found it, it may let nobody in; links are no directories
                inner = os.open(name, _DIRECTORY_FLAGS, dir_fd=top)
                try:
                    for below in _clear(inner, device):
                        with contextlib.suppress(OSError):
                            os.chmod(below, 0o700, dir_fd=inner)  # to give it another parent is to write into it
                            os.rename(below, _free(top, numbers), src_dir_fd=inner, dst_dir_fd=top)
                finally:
                    os.close(inner)
                os.rmdir(name, dir_fd=top)
            except OSError:
                stuck.add(name)


def _clear(directory: int, device: int) -> list[str]:
    """Unlink all that is no directory; the names of those, but for the empty ones, which go, too.

    What is mounted here is left, and not named.
    """
    left = []
    with os.scandir(directory) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                if not entry.is_dir(follow_symlinks=False):
                    os.unlink(entry.name, dir_fd=directory)
                    continue
                if entry.stat(follow_symlinks=False).st_dev != device:
                    continue
                left.append(entry.name)
                os.rmdir(entry.name, dir_fd=directory)
                left.pop()
    return left


def _free(top: int, numbers: Iterator[int]) -> str:
    """A name that nothing in ``top`` has: ``rename(2)`` would take the place of an empty directory."""
    for number in numbers:
        try:
            os.stat(str(number), dir_fd=top, follow_symlinks=False)
        except FileNotFoundError:
            return str(number)
    raise AssertionError
