"""Artifacts that rotted: ``<root>/rotted/<id>.tar.zst`` (or ``<id>~N``), each beside why, ``<id>.reason.json``.

What always holds: whatever is here says why; nothing of ours reads it again. What it was under its id in ``episodes/``
is gone, or goes when the store is mended next.

Blocks on the disk. Imported by ``store``.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable
from pathlib import Path

import msgspec

from fastship import durable
from fastship.episode import ARTIFACT_SUFFIX
from fastship.receiver.store.receipts import Receipts


class Rotted:
    """Those in ``directory``, which is made for the first. Safe to use from threads and from several processes."""

    def __init__(self, directory: Path, receipts: Receipts) -> None:
        self._directory = directory
        self._receipts = receipts

    def set_aside(self, episode: str, inode: int, reason: msgspec.Struct) -> Path:
        """Move the artifact that is this inode here, durably; its id is free then. Returns where it is.

        The reason, with all that was known of it, is durable before the artifact moves, so whatever is here says why;
        the rename is the one step that counts. Cut before it: the next who reads the artifact does it again, under the
        same name. Cut after it: the receipt that is left says nothing without an artifact, and whoever publishes that
        id removes it (`Store.name`), which may be at this very moment. Raises ``OSError``.
        """
        self._directory.mkdir(exist_ok=True)
        artifact = self._receipts.artifact_path(episode)
        target = durable.free_path(self._directory, episode, ARTIFACT_SUFFIX)
        name = target.name.removesuffix(ARTIFACT_SUFFIX)
        encoded = msgspec.json.format(msgspec.json.encode(reason), indent=2) + b"\n"
        durable.write_file(self._directory / f"{name}.reason.json", encoded)
        durable.sync_directory(self._directory.parent)
        if os.stat(artifact).st_ino != inode:
            raise FileNotFoundError(errno.ENOENT, "another artifact has its name by now", episode)
        os.rename(artifact, target)
        durable.sync_directory(self._directory)
        durable.sync_directory(artifact.parent)
        with contextlib.suppress(OSError):  # it is set aside; `mend` comes here again
            self._receipts.drop_without_artifact(episode)
        return target

    def mend(self, is_old: Callable[[float], bool]) -> None:
        """The receipts of what was set aside go, and what was not written to its end and ``is_old``.

        Another's receipt that lacks its artifact stays: it tells the operator what was lost.
        """
        with contextlib.suppress(OSError):
            for name in os.listdir(self._directory):
                if name.endswith(ARTIFACT_SUFFIX):
                    self._receipts.drop_without_artifact(durable.unnumbered(name.removesuffix(ARTIFACT_SUFFIX)))
        with contextlib.suppress(FileNotFoundError):  # nothing has rotted yet
            durable.remove_temporaries(self._directory, is_old=is_old)
