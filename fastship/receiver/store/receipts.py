"""Receipts as files: ``<id>.receipt.json`` beside its artifact, and before that one that waits for it in ``uploads/``.

What always holds: a receipt is read only as what was written (its seal fits, it is of this id); where it waits it is
known by the inode that its artifact has under any name.

Blocks on the disk. Imported by ``store``.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from pathlib import Path

import msgspec

from fastship import durable, sealed
from fastship.episode import ARTIFACT_SUFFIX, Receipt

_log = logging.getLogger("fastship.receiver")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class Receipts:
    """Those of the artifacts in ``episodes``; they wait in ``uploads``."""

    def __init__(self, episodes: Path, uploads: Path) -> None:
        self._episodes = episodes
        self._uploads = uploads

    def path(self, episode: str) -> Path:
        return self._episodes / f"{episode}.receipt.json"

    def waiting(self, episode: str, inode: int) -> Path:
        return self._uploads / f"{episode}.{inode}.receipt"

    def write(self, receipt: Receipt) -> None:
        """Durably, in its place."""
        durable.write_file(self.path(receipt.episode), encode(receipt))

    def place(self, episode: str, fd: int) -> None:
        """The one that waits for the artifact that is open as ``fd``, if there is one, is renamed into its place."""
        with contextlib.suppress(FileNotFoundError):
            os.rename(self.waiting(episode, os.fstat(fd).st_ino), self.path(episode))

    def read(self, episode: str) -> Receipt | None:
        """None where there is none, or one that cannot be of the artifact beside it."""
        receipt = self.written(episode)
        try:
            size = os.stat(self._episodes / f"{episode}{ARTIFACT_SUFFIX}").st_size
        except FileNotFoundError:
            return None
        if receipt is None or receipt.artifact.bytes == size:
            return receipt
        _log.warning("the receipt of %s is not one of the artifact beside it", episode)
        return None

    def written(self, episode: str) -> Receipt | None:
        """None where there is none, or a spoilt one: a flipped bit of it would be told to every client that asks."""
        try:
            compact = msgspec.json.format(self.path(episode).read_bytes(), indent=-1)
            receipt = msgspec.json.decode(sealed.unseal(compact), type=Receipt)
        except FileNotFoundError:
            return None
        except ValueError as error:
            _log.warning("the receipt of %s cannot be read: %s", episode, error)
            return None
        if receipt.episode == episode and _SHA256.fullmatch(receipt.artifact.sha256):
            return receipt
        _log.warning("the receipt of %s is not one of the artifact beside it", episode)
        return None


def encode(receipt: Receipt) -> bytes:
    return msgspec.json.format(sealed.seal(msgspec.json.encode(receipt)), indent=2) + b"\n"
