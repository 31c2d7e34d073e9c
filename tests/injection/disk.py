"""A model of a file system that loses power: what of the calls in a trace may be on the disk when it comes back.

Two ways of losing:

- `ORDERED`, as ext4 with ``data=ordered``, xfs and btrfs do it: what happened to names is kept up to some call, and
  lost from there on; a file is as long as what of its data was written, a beginning of it.
- `ANY`, what POSIX allows: of all that was not synced, any part may be there without the rest. A name without the data,
  a removal without the name that came before it, the length without the content, any pages without the others.

In both: ``fsync`` and ``fdatasync`` of a file keep its data and length, of a directory its names, and nothing else (to
keep a file says nothing of its name); a rename is atomic; and a write within one sector of 512 bytes is there or not.

A tree that was there before is as it was, on the disk, and is read from ``origin`` when something is done in it.
"""

from __future__ import annotations

import enum
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeAlias

from syscalls import Call

PAGE_BYTES = 4096
SECTOR_BYTES = 512
_METHODS = {  # what may change something, and the method of `Disk` that knows how
    "open": "open",
    "openat": "open",
    "creat": "open",
    "write": "write",
    "writev": "write",
    "pwrite64": "write",
    "pwritev": "write",
    "pwritev2": "write",
    "ftruncate": "ftruncate",
    "fsync": "fsync",
    "fdatasync": "fsync",
    "rename": "rename",
    "link": "link",
    "unlink": "unlink",
    "rmdir": "unlink",
    "mkdir": "mkdir",
}


class Loss(enum.Enum):
    """How much of what was not synced is lost."""

    NOTHING = "nothing"  # the process died, not the machine
    ORDERED = "ordered"
    ANY = "any"
    ALL = "all"


class Edit(NamedTuple):
    """Something done to a file's data."""

    at: int  # where in the trace
    offset: int
    data: bytes | None  # None: cut, or made longer, to `offset`

    def apply(self, content: bytearray) -> None:
        if self.data is None:
            content[self.offset :] = bytes(max(0, self.offset - len(content)))
            return
        content.extend(bytes(max(0, self.offset - len(content))))
        content[self.offset : self.offset + len(self.data)] = self.data


