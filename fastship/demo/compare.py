"""Whether two trees are the same: names, kinds, modes, contents, link targets, whole-second times.

What always holds: reading only; no link is followed; names are bytes. Written apart from ``pack`` on purpose: it
checks that package and shares no line with it.

Imports nothing of fastship; ``demo`` and tests import it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

_CHUNK_BYTES = 1 << 20
_KINDS = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symbolic link",
    stat.S_IFIFO: "FIFO",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "character device",
    stat.S_IFBLK: "block device",
}


class Tree:
    """What `differences` saw of the first tree, for the reader's table."""

    def __init__(self) -> None:
        self.files = 0
        self.bytes = 0  # of the regular files' contents
        self.sockets = 0  # which no tar holds, and which are not compared


def differences(
    recorded: Path, restored: Path, tree: Tree | None = None, *, archived_modes: Mapping[bytes, int] | None = None
) -> Iterator[str]:
    """Every difference as a sentence, depth first by name; none when the trees are the same.

    ``archived_modes``: the mode of each member by its path below the top, as the archive has it. Extraction leaves
    out setuid, setgid and sticky on purpose; with these, the archive is asked for the three bits instead.
    Blocks on the disk. Raises ``OSError`` where something cannot be read.
    """
    tree = tree if tree is not None else Tree()
    pending = [b""]
    first, second = os.fsencode(recorded), os.fsencode(restored)
    while pending:
        inside = pending.pop()
        left, right = os.path.join(first, inside), os.path.join(second, inside)
        name = os.fsdecode(inside) or "the top"
        try:
            here, there = os.lstat(left), os.lstat(right)
        except FileNotFoundError as error:
            yield f"{name} is missing where it was {'recorded' if error.filename == left else 'restored'}"
            continue
        if stat.S_IFMT(here.st_mode) != stat.S_IFMT(there.st_mode):
            yield f"{name} was a {_kind(here)} and became a {_kind(there)}"
            continue
        yield from _compare_entry(name, left, here, right, there)
        mode = stat.S_IMODE(there.st_mode)
        if archived_modes is not None:
            mode = mode & 0o777 | archived_modes.get(inside, 0) & 0o7000
        if mode != stat.S_IMODE(here.st_mode) and not stat.S_ISLNK(here.st_mode):
            yield f"{name} had mode {stat.S_IMODE(here.st_mode):o} and has {mode:o}"
        if stat.S_ISREG(here.st_mode):
            tree.files += 1
            tree.bytes += here.st_size
        if stat.S_ISDIR(here.st_mode):
            names, sockets = _names(left)
            tree.sockets += sockets
            both = sorted(names | _names(right)[0], reverse=True)
            pending.extend(os.path.join(inside, one) for one in both)


def _names(directory: bytes) -> tuple[set[bytes], int]:
    names, sockets = set(), 0
    with os.scandir(directory) as entries:
        for entry in entries:
            if stat.S_ISSOCK(entry.stat(follow_symlinks=False).st_mode):
                sockets += 1
            else:
                names.add(entry.name)
    return names, sockets


def _kind(status: os.stat_result) -> str:
    return _KINDS.get(stat.S_IFMT(status.st_mode), "thing of an unknown kind")


def _compare_entry(name: str, left: bytes, here: os.stat_result, right: bytes, there: os.stat_result) -> Iterator[str]:
    kind = stat.S_IFMT(here.st_mode)
    if kind == stat.S_IFLNK:
        if os.readlink(left) != os.readlink(right):
            yield f"{name} points elsewhere"
        return
    if here.st_mtime_ns // 1_000_000_000 != there.st_mtime_ns // 1_000_000_000:
        yield f"{name} has another time"
    if kind in (stat.S_IFCHR, stat.S_IFBLK) and here.st_rdev != there.st_rdev:
        yield f"{name} is another device"
    if kind == stat.S_IFREG:
        if here.st_size != there.st_size:
            yield f"{name} had {here.st_size} bytes and has {there.st_size}"
        else:
            yield from _compare_contents(name, left, right)


def _compare_contents(name: str, left: bytes, right: bytes) -> Iterator[str]:
    with open(left, "rb", buffering=0) as here, open(right, "rb", buffering=0) as there:
        offset = 0
        while True:
            one, other = here.read(_CHUNK_BYTES), there.read(_CHUNK_BYTES)
            if one != other:
                yield f"{name} has other bytes after {offset}"
                return
            if not one:
                return
            offset += len(one)
