"""Receipts as files: ``<id>.receipt.json`` beside its artifact, and before that one that waits for it in ``uploads/``.

The file also says whose the artifact is (``owner``: see ``accounts``), which is no part of what anybody is told.

What always holds: a receipt is read only as what was written (its seal fits, it is of this id); where it waits it is
known by the inode that its artifact has under any name; whose an artifact is stays as it was said first.

Blocks on the disk. Imported by ``store``, ``recount`` and ``rotted``.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from pathlib import Path
from typing import TypeVar

import msgspec

from fastship import durable, sealed
from fastship.episode import ARTIFACT_SUFFIX, Receipt

_log = logging.getLogger("fastship.receiver")
_SHA256 = re.compile(r"[0-9a-f]{64}")

T = TypeVar("T", bound=Receipt)


class _Kept(Receipt, frozen=True, kw_only=True):
    """All that is in the file."""

    owner: str = ""


class Receipts:
    """Those of the artifacts in ``episodes``; they wait in ``uploads``."""

    def __init__(self, episodes: Path, uploads: Path) -> None:
        self._episodes = episodes
        self._uploads = uploads

    def artifact_path(self, episode: str) -> Path:
        return self._episodes / f"{episode}{ARTIFACT_SUFFIX}"

    def path(self, episode: str) -> Path:
        return self._episodes / f"{episode}.receipt.json"

    def waiting(self, episode: str, inode: int) -> Path:
        return self._uploads / f"{episode}.{inode}.receipt"

    def write(self, receipt: Receipt) -> None:
        """Durably, in its place."""
        path = self.path(receipt.episode)
        before = _read(path, receipt.episode, _Kept)
        durable.write_file(path, encode(receipt, before.owner if before is not None else ""))

    def place(self, episode: str, fd: int) -> None:
        """The one that waits for the artifact that is open as ``fd``, if there is one, is renamed into its place."""
        with contextlib.suppress(FileNotFoundError):
            os.rename(self.waiting(episode, os.fstat(fd).st_ino), self.path(episode))

    def read(self, episode: str) -> Receipt | None:
        """None where there is none, or one that cannot be of the artifact beside it."""
        receipt = self.written(episode)
        try:
            size = os.stat(self.artifact_path(episode)).st_size
        except FileNotFoundError:
            return None
        if receipt is None or receipt.artifact.bytes == size:
            return receipt
        _log.warning("the receipt of %s is not one of the artifact beside it", episode)
        return None

    def written(self, episode: str) -> Receipt | None:
        """None where there is none, or a spoilt one: a flipped bit of it would be told to every client that asks."""
        return _read(self.path(episode), episode, Receipt)

    def owned(self, episode: str) -> tuple[str, int]:
        """Whose the artifact of this id is, and its bytes; ``("", 0)`` where no receipt says so, or it is gone."""
        for _ in range(2):  # in its place, where it waits, and once more in its place: it may be renamed just now
            kept = _read(self.path(episode), episode, _Kept)
            if kept is None:
                try:
                    inode = os.stat(self.artifact_path(episode)).st_ino
                except FileNotFoundError:
                    break
                kept = _read(self.waiting(episode, inode), episode, _Kept)
            if kept is not None:
                return kept.owner, kept.artifact.bytes
        return "", 0

    def drop_without_artifact(self, episode: str) -> None:
        """Remove the receipt where its artifact is gone: it says nothing any more. Durable. Raises ``OSError``."""
        if self.path(episode).exists() and not self.artifact_path(episode).exists():
            durable.unlink_if_present(self.path(episode))
            durable.sync_directory(self._episodes)


def _read(path: Path, episode: str, kind: type[T]) -> T | None:
    try:
        compact = msgspec.json.format(path.read_bytes(), indent=-1)
        receipt = msgspec.json.decode(sealed.unseal(compact), type=kind)
    except FileNotFoundError:
        return None
    except ValueError as error:
        _log.warning("the receipt of %s cannot be read: %s", episode, error)
        return None
    if receipt.episode == episode and _SHA256.fullmatch(receipt.artifact.sha256):
        return receipt
    _log.warning("the receipt of %s is not one of the artifact beside it", episode)
    return None


def encode(receipt: Receipt, owner: str = "") -> bytes:
    kept = _Kept(**msgspec.structs.asdict(receipt), owner=owner) if owner else receipt
    record = msgspec.json.encode(kept)
    return msgspec.json.format(sealed.seal(record), indent=2) + b"\n"
