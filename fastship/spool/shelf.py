"""``shipped/``: the copies here of what is at the receiver, and how one of them is removed or shipped again.

What always holds: what stands in ``shipped/`` under an id is whole; nothing is listed that has no receipt; whoever
calls `remove` has the receiver's word of just now that it holds the content, and the copy is still what was shipped.

Imports ``layout``, ``journal``, ``removal``, ``durable``, ``episode`` and ``errors``; ``store`` imports it.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from fastship import durable
from fastship.episode import is_episode_id, read_wall
from fastship.errors import UsageError
from fastship.spool.journal import Journal
from fastship.spool.layout import Layout, episode_of, require_id
from fastship.spool.removal import remove_tree

_GOING_PREFIX = ".retired-"  # no id begins so
_NEVER = float("inf")
_GAPS = 8  # an operator may have removed some of them


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
            episode = episode_of(name)
            line = journal.find(episode)
            if line is None:
                continue
            receipt = line.receipt
            size = receipt.content.bytes if receipt.content is not None else receipt.artifact.bytes
            found.append(Copy(name, episode, size, _seconds(line.retired_at), line.fingerprint))
        return sorted(found, key=lambda one: (one.retired_at, one.name))

    def names_of(self, episode: str) -> list[str]:
        """The names in ``shipped/`` that are copies of an episode, the newest first."""
        if not is_episode_id(episode):
            return []
        found, number = [], 0
        while number <= _GAPS or os.path.lexists(self._paths.shipped / f"{episode}~{number - 1}"):
            path = self._paths.shipped / (f"{episode}~{number}" if number else episode)
            if path.is_dir() and not path.is_symlink():
                found.append(path.name)
            number += 1
        return found[::-1]

    def reship(self, name: str) -> str:
        """Put a retired episode back into ``episodes/``, to be shipped again; returns its id. Raises `UsageError`.

        One durable rename, of an episode that still has its marker: it is in the one place or in the other. Its
        receipt stays in the journal, and is followed by another.
        """
        episode = episode_of(name)
        require_id(episode)
        path = self._paths.shipped / name
        if name != Path(name).name or not path.is_dir() or path.is_symlink():
            raise UsageError(f"{name} is not in shipped/", remedy="see what is there: ls shipped")
        if os.path.lexists(self._paths.episodes / episode):
            raise UsageError(f"episodes/{episode} is there already", remedy="it is shipped when its turn comes")
        durable.move(path, self._paths.episodes / episode)
        return episode

    def remove(self, name: str) -> bool:
        """Remove a copy for good; whether all of it went.

        The rename takes it out of ``shipped/`` in one step, and is made durable before the first file goes: else a
        power loss could bring half a copy back under its id, and the next look would take it for one. Interrupted after
        it, a tree is left that no id can be named like, which `finish_removals` takes away. Its receipt stays.
        """
        going = durable.free_path(self._paths.shipped, f"{_GOING_PREFIX}{name}")  # one that would not go may be there
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
        return read_wall(wall)
    except ValueError:
        return _NEVER
