"""Noticing new markers at once, by inotify.

A hint, never the truth: whatever is missed here (a limit on watches, a queue that overflowed, a network file
system that tells nothing) the regular look through the spool finds. Watches ``episodes/`` for new directories
and every unfinished episode for its marker.

Imports ``episode`` and ``requests``; the supervisor imports it.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterable
from pathlib import Path

from inotify_simple import INotify, flags

from fastship.episode import MARKER
from fastship.spool.requests import is_request

_NEW_NAME = flags.CREATE | flags.MOVED_TO | flags.ONLYDIR
_LIMIT_ERRORS = {errno.ENOSPC, errno.ENOMEM, errno.EMFILE}


class MarkerWatch:
    """One inotify instance. `fileno` is readable when there is something to `read`."""

    def __init__(self, episodes: Path, requests: Path) -> None:
        """Raises ``OSError`` where the kernel gives no instance (``fs.inotify.max_user_instances``)."""
        self._episodes = episodes
        self._inotify = INotify(nonblocking=True)
        self._root = self._inotify.add_watch(os.fspath(episodes), _NEW_NAME)
        self._requests = self._inotify.add_watch(os.fspath(requests), _NEW_NAME)
        self._watched: dict[str, int] = {}
        self._names: dict[int, str] = {}
        self.full = False  # a limit was reached: some episodes are seen by the regular look only

    def fileno(self) -> int:
        return int(self._inotify.fileno())

    def follow(self, unfinished: Iterable[str]) -> list[str]:
        """Watch exactly these episodes from now on. Those that got their marker meanwhile are returned."""
        wanted = set(unfinished)
        for episode in self._watched.keys() - wanted:
            self._forget(episode)
        return [episode for episode in wanted - self._watched.keys() if self._add(episode)]

    def _add(self, episode: str) -> bool:
        """Watch one more; True when its marker is there already."""
        path = self._episodes / episode
        try:
            number = self._inotify.add_watch(os.fspath(path), _NEW_NAME | flags.DONT_FOLLOW)
        except OSError as error:
            if error.errno in _LIMIT_ERRORS:
                self.full = True
            return False
        older = self._names.get(number)
        if older is not None:  # renamed since: the kernel gives the same watch for the same directory
            self._watched.pop(older, None)
        self._watched[episode] = number
        self._names[number] = episode
        return os.access(path / MARKER, os.F_OK)  # only now: one set before the watch stood told nothing

    def _forget(self, episode: str) -> None:
        number = self._watched.pop(episode)
        self._names.pop(number, None)
        with contextlib.suppress(OSError):  # its directory is gone or moved, and the watch with it
            self._inotify.rm_watch(number)

    def read(self) -> tuple[list[str], bool, bool]:
        """(episodes that have a marker now, whether requests came, whether a full look is needed). Does not block."""
        marked: list[str] = []
        requests = look = False
        for event in self._inotify.read(timeout=0):
            if event.mask & flags.Q_OVERFLOW:
                look = True
            elif event.wd == self._requests:
                requests = requests or is_request(event.name)  # not our own answers
            elif event.wd == self._root:
                if event.mask & flags.ISDIR and self._add(event.name):
                    marked.append(event.name)
            elif event.mask & flags.IGNORED:
                self._watched.pop(self._names.pop(event.wd, ""), None)
            elif event.name == MARKER and event.wd in self._names:
                marked.append(self._names[event.wd])
        return marked, requests, look

    def close(self) -> None:
        self._inotify.close()
