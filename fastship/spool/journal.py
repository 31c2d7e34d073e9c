"""The receipts of a spool, read: ``receipts/DATE.jsonl``, one line an episode retired (`Spool.retire` writes them).

What always holds: looking changes nothing; memory is some hundred bytes an episode, whatever its receipt says; a line
that is torn or spoilt is never taken for another, and is named.

Imports ``episode`` and ``sealed``; ``custody`` imports it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import msgspec

from fastship import sealed
from fastship.episode import Receipt


class Line(msgspec.Struct, frozen=True):
    """What stands on one line."""

    receipt: Receipt
    retired_at: str = ""  # UTC
    fingerprint: str = ""  # of the episode when it was packed


class _Id(msgspec.Struct, frozen=True):
    episode: str


class _Beginning(msgspec.Struct, frozen=True):
    receipt: _Id


class _Place(NamedTuple):
    path: Path
    offset: int


class Journal:
    """The journals as they are now, those in ``directory``. Blocks on the disk; raises ``OSError``."""

    def __init__(self, directory: Path) -> None:
        self._places: dict[str, _Place] = {}
        self.spoilt: list[str] = []
        """The lines that cannot be read, ``2026-11-24.jsonl, line 3``; nothing is known of what stood there."""
        for name in sorted(os.listdir(directory)):  # no glob, which finds nothing where it may not look
            if name.endswith(".jsonl"):
                self._look_through(directory / name)

    def _look_through(self, path: Path) -> None:
        offset = 0
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    episode = msgspec.json.decode(sealed.unseal(line), type=_Beginning).receipt.episode
                    self._places[episode] = _Place(path, offset)  # a later one counts
                except ValueError:
                    if line.strip():
                        self.spoilt.append(f"{path.name}, line {number}")
                offset += len(line)

    def episodes(self) -> Iterable[str]:
        """Every id that has a receipt, in order."""
        return sorted(self._places)

    def find(self, episode: str) -> Line | None:
        """The last receipt of an episode."""
        place = self._places.get(episode)
        if place is None:
            return None
        with place.path.open("rb") as file:
            file.seek(place.offset)
            return msgspec.json.decode(sealed.unseal(file.readline()), type=Line)
