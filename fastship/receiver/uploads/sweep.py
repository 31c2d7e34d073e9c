"""What is too old among uploads and their tombstones, or was left there by a crash, and is removed.

What always holds: an upload goes only under its lock, and only if nothing was appended to it meanwhile; a file of a
request that may be under way stays for an hour. Ages are as `Ages` believes them: a clock that jumps forgets no upload.

Blocks on the disk. Imported by ``uploads``.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

from fastship import durable
from fastship.ages import STEP_S, Ages
from fastship.receiver.policy.decisions import Declared
from fastship.receiver.uploads.bodies import is_free
from fastship.receiver.uploads.lock import Busy, Gone, UploadLock

_log = logging.getLogger("fastship.receiver")
TOKEN = re.compile(r"[0-9a-f]{64}")  # of an upload, whose files are called so
_ORPHAN_AGE_S = 3600.0  # of files whose process may still be about to use them
MOST_TOMBSTONES = 100_000  # 400 MB; they spare a client a question, no more


class Sweep:
    """Of the uploads in ``directory``: ``read`` gives what one declared, ``remove`` takes it away under its lock."""

    def __init__(
        self,
        directory: Path,
        max_age_s: float,
        read: Callable[[str], Declared | None],
        remove: Callable[[str], None],
    ) -> None:
        self._directory = directory
        self._ended = directory / "ended"
        self._max_age_s = max_age_s
        self._ages = Ages(directory / "clock")
        self._read = read
        self._remove = remove

    def run(self, is_stored: Callable[[str], bool]) -> int:
        """Remove what is older than the limit or was left by a crash; the number of files. May be repeated.

        An upload of an episode that ``is_stored`` is of no use any more and only promises room: an hour is its limit.
        What is of the future, where the clock was set back, is taken to be made now: else it would stay for as long as
        the clock was ahead.
        """
        self._ages.look()
        removed = self._sweep_tombstones()
        for entry in [entry for each in (self._directory, self._directory / "bodies") for entry in os.scandir(each)]:
            with contextlib.suppress(FileNotFoundError, Busy):
                age_s = self._age_s(entry)
                token, _, kind = entry.name.rpartition(".")
                if entry.is_dir():
                    continue
                if kind == "receipt":
                    expired = age_s > self._max_age_s
                elif TOKEN.fullmatch(token):
                    known = self._read(token) if kind == "lock" else None
                    useless = known is not None and is_stored(known.episode)
                    limit_s = min(_ORPHAN_AGE_S, self._max_age_s) if useless else self._max_age_s
                    if kind == "lock" and self._is_expired(token, limit_s):
                        self._expire(token, limit_s)
                        removed += 1
                    lockless = kind != "lock" and not self._path(token, "lock").exists()
                    expired = lockless and age_s > _ORPHAN_AGE_S
                elif kind == "part":
                    expired = age_s > _ORPHAN_AGE_S and is_free(entry.path)
                else:
                    expired = entry.name.startswith(durable.TEMP_PREFIX) and age_s > _ORPHAN_AGE_S
                if expired:
                    removed += durable.unlink_if_present(entry.path)
        return removed

    def is_orphan(self, mtime: float) -> bool:
        """Whether a file that nobody has named is so old, as of the last sweep, that nobody will."""
        return self._ages.age_s(mtime) > _ORPHAN_AGE_S

    def _age_s(self, entry: os.DirEntry[str]) -> float:
        mtime = entry.stat().st_mtime
        if mtime > time.time() + STEP_S:
            os.utime(entry.path)
        return self._ages.age_s(mtime)

    def _sweep_tombstones(self) -> int:
        ages: list[tuple[float, str]] = []
        for entry in os.scandir(self._ended):
            with contextlib.suppress(FileNotFoundError):
                ages.append((self._age_s(entry), entry.path))
        ages.sort()
        old = [path for age_s, path in ages[:MOST_TOMBSTONES] if age_s > self._max_age_s]
        return sum(map(durable.unlink_if_present, [*old, *(path for _, path in ages[MOST_TOMBSTONES:])]))

    def _expire(self, token: str, limit_s: float) -> None:
        lock = UploadLock(self._path(token, "lock"))
        try:
            with contextlib.suppress(Gone), lock.locked():
                if self._is_expired(token, limit_s):  # still: somebody may have gone on with it meanwhile
                    _log.info("upload %s... was not finished in time and is forgotten", token[:8])
                    self._remove(token)
        finally:
            lock.close()

    def _is_expired(self, token: str, limit_s: float) -> bool:
        times = []
        for kind in ("json", "part"):
            with contextlib.suppress(FileNotFoundError):
                times.append(os.stat(self._path(token, kind)).st_mtime)
        if not times:  # a crash between making the lock and the rest
            return self.is_orphan(os.stat(self._path(token, "lock")).st_mtime)
        return self._ages.age_s(max(times)) > limit_s

    def _path(self, token: str, kind: str) -> Path:
        return self._directory / f"{token}.{kind}"