class Node:
    """A file or directory, whatever names it has."""

    def __init__(self, directory: bool, origin: Path | None = None) -> None:
        self.directory = directory
        self.origin = origin
        self.now: Names = {}  # what was done to names in it; all others are as in `origin`
        self.kept: Names = {}  # of that what is on the disk
        self.content = bytearray(origin.read_bytes() if origin is not None and not directory else b"")
        self.synced = bytes(self.content)
        self.pending: list[Edit] = []

    def edit(self, edit: Edit) -> None:
        edit.apply(self.content)
        self.pending.append(edit)

    def sync(self, before: int) -> None:
        """All that was done before that place in the trace is on the disk."""
        done = [edit for edit in self.pending if edit.at < before]
        if done:
            synced = bytearray(self.synced)
            for edit in done:
                edit.apply(synced)
            self.synced = bytes(synced)
            self.pending = self.pending[len(done) :]

    def survive(self, loss: Loss, chance: random.Random) -> bytes:
        if loss is Loss.NOTHING:
            return bytes(self.content)
        if loss is Loss.ALL or not self.pending:
            return self.synced
        return self._beginning(chance) if loss is Loss.ORDERED else self._any(chance)

    def _beginning(self, chance: random.Random) -> bytes:
        content = bytearray(self.synced)
        for edit in self.pending[: chance.randint(0, len(self.pending))]:
            edit.apply(content)
        if len(content) > len(self.synced) and chance.random() < 0.5:
            least = -(-len(self.synced) // PAGE_BYTES)
            del content[max(len(self.synced), PAGE_BYTES * chance.randint(least, len(content) // PAGE_BYTES + 1)) :]
        return bytes(content)

    def _any(self, chance: random.Random) -> bytes:
        share = chance.choice([0.0, 0.5, 0.9, 1.0])
        lengths = chance.choice([0.0, 1.0, share])
        content = bytearray(self.synced)
        for edit in self.pending:
            if edit.data is None:
                if chance.random() < lengths:
                    edit.apply(content)
                continue
            if chance.random() < lengths:
                content.extend(bytes(max(0, edit.offset + len(edit.data) - len(content))))
            for piece in pieces(edit, SECTOR_BYTES if len(edit.data) < PAGE_BYTES else PAGE_BYTES):
                if chance.random() < share:
                    piece.apply(content)
        torn = len(content) - len(self.synced)
        if torn > 0 and chance.random() < 0.25:
            del content[len(self.synced) + chance.randrange(torn) :]
        return bytes(content)


Names: TypeAlias = "dict[str, Node | None]"
Slot: TypeAlias = tuple[Node, str, Node | None]


def pieces(edit: Edit, size: int) -> Iterator[Edit]:
    """A write in pieces that do not cross multiples of ``size`` in the file."""
    assert edit.data is not None
    start = 0
    while start < len(edit.data):
        end = min(len(edit.data), start + size - (edit.offset + start) % size)
        yield Edit(edit.at, edit.offset + start, edit.data[start:end])
        start = end


class Change:
    """Something done to names: each ``slot`` is a directory, a name in it, and what that is of now."""

    def __init__(self, at: int, slots: list[Slot]) -> None:
        self.at = at
        self.slots = slots


class Disk:
    """One tree, ``root``, to which `feed` tells the calls of a trace in their order; ``origin``: a copy from before."""

    def __init__(self, root: Path, origin: Path) -> None:
        self.root = os.fspath(root)
        self._top = Node(True, origin)
        self._pending: list[Change] = []
        self._kept_up_to = -1
        self._positions: dict[tuple[int, str], int] = {}  # of descriptors
        self._last: dict[str, Node] = {}  # by names that are gone

    def is_about(self, call: Call) -> bool:
        """Whether the call may change something here, or make it durable."""
        if call.name not in _METHODS or not self._has(call.path):
            return False
        return "open" not in call.name or "O_CREAT" in call.flags or "O_TRUNC" in call.flags

    def feed(self, call: Call) -> None:
        if call.name in _METHODS and self._has(call.path):
            assert not call.other or self._has(call.other), f"{call.path} leaves the tree: {call.other}"
            getattr(self, f"_{_METHODS[call.name]}")(call)

    def _has(self, path: str) -> bool:
        return path == self.root or path.startswith(f"{self.root}/")

    def find(self, path: str) -> Node | None:
        """By the path below the root, as things are now."""
        node: Node | None = self._top
        for name in filter(None, path.split("/")):
            node = self._child(node, name) if node is not None and node.directory else None
        return node

    def node_of(self, call: Call) -> Node:
        """The file that a descriptor is of; also when it has no name any more."""
        path = call.path.removeprefix(self.root).strip("/")
        node = self.find(path) or self._last.get(path)
        assert node is not None, f"nothing is known of {call.path}"
        return node

    def content(self, path: str, loss: Loss) -> bytes | None:
        """Of a file, when nothing of what was not synced is left (`ALL`), or all of it (`NOTHING`); None: no such."""
        node: Node | None = self._top
        for name in path.split("/"):
            node = self._child(node, name, loss) if node is not None and node.directory else None
        return node.survive(loss, random.Random()) if node is not None and not node.directory else None

    def write_to(self, target: Path, loss: Loss, chance: random.Random, change: Callable[[bytes], bytes]) -> None:
        """Put there what survives; ``change`` is applied to what was written. What nothing was done to is copied
        with its times."""
        names: dict[int, Names] = {}
        left = list(self._pending)
        if loss is Loss.ALL:
            left = []
        elif loss is Loss.ORDERED:
            least = sum(one.at <= self._kept_up_to for one in left)
            del left[chance.randint(least, len(left)) :]
        elif loss is Loss.ANY:
            share = chance.choice([0.0, 0.5, 0.9, 1.0])
            left = [one for one in left if chance.random() < share]
        for one in left:
            for directory, name, node in one.slots:
                names.setdefault(id(directory), dict(directory.kept))[name] = node
        written: dict[int, Path] = {}

        def put(node: Node, path: Path) -> None:
            if id(node) in written:
                os.link(written[id(node)], path)
                return
            if not node.directory:
                written[id(node)] = path
                if node.origin is not None and not node.pending and node.synced == node.origin.read_bytes():
                    shutil.copy2(node.origin, path)
                else:
                    path.write_bytes(change(node.survive(loss, chance)))
                return
            found = node.now if loss is Loss.NOTHING else names.get(id(node), node.kept)
            path.mkdir()
            if node.origin is not None:
                for entry in os.scandir(node.origin):
                    if entry.name in found:
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        shutil.copytree(entry.path, path / entry.name, symlinks=True)
                    else:
                        shutil.copy2(entry.path, path / entry.name, follow_symlinks=False)
            for name, child in found.items():
                if child is not None:
                    put(child, path / name)
            if node.origin is not None:
                shutil.copystat(node.origin, path)

        put(self._top, target)

    # --- the calls -------------------------------------------------------------------------------------------

    def _open(self, call: Call) -> None:
        self._positions[call.fd, call.path] = 0
        if not call.flags or not ("O_CREAT" in call.flags or "O_TRUNC" in call.flags):
            return
        node = self._at(call.path)
        if node is None:
            self._change(call, (call.path, Node(False)))
        elif "O_TRUNC" in call.flags and not node.directory:
            node.edit(Edit(call.ended, 0, None))
        if "O_APPEND" in call.flags:
            self._positions[call.fd, call.path] = -1

    def _write(self, call: Call) -> None:
        node = self.node_of(call)
        offset = call.offset
        if offset is None:
            key = (call.fd, call.path)
            offset = self._positions[key]
            if offset < 0:
                offset = len(node.content)
            else:
                self._positions[key] = offset + call.result
        node.edit(Edit(call.ended, offset, call.data))

    def _ftruncate(self, call: Call) -> None:
        node = self.node_of(call)
        assert call.offset is not None
        node.edit(Edit(call.ended, call.offset, None))

    def _fsync(self, call: Call) -> None:
        node = self.node_of(call)
        if node.directory:
            for change in [one for one in self._pending if one.at < call.begun]:
                if any(directory is node for directory, _, _ in change.slots):
                    self._keep(change)
        else:
            node.sync(call.begun)

    def _keep(self, change: Change) -> None:
        self._kept_up_to = max(self._kept_up_to, change.at)
        for directory, name, node in change.slots:
            directory.kept[name] = node
        kept = {(id(directory), name) for directory, name, _ in change.slots}
        for older in [one for one in self._pending if one.at <= change.at]:
            older.slots = [slot for slot in older.slots if (id(slot[0]), slot[1]) not in kept]
        self._pending = [one for one in self._pending if one.slots]

    def _rename(self, call: Call) -> None:
        node = self._at(call.path)
        assert node is not None
        self._change(call, (call.other, node), (call.path, None))

    def _link(self, call: Call) -> None:
        self._change(call, (call.other, self._at(call.path)))

    def _unlink(self, call: Call) -> None:
        self._change(call, (call.path, None))

    def _mkdir(self, call: Call) -> None:
        self._change(call, (call.path, Node(True)))

    # --- names -----------------------------------------------------------------------------------------------

    def _at(self, path: str) -> Node | None:
        return self.find(path.removeprefix(self.root).strip("/"))

    def _change(self, call: Call, *names: tuple[str, Node | None]) -> None:
        slots: list[Slot] = []
        for path, node in names:
            above, _, name = path.rpartition("/")
            directory = self._at(above)
            assert directory is not None, f"nothing is known of {above}"
            before = self._child(directory, name)
            if before is not None:
                self._last[path.removeprefix(self.root).strip("/")] = before
            directory.now[name] = node
            slots.append((directory, name, node))
        self._pending.append(Change(call.ended, slots))

    def _child(self, directory: Node, name: str, loss: Loss = Loss.NOTHING) -> Node | None:
        names = directory.now if loss is Loss.NOTHING else directory.kept
        if name not in names and directory.origin is not None and name not in directory.now:
            origin = directory.origin / name
            if os.path.lexists(origin):
                directory.now[name] = directory.kept[name] = Node(origin.is_dir() and not origin.is_symlink(), origin)
        elif name not in names and directory.origin is not None and os.path.lexists(directory.origin / name):
            raise AssertionError(f"{name} was changed before it was looked at")
        return names.get(name)
