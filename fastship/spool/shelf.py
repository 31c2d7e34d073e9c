"""``shipped/``: the copies here of what is at the receiver, and how one of them is removed.

What always holds: what stands in ``shipped/`` under an id is whole; nothing is listed that has no receipt; whoever
calls `remove` has the receiver's word of just now that it holds the content, and the copy is still what was shipped.

Imports ``layout``, ``journal``, ``removal`` and ``durable``; the supervisor imports it.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime

import msgspec

from fastship import durable
from fastship.spool.journal import Journal
from fastship.spool.layout import Layout
from fastship.spool.removal import remove_tree

_GOING_PREFIX = ".retired-"  # no id begins so
_NEVER = float("inf")


class Copy(msgspec.Struct, frozen=True):
    """One directory of ``shipped/`` that has a receipt."""

    name: str  # the id, or id~N where there were more of that id
    episode: str
    bytes: int  # of its tar stream, where the receiver said that; else of its artifact
    retired_at: float  # seconds since the epoch; infinite where that cannot be read
    fingerprint: str  # of what was shipped


class Shelf:
    """Of one spool. Blocks on the disk; raises ``OSError``. Only the holder of the spool lock calls what changes it."""

    def __init__(self, paths: Layout) -> None:
        self._paths = paths

    def copies(self) -> list[Copy]:
        """Those with a receipt, the oldest first. Reads every journal."""
        names = [
            entry.name
            for entry in os.scandir(self._paths.shipped)
            if not entry.name.startswith(".") and entry.is_dir(follow_symlinks=False)
        ]
        if not names:
            return []
        journal = Journal(self._paths.receipts)
        found = []
        for name in names:
            episode = name.partition("~")[0]
            line = journal.find(episode)
            if line is None:
                continue
            receipt = line.receipt
            size = receipt.content.bytes if receipt.content is not None else receipt.artifact.bytes
            found.append(Copy(name, episode, size, _seconds(line.retired_at), line.fingerprint))
        return sorted(found, key=lambda one: (one.retired_at, one.name))

    def remove(self, name: str) -> bool:
        """Remove a copy for good; whether all of it went.

        The rename takes it out of ``shipped/`` in one step, and is made durable before the first file goes: else a
        power loss could bring half a copy back under its id, and the next look would take it for one. Interrupted after
        it, a tree is left that no id can be named like, which `finish_removals` takes away. Its receipt stays.
        """
        going = self._paths.shipped / f"{_GOING_PREFIX}{name}"
        number = 0
        while os.path.lexists(going):  # one that would not go may be there
            number += 1
            going = self._paths.shipped / f"{_GOING_PREFIX}{name}~{number}"
        durable.rename_directory(self._paths.shipped / name, going)
        durable.sync_directory(self._paths.shipped)
        return remove_tree(going)

    def finish_removals(self) -> None:
        """Complete the removals that a crash interrupted. May be repeated."""
        for name in os.listdir(self._paths.shipped):
            if name.startswith(_GOING_PREFIX):
                remove_tree(self._paths.shipped / name)


def _seconds(wall: str) -> float:
    try:
        return datetime.strptime(wall, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC).timestamp()
    except ValueError:
        return _NEVER
